"""The built-in default data set: shapes on textured backgrounds, in COCO format, drawn in seconds."""

import json
import math
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from horovod_megdet.errors import UserError
from horovod_megdet.progress import progress

VERSION = 1
"""Goes up whenever the same seed would give different images or annotations."""

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring")
CATEGORY_IDS = (1, 2, 3, 5, 8, 13)
"""With gaps, as in COCO itself."""

# How difficult the images are.
IMAGE_SIZES = ((128, 176), (128, 192), (144, 176), (144, 192))
"""(height, width) of landscape images."""
PORTRAIT_FRACTION = 0.3
EMPTY_FRACTION = 0.04
OBJECTS = (2, 6)
"""Fewest and most objects that the generator tries to place in an image that is not empty."""
OBJECT_SIDES = (24.0, 64.0)
"""Pixels, geometric mean of the two sides before rotation; log-uniform."""
STRETCH = 1.5
"""Largest ratio of the two sides before rotation."""
TURN = math.radians(20)
"""Largest rotation in either direction, in radians."""
VISIBLE_FRACTION = 0.7
"""Smallest fraction of an object that objects in front of it and the image's edge may leave visible."""
CONTRAST = 100.0
"""Smallest distance in RGB between an object's color and the mean of the background behind it."""
CLUTTER = (0, 3)
"""Fewest and most lines in the background."""
NOISE = 10.0
"""Standard deviation of the noise of each pixel, in gray levels."""

SUPERSAMPLING = 4
PLACING_TRIES = 8
JPEG_QUALITY = 90
MARKER = "synthetic.json"


@dataclass
class _Object:
    """An object that was placed in an image."""

    label: int
    """Index in `CLASSES`."""
    full_area: float
    """Square pixels, if nothing were in front of it."""
    box: list[float]
    """x, y, width, height of the whole object inside the image, as an annotator would guess it."""
    visible: NDArray[np.bool_]
    """(height, width) of the image: where the object can be seen."""


def ensure_synthetic(root: Path, train_images: int, val_images: int, seed: int = 0) -> dict[str, str]:
    """Writes the data set to ``root`` unless it exists: ``annotations/{train,val}.json``, ``images/{train,val}/``.

    Several processes and hosts may call this at once: each draws in a folder of its own, and the first one to rename
    its folder wins. Returns the values of ``train_annotations``, ``train_images``, ``val_annotations`` and
    ``val_images`` for the configuration's section ``data``.

    Raises :class:`UserError` if ``root`` holds something else, or cannot be written.
    """
    wanted = {"version": VERSION, "train_images": train_images, "val_images": val_images, "seed": seed}
    if not _exists(root, wanted):
        try:
            _write(root, wanted)
        except OSError as error:
            raise UserError(
                f"{root}: the generated data set cannot be written: {error}. Set data.synthetic_root to another folder."
            ) from None
    paths = {f"{split}_annotations": root / "annotations" / f"{split}.json" for split in ("train", "val")}
    paths |= {f"{split}_images": root / "images" / split for split in ("train", "val")}
    return {key: str(path) for key, path in paths.items()}


def draw_image(random: np.random.Generator) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """An image, uint8 (height, width, 3), and its objects with `category_id`, `bbox` [x, y, w, h] and `area`."""
    height, width = IMAGE_SIZES[random.integers(len(IMAGE_SIZES))]
    if random.random() < PORTRAIT_FRACTION:
        height, width = width, height
    canvas = _background(height, width, random)
    objects: list[_Object] = []
    if random.random() >= EMPTY_FRACTION:
        for _ in range(random.integers(OBJECTS[0], OBJECTS[1], endpoint=True)):
            _place(canvas, objects, random)
    canvas += random.normal(0.0, NOISE, canvas.shape)
    entries = [
        {
            "category_id": CATEGORY_IDS[placed.label],
            "bbox": placed.box,
            "area": float(placed.visible.sum()),
        }
        for placed in objects
    ]
    return canvas.clip(0, 255).astype(np.uint8), entries


