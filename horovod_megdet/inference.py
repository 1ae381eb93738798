"""A trained detector for Python programs: images in, detections out."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from horovod_megdet.config import Config, override
from horovod_megdet.data.images import read_header, read_image, to_tensor
from horovod_megdet.data.transforms import evaluation_transforms
from horovod_megdet.engine import checkpoint as checkpoints
from horovod_megdet.errors import UserError
from horovod_megdet.evaluation.detections import Arrays, Detections
from horovod_megdet.evaluation.views import Views, in_view
from horovod_megdet.models.detector import SIZE_DIVISIBLE, Detector, build_detector
from horovod_megdet.models.weights import load_checkpoint
from horovod_megdet.report.pictures import draw_detections

Size = tuple[int, int]
"""Height and width."""

Source = str | Path | Image.Image | np.ndarray | Tensor
"""An image: the path of a file, a Pillow image, an array uint8 (H, W, 3), or a tensor (3, H, W), uint8 or float in
[0, 1]; RGB."""


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """The detections in one image, by falling score."""

    source: Source = field(repr=False)
    """The image, as it was given."""

    size: Size
    """Height and width of the image in pixels."""

    boxes: np.ndarray
    """float32 (k, 4): x1, y1, x2, y2 in pixels of the image."""

    scores: np.ndarray
    """float32 (k,)."""

    labels: np.ndarray
    """int32 (k,): label l stands for class_names[l - 1] and category_ids[l - 1]."""

    class_names: list[str] = field(repr=False)

    category_ids: list[int] = field(repr=False)
    """Ids of the annotation file that the detector was trained with."""

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """The name of each detection's class."""
        return [self.class_names[label - 1] for label in self.labels]

    def above(self, score_threshold: float) -> "ImageDetections":
        """The detections with a score of at least ``score_threshold``."""
        keep = self.scores >= score_threshold
        return replace(self, boxes=self.boxes[keep], scores=self.scores[keep], labels=self.labels[keep])

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO's results: dicts with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score``."""
        found = Detections.of_images([(image_id, (self.boxes, self.scores, self.labels))])
        return found.to_coco(self.category_ids)

    def draw(self) -> Image.Image:
        """The image with all detections drawn on it; :meth:`above` leaves out the doubtful ones.

        A file is read again. Small images are enlarged.
        """
        image = _pixels(self.source).cpu()
        if image.is_floating_point():
            image = (image * 255).round().clamp(0, 255).byte()
        return draw_detections(image, self.boxes, self.labels, self.scores, self.class_names)


@dataclass(frozen=True, eq=False)
class TrainedDetector:
    """The detector of a checkpoint, in evaluation mode; does not communicate. :func:`load` reads one."""

    detector: Detector = field(repr=False)
    config: Config = field(repr=False)
    class_names: list[str]
    category_ids: list[int] = field(repr=False)

    @property
    def device(self) -> torch.device:
        """Where the detector runs."""
        return next(self.detector.parameters()).device

    def detect(self, images: Iterable[Source], batch_size: int = 4) -> list[ImageDetections]:
        """The detections in images of any sizes, in their order.

        Images are resized as in an evaluation of the configuration, and seen at several scales and mirrored if it says
        so (``evaluation.scales``, ``evaluation.flip``). At most ``batch_size`` of them run together, and only such that
        fill one batch without padding that they would not have alone: the detections in an image do not depend on the
        others. Files are turned as their EXIF orientation says; Pillow images are taken as they are.

        Raises :class:`UserError` for a file that cannot be read, and for what is not an image.
        """
        if isinstance(images, str | Path | Image.Image):
            raise UserError("detect() takes a list of images: detect([image]) for a single one.")
        views = Views.of(self.config.evaluation, self.config.model)
        found: dict[int, list[Arrays]] = {}
        sizes: list[tuple[Source, Size]] = []
        batches: dict[tuple[Size, torch.dtype], list[_View]] = defaultdict(list)
        for number, source in enumerate(images):
            size, of_image = self._views_of(number, source, views)
            sizes.append((source, size))
            found[number] = [_NOTHING] * len(of_image)
            for view in of_image:
                alike = view.padded_size, view.pixels.dtype
                batches[alike].append(view)
                if len(batches[alike]) >= batch_size:
                    self._detect(batches.pop(alike), found, suppress=views is None)
        for batch in batches.values():
            self._detect(batch, found, suppress=views is None)
        return [
            ImageDetections(
                *sizes[number],
                *(views.merged(candidates) if views else candidates[0]),
                self.class_names,
                self.category_ids,
            )
            for number, candidates in found.items()
        ]

    def _views_of(self, number: int, source: Source, views: Views | None) -> tuple[Size, list["_View"]]:
        """The size of an image, and the image as the network shall see it, once or several times."""
        path, generator = Path(source) if isinstance(source, str | Path) else None, torch.Generator()
        if path:
            size = read_header(path).size
        else:
            try:
                pixels = _pixels(source)
            except (OSError, ValueError) as error:  # OSError: Pillow decodes its images when they are first used
                raise UserError(f"Image {number} of the list, from 0, cannot be used: {error}.") from None
            size = _size(pixels)
        resized = []
        for transform in evaluation_transforms(self.config.data, self.config.evaluation.scales):
            new_size = transform.draw_size(size, generator)
            if path:
                pixels = read_image(path, at_least=new_size)
            resized.append(transform.apply(pixels, torch.zeros(0, 4), size, new_size, generator)[0])
        shown = views.all_of(resized) if views else [(image, False) for image in resized]
        return size, [_View(number, place, size, *view) for place, view in enumerate(shown)]

    @torch.inference_mode()
    def _detect(self, batch: list["_View"], found: dict[int, list[Arrays]], suppress: bool) -> None:
        """Puts what is detected in some views into ``found``."""
        predictions = self.detector.predict([view.pixels.to(self.device) for view in batch], suppress)
        for view, prediction in zip(batch, predictions, strict=True):
            arrays = in_view(prediction, _size(view.pixels), view.flipped, view.original_size)
            found[view.number][view.place] = arrays


