"""What ranks run for ``cross_gpu_bn.py``: ``mpirun -np 2 python benchmarks/measure_cgbn.py PART RESULT.json``."""

import copy
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from alternatives import FiveMessageBatchNorm, convert
from timing import Timing, take_turns
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torchvision.models import resnet50
from torchvision_trainer import NaiveBatchNorm

from horovod_megdet import CrossGPUBatchNorm, comm, convert_batch_norm, revert_batch_norm
from horovod_megdet.comm.bare_mpi import BareMPI
from horovod_megdet.config import BatchNormConfig, ModelConfig, Norm
from horovod_megdet.engine import hardware
from horovod_megdet.models.backbone import RecomputedStage
from horovod_megdet.models.detector import Detector, build_detector
from horovod_megdet.models.resnet import build_resnet

IMAGES_PER_RANK = 2
CLASSES = 100
CHANNELS = (64, 512, 2048)
TIMED_STEPS = 10
KERNEL_SHAPES = ((2, 64, 400, 544), (2, 256, 200, 272), (2, 512, 100, 136))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
FOLLOWS = ("nothing", "ReLU", "shortcut and ReLU")
KERNEL_TURNS = 10


def classifier_step(model: nn.Module, side: int, ddp: bool = False, keep_gradients: bool = False) -> Callable[[], None]:
    """An SGD step on fixed random images: forward, backward with averaged gradients, update."""
    generator = torch.Generator().manual_seed(comm.rank())
    images = torch.randn(IMAGES_PER_RANK, 3, side, side, generator=generator)
    labels = torch.randint(0, CLASSES, (IMAGES_PER_RANK,), generator=generator)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    if ddp:
        model = DistributedDataParallel(model)
    else:
        optimizer = comm.distributed_optimizer(optimizer, model, passes_per_step=1, fp16=False)

    def step() -> None:
        model.zero_grad(set_to_none=not keep_gradients)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def resnet_steps() -> dict[str, Any]:
    """Our ResNet-50 with Cross-GPU BN, and torchvision's with the alternatives, at two image sizes."""
    folder = comm.broadcast_object(tempfile.mkdtemp() if comm.is_main() else "", "benchmark.store")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=comm.rank(), world_size=comm.size())
    torch.manual_seed(0)
    plain = resnet50(num_classes=CLASSES).train()
    models = {
        "plain": (copy.deepcopy(plain), False),
        "cgbn": (convert_batch_norm(build_resnet("resnet50", nn.BatchNorm2d, CLASSES)), False),
        "five_messages": (convert(copy.deepcopy(plain), FiveMessageBatchNorm), False),
        "naive_ddp": (convert(copy.deepcopy(plain), NaiveBatchNorm), True),
        "plain_ddp": (copy.deepcopy(plain), True),
    }
    result = {}
    for side, turns in ((256, 8), (128, 12)):
        steps = {name: classifier_step(copy.deepcopy(model), side, ddp) for name, (model, ddp) in models.items()}
        result[str(side)] = _seconds(take_turns(steps, turns))
    dist.destroy_process_group()
    if comm.is_main():
        shutil.rmtree(folder)
    return result


def detector_steps() -> dict[str, Any]:
    """The whole detector, R50-FPN at 320 px: Cross-GPU BN, the same layers by themselves, and PyTorch's layers."""
    detectors: dict[str, Any] = {
        "plain": revert_batch_norm(build("local")),
        "local": build("local"),
        "cgbn": build("cgbn"),
    }
    return {"320": _seconds(take_turns({name: detector_step(model) for name, model in detectors.items()}, 8))}


def build(norm: Norm) -> Detector:
    """R50-FPN with random weights and this normalization everywhere."""
    torch.manual_seed(0)
    model = ModelConfig(backbone="resnet50", weights="none", backbone_norm=norm, fpn_norm=norm, box_head_norm=norm)
    return build_detector(model, BatchNormConfig(), num_classes=5)


