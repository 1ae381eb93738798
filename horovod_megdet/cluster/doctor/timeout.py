"""Ends a rank that waits for another one for too long: ranks that cannot reach each other wait for ever."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

from horovod_megdet.errors import EXIT_CRASHED

GRACE = 5.0
"""Seconds between what a rank says when it gives up and its end."""


@contextlib.contextmanager
def patience(seconds: float, give_up: Callable[[], None]) -> Iterator[None]:
    """Runs the block; if it takes longer than ``seconds``, calls ``give_up`` and ends the process, with exit code 1."""

    def end() -> None:
        try:
            give_up()
            # The launcher ends the other ranks as soon as this one has gone, and they may have something to say.
            time.sleep(GRACE)
        finally:
            # The main thread is inside MPI, from where no exception brings it back.
            os._exit(EXIT_CRASHED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
