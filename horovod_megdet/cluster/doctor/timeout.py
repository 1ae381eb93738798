"""Ends a rank that waits too long for another one: ranks that cannot reach each other wait forever."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

from horovod_megdet.errors import EXIT_CRASHED

GRACE = 5.0
"""Seconds between a rank's last message and its exit."""


@contextlib.contextmanager
def time_limit(seconds: float, on_timeout: Callable[[], None]) -> Iterator[None]:
    """Runs the block; after ``seconds``, calls ``on_timeout`` from another thread and exits the process with code 1."""

    def end() -> None:
        try:
            on_timeout()
            # The launcher ends the other ranks as soon as this one exits, and they may have something to say.
            time.sleep(GRACE)
        finally:
            # The main thread is inside MPI, and no exception gets it out of there.
            os._exit(EXIT_CRASHED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
