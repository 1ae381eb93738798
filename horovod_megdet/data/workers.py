"""The loader's worker processes: forked by a clean process, deaf to the job's signals, and gone when their rank is."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WORKER_SIGNALS = {signal.SIGINT, signal.SIGUSR1}
"""Signals that reach the whole process group and that only the main process handles."""


def start_worker(_: int) -> None:
    """Leaves signals to the main process, and other cores to other workers."""
    for number in WORKER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    """Ends a worker whose main process was killed.

    torch's own watchdog checks the worker's parent, but that is the fork server, which waits for its workers.
    """
    main_process = multiprocessing.parent_process()
    assert main_process is not None
    multiprocessing.connection.wait([main_process.sentinel])
    os._exit(1)


def start_fork_server(preload: str) -> None:
    """Starts the process that forks the workers, with a module imported and the workers' signals blocked."""
    multiprocessing.set_forkserver_preload([preload])
    # First: starting the tracker, which the fork server needs, ends with SIGINT unblocked.
    multiprocessing.resource_tracker.ensure_running()
    with _blocked(WORKER_SIGNALS):
        multiprocessing.forkserver.ensure_running()


@contextmanager
def _blocked(signals: set[signal.Signals]) -> Iterator[None]:
    """Blocks signals: processes started meanwhile inherit the mask; this process gets the signals afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
