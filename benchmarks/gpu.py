"""Training on one NVIDIA GPU: the section "On one GPU" of docs/benchmarks.md, by parts.

    python benchmarks/gpu.py                                           # measures everything and prints it; minutes
    python benchmarks/gpu.py steps waits --write docs/benchmarks.md    # these parts, into the file

steps    images/s and peak memory of a step of the detector, R50-FPN with a head of two layers at 800 x 1333, beside
         torchvision's fasterrcnn_resnet50_fpn in a plain loop: the same images, already in (page-locked) memory, the
         same optimizer, and the same precision. Random weights, batch normalization in training mode, all layers train.
phases   where the time of such a step goes, with the GPU waited for between the phases
cgbn     what the machinery of cross-GPU BN costs: this rank sends its sums to itself, through Horovod and NCCL
loader   images/s with the loader reading, decoding and resizing JPEG files of 640 x 480, beside images in memory
waits    where the host waits for the GPU in a step

Variants take turns; figures are medians over the turns, in which the GPU is waited for once, at the end.
"""

import argparse
import collections
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from document import table, write_section
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from horovod_megdet import comm
from horovod_megdet.config import BatchNormConfig, DataConfig, ModelConfig, Norm, RuntimeConfig, SolverConfig
from horovod_megdet.data.coco import CocoDataset, load_dataset
from horovod_megdet.data.loader import Batch, build_train_loader
from horovod_megdet.engine import hardware
from horovod_megdet.engine.losses import agree_on_step, weigh_losses
from horovod_megdet.models.detector import Detector, build_detector
from horovod_megdet.solver.optimizer import build_optimizer

HEADING = "## On one GPU"
CLASSES = 80
OBJECTS = 8
Amp = Literal["none", "float16", "bfloat16"]
PRECISIONS: dict[str, Amp] = {"float32 (TF32)": "none", "float16": "float16", "bfloat16": "bfloat16"}
LOADED_IMAGES = 640
"""Of 640 x 480 that the loader reads."""

Step = Callable[[], None]
Row = tuple[object, ...]


