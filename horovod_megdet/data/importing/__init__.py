"""Data sets of other formats, as COCO JSON."""
