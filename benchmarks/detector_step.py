"""A training step of the whole detector, ours beside a plain torchvision trainer: a section of docs/benchmarks.md.

    python benchmarks/detector_step.py                              # prints the section; takes about 50 minutes
    python benchmarks/detector_step.py --write docs/benchmarks.md   # and replaces it in the file
    python benchmarks/detector_step.py --only pairs --rounds 3      # some of it

Both train the same detector on the same files with their own data loaders: ours with the steps of ``train.py``, the
other is ``torchvision_trainer.py``. Each launch trains for some steps under mpirun or torchrun, one thread per rank on
its own core; launches take turns, a ratio is the median over the rounds, and in each step the slowest rank counts. The
memory is the peak of what is resident, libraries included.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from document import Row, machine, table, write_section
from PIL import Image
from programs import program, under_mpirun
from timing import Timing, take_turns
from torchvision_trainer import Settings, take_own_core

from horovod_megdet import comm
from horovod_megdet.config import Config, load_config
from horovod_megdet.data.synthetic import CATEGORY_IDS, CLASSES, draw_image
from horovod_megdet.engine.startup import build_trainer

HERE = Path(__file__).parent
PICTURES = 64
SIZE = (480, 640)
"""(height, width) of the pictures."""
WARM_UP = 2
FLOAT32 = ("runtime.amp=none", "runtime.channels_last=false")
BFLOAT16 = ("runtime.amp=bfloat16", "runtime.channels_last=true")
LOCAL_BN = ("model.backbone_norm=local", "model.fpn_norm=local")
COCO_SIZE = (800, 1067)
"""Shorter and longer side of the large images."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a launch measured."""

    images: int
    """Images of a step, on all ranks."""
    timing: Timing
    peak_mb: float
    """Of the rank with the most."""

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.timing.median


Launch = Callable[[], Measured]


def make_data(folder: Path) -> Settings:
    """Writes pictures of one size with objects, as COCO data; the peer's settings for it."""
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    seed, (height, width) = 0, SIZE
    while len(images) < PICTURES:
        seed += 1
        pixels, objects = draw_image(np.random.default_rng(seed))
        if not objects or pixels.shape[0] > pixels.shape[1]:
            continue
        name = f"{seed:06d}.jpg"
        entry = {"id": len(images) + 1, "file_name": name, "height": height, "width": width}
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(
            folder / "images" / name, quality=92
        )
        y_scale, x_scale = height / pixels.shape[0], width / pixels.shape[1]
        for found in objects:
            x, y, w, h = found["bbox"]
            box = [x * x_scale, y * y_scale, w * x_scale, h * y_scale]
            annotation = {"id": len(annotations) + 1, "image_id": entry["id"], "iscrowd": 0, "bbox": box}
            annotations.append(annotation | {"category_id": found["category_id"], "area": box[2] * box[3]})
        images.append(entry)
    categories = [{"id": id, "name": name} for id, name in zip(CATEGORY_IDS, CLASSES, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))
    return Settings(folder / "train.json", folder / "images")


def our_config(settings: Settings, folder: Path) -> Config:
    """The configuration that trains the same as the peer."""
    values: dict[str, dict[str, Any]] = {
        "model": {
            "backbone": settings.backbone,
            "weights": "none",
            "trainable_stages": 5,
            "fpn_channels": settings.fpn_channels,
            "box_head_channels": settings.box_head_channels,
            "anchor_sizes": [settings.smallest_anchor * 2**level for level in range(5)],
            "rpn_candidates_train": settings.candidates,
            "proposals_train": settings.proposals,
            "anchors_per_image": settings.anchors,
            "rois_per_image": settings.rois,
        },
        "data": {
            "train_annotations": str(settings.annotations),
            "train_images": str(settings.images),
            "val_annotations": str(settings.annotations),
            "val_images": str(settings.images),
            "shorter_side_train": [settings.shorter_side],
            "longer_side_train": settings.longer_side,
            "images_per_rank": settings.images_per_rank,
            "workers": settings.workers,
        },
        "solver": {"base_lr": settings.lr, "reference_batch_size": 2, "epochs": 1000, "milestones": [], "gammas": []},
        "runtime": {"device": "cpu", "threads_per_rank": 1},
        "output": {"run_dir": str(folder / "run")},
    }
    return Config.model_validate(values)


