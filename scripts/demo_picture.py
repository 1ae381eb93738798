#!/usr/bin/env python3
"""Draws the picture at the top of the README: what the detector of a finished `make demo` finds on validation images.

.venv/bin/python scripts/demo_picture.py runs/demo docs/figures/demo.jpg
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from horovod_megdet.engine import checkpoint
from horovod_megdet.predict import predict_images

IMAGES = ("000003.jpg", "000004.jpg", "000007.jpg", "000008.jpg")
"""Landscape images, which fit beside each other."""
HEIGHT, GAP, SCORE = 240, 6, 0.7


def main(run_dir: Path, output: Path) -> None:
    """Puts the pictures of `megdet predict` beside each other."""
    folder = Path(checkpoint.read(run_dir).config.data.synthetic_root) / "images" / "val"
    with tempfile.TemporaryDirectory() as drawn:
        predict_images(run_dir, [folder / name for name in IMAGES], Path(drawn), SCORE, "cpu")
        pictures = [Image.open(path).convert("RGB") for path in sorted(Path(drawn).glob("*.png"))]
    pictures = [picture.resize((picture.width * HEIGHT // picture.height, HEIGHT)) for picture in pictures]
    strip = Image.new("RGB", (sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1), HEIGHT), "white")
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width + GAP
    output.parent.mkdir(parents=True, exist_ok=True)
    strip.save(output, quality=88)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
