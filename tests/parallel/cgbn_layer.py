"""Compares CrossGPUBatchNorm on all ranks with a float64 BatchNorm of one process that has the whole batch."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import cgbn_common as common
import torch
from torch import Tensor, nn

from horovod_megdet import comm
from horovod_megdet.layers.cross_gpu_bn import CrossGPUBatchNorm, average_running_statistics, convert_batch_norm
from horovod_megdet.layers.recomputation import recomputed

CHANNELS = 6


@dataclass
class Case:
    """One kind of input and layer. Shapes leave out the channels; the last dimension grows with the rank."""

    shape: tuple[int, ...] = (2, 5, 7)
    mean: float = 0.5
    std: float = 1.0
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    empty_rank: bool = False
    steps: int = 1
    shortcut: bool = False
    relu: bool = False
    layer: dict[str, Any] = field(default_factory=dict)


CASES = {
    "2d": Case(),
    "channels last": Case(layout=torch.channels_last),
    "1d without length": Case(shape=(7,)),
    "1d": Case(shape=(2, 9)),
    "3d": Case(shape=(2, 3, 4, 5)),
    "3d channels last": Case(shape=(2, 3, 4, 5), layout=torch.channels_last_3d),
    "empty rank": Case(empty_rank=True),
    "mean over std 1e4": Case(mean=1e4),
    "mean over std 1e4, channels last": Case(mean=1e4, layout=torch.channels_last),
    "mean and std 1e4": Case(mean=-1e4, std=1e4),
    "small": Case(mean=1e-3, std=1e-3),
    "constant": Case(mean=3.0, std=0.0),
    "constant zero": Case(mean=0.0, std=0.0),
    "no affine": Case(layer={"affine": False}),
    "no running statistics": Case(layer={"track_running_stats": False}),
    "cumulative average": Case(steps=3, layer={"momentum": None}),
    "float64": Case(dtype=torch.float64),
    "half float16": Case(dtype=torch.float16),
    "half bfloat16": Case(dtype=torch.bfloat16),
    "half large mean": Case(mean=100.0, dtype=torch.bfloat16),
    "half channels last": Case(dtype=torch.bfloat16, layout=torch.channels_last),
    "relu": Case(relu=True),
    "shortcut": Case(shortcut=True),
    "shortcut and relu": Case(shortcut=True, relu=True),
    "relu, channels last": Case(relu=True, layout=torch.channels_last),
    "shortcut and relu, channels last": Case(shortcut=True, relu=True, layout=torch.channels_last),
    "shortcut and relu, many values": Case(shape=(2, 31, 37), shortcut=True, relu=True),
    "shortcut and relu, empty rank": Case(shortcut=True, relu=True, empty_rank=True),
    "relu, empty rank": Case(relu=True, empty_rank=True),
    "shortcut and relu, 1d": Case(shape=(2, 9), shortcut=True, relu=True),
    "shortcut and relu, no affine": Case(shortcut=True, relu=True, layer={"affine": False}),
    "shortcut and relu, float64": Case(shortcut=True, relu=True, dtype=torch.float64),
    "half relu": Case(relu=True, dtype=torch.bfloat16),
    "half shortcut and relu": Case(shortcut=True, relu=True, dtype=torch.bfloat16),
    "half float16, shortcut and relu, channels last": Case(
        shortcut=True, relu=True, dtype=torch.float16, layout=torch.channels_last
    ),
}


def compare(case: Case, algorithm: str, group: comm.Group, device: torch.device | str = "cpu") -> dict[str, float]:
    """This rank's relative errors, with the layer on ``device`` and the reference on the CPU."""
    generator = torch.Generator().manual_seed(7)
    reference = nn.BatchNorm1d(CHANNELS, **case.layer).double()
    if reference.affine:
        nn.init.uniform_(reference.weight, 0.5, 1.5, generator=generator)
        nn.init.normal_(reference.bias, generator=generator)
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    layer = convert_batch_norm(
        copy.deepcopy(reference).to(device, dtype), group=group, algorithm=algorithm, path="test"
    )
    for _ in range(case.steps):
        inputs = _data(case, generator)
        gradients, shortcuts = (_data(replace(case, mean=0.0, std=1.0), generator) for _ in range(2))
        errors = _compare_step(case, layer, reference, inputs, gradients, shortcuts, device)
    for name, buffer in reference.named_buffers():
        errors[name] = common.relative_error(layer.get_buffer(name), buffer)
    return errors