def random_batches(images: int, size: tuple[int, int], count: int = 4) -> list[Batch]:
    """Batches of uint8 images (3, height, width) in page-locked memory, with :data:`OBJECTS` boxes each."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    batches = []
    for number in range(count):
        pictures = torch.randint(0, 256, (images, height, width, 3), dtype=torch.uint8, generator=generator)
        corners = torch.rand(images, OBJECTS, 2, generator=generator) * 0.6
        boxes = torch.cat([corners, corners + 0.05 + 0.3 * torch.rand(images, OBJECTS, 2, generator=generator)], dim=2)
        labels = torch.randint(1, CLASSES + 1, (images, OBJECTS), generator=generator)
        targets = [
            {
                "boxes": boxes[image] * torch.tensor([width, height, width, height]),
                "labels": labels[image],
                "image_id": image,
                "index": image,
                "seed": 1000 * number + image,
            }
            for image in range(images)
        ]
        batch = Batch([picture.permute(2, 0, 1) for picture in pictures], targets)
        batches.append(batch.pin_memory() if torch.cuda.is_available() else batch)
    return batches


def cycle(batches: list[Batch]) -> Iterator[Batch]:
    """The batches again and again."""
    while True:
        yield from batches


class Ours:
    """A training step as :class:`~horovod_megdet.engine.trainer.Trainer` takes it, on one rank."""

    def __init__(self, batches: Iterator[Batch], amp: Amp, channels_last: bool, group: comm.Group | None = None):
        self.device, self.batches = DEVICE, batches
        self.runtime = RuntimeConfig(amp=amp, channels_last=channels_last)
        norm: Norm = "local" if group is None else "cgbn"
        model = ModelConfig(weights="none", backbone_norm=norm, fpn_norm="none", box_head_norm="none")
        torch.manual_seed(0)
        self.detector: Detector = build_detector(
            model, BatchNormConfig(), CLASSES, group=group, channels_last=channels_last
        ).to(DEVICE)
        self.detector.train()
        self.optimizer = comm.distributed_optimizer(
            build_optimizer(self.detector, SolverConfig(base_lr=1e-5)), self.detector, 1, fp16=False
        )
        self.scaler = hardware.loss_scaler(self.runtime, DEVICE)
        self.step = 0

    def __call__(self) -> None:
        batch = next(self.batches).to(self.device)
        with hardware.autocast(self.runtime, self.device):
            losses = self.detector.forward_losses(batch.images, batch.targets)
        loss, report = weigh_losses(batch, losses)
        self.scaler.scale(loss).backward()
        agree_on_step([report], False, self.step, skip_unreadable=False)
        comm.synchronize(self.optimizer)
        with self.optimizer.skip_synchronize():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1


class Torchvision:
    """A training step of torchvision's detector in a plain loop."""

    def __init__(self, batches: Iterator[Batch], amp: Amp) -> None:
        self.batches = batches
        self.runtime = RuntimeConfig(amp=amp)
        torch.manual_seed(0)
        self.model: nn.Module = fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=CLASSES + 1, trainable_backbone_layers=5
        ).to(DEVICE)
        self.model.train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-5, momentum=0.9, weight_decay=1e-4)
        self.scaler = hardware.loss_scaler(self.runtime, DEVICE)

    def __call__(self) -> None:
        batch = next(self.batches)
        images = [image.to(DEVICE, non_blocking=True).float() / 255 for image in batch.images]
        targets = [
            {key: target[key].to(DEVICE, non_blocking=True) for key in ("boxes", "labels")} for target in batch.targets
        ]
        with hardware.autocast(self.runtime, DEVICE):
            losses = self.model(images, targets)
        loss = sum(losses.values())
        assert isinstance(loss, Tensor)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def synchronize() -> None:
    """Waits until the GPU has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def seconds_per_step(variants: dict[str, Step], turns: int, steps: int = 3, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of a step of each variant, by turns."""
    for step in variants.values():
        for _ in range(warm_up):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(turns):
        for name, step in variants.items():
            synchronize()
            began = time.perf_counter()
            for _ in range(steps):
                step()
            synchronize()
            seconds[name].append((time.perf_counter() - began) / steps)
    return seconds


