"""Whether all hosts see the same run directory: rank 0 writes files that the others read, and vice versa."""

import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from horovod_megdet import comm, launched

DELAY = 8.0
"""Seconds that a file may take to appear on another host: network file systems cache the contents of folders."""

TOKEN_FILE = "token"


@dataclass(frozen=True)
class RunDirectory:
    """The run directory as one host sees it."""

    rank: int
    host: str
    folder: str
    unseen: str = ""
    """Why the host cannot read rank 0's file."""
    unwritable: str = ""
    """Why the host cannot write a file."""
    arrived: bool = True
    """Whether rank 0 sees the file that the host wrote."""


def try_run_directory(run_dir: Path | None, delay: float = DELAY) -> list[RunDirectory]:
    """Reads and writes in the run directory from every host; returns what each one saw, on every rank.

    Leaves nothing behind. ``run_dir`` is None if the configuration is not known. Collective.
    """
    token = comm.broadcast_object(uuid.uuid4().hex, "doctor.token")
    trial = run_dir.absolute() / f".doctor-{token}" if run_dir else None
    created: list[Path] = []
    try:
        failure = _failure_of(lambda: _write_token(trial, token, created)) if trial and comm.is_main() else ""
        failure = comm.broadcast_object(failure, "doctor.token_failure")
        mine = _try_from_this_host(trial, token, failure, delay) if trial and comm.local_rank() == 0 else None
        views = [view for view in comm.gather_objects(mine, "doctor.views") if view]
        if trial and comm.is_main():
            views = _look_for_files(trial, views, delay)
        return comm.broadcast_object(views, "doctor.arrived")
    finally:
        for folder in created:
            shutil.rmtree(folder, ignore_errors=True)


def _write_token(trial: Path, token: str, created: list[Path]) -> None:
    """Creates the trial folder with rank 0's file; appends the topmost folder that this creates to ``created``."""
    missing = [path for path in (trial, *trial.parents) if not path.exists()]
    trial.mkdir(parents=True)
    created.append(missing[-1])
    (trial / TOKEN_FILE).write_text(token)


def _try_from_this_host(trial: Path, token: str, failure: str, delay: float) -> RunDirectory:
    mine = RunDirectory(comm.rank(), launched.host(), str(trial.parent))
    if failure:
        # Rank 0 could not write, so there is nothing for the others to see.
        return replace(mine, unwritable=failure if comm.is_main() else "")
    if not _wait_until(lambda: _read(trial / TOKEN_FILE) == token, delay):
        return replace(mine, unseen="the file does not appear" if trial.parent.is_dir() else "there is no such folder")
    return replace(mine, unwritable=_failure_of(lambda: _file_of(trial, mine.rank).write_text(token)))


def _look_for_files(trial: Path, views: list[RunDirectory], delay: float) -> list[RunDirectory]:
    """Waits for the files that the other hosts wrote, and notes which of them have arrived."""
    wrote = {view.rank for view in views if not view.unseen and not view.unwritable}
    _wait_until(lambda: all(_file_of(trial, rank).name in _names(trial) for rank in wrote), delay)
    names = _names(trial)
    return [replace(view, arrived=view.rank not in wrote or _file_of(trial, view.rank).name in names) for view in views]


def _file_of(trial: Path, rank: int) -> Path:
    return trial / f"from-rank-{rank}"


def _read(path: Path) -> str:
    try:
        # Listing the folder makes a network file system look at it again.
        return path.read_text() if path.name in _names(path.parent) else ""
    except OSError:
        return ""


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _failure_of(action: Callable[[], object]) -> str:
    """Why ``action`` fails; empty if it succeeds."""
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    return ""
