"""What grows with the number of ranks beside training itself: a section of docs/benchmarks.md.

    python benchmarks/control_plane.py                              # prints the table, for 2 to 128 ranks
    python benchmarks/control_plane.py --write docs/benchmarks.md   # and replaces its section of the file

The ranks are light: Python with mpi4py and numpy, without torch and Horovod, so that 128 of them fit on one machine.
They make the calls of a training with messages of the same sizes. They share the cores of this machine, so a figure is
the work of all ranks rather than what a cluster waits for; how it grows with their number is what to look at. A second
table has real ranks, each with torch and Horovod, up to the first step of a training. Last, what an elastic job does
after each step: a single rank with the R50-FPN detector keeps its state in memory.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from document import processor, table, write_section
from programs import under_mpirun

from horovod_megdet.cluster.watchdog.heartbeats import Heartbeat, Heartbeats

RANKS = (2, 8, 32, 128)
REAL_RANKS = (2, 4, 8, 16)
REPEATS = 20
DETECTIONS = 370_000
"""Of the 5,000 images of COCO's validation set."""

PROJECT = Path(__file__).resolve().parents[1]
YIELDING = ("--mca", "mpi_yield_when_idle", "1")

FIGURES = {
    "start": "from launch until all ranks have met, s",
    "agreement": "agreement of a step of one pass: sum of 7 float64, ms",
    "objects": "agreement on an error: a sentence of each rank to all, ms",
    "metrics": "row of metrics: 4 float64 of each rank to all, ms",
    "detections": "370,000 detections to rank 0, s",
    "heartbeats": "one heartbeat of every rank, ms",
    "heartbeats_read": "all heartbeats read by one rank, ms",
}


