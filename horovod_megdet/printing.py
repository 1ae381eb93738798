"""Lines for the terminal or log of a job, where the output of many ranks comes together."""

import contextlib
import os
import sys


def say(text: str) -> None:
    """Writes a line to standard error in one system call, so that the lines of many ranks do not tear.

    A reader that is gone is no error: it must not keep a rank from what it does next, such as ending the job.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        os.write(2, (text.rstrip("\n") + "\n").encode())