def _compare_step(
    case: Case,
    layer: CrossGPUBatchNorm,
    reference: nn.Module,
    inputs: list[Tensor],
    gradients: list[Tensor],
    shortcuts: list[Tensor],
    device: torch.device | str,
) -> dict[str, float]:
    """Forward and backward pass of this rank, and of one process with all inputs; each list has one tensor per rank."""
    group, rank = layer.group, comm.rank()
    layout = case.layout if inputs[rank].numel() else torch.contiguous_format
    x, shortcut = (each[rank].clone(memory_format=layout).to(device).requires_grad_() for each in (inputs, shortcuts))
    y = layer(x, shortcut if case.shortcut else None, case.relu)
    y.backward(gradients[rank].to(y))
    whole, whole_shortcut, whole_dy = (
        torch.cat([_rows(each[other]) for other in group.ranks]).double().requires_grad_()
        for each in (inputs, shortcuts, gradients)
    )
    whole_y = reference(whole)
    whole_y = whole_y + whole_shortcut if case.shortcut else whole_y
    whole_y = whole_y.relu() if case.relu else whole_y
    reference.zero_grad()
    whole_y.backward(whole_dy)

    first = sum(len(_rows(inputs[other])) for other in group.ranks if other < rank)
    mine = slice(first, first + len(_rows(x)))
    assert y.dtype == x.dtype
    pairs = {"y": (y, whole_y), "dx": (x.grad, whole.grad)}
    if case.shortcut:
        pairs["dshortcut"] = (shortcut.grad, whole_shortcut.grad)
    errors = {name: common.relative_error(_rows(ours), theirs[mine]) for name, (ours, theirs) in pairs.items()}
    for name, parameter in layer.named_parameters():
        errors[f"d{name}"] = common.relative_error(
            common.summed(parameter.grad, group), reference.get_parameter(name).grad
        )
        parameter.grad = None
    return errors


def _data(case: Case, generator: torch.Generator) -> list[Tensor]:
    """The inputs of all ranks, of different sizes."""
    images, *extents = case.shape
    data = []
    for rank in range(comm.size()):
        sizes = [*extents[:-1], extents[-1] + rank] if extents else []
        count = 0 if case.empty_rank and rank == comm.size() - 1 else images + (0 if extents else rank)
        x = torch.randn(count, CHANNELS, *sizes, generator=generator, dtype=torch.float64) * case.std + case.mean
        data.append(x.to(case.dtype))
    return data


def _rows(x: Tensor) -> Tensor:
    """(N, C, *) as (values per channel, C)."""
    return x.movedim(1, -1).reshape(-1, CHANNELS)


def exactness(group: comm.Group) -> dict[str, dict[str, float]]:
    """The largest errors over all ranks, by algorithm and case."""
    return {
        f"{algorithm}: {name}": common.worst(compare(case, algorithm, group))
        for algorithm in ("one_pass", "two_pass")
        for name, case in CASES.items()
    }


def message_counts() -> dict[str, list[int]]:
    """Messages of one layer: forward, backward, backward with recomputation, evaluation."""
    counts = {}
    for algorithm in ("one_pass", "two_pass"):
        layer = CrossGPUBatchNorm(CHANNELS, algorithm=algorithm)
        x = torch.randn(2, CHANNELS, 4, 4, requires_grad=True)
        with common.messages() as forward:
            loss = layer(x).square().sum()
        with common.messages() as backward:
            loss.backward()
        loss = recomputed(layer, x).square().sum()
        with common.messages() as recomputation:
            loss.backward()
        with common.messages() as evaluation:
            layer.eval()(x).sum().backward()
        counts[algorithm] = [len(names) for names in (forward, backward, recomputation, evaluation)]
    return counts