def timed(barrier: Callable[[], None], work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median seconds of ``work``, from a moment when all ranks are ready until this one has done it."""
    seconds = []
    for _ in range(repeats):
        barrier()
        seconds.append(_seconds_of(work))
    return float(np.median(seconds))


def measure(folder: Path, launched_at: float) -> None:
    """What one rank does; rank 0 writes the longest times of all ranks."""
    from mpi4py import MPI  # starts MPI

    world = MPI.COMM_WORLD
    rank, size = world.rank, world.size
    world.Barrier()
    found = {"start": time.time() - launched_at}

    mine, total = np.ones(7), np.empty(7)
    found["agreement"] = 1e3 * timed(world.Barrier, lambda: world.Allreduce(mine, total))
    found["objects"] = 1e3 * timed(world.Barrier, lambda: world.allgather((f"node{rank // 8:03d}", "", 0)))
    row, rows = np.ones(4), np.empty((size, 4))
    found["metrics"] = 1e3 * timed(world.Barrier, lambda: world.Allgather(row, rows))

    counts = [len(part) for part in np.array_split(np.empty(DETECTIONS), size)]
    shard = np.ones((counts[rank], 7), np.float32)
    detections = np.empty((DETECTIONS, 7), np.float32) if rank == 0 else None
    gather = [detections, [7 * count for count in counts]] if rank == 0 else None
    found["detections"] = timed(world.Barrier, lambda: world.Gatherv(shard, gather), 5)

    heartbeats = Heartbeats(folder)
    beat = Heartbeat(rank, size, f"node{rank // 8:03d}", os.getpid(), 1, "computing", None, 0.1, 5.0)
    found["heartbeats"] = 1e3 * timed(world.Barrier, lambda: heartbeats.write(beat))
    world.Barrier()
    if rank == 0:
        found["heartbeats_read"] = 1e3 * timed(lambda: None, heartbeats.read)
        assert len(heartbeats.read()) == size
    longest = world.gather(found)
    if rank == 0:
        assert longest
        results = {name: max(one[name] for one in longest if name in one) for name in FIGURES}
        (folder / "results.json").write_text(json.dumps(results))


def first_step(ranks: int, folder: Path) -> float:
    """Seconds from the launch of a training of real ranks until its first step is in the log."""
    settings = ["data.synthetic_train_images=64", f"data.synthetic_root={folder / 'data'}", "solver.epochs=1"]
    settings += ["solver.milestones=[]", "solver.gammas=[]", "output.log_every_images=1", "output.pictures=0"]
    arguments = ["--config", str(PROJECT / "tests/parallel/tiny.yaml"), "--run-dir", str(folder / f"run-{ranks}")]
    arguments += [word for setting in settings for word in ("--set", setting)]
    command = under_mpirun(ranks, str(PROJECT / "train.py"), *arguments, options=YIELDING)
    began, seconds, output = time.monotonic(), None, []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        assert job.stdout is not None
        for line in job.stdout:
            output.append(line)
            if seconds is None and line.startswith("step 1 "):
                seconds = time.monotonic() - began
    if job.returncode or seconds is None:
        raise SystemExit("".join(output))
    return seconds


def keeping(folder: Path) -> tuple[float, float]:
    """Seconds of a step with 2 images of R50-FPN, and of keeping the state after it as an elastic job does."""
    from horovod_megdet.config import load_config
    from horovod_megdet.engine.elastic import ElasticTrainer
    from horovod_megdet.engine.foundation import lay_foundation
    from horovod_megdet.engine.startup import start_horovod, start_trainer

    class Timed(ElasticTrainer):
        def train_step(self, batches: Any) -> None:
            steps.append(_seconds_of(lambda: super(Timed, self).train_step(batches)))

        def keep(self) -> None:
            keeps.append(_seconds_of(super().keep))

    steps: list[float] = []
    keeps: list[float] = []
    settings: dict[str, Any] = {
        "data.synthetic_root": folder / "data-keeping",
        "output.run_dir": folder / "run-keeping",
    }
    settings |= {"model.backbone": "resnet50", "model.fpn_channels": 256, "model.box_head_channels": 1024}
    settings |= {"data.shorter_side_train": [320], "data.longer_side_train": 480, "solver.epochs": 1}
    settings |= {"solver.milestones": [], "solver.gammas": [], "output.pictures": 0}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = start_horovod(lambda: load_config(PROJECT / "tests/parallel/tiny.yaml", overrides))
    with contextlib.redirect_stdout(sys.stderr):
        start_trainer(lay_foundation(config, None, None), False, None, Timed).train()
    return float(np.median(steps)), float(np.median(keeps))


def _seconds_of(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def on_ranks(ranks: int) -> dict[str, float]:
    """Starts light ranks and returns what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = under_mpirun(ranks, __file__, "--measure", folder, str(time.time()), options=YIELDING)
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found: dict[str, float] = json.loads((Path(folder) / "results.json").read_text())
        return found


def section(results: dict[int, dict[str, float]], starts: dict[int, float], kept: tuple[float, float]) -> str:
    """The section of docs/benchmarks.md."""
    rows = [(text, *(f"{found[name]:.3g}" for found in results.values())) for name, text in FIGURES.items()]
    first_steps = ("from launch to the first step, s", *(f"{seconds:.1f}" for seconds in starts.values()))
    return (
        "## What grows with the ranks\n\n"
        "Written by `python benchmarks/control_plane.py --write docs/benchmarks.md`, which says how it measures. "
        f"{processor()}, shared by all ranks; the longest time of any rank.\n\n"
        f"{table(('figure', *(f'{ranks} ranks' for ranks in results)), rows)}\n\n"
        f"{table(('real ranks', *map(str, starts)), [first_steps])}\n\n"
        f"An elastic job keeps its state in memory after each step: {1e3 * kept[1]:.2f} ms for R50-FPN on one rank, "
        f"whose step takes {kept[0]:.2f} s.\n"
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="Markdown file whose section to replace")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "TIME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(Path(arguments.measure[0]), float(arguments.measure[1]))
        return
    results = {ranks: on_ranks(ranks) for ranks in RANKS}
    with tempfile.TemporaryDirectory() as folder:
        first_step(2, Path(folder, "first"))  # reads files from the disk, which stay in memory then
        starts = {ranks: first_step(ranks, Path(folder)) for ranks in REAL_RANKS}
        kept = keeping(Path(folder))
    text = section(results, starts, kept)
    print(text)
    if arguments.write:
        write_section(arguments.write, text)


if __name__ == "__main__":
    main()
