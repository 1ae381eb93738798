"""The metrics of an evaluation: their names and meaning."""

import math

METRICS = {
    "AP": "IoU 0.50:0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "AP_small": "area < 32² px",
    "AP_medium": "32² to 96² px",
    "AP_large": "area > 96² px",
    "AR_1": "1 detection per image",
    "AR_10": "10 detections per image",
    "AR_100": "100 detections per image",
    "AR_small": "area < 32² px",
    "AR_medium": "32² to 96² px",
    "AR_large": "area > 96² px",
}
"""COCO's twelve box metrics and what each one covers, in the order of pycocotools."""

MAIN_METRIC = "AP"
"""Decides which checkpoint is the best."""

DRAWN_METRICS = (MAIN_METRIC, "AP50")
"""Drawn over epochs."""


def percent(value: float) -> str:
    """A metric between 0 and 1 in percent, such as `43.2`; a dash for NaN."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}"
