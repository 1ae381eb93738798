"""What is where in a run directory, for those that write it and those that only read it."""

from pathlib import Path

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
SUMMARY_FILE = "summary.json"

CHECKPOINTS = "checkpoints"
DESCRIPTION_FILE = "checkpoint.json"
"""In the folder of each checkpoint: what it is."""


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The folders of all checkpoints, whole or not, by step."""
    return sorted((run_dir / CHECKPOINTS).glob("step_*"))
