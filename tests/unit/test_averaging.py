"""Averaged weights against a plain formula."""

import math

import torch
from torch import nn

from horovod_megdet.solver.averaging import averaged_model

MEMORY, MINI_BATCH = 100.0, 8


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def change(module: nn.Sequential, step: int) -> None:
    """Stands for a training step: new weights, and new statistics of the batch norm."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    module(torch.randn(2, 3, 5, 5, generator=generator))


def test_weights_and_statistics_are_averaged() -> None:
    module = model()
    averaged = averaged_model(module, MEMORY, MINI_BATCH)
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 41):
        change(module, step)
        averaged.update_parameters(module)
        keep = 0.0 if step == 1 else min(math.exp(-MINI_BATCH / MEMORY), step / (9 + step))
        for name, value in module.state_dict().items():
            new = value.double() if value.is_floating_point() else value.clone()
            if name in expected and value.is_floating_point():
                new = keep * expected[name] + (1 - keep) * new
            expected[name] = new
    found = averaged.module.state_dict()
    assert found.keys() == expected.keys()
    assert found["1.num_batches_tracked"] == 40
    for name, value in expected.items():
        torch.testing.assert_close(found[name].to(value), value, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found["1.running_mean"], module[1].running_mean)


def test_weights_that_do_not_train_keep_their_bits() -> None:
    module = model()
    module[0].requires_grad_(False)
    averaged = averaged_model(module, MEMORY, MINI_BATCH)
    for _ in range(20):
        averaged.update_parameters(module)
    assert torch.equal(averaged.module[0].weight, module[0].weight)


def test_going_on_from_saved_averages_gives_the_same_bits() -> None:
    module = model()
    averaged = averaged_model(module, MEMORY, MINI_BATCH)
    for step in range(1, 6):
        change(module, step)
        averaged.update_parameters(module)
    resumed = averaged_model(model(), MEMORY, MINI_BATCH)
    resumed.module.load_state_dict(averaged.module.state_dict())
    resumed.n_averaged.fill_(5)
    for step in range(6, 9):
        change(module, step)
        averaged.update_parameters(module)
        resumed.update_parameters(module)
    ours, theirs = resumed.module.state_dict(), averaged.module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_very_short_memory_is_the_weights_themselves() -> None:
    module = model()
    averaged = averaged_model(module, 1e-300, MINI_BATCH)
    for step in range(1, 4):
        change(module, step)
        averaged.update_parameters(module)
    assert torch.equal(averaged.module[0].weight, module[0].weight)