def train_ours(variants: dict[str, list[str]], config: Path, steps: int, result: Path) -> None:
    """What each rank runs for ours: the steps of one trainer or, in turns, of several. Collective."""
    comm.init()
    if comm.size() == 1:
        take_own_core(0)
    train: dict[str, Callable[[], None]] = {}
    for name, settings in variants.items():
        trainer = build_trainer(load_config(config, [*settings, f"output.run_dir={result}.{name}"]), resume=False)
        batches = iter(trainer.train_loader())
        train[name] = lambda trainer=trainer, batches=batches: trainer.train_step(batches)  # type: ignore[misc]
    timings = take_turns(train, turns=steps, warm_up=WARM_UP)
    peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10])
    peak_mb = comm.all_gather(peak, "benchmark.peak").max().item()
    if comm.is_main():
        seconds = {name: timing.seconds for name, timing in timings.items()}
        result.write_text(json.dumps({"seconds": seconds, "peak_mb": peak_mb}))
    comm.barrier()
    comm.shutdown()


class Launcher:
    """Starts ours and the peer on the same data, each launch in a process of its own per rank."""

    def __init__(self, folder: Path, steps: int, settings: Settings) -> None:
        self.folder = folder
        self.steps = steps
        self.settings = settings

    def ours(
        self, ranks: int, environment: dict[str, str] | None = None, **variants: tuple[str, ...]
    ) -> dict[str, Measured]:
        """Our trainer; several variants take turns in one launch."""
        arguments = ["--steps", str(self.steps), "--variants", json.dumps(variants)]
        found = self.under_mpirun(ranks, Path(__file__), *arguments, environment=environment)
        images = ranks * self.settings.images_per_rank
        return {name: Measured(images, Timing(times), found["peak_mb"]) for name, times in found["seconds"].items()}

    def under_mpirun(
        self, ranks: int, script: Path, *arguments: str, environment: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """What a script leaves in its ``--result``; its ``--config`` trains the same as the peer."""
        config = self.folder / "config.yaml"
        config.write_text(our_config(self.settings, self.folder).to_yaml())
        command = under_mpirun(ranks, str(script), "--config", str(config), *arguments)
        return self._run(command, environment or {})

    def peer(self, ranks: int) -> Measured:
        """The torchvision trainer."""
        command = [program("torchrun"), "--standalone", "--nproc-per-node", str(ranks)]
        command += [str(HERE / "torchvision_trainer.py"), "--steps", str(WARM_UP + self.steps)]
        for name, value in dataclasses.asdict(self.settings).items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        found = self._run(command, {})
        return Measured(ranks * self.settings.images_per_rank, Timing(found["seconds"][WARM_UP:]), found["peak_mb"])

    def _run(self, command: list[str], environment: dict[str, str]) -> dict[str, Any]:
        result = Path(tempfile.mkdtemp(dir=self.folder)) / "result.json"
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        run = subprocess.run([*command, "--result", str(result)], env=variables, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"{' '.join(command)}\n{run.stdout}{run.stderr}")
        return json.loads(result.read_text())


def in_rounds(launches: dict[str, Launch], rounds: int) -> dict[str, list[Measured]]:
    """Each launch once per round, beginning with another one every time."""
    names = list(launches)
    measured: dict[str, list[Measured]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found = launches[name]()
            measured[name].append(found)
            print(f"# {name}: {found.timing.median:.2f} s, {found.peak_mb:.0f} MB", file=sys.stderr, flush=True)
    return measured


def over_rounds(ours: list[Measured], theirs: list[Measured], figure: Callable[[Measured], float]) -> float:
    """Median over the rounds of the ratio of a figure."""
    return statistics.median(figure(mine) / figure(other) for mine, other in zip(ours, theirs, strict=True))


def _rate(measured: Measured) -> float:
    return measured.rate


def _seconds(measured: Measured) -> float:
    return measured.timing.median


def _memory(measured: Measured) -> float:
    return measured.peak_mb


def _both(ours: list[Measured], theirs: list[Measured], figure: Callable[[Measured], float], form: str) -> Row:
    medians = (statistics.median(map(figure, measured)) for measured in (ours, theirs))
    return *(format(median, form) for median in medians), f"{over_rounds(ours, theirs, figure):.2f}"


def pairs(launcher: Launcher, rounds: int) -> Sequence[Row]:
    """Ours in both precisions, one process, and the peer."""
    found = in_rounds(
        {
            "ours, float32": lambda: launcher.ours(2, it=FLOAT32)["it"],
            "ours, bfloat16": lambda: launcher.ours(2, it=BFLOAT16)["it"],
            "ours, bfloat16, one process": lambda: launcher.ours(1, it=BFLOAT16)["it"],
            "the peer": lambda: launcher.peer(2),
        },
        rounds,
    )
    float32, bfloat16, alone, peer = found.values()
    size = f"{launcher.settings.shorter_side} x {launcher.settings.longer_side} px, 2 ranks x 2 images"
    return [
        (f"{size}: images/s, ours in float32 / the peer", *_both(float32, peer, _rate, ".2f")),
        (f"{size}: images/s, ours in bfloat16, channels last / the peer", *_both(bfloat16, peer, _rate, ".2f")),
        ("the same step, bfloat16: s, two ranks / one process", *_both(bfloat16, alone, _seconds, ".2f")),
    ]


def synchronization(launcher: Launcher, rounds: int) -> Sequence[Row]:
    """CGBN against statistics of one rank."""
    rows = []
    for name, precision in (("float32", FLOAT32), ("bfloat16, channels last", BFLOAT16)):
        of_rounds = [launcher.ours(2, first=precision, second=precision + LOCAL_BN) for _ in range(rounds)]
        rows.append((f"the same step, {name}: s, CGBN / local batch normalization", *in_turns(of_rounds)))
    return rows


def instructions(launcher: Launcher, rounds: int) -> Sequence[Row]:
    """Both precisions by the instructions that convolutions may use, on one rank."""
    rows = []
    for name, isa in (("all instructions", "DEFAULT"), ("no AMX", "AVX512_CORE_BF16")):
        variables = {"ONEDNN_MAX_CPU_ISA": isa}
        of_rounds = [launcher.ours(1, variables, first=BFLOAT16, second=FLOAT32) for _ in range(rounds)]
        rows.append((f"the same step, one rank, {name}: s, bfloat16, channels last / float32", *in_turns(of_rounds)))
    return rows


def in_turns(of_rounds: list[dict[str, Measured]]) -> Row:
    """Seconds of two variants that took turns in each launch, and their ratio."""
    medians = (statistics.median(found[name].timing.median for found in of_rounds) for name in ("first", "second"))
    ratio = statistics.median(found["first"].timing.ratio(found["second"].timing) for found in of_rounds)
    return *(f"{seconds:.2f}" for seconds in medians), f"{ratio:.2f}"


def large(launcher: Launcher, rounds: int) -> Sequence[Row]:
    """Images of COCO's size on one rank: time and memory."""
    shorter, longer = COCO_SIZE
    settings = dataclasses.replace(launcher.settings, shorter_side=shorter, longer_side=longer)
    launcher = Launcher(launcher.folder, max(2, launcher.steps // 2), settings)
    found = in_rounds(
        {
            "large, ours, float32": lambda: launcher.ours(1, it=FLOAT32)["it"],
            "large, ours, bfloat16": lambda: launcher.ours(1, it=BFLOAT16)["it"],
            "large, the peer": lambda: launcher.peer(1),
        },
        rounds,
    )
    float32, bfloat16, peer = found.values()
    size = f"{shorter} x {longer} px, one rank, 2 images"
    return [
        (f"{size}: s, ours in {name} / the peer", *_both(ours, peer, _seconds, ".1f"))
        for name, ours in (("float32", float32), ("bfloat16, channels last", bfloat16))
    ] + [
        (f"{size}: peak memory in MB, ours in {name} / the peer", *_both(ours, peer, _memory, ".0f"))
        for name, ours in (("float32", float32), ("bfloat16, channels last", bfloat16))
    ]


PARTS = {"pairs": pairs, "synchronization": synchronization, "instructions": instructions, "large": large}


def section(rows: Sequence[Row], settings: Settings) -> str:
    """The section of docs/benchmarks.md."""
    return "\n".join(
        [
            "## The detector beside a torchvision trainer",
            "",
            "Written by `python benchmarks/detector_step.py --write docs/benchmarks.md`, which says how it measures; "
            f"one thread per rank. {machine()}, load average {os.getloadavg()[1]:.1f} over the five minutes before the "
            f"end. {settings.backbone} FPN, {settings.rois} RoIs and {settings.proposals:,} proposals per image. The "
            "peer is `benchmarks/torchvision_trainer.py`, in float32.",
            "",
            table(("figure", "ours, or first", "peer, or second", "ratio"), rows),
        ]
    )


def main() -> None:
    """Measures, prints and writes; with ``--variants`` what one rank of ours runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--rounds", type=int, default=3, help="launches of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a launch (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="Markdown file whose section is replaced")
    parser.add_argument("--variants", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variants:
        train_ours(arguments.variants, arguments.config, arguments.steps, arguments.result)
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = make_data(Path(folder) / "data")
        launcher = Launcher(Path(folder), arguments.steps, settings)
        rows: list[Row] = []
        for name in arguments.only:
            rows += PARTS[name](launcher, arguments.rounds)
            print(section(rows, settings), file=sys.stderr, flush=True)  # so that it is not lost if the next one fails
    text = section(rows, settings)
    print(text)
    if arguments.write:
        write_section(arguments.write, text)


if __name__ == "__main__":
    main()