def ratio(mine: list[float], theirs: list[float]) -> float:
    """Median over the turns of one time divided by the other."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def peak_mib(step: Step) -> float:
    """Peak memory of a step, in MiB; that of the models of all variants counts alike."""
    if DEVICE.type != "cuda":
        return float("nan")
    synchronize()
    held = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    step()
    synchronize()
    return (torch.cuda.max_memory_allocated(DEVICE) - held) / 2**20


def measure_steps(sizes: list[int], side: tuple[int, int], turns: int) -> list[str]:
    """The part ``steps``."""
    rows: list[Row] = []
    for name, amp in PRECISIONS.items():
        for images in sizes:
            batches = random_batches(images, side)
            variants: dict[str, Step] = {
                "last": Ours(cycle(batches), amp, channels_last=True),
                "first": Ours(cycle(batches), amp, channels_last=False),
                "torchvision": Torchvision(cycle(batches), amp),
            }
            seconds = seconds_per_step(variants, turns)
            rate = {each: images / statistics.median(values) for each, values in seconds.items()}
            memory = {each: peak_mib(step) for each, step in variants.items()}
            best = ratio(seconds["torchvision"], seconds["last"])
            rows.append(
                (
                    name,
                    images,
                    *(f"{rate[each]:.1f}" for each in variants),
                    f"{best:.2f}",
                    f"{memory['last']:.0f} / {memory['torchvision']:.0f}",
                )
            )
            print(rows[-1], flush=True)
            del variants
    ours = ("ours, channels last: images/s", "ours, channels first: images/s")
    head = (
        "precision",
        "images",
        *ours,
        "torchvision: images/s",
        "ours / torchvision",
        "peak memory of a step, MiB: ours / torchvision",
    )
    return titled("Steps of the detector, images in memory", head, rows)


def measure_phases(sizes: list[int], side: tuple[int, int], turns: int) -> list[str]:
    """The part ``phases``."""
    rows: list[Row] = []
    for images in sizes:
        ours = Ours(cycle(random_batches(images, side)), "bfloat16", channels_last=True)
        found = [phases(ours) for _ in range(turns + 2)][2:]
        medians = [statistics.median(values) for values in zip(*(each.values() for each in found), strict=True)]
        rows.append((images, *(f"{1e3 * each:.1f}" for each in medians)))
        print(rows[-1], flush=True)
    names = ("images, normalized", "backbone and FPN", "RPN", "RoI heads", "backward", "losses fetched, step taken")
    return titled("Phases of a step in bfloat16, channels last, ms", ("images", *names), rows)


def phases(ours: Ours) -> dict[str, float]:
    """Seconds of each phase of a step; the GPU is waited for after each."""
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def ends(name: str) -> None:
        nonlocal last
        synchronize()
        seconds[name], last = time.perf_counter() - last, time.perf_counter()

    detector, batch = ours.detector, next(ours.batches).to(DEVICE)
    with hardware.autocast(ours.runtime, DEVICE):
        images, _ = detector.transform(batch.images)
        ends("images")
        features = detector.backbone(images.tensors)
        ends("backbone")
        proposals, of_anchors = detector.rpn(images, features, batch.targets)
        ends("rpn")
        _, of_rois = detector.roi_heads(features, proposals, images.image_sizes, batch.targets)
        ends("roi_heads")
    found = of_anchors | of_rois
    loss = torch.stack([found[name] for name in found if name.startswith("loss")]).sum()
    loss.backward()
    ends("backward")
    loss.item()
    with ours.optimizer.skip_synchronize():
        ours.optimizer.step()
    ours.optimizer.zero_grad()
    ends("step")
    return seconds


def measure_cgbn(sizes: list[int], side: tuple[int, int], turns: int) -> list[str]:
    """The part ``cgbn``."""
    import horovod.torch as hvd

    # Two ranks in name, so that the layers send their sums; Horovod knows that there is one.
    pretended = comm.Group((0, 0), hvd.global_process_set)
    rows: list[Row] = []
    for images in sizes:
        batches = random_batches(images, side)
        variants: dict[str, Step] = {
            "local": Ours(cycle(batches), "bfloat16", channels_last=True),
            "cgbn": Ours(cycle(batches), "bfloat16", channels_last=True, group=pretended),
        }
        seconds = seconds_per_step(variants, turns)
        medians = (f"{1e3 * statistics.median(values):.1f}" for values in seconds.values())
        rows.append((images, *medians, f"{ratio(seconds['cgbn'], seconds['local']):.3f}"))
        print(rows[-1], flush=True)
    settings = ", ".join(f"{name}={value}" for name, value in comm.launch_settings().items())
    head = ("images", "local BN, ms", "CGBN with a rank of its own, ms", "ratio")
    return [*titled("The machinery of CGBN, bfloat16, channels last", head, rows), f"With {settings}.", ""]


def measure_loader(sizes: list[int], side: tuple[int, int], turns: int) -> list[str]:
    """The part ``loader``; the size of the images follows from the files."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = photos(Path(folder))
        for images in sizes:
            for workers in (4, 8, 16):
                data = DataConfig(workers=workers, images_per_rank=images)
                loader = build_train_loader(
                    dataset, data, seed=0, rank=0, ranks=1, start=0, stop=10**6, pin_memory=DEVICE.type == "cuda"
                )
                batches = iter(loader)
                size = next(batches).images[0].shape[1:]
                variants: dict[str, Step] = {
                    "loader": Ours(batches, "bfloat16", channels_last=True),
                    "memory": Ours(cycle(random_batches(images, (size[0], size[1]))), "bfloat16", channels_last=True),
                }
                seconds = seconds_per_step(variants, turns, steps=max(3, 48 // images))
                rate = {each: images / statistics.median(values) for each, values in seconds.items()}
                rows.append((images, workers, f"{rate['loader']:.1f}", f"{rate['memory']:.1f}"))
                print(rows[-1], flush=True)
                del variants, batches, loader
    head = ("images", "workers", "with the loader: images/s", "in memory: images/s")
    return titled("With the loader, bfloat16, channels last", head, rows)


def photos(folder: Path) -> CocoDataset:
    """A data set of smooth random JPEG files of 640 x 480, with :data:`OBJECTS` boxes each."""
    random = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(LOADED_IMAGES):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 640, "height": 480})
        for _ in range(OBJECTS):
            x, y, w, h = (random.uniform(0, 300), random.uniform(0, 200), *random.uniform(30, 250, 2))
            box = {"image_id": number, "category_id": int(random.integers(1, CLASSES + 1)), "bbox": [x, y, w, h]}
            annotations.append({"id": len(annotations) + 1, "area": w * h, "iscrowd": 0, **box})
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return load_dataset(folder / "annotations.json", folder, training=True)


