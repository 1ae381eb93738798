"""Image files: size and orientation from the header, pixels always as uint8 RGB."""

import contextlib
import io
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from horovod_megdet.errors import UserError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""Files in a folder that count as images."""

TRANSPOSED_ORIENTATIONS = {5, 6, 7, 8}
"""EXIF orientations that swap width and height."""

JPEG_START = b"\xff\xd8"

JPEG_APP1 = b"\xff\xe1"
"""Begins the segments of a JPEG that hold EXIF and XMP, and with them the orientation."""

FRACTIONS = (1, 2, 4, 8)
"""A JPEG may be decoded at one over these of its size, rounded up."""

HEAD_BYTES = 4096
"""Of a file that are read first; the header of most JPEGs takes less."""


class ImageFileError(UserError):
    """An image file that is missing, damaged or in an unsupported format."""


class ImageHeader(NamedTuple):
    """What the header of an image file says; sizes are (height, width)."""

    size: tuple[int, int]
    """As displayed, after EXIF orientation."""
    stored_size: tuple[int, int]
    """As stored, before it."""


def read_header(path: Path) -> ImageHeader:
    """The size of an image from the file's header; fast, but does not notice that the end of the file is missing.

    Raises :class:`ImageFileError` naming the file.
    """
    try:
        with path.open("rb") as file:
            if size := _size_of_plain_jpeg(file.read(HEAD_BYTES)):
                return ImageHeader(size, size)
            file.seek(0)
            with Image.open(file) as image:
                _check_mode(image)
                width, height = image.size
                transposed = _orientation(image) in TRANSPOSED_ORIENTATIONS
    except Exception as error:  # On damaged bytes, Pillow's plugins may raise anything.
        raise _unreadable(path, error) from None
    stored_size = (height, width)
    return ImageHeader(stored_size[::-1] if transposed else stored_size, stored_size)


def _size_of_plain_jpeg(head: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG without EXIF and XMP, faster than by Pillow; None where only Pillow can tell.

    ``head`` is the beginning of the file. What is wrong with a damaged one is left to Pillow to say.
    """
    if not head.startswith(JPEG_START) or JPEG_APP1 in head:
        return None
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(head)
    except (ValueError, KeyError):  # KeyError: combinations that it has no name for
        return None
    large = Image.MAX_IMAGE_PIXELS is not None and height * width >= Image.MAX_IMAGE_PIXELS
    return (height, width) if color_space in ("YCbCr", "Gray") and not large else None


def read_image(path: Path, at_least: tuple[int, int] | None = None) -> Tensor:
    """Decodes an image as displayed (after EXIF orientation) into a uint8 tensor (3, height, width), RGB.

    Gray, palette, CMYK and 16-bit images are converted; transparency is dropped. A JPEG is decoded at 1/2, 1/4 or 1/8
    of its size, which is several times faster and averages neighboring pixels, if the result is still no smaller than
    ``at_least = (height, width)``.

    Raises :class:`ImageFileError` naming the file.
    """
    try:
        return _decode(path.read_bytes(), at_least)
    except Exception as error:  # On damaged bytes, Pillow's plugins may raise anything.
        raise _unreadable(path, error) from None


def to_tensor(image: Image.Image) -> Tensor:
    """A Pillow image of any mode as a uint8 tensor (3, height, width), RGB; ignores EXIF orientation."""
    # Copied, because arrays that share memory with Pillow are read-only. In memory the order stays (height, width, 3),
    # which resizing is fastest with.
    return torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)


def _decode(content: bytes, at_least: tuple[int, int] | None) -> Tensor:
    with warnings.catch_warnings():
        # A large image, or odd EXIF data in a readable file, is not worth a warning in every epoch.
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as image:
            reduced = at_least is not None and _reduce(image, at_least)
            oriented = _orientation(image) != 1
            if image.format == "JPEG" and image.mode in ("RGB", "L") and not oriented and not reduced:
                # The same pixels as Pillow's in less time; the array is already in the order that resizing wants. What
                # is odd and harmless, such as bytes before the end marker, is an error here and none for Pillow.
                with contextlib.suppress(ValueError):
                    return torch.from_numpy(simplejpeg.decode_jpeg(content, "RGB")).permute(2, 0, 1)
            return to_tensor(ImageOps.exif_transpose(image) if oriented else image)


def _reduce(image: Image.Image, at_least: tuple[int, int]) -> bool:
    """Makes a JPEG decode at a fraction of its size if that is large enough; returns whether it will."""
    height, width = at_least
    if _orientation(image) in TRANSPOSED_ORIENTATIONS:
        height, width = width, height
    full_size = image.size
    image.draft(None, (width, height))
    return image.size != full_size


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, as far as the header tells."""
    if image.format == "TIFF":
        return 1  # Pillow has already applied it.
    if image.format == "PNG" and not image.info.keys() & {"exif", "Raw profile type exif"}:
        return 1  # Pillow would decode the whole image to look for EXIF data at its end.
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit gray: Pillow's own conversion would clip at 255 instead of scaling.
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    _check_mode(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")


def _unreadable(path: Path, error: Exception) -> ImageFileError:
    if isinstance(error, FileNotFoundError):
        return ImageFileError(f"{path}: no such image file")
    if isinstance(error, UnidentifiedImageError):
        return ImageFileError(f"{path}: not an image, or damaged at its beginning")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ImageFileError(f"{path}: the image cannot be read: {reason}")
