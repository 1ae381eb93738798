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
    :func:`quietly`, the line goes to the logger ``horovod_megdet`` of ``logging`` instead: a program that sets up
    nothing sees the warnings.
    """
    if _quiet:
        is_warning = text.startswith("warning: ")
        level = logging.WARNING if is_warning else logging.INFO
        logging.getLogger("horovod_megdet").log(level, text.removeprefix("warning: "))
        return
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        os.write(2, (text.rstrip("\n") + "\n").encode())
