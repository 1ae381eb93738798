"""How long a data set of COCO's size takes to load and to evaluate: the section "COCO's size" of docs/benchmarks.md.

    python benchmarks/coco_scale.py /scratch/coco                              # prints the table
    python benchmarks/coco_scale.py /scratch/coco --write docs/benchmarks.md   # and replaces its section of the file
    python benchmarks/coco_scale.py /scratch/coco --photos FOLDER              # real photos instead of generated ones

The folder gets a data set of 123 thousand hard links to a few pictures, 0.5 GB. All files are in the page cache, and
the ranks share the cores of this machine: times are what the software costs, without a disk or network.
"""

import argparse
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import coco_scale_data
import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from document import processor, table, write_section
from programs import under_mpirun
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision_trainer import Settings, batches, build_loader

from horovod_megdet import comm
from horovod_megdet.config import Config, DataConfig
from horovod_megdet.data.coco import CocoDataset, load_dataset
from horovod_megdet.data.loader import build_train_loader
from horovod_megdet.engine import checkpoint
from horovod_megdet.engine.checkpoint import Position, RunDescription, TrainingState
from horovod_megdet.engine.run_folder import RunFolder
from horovod_megdet.evaluation.backends import Backend, coco_metrics
from horovod_megdet.evaluation.coco import Evaluation, collect_detections
from horovod_megdet.evaluation.metrics import METRICS
from horovod_megdet.models.detector import build_detector
from horovod_megdet.solver.optimizer import build_optimizer

RANKS = 8
GATHERING_RANKS = 4
LOADED_IMAGES = 1200
EPOCHS = 3
SAVES = 5
MIB = 2**20

Row = tuple[str, str]


def own_memory(process: psutil.Process | None = None) -> int:
    """Bytes of this process that no file stands behind, so that no other process shares them."""
    pid = process.pid if process else os.getpid()
    found = re.search(r"^Anonymous:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def load(folder: Path, split: str) -> CocoDataset:
    """The training or validation set, by all ranks of the job together."""
    ranks: dict[str, Any] = {"ranks": comm} if comm.size() > 1 else {}
    return load_dataset(folder / f"{split}.json", folder / split, training=split == "train", **ranks)


def start(folder: Path) -> dict[str, Any]:
    """What a rank needs to get the training set."""
    opened: Counter[str] = Counter()

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.scandir"):
            opened["listings" if event == "os.scandir" else Path(str(arguments[0])).suffix] += 1

    sys.addaudithook(count)
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before, began = own_memory(), time.perf_counter()
    dataset = load(folder, "train")
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "own": own_memory() - before,
        "imports": imports,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "opened": opened,
        "images": len(dataset),
    }


def gathering(folder: Path) -> dict[str, Any]:
    """Seconds until rank 0 has the detections of all ranks; the second of two times."""
    image_ids = np.arange(1, coco_scale_data.SPLITS["val"] + 1)
    shard = coco_scale_data.detections(image_ids[comm.rank() :: comm.size()], 80, seed=comm.rank())
    for _ in range(2):
        comm.barrier()
        began = time.perf_counter()
        collect_detections(shard)
        seconds = time.perf_counter() - began
    return {"seconds": seconds}


PARTS = {"start": start, "gathering": gathering}