def _background(height: int, width: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Smooth colors, blotches and lines: float (height, width, 3), 0 to 255."""

    def smooth(cells: int, channels: int) -> NDArray[np.float64]:
        shape = (max(2, cells * height // width), cells, channels)
        grid = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8).squeeze())
        pixels = np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
        return pixels.reshape(height, width, channels)

    canvas = 90 + 0.3 * smooth(3, 3) + random.uniform(0.05, 0.25) * (smooth(24, 1) - 128)
    lines = Image.new("L", (width, height))
    draw = ImageDraw.Draw(lines)
    for _ in range(random.integers(CLUTTER[0], CLUTTER[1], endpoint=True)):
        ends = random.uniform(0, 1, (2, 2)) * (width, height)
        draw.line([tuple(end) for end in ends], fill=255, width=int(random.integers(1, 4)))
    opacity = np.asarray(lines, dtype=np.float64)[..., None] / 255
    return canvas + opacity * (random.uniform(0, 255, 3) - canvas)


def _place(canvas: NDArray[np.float64], objects: list[_Object], random: np.random.Generator) -> None:
    """Draws an object in front of the others if it finds a place that leaves enough of each of them visible."""
    height, width = canvas.shape[:2]
    label = int(random.integers(len(CLASSES)))
    for _ in range(PLACING_TRIES):
        side = math.exp(random.uniform(*np.log(OBJECT_SIDES)))
        stretch = STRETCH ** random.uniform(-0.5, 0.5)
        center = random.uniform(0.25 * side, (width - 0.25 * side, height - 0.25 * side))
        outlines = _outlines(label, side * stretch, side / stretch, random.uniform(-TURN, TURN), center)
        opacity = _rasterize(outlines, height, width)
        mask = opacity >= 0.5
        full_area = abs(_area(outlines[0])) - sum(abs(_area(hole)) for hole in outlines[1:])
        seen = [(placed.visible & ~mask).sum() / placed.full_area for placed in objects] + [mask.sum() / full_area]
        if min(seen) >= VISIBLE_FRACTION:
            break
    else:
        return
    for placed in objects:
        placed.visible &= ~mask
    corner = outlines[0].min(axis=0).clip(0, (width, height))
    other_corner = outlines[0].max(axis=0).clip(0, (width, height))
    box = [round(float(value), 2) for value in (*corner, *(other_corner - corner))]
    objects.append(_Object(label, full_area, box, mask))
    _paint(canvas, opacity, random)


def _outlines(
    label: int, width: float, height: float, angle: float, center: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """Outline of a shape and, for the ring, of its hole: each (points, 2), x and y in pixels."""
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return [outline * (width / 2, height / 2) @ turn + center for outline in _unit_outlines(CLASSES[label])]


def _unit_outlines(name: str) -> list[NDArray[np.float64]]:
    """The outlines in the square from -1 to 1."""
    arm = 0.36
    match name:
        case "circle":
            return [_polar(np.ones(48))]
        case "square":
            return [0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float)]
        case "triangle":
            return [_polar(np.ones(3))]
        case "star":
            return [_polar(np.tile([1.0, 0.42], 5))]
        case "cross":
            quarter = np.array([(arm, arm), (arm, 1), (-arm, 1)])
            turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
            return [np.concatenate([quarter @ np.linalg.matrix_power(turn, times) for times in range(4)])]
        case "ring":
            return [_polar(np.ones(48)), _polar(np.full(48, 0.55))]
    raise ValueError(f"no shape {name!r}")


def _polar(radii: NDArray[np.float64]) -> NDArray[np.float64]:
    angles = np.arange(len(radii)) * 2 * math.pi / len(radii)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _area(outline: NDArray[np.float64]) -> float:
    """Signed area of a polygon (points, 2)."""
    following = np.roll(outline, -1, axis=0)
    return float((outline[:, 0] * following[:, 1] - outline[:, 1] * following[:, 0]).sum() / 2)


def _rasterize(outlines: list[NDArray[np.float64]], height: int, width: int) -> NDArray[np.float64]:
    """Opacity of every pixel, 0 to 1, (height, width), with smooth edges."""
    picture = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    draw = ImageDraw.Draw(picture)
    for outline, opacity in zip(outlines, (255, 0), strict=False):
        # Pillow's coordinates refer to pixel centers.
        draw.polygon((outline * SUPERSAMPLING - 0.5).ravel().tolist(), fill=opacity)
    return np.asarray(picture.reduce(SUPERSAMPLING), dtype=np.float64) / 255


def _paint(canvas: NDArray[np.float64], opacity: NDArray[np.float64], random: np.random.Generator) -> None:
    """Fills a shape with a shaded, sometimes striped, color that stands out from what is behind it."""
    height, width = opacity.shape
    behind = (canvas * opacity[..., None]).sum(axis=(0, 1)) / opacity.sum()
    color = random.uniform(0, 255, 3)
    while np.linalg.norm(color - behind) < CONTRAST:
        color = random.uniform(0, 255, 3)
    direction = random.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:height, :width]
    along = x * math.cos(direction) + y * math.sin(direction)
    shade = random.uniform(-0.4, 0.4) * along
    if random.random() < 0.2:
        shade += 20 * np.sign(np.sin(along * 2 * math.pi / random.uniform(5, 12)))
    shade -= (shade * opacity).sum() / opacity.sum()
    canvas += opacity[..., None] * (color + shade[..., None] - canvas)


def _exists(root: Path, wanted: dict[str, int]) -> bool:
    """Whether ``root`` holds the wanted data set; anything else there, except an empty folder, is an error."""
    if not root.exists():
        return False
    try:
        found = json.loads((root / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        if root.is_dir() and not any(root.iterdir()):
            return False
        raise UserError(
            f"{root}: exists and is not a generated data set. Set data.synthetic_root to another folder."
        ) from None
    if found != wanted:
        raise UserError(
            f"{root}: holds a data set generated with other settings ({found} instead of {wanted}). "
            "Delete it, or set data.synthetic_root to another folder."
        )
    return True


def _write(root: Path, wanted: dict[str, int]) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{root.name}.{socket.gethostname()}.", dir=root.parent))
    try:
        for number, (split, count) in enumerate((("train", wanted["train_images"]), ("val", wanted["val_images"]))):
            _write_split(draft, split, count, [wanted["seed"], number])
        (draft / MARKER).write_text(json.dumps(wanted), encoding="utf-8")
        draft.chmod(0o755)
        try:
            draft.rename(root)
        except OSError:
            # Another process may have been first.
            if not _exists(root, wanted):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_split(root: Path, split: str, count: int, seed: list[int]) -> None:
    folder = root / "images" / split
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        progress.advance()
        pixels, objects = draw_image(np.random.default_rng([*seed, image_id]))
        name = f"{image_id:06d}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=JPEG_QUALITY)
        images.append({"id": image_id, "file_name": name, "height": pixels.shape[0], "width": pixels.shape[1]})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0, **entry})
    categories = [{"id": id, "name": name} for id, name in zip(CATEGORY_IDS, CLASSES, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
