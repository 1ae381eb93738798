"""Ending together with the parent process: Linux's parent-death signal, see ``man 2 prctl``."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1

# Looked up at import: in a process forked from one with several threads, the loader's locks may stay locked.
_prctl = ctypes.CDLL(None).prctl


def end_with_parent(number: signal.Signals) -> None:
    """Has the kernel send this process a signal when its parent ends; SIGKILL also ends a process that is stopped.

    May be called between fork and exec, and lasts beyond the latter. To the kernel, the parent is the *thread* that
    started this process.
    """
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended in between
        os.kill(os.getpid(), number)