def on_ranks(part: str, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What each of some ranks measured."""
    with tempfile.TemporaryDirectory() as results:
        command = under_mpirun(ranks, __file__, str(folder), "--part", part, "--result", results)
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return [json.loads((Path(results) / f"{rank}.json").read_text()) for rank in range(ranks)]


def start_rows(folder: Path) -> list[Row]:
    """The first start, without a cache, and a later one."""
    rows = []
    for path in folder.glob(".train.json.*"):
        path.unlink()
    for name, number in (("first", RANKS), ("later", os.cpu_count() or 1)):
        ranks = on_ranks("start", number, folder)
        opened = sum((Counter(rank["opened"]) for rank in ranks), Counter[str]())
        rows += [
            (f"{name} start, {number} ranks: training set ready on the slowest",
             f"{max(rank['seconds'] for rank in ranks):.1f} s"),
            (f"{name} start: own memory of a rank for it, at most", f"{max(r['own'] for r in ranks) / MIB:.0f} MiB"),
            (f"{name} start: peak of a rank, with torch and Horovod",
             f"{max(r['peak'] for r in ranks) / MIB:.0f} MiB, {max(r['imports'] for r in ranks) / MIB:.0f} before it"),
            (f"{name} start: opened by all ranks",
             f"{opened['.json']} JSON, {opened['.jpg']:,} image files, {opened['listings']} listings"),
        ]  # fmt: skip
    return rows


def metrics_rows(folder: Path) -> list[Row]:
    """COCO's metrics by both libraries."""
    truth = load(folder, "val").ground_truth
    found = coco_scale_data.detections(truth.image_ids, 80)
    results, seconds = {}, {}
    backends: tuple[Backend, ...] = ("hotcoco", "pycocotools")
    for backend in backends:
        began = time.perf_counter()
        results[backend] = repr(coco_metrics(truth, found, backend))
        seconds[backend] = time.perf_counter() - began
    equal = "equal in every bit" if results["hotcoco"] == results["pycocotools"] else "DIFFERENT"
    what = f"12 metrics and AP per class, {len(truth.image_ids):,} images, {len(found.scores):,} detections"
    return [
        (f"{what}: hotcoco", f"{seconds['hotcoco']:.2f} s"),
        (f"{what}: pycocotools", f"{seconds['pycocotools']:.1f} s, {equal}"),
    ]


def gathering_rows(folder: Path) -> list[Row]:
    """Bringing the detections to rank 0."""
    seconds = max(rank["seconds"] for rank in on_ranks("gathering", GATHERING_RANKS, folder))
    return [(f"gathering those detections from {GATHERING_RANKS} ranks", f"{seconds:.2f} s")]


def checkpoint_rows(folder: Path) -> list[Row]:
    """Writing a checkpoint of R50-FPN and its momentum."""
    config = Config()
    detector = build_detector(config.model, config.batch_norm, 80)
    optimizer = build_optimizer(detector, config.solver)
    for parameter in detector.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    seconds = []
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        for step in range(SAVES):
            state = TrainingState(optimizer.state_dict(), {}, Position(step), random=[])
            run = RunDescription(config.model_dump(mode="json"), [], [], "", {})
            began = time.perf_counter()
            path = checkpoint.save(Path(run_dir), detector.state_dict(), state, run, epoch=0.0)
            seconds.append(time.perf_counter() - began)
        size = sum(file.stat().st_size for file in path.iterdir())
    what = f"checkpoint of R50-FPN with momentum, {size / 1e6:.0f} MB: all ranks wait, median of {SAVES}"
    return [(what, f"{statistics.median(seconds):.2f} s")]


def run_folder_rows(folder: Path) -> list[Row]:
    """What rank 0 writes after an evaluation, and at the end of a run: its second time, with everything imported."""
    dataset = load(folder, "val")
    found = coco_scale_data.detections(dataset.image_ids, 80)
    aps = dict.fromkeys(dataset.class_names, 0.5)
    evaluation = Evaluation(dict.fromkeys(METRICS, 0.5), aps, len(dataset), dataset.category_ids, found)
    description = RunDescription({}, dataset.class_names, dataset.category_ids, "", {})
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        config = Config.model_validate({"output": {"run_dir": run_dir}})
        files = RunFolder(config)
        files.open_log(len(dataset), Position())
        for step in (1, 2):
            began = time.perf_counter()
            files.log_evaluation({"step": step, "images_seen": step, "epoch": float(step)}, evaluation)
            waited = time.perf_counter() - began
            files.wait()
            written = time.perf_counter() - began
        began = time.perf_counter()
        files.write_report(description, Position(2, 2), 2.0, dataset, evaluation, multi_scale=None)
        page = time.perf_counter() - began
        files.close()
    return [
        (f"an evaluation's row, {len(found.scores):,} detections and curves: all ranks wait", f"{waited:.2f} s"),
        ("the same: until they are written, while training goes on", f"{written:.2f} s"),
        (f"validation page, {config.output.pictures} images, once at the end of a run", f"{page:.1f} s"),
    ]


def loader_rows(folder: Path) -> list[Row]:
    """Images per second of one loader worker, and memory over some epochs, on one core, as a rank has it."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        return _loader_rows(folder)
    finally:
        os.sched_setaffinity(0, cores)


def _loader_rows(folder: Path) -> list[Row]:
    dataset = load(folder, "train")
    data = DataConfig(workers=1, images_per_rank=2)
    loader = build_train_loader(dataset, data, seed=0, rank=0, ranks=1, start=0, stop=EPOCHS * LOADED_IMAGES)
    batches = iter(loader)
    next(batches)
    memory, began = [], time.perf_counter()
    for number, _ in enumerate(batches, start=1):
        if number % (LOADED_IMAGES // 8) == 0:
            memory.append(sum(own_memory(process) for process in psutil.Process().children(recursive=True)))
    rate = (EPOCHS * LOADED_IMAGES - 2) / (time.perf_counter() - began)
    memory = memory[len(memory) // EPOCHS :]  # without the first epoch, in which buffers grow
    slope = np.polyfit(np.arange(len(memory)), np.array(memory) / MIB, 1)[0] * 8
    peers = peer_loader_rate(folder)
    return [
        ("loader, one worker, one core, 800 px: images/s", f"{rate:.0f}"),
        ("the same, torchvision's loader and its resizing (torchvision_trainer.py)",
         f"{peers:.0f}; ours is {rate / peers:.1f} times as fast"),
        (f"loader: memory of its processes, growth per {LOADED_IMAGES} images", f"{slope:+.1f} MiB"),
    ]  # fmt: skip


def peer_loader_rate(folder: Path) -> float:
    """Images per second of torchvision's data set in one worker, with the main process resizing, as its detector does.

    The two share the core; ours leaves the main process nothing to resize.
    """
    settings = Settings(folder / "train.json", folder / "train", shorter_side=800, longer_side=1333)
    stream = batches(build_loader(settings, ranks=1, rank=0))
    transform = GeneralizedRCNNTransform(settings.shorter_side, settings.longer_side, [0.0] * 3, [1.0] * 3)
    next(stream)
    began = time.perf_counter()
    for images, targets in itertools.islice(stream, LOADED_IMAGES // settings.images_per_rank):
        for image, target in zip(images, targets, strict=True):
            transform.resize(image, target)
    return LOADED_IMAGES / (time.perf_counter() - began)


def section(rows: list[Row], photos: bool) -> str:
    """The section of docs/benchmarks.md."""
    return (
        "## COCO's size\n\n"
        "Written by `python benchmarks/coco_scale.py FOLDER --write docs/benchmarks.md`, which explains how. "
        f"{processor()}, load average {os.getloadavg()[1]:.1f} over the five minutes before the end, "
        f"{'real photos' if photos else 'generated pictures'}.\n\n"
        f"{table(('figure', 'measured'), rows)}\n"
    )


def main() -> None:
    """Measures and prints; with ``--part`` what one rank measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the data set is, or is made")
    parser.add_argument("--photos", type=Path, help="folder of JPEG files to use as images")
    parser.add_argument("--write", type=Path, help="Markdown file whose section to replace")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part:
        comm.init()
        result = PARTS[arguments.part](arguments.folder)
        (arguments.result / f"{comm.rank()}.json").write_text(json.dumps(result))
        comm.barrier()
        comm.shutdown()
        return
    coco_scale_data.make(arguments.folder, arguments.photos)
    rows: list[Row] = []
    measures = (start_rows, metrics_rows, gathering_rows, checkpoint_rows, run_folder_rows, loader_rows)
    for measure in measures:
        measured = measure(arguments.folder)
        print("\n".join(f"{figure}: {value}" for figure, value in measured), flush=True)
        rows += measured
    if arguments.write:
        write_section(arguments.write, section(rows, bool(arguments.photos)))


if __name__ == "__main__":
    main()
