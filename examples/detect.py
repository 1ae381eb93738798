"""Detections from Python: what is in some images, as a table, as COCO's results, and drawn.

python examples/detect.py runs/demo photo.jpg another.png
"""

import json
import sys
from pathlib import Path

import horovod_megdet as megdet

detector = megdet.load(sys.argv[1])
results = []
for number, found in enumerate(detector.detect(sys.argv[2:]), start=1):
    sure = found.above(0.5)
    for name, score, box in zip(sure.names, sure.scores, sure.boxes, strict=True):
        print(f"{found.source}: {name} {score:.2f} at {box.round(1)}")
    sure.draw().save(f"detected_{number}.png")
    results += found.to_coco(image_id=number)
Path("results.json").write_text(json.dumps(results))
