"""What a checkpoint says to someone who finds nothing but its folder: ``README.md``, with facts of the run only."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from horovod_megdet.config import Config
from horovod_megdet.data.coco import CocoDataset
from horovod_megdet.engine import checkpoint
from horovod_megdet.engine.checkpoint import Position, RunDescription
from horovod_megdet.evaluation.metrics import METRICS, percent
from horovod_megdet.files import atomic_write
from horovod_megdet.report.page import render
from horovod_megdet.report.rows import finite
from horovod_megdet.report.runs import Run, read_runs
from horovod_megdet.run_files import CURVES_FILE
from horovod_megdet.solver.schedule import Schedule
from horovod_megdet.versions import versions

CARD_FILE = "README.md"


def write_model_cards(
    run_dir: Path,
    description: RunDescription,
    position: Position,
    schedule: Schedule,
    train_set: CocoDataset,
    val_set: CocoDataset,
) -> list[Path]:
    """Writes the cards of the best and of the last checkpoint, with the run's curves, and returns their paths.

    Raises :class:`UserError` if they cannot be written, or if the run's metrics cannot be read.
    """
    [run] = read_runs([run_dir])
    evaluations = {checkpoint.name(row["step"]): row for row in run.evaluations}
    written = []
    for name in dict.fromkeys([position.best_checkpoint, checkpoint.name(position.step)]):
        folder = checkpoint.folder(run_dir) / str(name)
        if name in evaluations and folder.exists():
            values = _facts(run, evaluations[name], description, schedule, train_set, val_set)
            card = render("model_card.md", folder=name, is_best=name == position.best_checkpoint, **values)
            _copy(run_dir / CURVES_FILE, folder / CURVES_FILE)
            with atomic_write(folder / CARD_FILE) as file:
                file.write(card)
            written.append(folder / CARD_FILE)
    return written


def _facts(
    run: Run,
    evaluation: dict[str, Any],
    description: RunDescription,
    schedule: Schedule,
    train_set: CocoDataset,
    val_set: CocoDataset,
) -> dict[str, Any]:
    config = Config.model_validate(description.config)
    training, validation = _boxes(train_set), _boxes(val_set)
    hours = run.hours([evaluation])[0]
    columns = (description.class_names, description.category_ids, training, validation)
    return {
        "title": f"{run.path.name}, step {evaluation['step']}",
        "version": versions(("horovod-megdet",))["horovod-megdet"],
        "model": config.model,
        "data": config.data,
        "epoch": evaluation["epoch"],
        "metrics": [(name, metric.meaning, percent(finite(evaluation.get(name)))) for name, metric in METRICS.items()],
        "classes": [
            {
                "name": name.replace("|", r"\|"),
                "id": category_id,
                "training": in_training,
                "validation": in_validation,
                "ap": percent(finite(evaluation["per_class"].get(name))),
            }
            for name, category_id, in_training, in_validation in zip(*columns, strict=True)
        ],
        "training": {"images": len(train_set), "boxes": sum(training)},
        "validation": {"images": len(val_set), "boxes": sum(validation)},
        "fingerprint": description.training_data,
        "training_facts": [
            ("so far", f"{evaluation['step']} steps, {evaluation['images_seen']} images"),
            ("time of the steps", f"{hours:.2f} hours" if np.isfinite(hours) else "unknown"),
            ("starting weights", config.model.weights),
            ("normalization", f"backbone {config.model.backbone_norm}, FPN {config.model.fpn_norm}"),
            ("optimizer", config.solver.optimizer),
            ("weights", f"averages over {config.solver.ema:g} epochs" if config.solver.ema else "of the last step"),
            *schedule.table(),
        ],
        "versions": description.versions,
    }


def _boxes(dataset: CocoDataset) -> list[int]:
    """Boxes of each class, groups of objects left out."""
    found = dataset.ground_truth
    counts = np.bincount(found.labels[~found.crowd], minlength=len(dataset.class_names) + 1)
    return counts[1:].tolist()


def _copy(source: Path, target: Path) -> None:
    if source.exists():
        with source.open("rb") as original, atomic_write(target) as copy:
            shutil.copyfileobj(original, copy)
