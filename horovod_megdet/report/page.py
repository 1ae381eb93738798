"""The HTML of the validation page: one file that needs nothing beside it."""

import base64
import io
from dataclasses import dataclass
from html import escape

from PIL import Image

from horovod_megdet.report.drawing import Color

STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #5f6770; --line: #dfe3e8; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 32px 60px; max-width: 1480px; background: #f6f7f9; color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0 0 2px; font-size: 24px; }
p { margin: 0 0 10px; color: var(--soft); }
.key { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 6px 22px; align-items: center;
       margin: 14px -32px 20px; padding: 10px 32px; background: #fffffff2; border-block: 1px solid var(--line); }
.key span { display: inline-flex; gap: 8px; align-items: center; }
.swatch { width: 14px; height: 14px; border-radius: 3px; }
.tag { padding: 0 6px; font-style: normal; border: 2px solid #444; background: #444; color: #fff; font-size: 13px; }
.hollow { border-style: dashed; background: #fff; color: #444; }
.divider { width: 1px; height: 20px; background: var(--line); }
main { display: flex; flex-wrap: wrap; gap: 20px; }
article { padding: 14px 16px 16px; background: #fff; border: 1px solid var(--line); border-radius: 10px; }
header { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline; margin-bottom: 10px; }
header b { font-size: 16px; overflow-wrap: anywhere; }
.tag.soft { border-color: #6e6e6e; }
.good { color: #12703a; } .bad { color: #b3261e; } .soft { color: var(--soft); }
.pair { display: flex; flex-wrap: wrap; gap: 16px; }
figure { flex: 1 1 260px; margin: 0; }
figcaption { margin-bottom: 4px; color: var(--soft); font-size: 13px; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
"""

TALLEST = 480
"""Pixels on the screen that a picture is high at most."""

ENLARGED_WIDTH = 323
"""Pixels on the screen that an enlarged picture is wide at most: two cards in a row."""


@dataclass(frozen=True)
class Card:
    """One validation image on the page."""

    name: str
    size: tuple[int, int]
    """(height, width) of the original image."""
    objects: Image.Image
    """The ground truth."""
    detections: Image.Image
    correct: int
    wrong: int
    missed: int
    crowded: bool
    """Whether there is a crowd region, drawn in grey."""


def page(title: str, summary: str, classes: list[tuple[str, Color]], cards: list[Card]) -> str:
    """The whole page. ``classes``: names and colours for the key."""
    swatches = "".join(f"<span><i class='swatch' style='background:{_css(color)}'></i>{escape(name)}</span>"
                       for name, color in classes)  # fmt: skip
    crowd = (
        "<span><i class='tag hollow soft'>crowd of name</i>many objects: not counted, nor what is found inside</span>"
    )
    totals = _counts(*(sum(getattr(card, name) for card in cards) for name in ("correct", "wrong", "missed")))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>{escape(summary)}</p>
<p>In these {len(cards)} images: {totals}</p>
<div class="key">
<span><i class="tag">name 0.98</i>correct: IoU of at least 0.5 with an object of its class</span>
<span><i class="tag hollow">✗ name 0.61</i>wrong</span>
<span><i class="tag hollow">✗ name</i>missed object</span>
{crowd if any(card.crowded for card in cards) else ""}
<i class="divider"></i>{swatches}
</div>
<main>
{"".join(_article(card) for card in cards)}</main></body></html>
"""


def _article(card: Card) -> str:
    height, width = card.size
    shown = min(card.objects.width, card.objects.width * TALLEST // card.objects.height)
    if card.objects.width > width:
        shown = min(shown, ENLARGED_WIDTH)
    return f"""<article style="flex: 0 1 {2 * shown + 52}px"><header><b>{escape(card.name)}</b>
<span class="soft">{width} × {height}</span><span>{_counts(card.correct, card.wrong, card.missed)}</span></header>
<div class="pair">{_figure("Ground truth", card.objects, shown)}{_figure("Detections", card.detections, shown)}</div>
</article>
"""


def _counts(correct: int, wrong: int, missed: int) -> str:
    entries = [("✓", correct, "correct", "good"), ("✗", wrong, "wrong", "bad"), ("✗", missed, "missed", "bad")]
    return " · ".join(
        f"<span class='{style if count else 'soft'}'>{sign} {count} {name}</span>"
        for sign, count, name, style in entries
    )


def _figure(caption: str, picture: Image.Image, shown: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    content = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<figure style='max-width: {shown}px'><figcaption>{caption}</figcaption>"
        f"<img alt='{caption}' width='{picture.width}' height='{picture.height}' "
        f"src='data:image/png;base64,{content}'></figure>"
    )


def _css(color: Color) -> str:
    return f"rgb{color}"
