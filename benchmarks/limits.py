"""How far a step of the detector is from what the processor allows: a section of docs/performance.md.

    python benchmarks/limits.py                                # prints the section; takes about ten minutes
    python benchmarks/limits.py --write docs/performance.md    # and replaces it in the file

A step of the detector of ``detector_step.py``, ours and the peer's, beside two limits. Arithmetic: the operations of
all convolutions and matrix products, forward and backward, at the rate of large matrix products. Memory: what batch
normalization and the optimizer read and write at the least, at the rate of large copies. Each rank measures both rates
on its own core while the other does the same.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detector_step import BFLOAT16, FLOAT32, Launcher, Measured, in_rounds, make_data
from document import Row, machine, table, write_section
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from horovod_megdet import comm
from horovod_megdet.config import load_config
from horovod_megdet.engine.startup import build_trainer
from horovod_megdet.layers.cross_gpu_bn import CrossGPUBatchNorm

MATRIX = 2048
"""Rows and columns of the matrix products."""
COPY = 256 << 20
"""Bytes of the copies."""
NORM_PASSES = 8
"""How often batch normalization reads or writes as much as its input. Forward: the input for the sums, input and output
for the result; backward: input and gradient for the sums, input, gradient and its own gradient for the result."""
OPTIMIZER_PASSES = 5
"""How often SGD does so with the weights: it reads weight, gradient and momentum, and writes weight and momentum."""


def seconds_of(work: Callable[[], object], repetitions: int = 10) -> float:
    """Median time of ``work``, which all ranks begin together. Collective."""
    seconds = []
    for _ in range(repetitions):
        comm.barrier()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def product_rate(dtype: torch.dtype) -> float:
    """Operations per second of a matrix product. Collective."""
    a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    return 2 * MATRIX**3 / seconds_of(lambda: a @ b)


def copy_rate() -> float:
    """Bytes per second that a copy reads and writes. Collective."""
    source, target = (torch.ones(COPY // 4) for _ in range(2))
    return 2 * COPY / seconds_of(lambda: target.copy_(source))


def count(config: Path, settings: tuple[str, ...]) -> dict[str, float]:
    """Operations of a step, and the bytes that batch normalization and the optimizer move. Collective."""
    trainer = build_trainer(load_config(config, list(settings)), resume=False)
    batches = iter(trainer.train_loader())
    normalized = 0

    def add(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal normalized
        normalized += inputs[0].numel() * inputs[0].element_size()

    for layer in trainer.detector.modules():
        if isinstance(layer, CrossGPUBatchNorm):
            layer.register_forward_pre_hook(add)
    with FlopCounterMode(display=False) as counter:
        trainer.train_step(batches)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trainer.detector.parameters())
    return {
        "operations": counter.get_total_flops(),
        "norm_bytes": NORM_PASSES * normalized,
        "optimizer_bytes": OPTIMIZER_PASSES * weights,
    }


def measure_rank(config: Path, result: Path) -> None:
    """What each of two ranks runs. Collective."""
    comm.init()
    found: dict[str, Any] = {"copy_rate": copy_rate()}
    for name, settings, dtype in (("float32", FLOAT32, torch.float32), ("bfloat16", BFLOAT16, torch.bfloat16)):
        own_run = f"output.run_dir={result}.{name}"
        found[name] = {"rate": product_rate(dtype), **count(config, (*settings, own_run))}
    if comm.is_main():
        result.write_text(json.dumps(found))
    comm.barrier()
    comm.shutdown()


def column(counts: dict[str, float], copy_rate: float, ours: float, peer: float) -> Row:
    """The limits of one precision, the steps, and how many times the limit they take."""
    moved = counts["norm_bytes"] + counts["optimizer_bytes"]
    arithmetic, memory = counts["operations"] / counts["rate"], moved / copy_rate
    limit = arithmetic + memory
    return (
        f"{counts['operations'] / 1e9:.0f} GFLOP at {counts['rate'] / 1e9:.0f} GFLOP/s: {arithmetic:.2f} s",
        f"{moved / 1e9:.1f} GB at {copy_rate / 1e9:.1f} GB/s: {memory:.2f} s",
        f"{limit:.2f} s",
        f"{ours:.2f} s, {ours / limit:.2f} times the limit",
        f"{peer:.2f} s, {peer / limit:.2f} times the limit",
    )


def rows(found: dict[str, Any], measured: dict[str, list[Measured]]) -> list[Row]:
    """The rows of the table, a column for each precision."""
    seconds = {name: statistics.median(launch.timing.median for launch in measured[name]) for name in measured}
    columns = [
        column(found[name], found["copy_rate"], seconds[name], seconds["peer"]) for name in ("float32", "bfloat16")
    ]
    names = (
        "convolutions and matrix products",
        "memory of batch normalization and optimizer",
        "limit, both together",
        "ours",
        "the peer, float32",
    )
    return list(zip(names, *columns, strict=True))


def section(lines: list[Row]) -> str:
    """The section of docs/performance.md."""
    return "\n".join(
        [
            "## How far a step is from the limit",
            "",
            "Written by `python benchmarks/limits.py --write docs/performance.md`, which says what the limits are: a "
            "step of R50-FPN with 2 images of 320 x 427 px on each of two ranks, one thread per rank. "
            f"{machine()}. The peer is `benchmarks/torchvision_trainer.py`.",
            "",
            table(("", "float32", "bfloat16, channels last"), lines),
        ]
    )


def main() -> None:
    """Measures, prints and writes; with ``--config`` what one rank runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="launches of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a launch (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="Markdown file whose section is replaced")
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.config:
        measure_rank(arguments.config, arguments.result)
        return
    with tempfile.TemporaryDirectory() as folder:
        launcher = Launcher(Path(folder), arguments.steps, make_data(Path(folder) / "data"))
        found = launcher.under_mpirun(2, Path(__file__))
        measured = in_rounds(
            {
                "float32": lambda: launcher.ours(2, it=FLOAT32)["it"],
                "bfloat16": lambda: launcher.ours(2, it=BFLOAT16)["it"],
                "peer": lambda: launcher.peer(2),
            },
            arguments.rounds,
        )
    text = section(rows(found, measured))
    print(text)
    if arguments.write:
        write_section(arguments.write, text)


if __name__ == "__main__":
    main()
