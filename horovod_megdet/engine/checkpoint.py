"""Checkpoints that are whole or not there.

A checkpoint is a folder ``step_00000123`` with three files: ``model.safetensors`` (weights and buffers), ``state.pt``
(optimiser, position, random states) and ``checkpoint.json`` (what it is, and the SHA-256 of the other two). The folder
is written under a temporary name, flushed to disk and then renamed, so that a kill at any moment leaves either the
whole checkpoint or none.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from horovod_megdet.config import Config
from horovod_megdet.errors import NotSavedError, UserError

WEIGHTS, STATE, DESCRIPTION = "model.safetensors", "state.pt", "checkpoint.json"
_TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    """What was read from a checkpoint folder."""

    path: Path
    description: dict[str, Any]
    """The content of checkpoint.json: step, images_seen, config, class_names, category_ids, versions, metrics."""

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict, on the CPU."""
        return load_file(self.path / WEIGHTS)

    def state(self) -> dict[str, Any]:
        """Optimiser, position and random states, on the CPU."""
        return torch.load(self.path / STATE, map_location="cpu", weights_only=True)

    @property
    def config(self) -> Config:
        """The configuration of the run that wrote it."""
        return Config.model_validate(self.description["config"])


def folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def name(step: int) -> str:
    """The folder name of a step's checkpoint; names sort by step."""
    return f"step_{step:08d}"


def save(run_dir: Path, weights: dict[str, Tensor], state: dict[str, Any], description: dict[str, Any]) -> Path:
    """Writes a checkpoint atomically and returns its folder.

    Raises :class:`NotSavedError` when the disk is full or not writable; nothing is left behind then.
    """
    final = folder(run_dir) / name(description["step"])
    temporary = folder(run_dir) / f"{_TEMPORARY}{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in weights.items()}, temporary / WEIGHTS)
        torch.save(state, temporary / STATE)
        described = description | {
            "sha256": {file: _sha256(temporary / file) for file in (WEIGHTS, STATE)},
        }
        (temporary / DESCRIPTION).write_text(json.dumps(described, indent=1), encoding="utf-8")
        for file in (WEIGHTS, STATE, DESCRIPTION):
            _flush(temporary / file)
        _flush(temporary)
        if final.exists():  # a broken one that --resume passed over, or the same step written again
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(final.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise NotSavedError(
            f"{final}: the checkpoint cannot be written: {error}. Free disk space or choose another output.run_dir; "
            "older checkpoints are kept, and --resume goes on from the newest."
        ) from error
    return final


def prune(run_dir: Path, keep: int, best: str | None) -> None:
    """Removes all but the ``keep`` newest checkpoints and the best one, and what killed runs left half-written."""
    for path in folder(run_dir).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(folder(run_dir).glob("step_*"))[:-keep]:
        if path.name != best:
            shutil.rmtree(path)


def read(path: str | Path) -> Checkpoint:
    """Checks a checkpoint folder, or a run directory's newest one, and reads its description.

    Raises :class:`UserError` when it is missing, truncated or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such checkpoint.")
    if not (path / DESCRIPTION).exists() and folder(path).is_dir():
        return newest(path, report=lambda sentence: None)
    try:
        description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        for file, expected in description["sha256"].items():
            if _sha256(path / file) != expected:
                raise UserError(f"{path / file}: the checkpoint is damaged: its SHA-256 is not the one recorded.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a whole checkpoint ({error}). A checkpoint is a folder step_* below a run's `checkpoints`."
        ) from None
    return Checkpoint(path, description)


def newest(run_dir: Path, report: Callable[[str], None]) -> Checkpoint:
    """Returns the newest whole checkpoint of a run; broken ones are reported and passed over.

    Raises :class:`UserError` when there is none.
    """
    for path in sorted(folder(run_dir).glob("step_*"), reverse=True):
        try:
            return read(path)
        except UserError as error:
            report(f"{error} Taking the one before it.")
    raise UserError(
        f"{run_dir}: there is no whole checkpoint to resume from. Start without --resume, or check output.run_dir."
    )


def load_for_inference(path: str | Path) -> tuple[Config, list[str], list[int], dict[str, Tensor]]:
    """Returns configuration, class names, COCO category ids and weights of a checkpoint of ours."""
    checkpoint = read(path)
    description = checkpoint.description
    return checkpoint.config, description["class_names"], description["category_ids"], checkpoint.weights()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
