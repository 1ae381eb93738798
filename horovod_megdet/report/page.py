"""Pages of one file that needs no other file, from the templates in ``templates``."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import jinja2
from PIL import Image

VALIDATION_PAGE = "validation.html"
DATASET_PAGE = "dataset.html"

TALLEST = 480
"""Pixels on the screen that a picture is high at most."""

ENLARGED_WIDTH = 323
"""Pixels on the screen that an enlarged picture is wide at most: two cards in a row."""


@dataclass(frozen=True)
class Card:
    """One validation image on the validation page."""

    name: str
    height: int
    width: int
    """Of the original image, in pixels."""
    objects: Image.Image
    """The ground truth."""
    detections: Image.Image
    correct: int
    wrong: int
    missed: int
    crowded: bool
    """Whether there is a crowd region, drawn in gray."""

    @property
    def shown_width(self) -> int:
        """Pixels on the screen that each of the two pictures is wide at most."""
        shown = min(self.objects.width, self.objects.width * TALLEST // self.objects.height)
        return min(shown, ENLARGED_WIDTH) if self.objects.width > self.width else shown

    def beside(self) -> Image.Image:
        """Both in one picture, the ground truth on the left."""
        gap = self.objects.width // 50
        picture = Image.new("RGB", (2 * self.objects.width + gap, self.objects.height), "white")
        picture.paste(self.objects)
        picture.paste(self.detections, (self.objects.width + gap, 0))
        return picture


@dataclass(frozen=True)
class PictureCard:
    """One image on the page of a data set."""

    name: str
    part: str
    """Such as ``train``."""
    height: int
    width: int
    """Of the original image, in pixels."""
    picture: Image.Image
    """With its boxes."""


def render(template: str, **values: Any) -> bytes:
    """The page of a template, such as ``validation.html``, in UTF-8. What is inserted into HTML is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("horovod_megdet.report"),
        autoescape=not template.endswith(".md"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["data_url"] = _data_url
    return environment.get_template(template).render(values).encode()


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
