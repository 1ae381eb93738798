"""Whether all hosts see one and the same run directory: rank 0 writes what the others read, and the other way round."""

import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from horovod_megdet import comm, launched

PATIENCE = 8.0
"""Seconds that a file may take to appear on another host: network file systems keep folders' contents for a while."""

TOKEN = "token"


@dataclass(frozen=True)
class Shared:
    """What one host found out about the run directory."""

    rank: int
    host: str
    folder: str
    unseen: str = ""
    """Why rank 0's file cannot be read there."""
    unwritable: str = ""
    """Why no file can be written there."""
    arrived: bool = True
    """Whether rank 0 sees the file that was written there."""


def try_run_directory(run_dir: Path | None, patience: float = PATIENCE) -> list[Shared]:
    """Tries the run directory from every host; returns what each found, on every rank. Leaves nothing behind.

    ``run_dir`` is None where the configuration is not known. Collective.
    """
    made: list[Path] = []
    token, failure = uuid.uuid4().hex, ""
    if comm.is_main() and run_dir:
        failure = _why_not(lambda: _write_token(run_dir, token, made))
    token, failure = comm.broadcast_object((token, failure), "doctor.token")
    try:
        mine = None
        if comm.local_rank() == 0 and run_dir:
            mine = _try_here(_trial(run_dir, token), token, failure, patience)
        found = [entry for entry in comm.gather_objects(mine, "doctor.seen") if entry]
        if comm.is_main() and run_dir:
            found = _look_for_files(_trial(run_dir, token), found, patience)
        return comm.broadcast_object(found, "doctor.arrived")
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)


def _write_token(run_dir: Path, token: str, made: list[Path]) -> None:
    """Makes the folder of the trial with rank 0's file in it; appends the topmost folder that was made to ``made``."""
    trial = _trial(run_dir, token)
    missing = [path for path in (trial, *trial.parents) if not path.exists()]
    trial.mkdir(parents=True)
    made.append(missing[-1])
    (trial / TOKEN).write_text(token)


def _try_here(trial: Path, token: str, failure: str, patience: float) -> Shared:
    mine = Shared(comm.rank(), launched.host(), str(trial.parent))
    if failure:
        # Rank 0 could not write, so that there is nothing to see for the others.
        return replace(mine, unwritable=failure if comm.is_main() else "")
    if not _wait(lambda: _read(trial / TOKEN) == token, patience):
        return replace(mine, unseen="its file is not there" if trial.parent.is_dir() else "there is no such folder")
    return replace(mine, unwritable=_why_not(lambda: _file_of(trial, mine.rank).write_text(token)))


def _look_for_files(trial: Path, found: list[Shared], patience: float) -> list[Shared]:
    wrote = {entry.rank for entry in found if not entry.unseen and not entry.unwritable}
    _wait(lambda: all(_file_of(trial, rank).name in _names(trial) for rank in wrote), patience)
    names = _names(trial)
    return [
        replace(entry, arrived=entry.rank not in wrote or _file_of(trial, entry.rank).name in names) for entry in found
    ]


def _trial(run_dir: Path, token: str) -> Path:
    return run_dir.absolute() / f".doctor-{token}"


def _file_of(trial: Path, rank: int) -> Path:
    return trial / f"from-rank-{rank}"


def _read(path: Path) -> str:
    try:
        # Listing the folder makes network file systems look at it again.
        return path.read_text() if path.name in _names(path.parent) else ""
    except OSError:
        return ""


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _wait(condition: Callable[[], bool], patience: float) -> bool:
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _why_not(action: Callable[[], object]) -> str:
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    return ""
