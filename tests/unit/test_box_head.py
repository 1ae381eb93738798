"""The box head in 16 bits: what it computes does not depend on the rows that are added, and products have few sizes."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from horovod_megdet.models.box_head import ROI_SIZE, ROWS, MLPHead, Predictor

CHANNELS = 4


@contextlib.contextmanager
def rows_of_products(*heads: nn.Module) -> Iterator[set[int]]:
    """The numbers of rows that linear layers have to multiply."""
    rows: set[int] = set()
    layers = [layer for head in heads for layer in head.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(lambda _, inputs, __: rows.add(len(inputs[0]))) for layer in layers]
    yield rows
    for hook in hooks:
        hook.remove()


def forward_and_backward(head: nn.Module, predictor: nn.Module, pooled: Tensor) -> list[Tensor]:
    """Logits and offsets, and the gradients of the input and all weights."""
    pooled = pooled.clone().requires_grad_()
    outputs = predictor(head(pooled))
    sum((output.float() ** 2).sum() for output in outputs).backward()
    parameters = [*head.parameters(), *predictor.parameters()]
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return [*outputs, pooled.grad, *gradients]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_added_rows_change_nothing_and_leave_few_sizes(precision: str) -> None:
    torch.manual_seed(0)
    head, predictor = MLPHead(CHANNELS * ROI_SIZE**2, 32), Predictor(32, 3)
    plain = TwoMLPHead(CHANNELS * ROI_SIZE**2, 32), FastRCNNPredictor(32, 3)
    plain[0].load_state_dict(head.state_dict())
    plain[1].load_state_dict(predictor.state_dict())
    numbers = [0, 1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS - 5]
    half = precision == "bfloat16"
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if half else {"rtol": 0.0, "atol": 0.0}
    with torch.autocast("cpu", torch.bfloat16, enabled=half), rows_of_products(head, predictor) as rows:
        for number in numbers:
            pooled = torch.randn(number, CHANNELS, ROI_SIZE, ROI_SIZE)
            ours, theirs = forward_and_backward(head, predictor, pooled), forward_and_backward(*plain, pooled)
            for mine, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine.float(), other.float(), **tolerance)
    assert rows == ({0, ROWS, 2 * ROWS, 3 * ROWS} if half else set(numbers))