def measure_waits(sizes: list[int], side: tuple[int, int], turns: int) -> list[str]:
    """The part ``waits``."""
    lines = [f"### Where the host waits for the GPU, in a step of {sizes[0]} images", ""]
    batches = random_batches(sizes[0], side)
    for name, step in (
        ("ours", Ours(cycle(batches), "bfloat16", channels_last=True)),
        ("torchvision", Torchvision(cycle(batches), "bfloat16")),
    ):
        for _ in range(2):
            step()
        places = waits(step)
        print(name, places, flush=True)
        lines += [f"- {name}, {sum(places.values())} times:"]
        lines += [f"  - {count} in `{place}`" for place, count in places.most_common()]
    return [*lines, ""]


def waits(step: Step) -> collections.Counter[str]:
    """How often the host waits in a step, by file and line; waits in the backward pass have the place of its call."""
    if DEVICE.type != "cuda":
        return collections.Counter()
    synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    synchronizing = [warning for warning in caught if "synchroniz" in str(warning.message)]
    places = (f"{Path(warning.filename).parent.name}/{Path(warning.filename).name}:{warning.lineno}"
              for warning in synchronizing)  # fmt: skip
    return collections.Counter(places)


PARTS: dict[str, Callable[[list[int], tuple[int, int], int], list[str]]] = {
    "steps": measure_steps,
    "phases": measure_phases,
    "cgbn": measure_cgbn,
    "loader": measure_loader,
    "waits": measure_waits,
}


def titled(title: str, head: tuple[str, ...], rows: list[Row]) -> list[str]:
    """A table under a heading, as lines of Markdown."""
    return [f"### {title}", "", table(head, [tuple(map(str, row)) for row in rows]), ""]


def section(lines: list[str]) -> str:
    """The section of docs/benchmarks.md."""
    gpu = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "no GPU"
    built = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    lead = (
        f"Written by `python benchmarks/gpu.py --write docs/benchmarks.md`, which says how it measures. {gpu}, {built}."
    )
    return "\n".join([HEADING, "", lead, "", *lines])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--images", type=int, nargs="+", default=[2, 4, 8, 16], help="images of a step")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], help="height and width of the images")
    parser.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--write", type=Path, help="Markdown file whose section is replaced")
    parser.add_argument("--device", default="cuda", help="cpu tries the program without a GPU (default: %(default)s)")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs an NVIDIA GPU, and torch sees none.")
    global DEVICE
    DEVICE = torch.device(arguments.device)
    comm.init()
    torch.set_float32_matmul_precision("high")
    lines = []
    for part in arguments.parts or PARTS:
        lines += PARTS[part](arguments.images, tuple(arguments.size), arguments.turns)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    text = section(lines)
    print(text)
    if arguments.write:
        write_section(arguments.write, text)
    comm.shutdown()


DEVICE = torch.device("cpu")

if __name__ == "__main__":
    main()