def reuse() -> dict[str, float]:
    """A layer used twice in one forward pass, with inputs of two sizes."""
    torch.manual_seed(comm.rank())
    reference = nn.BatchNorm2d(CHANNELS).double()
    layer = convert_batch_norm(copy.deepcopy(reference), path="twice")
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64)
    ours = x.clone().requires_grad_()
    layer(layer(ours)[:, :, ::2].relu()).square().sum().backward()
    whole = torch.cat(comm.gather_objects(x, "test.reuse")).requires_grad_()
    reference(reference(whole)[:, :, ::2].relu()).square().sum().backward()
    assert whole.grad is not None
    errors = {"dx": common.relative_error(ours.grad, whole.grad[2 * comm.rank() : 2 * comm.rank() + 2])}
    errors |= {
        name: common.relative_error(layer.get_buffer(name), buffer) for name, buffer in reference.named_buffers()
    }
    return common.worst(errors)


def averaged_statistics() -> dict[str, float]:
    """Running statistics of local layers after averaging, against those of all values (one step with momentum 1)."""
    x = torch.randn(50, CHANNELS, 8, generator=torch.Generator().manual_seed(comm.rank())) + comm.rank()
    layer = nn.BatchNorm1d(CHANNELS, momentum=1.0)
    layer(x)
    average_running_statistics(nn.Sequential(layer))
    parts = torch.stack(comm.gather_objects(x.double(), "test.parts")).movedim(2, -1).reshape(comm.size(), -1, CHANNELS)
    var = parts.var(1).mean(0) + parts.mean(1).var(0, correction=0)
    errors = {
        "mean": common.relative_error(layer.running_mean, parts.mean((0, 1))),
        "var": common.relative_error(layer.running_var, var),
    }
    same = comm.gather_objects(layer.running_var, "test.same")
    errors["between ranks"] = max(float((other - same[0]).abs().max()) for other in same)
    return common.worst(errors)


def training() -> dict[str, float]:
    """Weights and buffers after ten steps on all ranks, against one process with the whole batch."""
    torch.manual_seed(0)
    images = torch.randn(4 * comm.size(), 3, 10, 10) * torch.linspace(0.2, 3, 4 * comm.size()).view(-1, 1, 1, 1)
    labels = torch.randint(0, 5, (len(images),))
    start = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 5),
    )  # fmt: skip
    whole = _trained(copy.deepcopy(start), images, labels, distributed=False)
    mine = slice(4 * comm.rank(), 4 * comm.rank() + 4)
    synchronized = _trained(convert_batch_norm(copy.deepcopy(start)), images[mine], labels[mine], distributed=True)
    local = _trained(copy.deepcopy(start), images[mine], labels[mine], distributed=True)

    def distance(model: nn.Module) -> float:
        pairs = zip(model.state_dict().values(), whole.state_dict().values(), strict=True)
        return max(common.relative_error(ours, theirs) for ours, theirs in pairs)

    return common.worst({"synchronized": distance(synchronized), "local": distance(local)})


def _trained(model: nn.Module, images: Tensor, labels: Tensor, distributed: bool) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if distributed:
        optimizer = comm.distributed_optimizer(optimizer, model, passes_per_step=1, fp16=False)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def measure() -> dict[str, Any]:
    """Everything, in a few seconds; with four ranks also groups of two."""
    groups = {"world": comm.world()}
    if comm.size() == 4:
        groups["pairs"] = comm.split_world(2)
    return {
        "ranks": comm.size(),
        "exactness": {name: exactness(group) for name, group in groups.items()},
        "messages": message_counts(),
        "reuse": reuse(),
        "averaged statistics": averaged_statistics(),
        "training": training(),
    }


if __name__ == "__main__":
    common.main(measure)
