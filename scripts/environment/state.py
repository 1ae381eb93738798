"""What the user chose, what an environment records about itself, and the locks that keep two set-ups apart."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

STATE_FOLDER = ".setup"
"""Inside the venv: the lock, the state, the logs and the Horovod build."""


class SetupError(Exception):
    """The set-up cannot go on. ``str(error)`` is one sentence: what is missing, and how to get it."""


class StepError(SetupError):
    """A command failed. ``lines`` of its output show why."""

    def __init__(self, sentence: str, lines: Sequence[str]) -> None:
        super().__init__(sentence)
        self.lines = list(lines)


class Stopped(BaseException):
    """A signal asked the set-up to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def say(message: str) -> None:
    """Print one line of progress at once."""
    print(f"setup: {message}", flush=True)


@dataclass(frozen=True)
class Options:
    """What the user chose. Empty ``torch`` and ``torchvision`` mean those of requirements.lock."""

    mpi: str = "wheel"
    gpu: bool = False
    torch: str = ""
    torchvision: str = ""

    @staticmethod
    def choose(environ: Mapping[str, str], recorded: Mapping[str, Any]) -> "Options":
        """Options from the environment variables; one that is not given keeps its ``recorded`` value.

        Raises:
            SetupError: a value is not one of those allowed, or TORCH comes without TORCHVISION.
        """
        options = Options(**{name: recorded[name] for name in asdict(Options()) if name in recorded})
        if mpi := environ.get("MPI"):
            options = replace(options, mpi=one_of("MPI", mpi, ("wheel", "system")))
        if gpu := environ.get("GPU"):
            options = replace(options, gpu=one_of("GPU", gpu, ("0", "1")) == "1")
        torch, torchvision = environ.get("TORCH", ""), environ.get("TORCHVISION", "")
        if torch == "lock":
            return replace(options, torch="", torchvision="")
        if bool(torch) != bool(torchvision):
            raise SetupError(
                "TORCH and TORCHVISION belong together: give both, for example 'TORCH=2.14.1 TORCHVISION=0.29.1'."
            )
        return replace(options, torch=torch, torchvision=torchvision) if torch else options


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """``value`` if it is allowed for the option ``name``, else a :class:`SetupError`."""
    if value not in allowed:
        choices = " or ".join(f"{name}={choice}" for choice in allowed)
        raise SetupError(f"{name}={value} is not known: use {choices}.")
    return value


def read_state(folder: Path) -> dict[str, Any]:
    """The state of the environment whose state folder this is; empty if there is none or it cannot be read."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def update_state(folder: Path, **changes: Any) -> None:
    """Change keys of the state (``None`` removes one) so that a reader sees either the old or the new state."""
    state = {key: value for key, value in {**read_state(folder), **changes}.items() if value is not None}
    temporary = folder / f"state.json.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(state, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "state.json")


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[int]:
    """Hold the lock file ``path``, saying ``waiting`` if another process has it. Yields its file descriptor.

    Commands inherit the descriptor (see :class:`Runner`): if only this script is killed, the lock is free no sooner
    than the command that it left behind has ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(waiting)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