def detector_step(detector: Detector) -> Callable[[], None]:
    """An SGD step of the detector on fixed random images with four objects each."""
    detector.train()
    generator = torch.Generator().manual_seed(comm.rank())
    images = [torch.randint(0, 256, (3, 320, 320), dtype=torch.uint8, generator=generator) for _ in range(2)]
    boxes = torch.tensor([[10.0, 10, 100, 120], [50, 150, 200, 300], [180, 20, 300, 90], [220, 200, 310, 310]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2, 3, 4]), "seed": number} for number in range(2)]
    optimizer = comm.distributed_optimizer(
        torch.optim.SGD(detector.parameters(), lr=1e-4, momentum=0.9, fused=True), detector, 1, fp16=False
    )

    def step() -> None:
        optimizer.zero_grad()
        losses = detector.forward_losses(images, targets)
        torch.stack(list(losses.values.values())).sum().backward()
        optimizer.step()

    return step


def bare_messages() -> dict[str, float]:
    """Seconds of the bare MPI allreduce; call before Horovod starts, whose thread would send messages in between."""
    mpi = BareMPI()
    return {
        str(channels): _seconds_of_one(partial(mpi.sum_, np.zeros(2 * channels + 1)), mpi.largest)
        for channels in CHANNELS
    }


def messages() -> dict[str, float]:
    """Seconds of an allreduce as CGBN sends it, by number of channels."""
    return {
        str(channels): _seconds_of_one(
            partial(comm.sum_, torch.zeros(2 * channels + 1, dtype=torch.float64), f"benchmark.{channels}"), _largest
        )
        for channels in CHANNELS
    }


def _largest(value: float) -> float:
    return comm.all_gather(torch.tensor([value], dtype=torch.float64), "benchmark.largest").max().item()


def _seconds_of_one(call: Callable[[], object], largest: Callable[[float], float], repetitions: int = 200) -> float:
    """Median over nine rounds of the mean time of a call; the slowest rank counts."""
    for _ in range(20):
        call()
    rounds = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(repetitions):
            call()
        rounds.append(largest((time.perf_counter() - start) / repetitions))
    return sorted(rounds)[4]


def memory() -> dict[str, Any]:
    """Peak memory of the activations in a ResNet-50 step at 512 px, without and with recomputing blocks.

    Also of torchvision's model with plain layers.
    """
    torch.manual_seed(0)
    ours = convert_batch_norm(build_resnet("resnet50", nn.BatchNorm2d, CLASSES))
    models = {"none": ours, "blocks": copy.deepcopy(ours), "torchvision": resnet50(num_classes=CLASSES)}
    steps, peaks = {}, {}
    for name, model in models.items():
        if name == "blocks":
            for stage in ("layer1", "layer2", "layer3", "layer4"):
                setattr(model, stage, RecomputedStage(getattr(model, stage), by_block=True))
        steps[name] = classifier_step(model, side=512, keep_gradients=True)
    timings = take_turns(steps, turns=6)
    for name, step in steps.items():
        peaks[name] = _largest(_peak_mb(step))
    return {"512": _seconds(timings), "peak_mb": peaks}


