"""Checkpoints that are whole or not there.

A checkpoint is a folder ``step_00000123`` with ``model.safetensors`` (weights and buffers), ``state.pt`` (optimizer,
position, random states), ``checkpoint.json`` (what it is) and ``SHA256SUMS``, which covers the other three and which
``sha256sum --check`` reads, too. The folder is written under a temporary name, flushed to disk and then renamed, so
that a kill at any moment leaves either the whole checkpoint or none.
"""

import contextlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from horovod_megdet.config import Config, SolverConfig
from horovod_megdet.errors import NotFiniteError, NotSavedError, UserError
from horovod_megdet.files import sha256
from horovod_megdet.models.weights import MODEL_FILE
from horovod_megdet.printing import warn
from horovod_megdet.run_files import CHECKPOINTS, DESCRIPTION_FILE, checkpoint_folders
from horovod_megdet.solver.agvm import AGVM
from horovod_megdet.solver.gradient_noise import NoiseAverages
from horovod_megdet.solver.optimizer import state_bytes

STATE_FILE, SUMS_FILE = "state.pt", "SHA256SUMS"
_TEMPORARY = ".writing-"


@dataclass
class Position:
    """How far training has come."""

    step: int = 0
    images_seen: int = 0
    best_metric: str = "AP"
    """What decides which evaluation is the best; see ``output.best_metric``."""
    best_value: float = -1.0
    best_checkpoint: str | None = None
    evaluations_since_best: int = 0

    @property
    def best(self) -> tuple[float, str | None]:
        """The best value so far, and its checkpoint."""
        return self.best_value, self.best_checkpoint

    @best.setter
    def best(self, best: tuple[float, str | None]) -> None:
        self.best_value, self.best_checkpoint = best

    def forget_best(self, metric: str) -> None:
        """From now on another metric decides; what was the best by the old one may not be by this one."""
        self.best_metric, self.best_value = metric, -1.0
        self.best_checkpoint, self.evaluations_since_best = None, 0


@dataclass
class TrainingState:
    """What training needs besides the weights to go on as if it had never stopped."""

    optimizer: dict[str, Any]
    """The optimizer's state dict."""
    scaler: dict[str, Any]
    """The loss scaler's state dict."""
    position: Position
    random: list[dict[str, Any]]
    """The states of the random generators, by rank."""
    noise: NoiseAverages = field(default_factory=NoiseAverages)
    agvm: AGVM = field(default_factory=AGVM)
    weights: dict[str, Tensor] | None = None
    """The weights that train, where those in :data:`MODEL_FILE` are their averages."""
    unfinished: int | None = None
    """Where the last step began, if what is due after it has yet to be done."""


@dataclass(frozen=True)
class RunDescription:
    """What a run trains; the same in all of its checkpoints."""

    config: dict[str, Any]
    """All values of the configuration."""
    class_names: list[str]
    category_ids: list[int]
    """Ids of the annotation file: label k + 1 is category_ids[k]."""
    training_data: str
    """Fingerprint of the training set."""
    versions: dict[str, str]
    """Of everything that could change the numbers."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files are whole."""

    path: Path
    run: RunDescription
    step: int
    images_seen: int
    epoch: float
    digests: dict[str, str]
    """SHA-256 by file name."""

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict, on the CPU."""
        return load_file(self.path / MODEL_FILE)

    def state(self) -> TrainingState:
        """What training needs to go on, on the CPU."""
        state = torch.load(self.path / STATE_FILE, map_location="cpu", weights_only=True)
        if "best_ap" in state["position"]:  # of the first format
            state["position"]["best_value"] = state["position"].pop("best_ap")
        if "weight" in state.get("noise", {}):  # of the first format, which averaged over the end of the warm-up
            del state["noise"]
        kinds = {"position": Position, "noise": NoiseAverages, "agvm": AGVM}
        return TrainingState(**(state | {key: kind(**state[key]) for key, kind in kinds.items() if key in state}))

    def bits(self) -> dict[str, str]:
        """SHA-256 of the weights and of the state: equal for two runs only if every bit of them is."""
        return {file: self.digests[file] for file in (MODEL_FILE, STATE_FILE)}

    @property
    def config(self) -> Config:
        """The configuration of the run that wrote it."""
        return Config.model_validate(self.run.config)


def folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / CHECKPOINTS


def name(step: int) -> str:
    """The folder name of a step's checkpoint; names sort by step."""
    return f"step_{step:08d}"


def expected_bytes(detector: nn.Module, solver: SolverConfig) -> int:
    """The size of a checkpoint of ``detector``, which may be on the meta device: weights and the optimizer's state."""
    weights = sum(value.nbytes for value in detector.state_dict().values())
    copies = 1 if solver.ema is None else 2  # see TrainingState.weights
    return copies * weights + state_bytes(detector, solver)


