"""What measuring the gradient's noise costs, as a part of a training step: a section of docs/benchmarks.md.

    mpirun -np 2 python benchmarks/gradient_noise.py                              # prints the section
    mpirun -np 2 python benchmarks/gradient_noise.py --write docs/benchmarks.md   # and replaces it in the file

The hooks on the gradients, the norms of the averaged gradients and the message are timed in steps that measure, and
compared with those whole steps. Figures are medians over the steps, in each of which the slowest rank counts.
"""

import math
import time

import torch
from cross_gpu_bn import NOISE_HEADING
from document import machine, measure_section
from torch import Tensor

from horovod_megdet import comm
from horovod_megdet.config import DEMO, BatchNormConfig, ModelConfig, SolverConfig, load_config
from horovod_megdet.data.loader import Batch
from horovod_megdet.engine.losses import weigh_losses
from horovod_megdet.models.detector import build_detector
from horovod_megdet.solver.gradient_noise import COST_LIMIT, GradientNoise
from horovod_megdet.solver.optimizer import build_optimizer

WARM_UP, STEPS = 3, 15


def measured_steps(model: ModelConfig, images: int, size: tuple[int, int]) -> Tensor:
    """Seconds of (hooks, norms and message, whole step), (STEPS, 3), of SGD steps on random images of this size."""
    torch.manual_seed(0)
    detector = build_detector(model, BatchNormConfig(), num_classes=5).train()
    noise = GradientNoise(detector, images, accumulation=1, interval=1)
    optimizer = comm.distributed_optimizer(build_optimizer(detector, SolverConfig()), detector, 1, fp16=False)
    batch = random_batch(images, size)
    rows = []
    for number in range(WARM_UP + STEPS):
        comm.barrier()
        noise.cost_seconds, started = 0.0, time.perf_counter()
        with noise.measuring(number):
            loss, _ = weigh_losses(batch, detector.forward_losses(batch.images, batch.targets))
            loss.backward()
        comm.synchronize(optimizer)
        hooks, updating = noise.cost_seconds, time.perf_counter()
        noise.update(number, images, loss_scale=1.0, step_seconds=updating - started)
        updated = time.perf_counter()
        with optimizer.skip_synchronize():
            optimizer.step()
        optimizer.zero_grad()
        mine = torch.tensor([hooks, updated - updating, time.perf_counter() - started], dtype=torch.float64)
        rows.append(comm.all_gather(mine, "benchmark.noise").amax(0))
    assert noise.averages.variance_of() > 0, "every step was measured"
    return torch.stack(rows[WARM_UP:])


def random_batch(images: int, size: tuple[int, int]) -> Batch:
    """Images of (height, width), other ones on every rank, with four objects each."""
    height, width = size
    generator = torch.Generator().manual_seed(comm.rank())
    pictures = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for _ in range(images)]
    unit = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.2, 0.5, 0.6, 0.9], [0.5, 0.1, 0.9, 0.3], [0.7, 0.6, 0.95, 0.95]])
    target = {"boxes": unit * torch.tensor([width, height, width, height]), "labels": torch.tensor([1, 2, 3, 4])}
    return Batch(pictures, [target | {"seed": number, "image_id": number, "index": number} for number in range(images)])


def section() -> str:
    """The section of docs/benchmarks.md. Collective."""
    demo = load_config(DEMO)
    cases = (
        ("demo", demo.model, demo.data.images_per_rank, (128, 170)),
        ("R50-FPN", ModelConfig(weights="none"), 2, (320, 427)),
    )
    command = f"mpirun -np {comm.size()} python benchmarks/gradient_noise.py --write docs/benchmarks.md"
    lines = [
        NOISE_HEADING,
        "",
        f"Written by `{command}`, which says how it measures; one thread per rank. {machine()}. `measure_noise: auto` "
        f"measures in every n-th step, so that the cost stays under {COST_LIMIT:.0%} of the time.",
        "",
        "| step | hooks, ms | norms of the mean and message, ms | whole step, ms | of a measured step | n of `auto` |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, model, images, size in cases:
        seconds = measured_steps(model, images, size)
        hooks, update, step = (1e3 * seconds.median(0).values).tolist()
        part = ((seconds[:, 0] + seconds[:, 1]) / seconds[:, 2]).median().item()
        step_name = f"{name}, {images} images of {size[0]} x {size[1]} per rank"
        every = max(1, math.ceil(part / COST_LIMIT))
        lines.append(f"| {step_name} | {hooks:.1f} | {update:.1f} | {step:.0f} | {part:.2%} | {every} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    measure_section(__doc__, section)
