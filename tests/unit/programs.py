"""Programs that tests write, start and wait for."""

import time
from collections.abc import Callable
from pathlib import Path


def executable(path: Path, script: str = "exit 0") -> Path:
    """A program that runs the shell ``script``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def wait_until(condition: Callable[[], object]) -> None:
    """Polls until the condition holds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie: process 1 of a container may not reap those whose parent has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state.split()[0] == "Z"