def save(run_dir: Path, weights: dict[str, Tensor], state: TrainingState, run: RunDescription, epoch: float) -> Path:
    """Writes a checkpoint atomically and returns its folder.

    Raises :class:`NotSavedError` when the disk is full or not writable; nothing is left behind then. Raises as
    :func:`check_finite`, too.
    """
    position = state.position
    for values in (weights, state.weights or {}):
        check_finite(values, position.step)
    final = folder(run_dir) / name(position.step)
    temporary = folder(run_dir) / f"{_TEMPORARY}{uuid.uuid4().hex}"
    replaced = temporary.with_name(f"{temporary.name}.old")
    description = asdict(run) | {"step": position.step, "images_seen": position.images_seen, "epoch": epoch}
    try:
        temporary.mkdir(parents=True)
        writers: dict[str, Callable[[Path], object]] = {
            MODEL_FILE: lambda path: save_file({key: value.contiguous() for key, value in weights.items()}, path),
            STATE_FILE: lambda path: torch.save(_as_plain(state), path),
            DESCRIPTION_FILE: lambda path: path.write_text(json.dumps(description, indent=1), encoding="utf-8"),
        }
        # All at the same time, because all ranks wait: writing and hashing leave the interpreter to other threads.
        with ThreadPoolExecutor() as threads:
            digests = threads.map(_write, [temporary / file for file in writers], writers.values())
            sums = "".join(f"{digest}  {file}\n" for file, digest in zip(writers, digests, strict=True))
        _write(temporary / SUMS_FILE, lambda path: path.write_text(sums, encoding="utf-8"))
        _flush(temporary)
        if final.exists():  # a broken one that --resume passed over, or the same step written again
            final.rename(replaced)
        temporary.rename(final)
        _flush(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not final.exists():
            with contextlib.suppress(OSError):
                replaced.rename(final)
        raise NotSavedError(
            f"{final}: the checkpoint cannot be written: {error}. Free disk space or choose another output.run_dir; "
            "older checkpoints are kept, and --resume goes on from the newest."
        ) from error
    return final


def check_finite(weights: dict[str, Tensor], step: int) -> None:
    """Raises :class:`NotFiniteError` if a weight or statistic is not finite after ``step``.

    The update may have made it so, after a loss that was finite; from such a checkpoint nobody could go on.
    """
    if not all(bool(value.isfinite().all()) for value in weights.values()):
        raise NotFiniteError(f"The weights are not finite after step {step}")


def prune(run_dir: Path, keep: int, best: str | None, written: str) -> None:
    """Removes all but the best checkpoint and the ``keep`` newest ones up to ``written``, the one of now.

    Also removed is what killed runs left half-written, and what is newer: ``--resume`` passed it over because it is
    broken.
    """
    for path in folder(run_dir).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    paths = checkpoint_folders(run_dir)
    newest = [path for path in paths if path.name <= written][-keep:]
    for path in paths:
        if path not in newest and path.name != best:
            shutil.rmtree(path)


def read(path: str | Path, report: Callable[[str], None] = warn) -> Checkpoint:
    """Checks a checkpoint folder, or a run directory's newest one, and reads its description.

    In a run directory, broken ones are reported and passed over. Raises :class:`UserError` when it is missing,
    truncated or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such checkpoint.")
    if not (path / DESCRIPTION_FILE).exists() and folder(path).is_dir():
        return newest(path, report)
    try:
        description = json.loads((path / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        digests = _recorded_digests(path, description)
        for file, expected in digests.items():
            if sha256(path / file) != expected:
                raise UserError(f"{path / file}: the checkpoint is damaged: its SHA-256 is not the one recorded.")
        place = {key: description.pop(key) for key in ("step", "images_seen", "epoch")}
        return Checkpoint(path, RunDescription(**description), **place, digests=digests)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a whole checkpoint ({error}). A checkpoint is a folder step_* below a run's `checkpoints`."
        ) from None


def is_whole(path: Path) -> bool:
    """Whether there is a whole checkpoint in a folder."""
    try:
        return bool(read(path))
    except UserError:
        return False


def _recorded_digests(path: Path, description: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of each file. The first format has them in the description instead of a file."""
    if (in_description := description.pop("sha256", None)) is not None:
        return dict(in_description)
    lines = (path / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    digests = {file: digest for digest, _, file in (line.partition("  ") for line in lines)}
    if missing := {MODEL_FILE, STATE_FILE, DESCRIPTION_FILE} - digests.keys():
        raise ValueError(f"{SUMS_FILE} lacks {', '.join(sorted(missing))}")
    return digests


def newest(run_dir: Path, report: Callable[[str], None] = warn, remedy: str = "") -> Checkpoint:
    """Returns the newest whole checkpoint of a run; broken ones are reported and passed over.

    Raises :class:`UserError`, which ends with the ``remedy``, when there is none.
    """
    for path in reversed(checkpoint_folders(run_dir)):
        try:
            return read(path)
        except UserError as error:
            report(f"{error} Taking the one before it.")
    raise UserError(f"{run_dir}: there is no whole checkpoint. {remedy}".rstrip())


def _as_plain(value: Any) -> Any:
    """Dataclasses as dicts, and containers built anew with one object for equal strings; tensors are not copied.

    A pickle refers back to an object that it has written before: without this, equal states could have other bytes,
    depending on which of their strings come from a checkpoint.
    """
    if isinstance(value, TrainingState | Position | NoiseAverages | AGVM):
        return _as_plain(vars(value))
    if isinstance(value, dict):
        return {_as_plain(key): _as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_as_plain(item) for item in value)
    return sys.intern(value) if isinstance(value, str) else value


def _write(path: Path, write: Callable[[Path], object]) -> str:
    """Writes a file to the disk and returns its SHA-256."""
    write(path)
    _flush(path)
    return sha256(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
