"""Lines for the terminal or log of a job, where the output of many ranks comes together."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

_quiet = False


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within the block nothing is printed, for programs that call this package; see :func:`say`."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


def is_quiet() -> bool:
    """Whether this process prints nothing."""
    return _quiet


def say(text: str) -> None:
    """Writes a line to standard error in one system call, so that the lines of many ranks do not tear.

    A reader that is gone is no error: it must not keep a rank from what it does next, such as ending the job. Within
    :func:`quietly`, the line goes to the logger ``horovod_megdet`` of ``logging`` instead.
    """
    _write(text, text, logging.INFO)


def warn(sentence: str) -> None:
    """As :func:`say`, for what a user should look at; a program that sets up no logging sees it even when quiet."""
    _write(f"warning: {sentence}", sentence, logging.WARNING)


def _write(text: str, logged: str, level: int) -> None:
    if _quiet:
        logging.getLogger("horovod_megdet").log(level, logged)
        return
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        os.write(2, (text.rstrip("\n") + "\n").encode())
