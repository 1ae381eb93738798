"""Labeled boxes drawn on images."""

import colorsys
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels."""

SMALL = 400
"""Images whose longer side has fewer pixels are enlarged, so that labels do not cover them."""

LEGIBLE = 3.0
"""Minimum contrast of white text on the color of a class: WCAG 2's for large text."""

WHITE: Color = (255, 255, 255)
GRAY: Color = (110, 110, 110)

# Strong colors that differ in hue and lightness; class_color computes those of any further classes.
_FIRST_COLORS: tuple[Color, ...] = (
    (0, 102, 204),
    (214, 69, 0),
    (0, 140, 90),
    (190, 0, 120),
    (150, 105, 0),
    (105, 60, 190),
    (0, 150, 180),
    (200, 20, 40),
    (90, 130, 0),
    (120, 75, 50),
)


@dataclass(frozen=True)
class Mark:
    """A box to draw."""

    box: Rectangle
    """In pixels of the original image."""

    text: str
    color: Color

    emphasis: bool = True
    """Whether it gets a solid line and a filled label, or a dashed line and a hollow label."""


def class_color(number: int) -> Color:
    """The color of the class with this number, counted from 0: the same in every picture."""
    if number < len(_FIRST_COLORS):
        return _FIRST_COLORS[number]
    # Steps of the golden ratio around the color wheel keep the hues of any number of classes apart.
    hue, lightness = number * 0.618034 % 1, (0.33, 0.45)[number % 2]
    while True:
        red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.8)
        color = round(255 * red), round(255 * green), round(255 * blue)
        if contrast_with_white(color) >= LEGIBLE:
            return color
        lightness -= 0.02  # yellows and greens are too light for white text


def contrast_with_white(color: Color) -> float:
    """WCAG 2's contrast ratio between a color and white, 1 to 21."""
    parts = [part / 255 for part in color]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)


def draw_marks(image: Tensor, marks: Iterable[Mark]) -> Image.Image:
    """Draws boxes and their labels onto a copy of an image.

    Args:
        image: uint8 (3, H, W), RGB. It is enlarged by an integer factor if its longer side is below :data:`SMALL`.
        marks: what to draw, in any order. Labels avoid each other as far as there is room.
    """
    height, width = image.shape[-2:]
    factor = max(1, math.ceil(SMALL / max(height, width)))
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))
    if factor > 1:
        picture = picture.resize((width * factor, height * factor), Image.Resampling.BICUBIC)
    pen = _Pen(picture, enlarged=factor > 1)
    # Large boxes first, so that small ones inside them stay visible.
    scaled = [(_scale(mark.box, factor), mark) for mark in sorted(marks, key=lambda mark: -_area(mark.box))]
    for box, mark in scaled:
        pen.rectangle(box, mark.color, dashed=not mark.emphasis)
    for box, mark in scaled:
        pen.label(box, mark.text, mark.color, filled=mark.emphasis)
    return picture


class _Pen:
    """Draws on one picture, with lines and text in proportion to its size."""

    def __init__(self, picture: Image.Image, enlarged: bool) -> None:
        # The validation page shows all enlarged pictures at the same small width, so their text has to be larger.
        unit = picture.width / 25 if enlarged else max(picture.size) / 52
        self.size = picture.size
        self.draw = ImageDraw.Draw(picture)
        self.line = max(2, round(unit / 6))
        self.font = _font(max(12, round(unit)))
        self.labels: list[Rectangle] = []

    def rectangle(self, box: Rectangle, color: Color, dashed: bool) -> None:
        x1, y1, x2, y2 = self._inside(box)
        # A white edge keeps the line visible on a background of the same color.
        self.draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=WHITE, width=self.line + 2)
        if not dashed:
            self.draw.rectangle((x1, y1, x2, y2), outline=color, width=self.line)
            return
        inner = self.line - 1
        for start, stop in _dashes(x1, x2, 4 * self.line):
            self.draw.rectangle((start, y1, stop, y1 + inner), fill=color)
            self.draw.rectangle((start, y2 - inner, stop, y2), fill=color)
        for start, stop in _dashes(y1, y2, 4 * self.line):
            self.draw.rectangle((x1, start, x1 + inner, stop), fill=color)
            self.draw.rectangle((x2 - inner, start, x2, stop), fill=color)

    def label(self, box: Rectangle, text: str, color: Color, filled: bool) -> None:
        place = self._free_place(self._inside(box), text)
        self.labels.append(place)
        self.draw.rectangle(place, fill=color if filled else WHITE, outline=color, width=max(1, self.line // 2))
        middle = (place[1] + place[3]) / 2
        self.draw.text(
            (place[0] + self._pad, middle), text, fill=WHITE if filled else color, font=self.font, anchor="lm"
        )

    @property
    def _pad(self) -> int:
        return 2 + self.line // 2

    def _inside(self, box: Rectangle) -> Rectangle:
        width, height = self.size
        x1, y1 = (min(max(0.0, value), side - 1.0) for value, side in zip(box[:2], self.size, strict=True))
        return round(x1), round(y1), round(max(x1, min(box[2], width - 1.0))), round(max(y1, min(box[3], height - 1.0)))

    def _free_place(self, box: Rectangle, text: str) -> Rectangle:
        """Of the places around the box, best first, the one that covers the least of the labels drawn so far."""
        ascent, descent = self.font.getmetrics()
        width, height = math.ceil(self.font.getlength(text)) + 2 * self._pad, ascent + descent
        x1, y1, x2, y2 = box
        above, below, right = y1 - height, y2 + 1, x2 - width
        inside_top, inside_bottom = y1 + self.line, y2 - height - self.line
        corners = [
            *((x1, above), (right, above), (x1, below), (right, below)),
            *((x1, inside_top), (right, inside_top), (x1, inside_bottom), (right, inside_bottom)),
        ]
        if y1 < height:  # above the box there is no room
            corners.insert(0, (x1, inside_top))
        places = [self._shift_inside(x, y, width, height) for x, y in corners]
        return min(places, key=lambda place: sum(_overlap(place, label) for label in self.labels))

    def _shift_inside(self, x: float, y: float, width: float, height: float) -> Rectangle:
        x = max(0.0, min(x, self.size[0] - width))
        y = max(0.0, min(y, self.size[1] - height))
        return x, y, x + width - 1, y + height - 1


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _dashes(start: float, stop: float, length: int) -> list[tuple[float, float]]:
    count = max(1, round((stop - start) / (2 * length)))
    step = (stop - start) / (count + 0.5)  # one more dash than gaps, so that both corners are drawn
    return [(start + number * step, start + (number + 0.5) * step) for number in range(count + 1)]


def _scale(box: Rectangle, factor: int) -> Rectangle:
    x1, y1, x2, y2 = (value * factor for value in box)
    return x1, y1, x2, y2


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(first: Rectangle, second: Rectangle) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0.0, width) * max(0.0, height)