_NOTHING: Arrays = (np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))


@dataclass(frozen=True)
class _View:
    """An image in a size that the network shall see."""

    number: int
    """Of the image."""
    place: int
    """Among the views of the image."""
    original_size: Size
    pixels: Tensor
    flipped: bool

    @property
    def padded_size(self) -> Size:
        """That of the network's input, in units of :data:`SIZE_DIVISIBLE`."""
        height, width = _size(self.pixels)
        return -(-height // SIZE_DIVISIBLE), -(-width // SIZE_DIVISIBLE)


def load(
    checkpoint: str | Path,
    device: str | torch.device = "cpu",
    score_threshold: float | None = None,
    settings: Sequence[str] = (),
) -> TrainedDetector:
    """Reads the detector of a checkpoint.

    Args:
        checkpoint: a checkpoint folder, or a run directory for its newest checkpoint.
        device: where the detector shall run: ``cpu``, ``cuda`` or ``cuda:1``.
        score_threshold: detections with a lower score are left out; by default what the configuration says.
        settings: other values of the checkpoint's configuration, such as ``evaluation.flip=true``.

    Raises :class:`UserError` for a checkpoint, device, score or setting that cannot be used.
    """
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise UserError(f"The lowest score must be between 0 and 1, not {score_threshold:g}.")
    saved = checkpoints.read(checkpoint)
    if score_threshold is not None:
        if sets_score(settings):
            raise UserError("Give the lowest score once: as score_threshold (--score), or as model.score_threshold.")
        settings = [*settings, f"model.score_threshold={score_threshold}"]
    config, run = override(saved.config, list(settings)), saved.run
    model = config.model.model_copy(update={"weights": "none"})
    detector = build_detector(model, config.batch_norm, len(run.class_names))
    load_checkpoint(detector, saved.path)
    detector.to(_checked(device)).eval()
    return TrainedDetector(detector, config, run.class_names, run.category_ids)


def sets_score(settings: Sequence[str]) -> bool:
    """Whether settings such as ``evaluation.flip=true`` give the lowest score of a detection."""
    return any(setting.startswith("model.score_threshold") for setting in settings)


def _checked(device: str | torch.device) -> torch.device:
    try:
        return torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise UserError(f"The device {str(device)!r} cannot be used: {reason}. Use cpu instead.") from None


def _pixels(source: Source) -> Tensor:
    """The image in its full resolution, (3, H, W), uint8 or float in [0, 1]."""
    match source:
        case str() | Path():
            return read_image(Path(source))
        case Image.Image():
            return to_tensor(source)
        case np.ndarray(ndim=3, dtype=np.uint8) if source.shape[2] == 3 and source.size:
            return torch.from_numpy(source.copy()).permute(2, 0, 1)  # Pillow's arrays are read-only
        case Tensor(ndim=3) if source.shape[0] == 3 and source.numel():
            if source.dtype == torch.uint8 or source.is_floating_point():
                return source
    shape = f" of {source.dtype} {tuple(source.shape)}" if isinstance(source, np.ndarray | Tensor) else ""
    raise ValueError(
        f"it is a {type(source).__name__}{shape}; wanted are a path, a Pillow image, an array of uint8 (height, width, "
        "3) or a tensor (3, height, width) of uint8 or floats in [0, 1]"
    )


def _size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]