def _peak_mb(step: Callable[[], None]) -> float:
    """How far the tensors' memory rises during a step above its level between steps, in MB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(size for _, size in changes)) / 2**20


def kernels() -> dict[str, Any]:
    """Seconds of normalization layers in this process, forward and backward, by shape, layout, type and what follows.

    ``ours`` is a layer of a group, without its messages; ``torch`` is ``nn.BatchNorm2d`` and separate operators.
    """
    send, comm.sum_ = comm.sum_, lambda tensor, name, group=None: tensor
    result = {}
    for shape in KERNEL_SHAPES:
        for layout in LAYOUTS:
            calls: dict[str, Callable[[], None]] = {}
            for dtype in (torch.float32, torch.bfloat16):
                for follows in FOLLOWS:
                    calls |= _layer_calls(shape, LAYOUTS[layout], dtype, follows)
            result[f"{tuple(shape)}, {layout}"] = _in_turn(calls)
    comm.sum_ = send
    return result


def _layer_calls(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, follows: str
) -> dict[str, Callable[[], None]]:
    x, shortcut, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    x.requires_grad_()
    shortcut.requires_grad_()
    ours, plain = CrossGPUBatchNorm(shape[1], group=comm.Group((0, 1), None)), nn.BatchNorm2d(shape[1])
    other, relu = shortcut if "shortcut" in follows else None, "ReLU" in follows

    def separate() -> torch.Tensor:
        y = plain(x) if other is None else plain(x).add_(other)
        return y.relu_() if relu else y

    def step(forward: Callable[[], torch.Tensor]) -> None:
        x.grad = shortcut.grad = None
        forward().backward(dy)

    name = f"{follows}, {str(dtype).removeprefix('torch.')}"
    return {
        f"{name}, ours": partial(step, lambda: ours(x, other, relu)),
        f"{name}, torch": partial(step, separate),
    }


def _in_turn(calls: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(KERNEL_TURNS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def overlap() -> dict[str, Any]:
    """How long CGBN messages take, alone in the forward pass and beside gradient messages in the backward pass.

    For each phase, in seconds, the median message on this rank, and two sums over a step: how long the first rank
    waits for the last one to reach the message, and how long the message takes from there.
    """
    torch.manual_seed(0)
    model = convert_batch_norm(build_resnet("resnet50", nn.BatchNorm2d, CLASSES))
    step = classifier_step(model, side=128)
    times: dict[str, list[tuple[float, float]]] = {"forward": [], "backward": []}
    plain_sum = comm.sum_

    def timed(tensor: torch.Tensor, name: str, group: comm.Group | None = None) -> torch.Tensor:
        start = time.perf_counter()
        result = plain_sum(tensor, name, group)
        times["backward" if name.endswith("backward") else "forward"].append((start, time.perf_counter()))
        return result

    timing = take_turns({"cgbn": step}, turns=TIMED_STEPS)["cgbn"]
    comm.sum_ = timed
    for _ in range(TIMED_STEPS):
        step()
    comm.sum_ = plain_sum
    return {"step": timing.median} | {phase: _message_times(pairs, phase) for phase, pairs in times.items()}


def _message_times(times: list[tuple[float, float]], phase: str) -> dict[str, float]:
    """From the start and end of each message on this rank; all ranks of a machine read the same clock."""
    flat = torch.tensor(times, dtype=torch.float64).flatten()
    starts, ends = comm.all_gather(flat, f"benchmark.{phase}").view(comm.size(), -1, 2).unbind(-1)
    last = starts.max(0).values
    return {
        "median": (ends - starts)[comm.rank()].median().item(),
        "waiting": (last - starts.min(0).values).sum().item() / TIMED_STEPS,
        "message": (ends.max(0).values - last).sum().item() / TIMED_STEPS,
    }


def scaling() -> dict[str, Any]:
    """Steps per second and memory of a small model on all ranks of the job."""
    torch.manual_seed(0)
    model = convert_batch_norm(build_resnet("resnet18", nn.BatchNorm2d, CLASSES))
    timing = take_turns({"cgbn": classifier_step(model, side=64)}, turns=10)["cgbn"]
    message = torch.zeros(1025, dtype=torch.float64)
    large = torch.zeros(4 << 20)
    return {
        "ranks": comm.size(),
        "seconds": timing.median,
        "memory_mb": _largest(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "message": _seconds_of_one(partial(comm.sum_, message, "benchmark.small"), _largest, repetitions=50),
        "large_message": _seconds_of_one(partial(comm.sum_, large, "benchmark.large"), _largest, repetitions=4),
    }


def _seconds(timings: dict[str, Timing]) -> dict[str, list[float]]:
    return {name: timing.seconds for name, timing in timings.items()}


PARTS = {part.__name__: part for part in (resnet_steps, detector_steps, kernels, messages, memory, overlap, scaling)}


def main() -> None:
    """Measures the part that the command line names; rank 0 writes the result."""
    part = sys.argv[1]
    bare = bare_messages() if part == "messages" else None
    comm.init()
    if os.environ.get("BENCHMARK_BIND_CORES", "1") == "1":
        hardware.bind_to_cores(hardware.core_masks())
    hardware.keep_freed_memory()
    torch.set_num_threads(1)
    result = PARTS[part]()
    if bare:
        result = {"horovod": result, "mpi": bare}
    if comm.is_main():
        Path(sys.argv[2]).write_text(json.dumps(result))
    comm.barrier()
    comm.shutdown()


if __name__ == "__main__":
    main()
