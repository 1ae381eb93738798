"""Stopping on request: the handlers only take a note; all ranks agree on it in the next step."""

import os
import signal
from types import FrameType

from horovod_megdet.errors import EXIT_INTERRUPTED


class StopRequest:
    """Notes SIGUSR1, SIGINT and SIGTERM. A second SIGINT ends the process at once, with nothing written.

    Batch systems send SIGUSR1 ahead of the time limit; Ctrl-C sends SIGINT; most launchers send SIGTERM when they are
    told to end.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupted = False
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def __bool__(self) -> bool:
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            os.write(2, b"Interrupted twice: stopping at once, nothing more is written.\n")
            os._exit(EXIT_INTERRUPTED)
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            self._interrupted = True
            os.write(
                2, b"Interrupted: finishing the step and writing a checkpoint. Press Ctrl-C again to stop at once.\n"
            )
