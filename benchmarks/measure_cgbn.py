"""What the ranks run for ``cross_gpu_bn.py``: ``mpirun -np 2 python benchmarks/measure_cgbn.py PART RESULT.json``."""

import copy
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from alternatives import FiveMessageBatchNorm, NaiveBatchNorm, converted
from timing import Timing, take_turns
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18, resnet50

from horovod_megdet import CrossGPUBatchNorm, comm, convert_batch_norm
from horovod_megdet.config import BatchNormConfig, ModelConfig
from horovod_megdet.models.backbone import RecomputedStage
from horovod_megdet.models.detector import build_detector

IMAGES_PER_RANK = 2
CLASSES = 100


def classifier_step(model: nn.Module, side: int, ddp: bool = False) -> Callable[[], None]:
    """A step of SGD on fixed random images: forward, backward with averaged gradients, update."""
    generator = torch.Generator().manual_seed(comm.rank())
    images = torch.randn(IMAGES_PER_RANK, 3, side, side, generator=generator)
    labels = torch.randint(0, CLASSES, (IMAGES_PER_RANK,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    if ddp:
        model = DistributedDataParallel(model)
    else:
        optimizer = comm.distributed_optimizer(optimizer, model, passes_per_step=1, fp16=False)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def resnet_steps() -> dict[str, Any]:
    """ResNet-50 with Cross-GPU BN and with what users would take instead, at two image sizes."""
    store = comm.broadcast_object(tempfile.mktemp(prefix="megdet-benchmark-"), "benchmark.store")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=comm.rank(), world_size=comm.size())
    torch.manual_seed(0)
    plain = resnet50(num_classes=CLASSES).train()
    models = {
        "local": (copy.deepcopy(plain), False),
        "cgbn": (convert_batch_norm(copy.deepcopy(plain)), False),
        "five_messages": (converted(copy.deepcopy(plain), FiveMessageBatchNorm), False),
        "naive_ddp": (converted(copy.deepcopy(plain), NaiveBatchNorm), True),
        "local_ddp": (copy.deepcopy(plain), True),
    }
    result = {}
    for side, turns in ((256, 12), (128, 20)):
        steps = {name: classifier_step(copy.deepcopy(model), side, ddp) for name, (model, ddp) in models.items()}
        result[str(side)] = _seconds(take_turns(steps, turns))
    dist.destroy_process_group()
    return result


def detector_steps() -> dict[str, Any]:
    """The whole detector, R50-FPN at 320 px, with Cross-GPU BN and with local BN."""
    steps = {}
    for norm in ("local", "cgbn"):
        torch.manual_seed(0)
        model = ModelConfig(backbone="resnet50", weights="none", backbone_norm=norm, fpn_norm=norm, box_head_norm=norm)
        steps[norm] = detector_step(model)
    return {"320": _seconds(take_turns(steps, 12))}


def detector_step(model: ModelConfig) -> Callable[[], None]:
    """A step of SGD of the detector on fixed random images with four objects each."""
    detector = build_detector(model, BatchNormConfig(), num_classes=5).train()
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


def messages() -> dict[str, Any]:
    """Seconds of one allreduce as CGBN sends it, by its length, and of the bare MPI call."""
    from mpi4py import MPI

    result: dict[str, Any] = {"settings": {name: os.environ.get(name, "") for name in comm.LAUNCH_DEFAULTS}}
    for channels in (64, 512, 2048):
        message = torch.zeros(2 * channels + 1, dtype=torch.float64)
        received = torch.empty_like(message)

        def horovod(message: torch.Tensor = message, name: str = f"benchmark.{channels}") -> None:
            comm.sum_(message, name)

        def mpi(message: torch.Tensor = message, received: torch.Tensor = received) -> None:
            MPI.COMM_WORLD.Allreduce(message.numpy(), received.numpy())

        result[str(channels)] = {"horovod": _seconds_of_one(horovod), "mpi": _seconds_of_one(mpi)}
    return result


def _seconds_of_one(call: Callable[[], None], repetitions: int = 200) -> float:
    """Median over five rounds of the mean time of a call; the slowest rank counts."""
    for _ in range(20):
        call()
    rounds = []
    for _ in range(5):
        comm.barrier()
        start = time.perf_counter()
        for _ in range(repetitions):
            call()
        mine = torch.tensor([(time.perf_counter() - start) / repetitions], dtype=torch.float64)
        rounds.append(comm.gather(mine, "benchmark.message").max().item())
    return sorted(rounds)[2]


def memory() -> dict[str, Any]:
    """Peak memory of a ResNet-50 step at 512 px above what stays, without and with recomputation by blocks."""
    torch.manual_seed(0)
    plain = convert_batch_norm(resnet50(num_classes=CLASSES).train())
    steps, peaks = {}, {}
    for name in ("none", "blocks"):
        model = copy.deepcopy(plain)
        if name == "blocks":
            for stage in ("layer1", "layer2", "layer3", "layer4"):
                setattr(model, stage, RecomputedStage(getattr(model, stage), by_block=True))
        steps[name] = classifier_step(model, side=512)
    timings = take_turns(steps, turns=6)
    for name, step in steps.items():
        peaks[name] = comm.gather(torch.tensor([_peak_mb(step)], dtype=torch.float64), "benchmark.peak").max().item()
    return {"512": _seconds(timings), "peak_mb": peaks}


def _peak_mb(step: Callable[[], None]) -> float:
    """How far resident memory rises above its level between the steps, in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
    before = _status_mb("VmRSS")
    step()
    return _status_mb("VmHWM") - before


def _status_mb(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def overlap() -> dict[str, Any]:
    """How long CGBN messages take in the forward pass, and in the backward pass beside the gradients' messages."""
    torch.manual_seed(0)
    model = convert_batch_norm(resnet50(num_classes=CLASSES).train())
    step = classifier_step(model, side=128)
    waits: dict[str, list[float]] = {"forward": [], "backward": []}
    plain_sum = comm.sum_

    def timed(tensor: torch.Tensor, name: str, group: comm.Group | None = None) -> torch.Tensor:
        start = time.perf_counter()
        result = plain_sum(tensor, name, group)
        waits["backward" if name.endswith("backward") else "forward"].append(time.perf_counter() - start)
        return result

    timing = take_turns({"cgbn": step}, turns=10)["cgbn"]
    comm.sum_ = timed
    for _ in range(10):
        step()
    comm.sum_ = plain_sum
    return {"step": timing.median} | {name: _quantiles(values) for name, values in waits.items()}


def scaling() -> dict[str, Any]:
    """Steps per second and memory of a small model on so many ranks."""
    torch.manual_seed(0)
    model = convert_batch_norm(resnet18(num_classes=CLASSES).train())
    timing = take_turns({"cgbn": classifier_step(model, side=64)}, turns=10)["cgbn"]
    peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024], dtype=torch.float64)
    layers = sum(isinstance(layer, CrossGPUBatchNorm) for layer in model.modules())
    message = torch.zeros(1025, dtype=torch.float64)
    large = torch.zeros(4 << 20)
    return {
        "ranks": comm.size(),
        "seconds": timing.median,
        "memory_mb": comm.gather(peak, "benchmark.memory").max().item(),
        "layers": layers,
        "message": _seconds_of_one(lambda: comm.sum_(message, "benchmark.small"), repetitions=50),
        "large_message": _seconds_of_one(lambda: comm.sum_(large, "benchmark.large"), repetitions=4),
    }


def _quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"median": ordered[len(ordered) // 2], "p95": ordered[int(0.95 * len(ordered))], "sum": sum(ordered) / 10}


def _seconds(timings: dict[str, Timing]) -> dict[str, list[float]]:
    return {name: timing.seconds for name, timing in timings.items()}


PARTS = {part.__name__: part for part in (resnet_steps, detector_steps, messages, memory, overlap, scaling)}


def main() -> None:
    """Measures the part named on the command line; rank 0 writes the result."""
    comm.init()
    torch.set_num_threads(1)
    result = PARTS[sys.argv[1]]()
    if comm.is_main():
        Path(sys.argv[2]).write_text(json.dumps(result))
    comm.barrier()
    comm.shutdown()


if __name__ == "__main__":
    main()
