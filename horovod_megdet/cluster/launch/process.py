"""Runs a launcher and passes signals on to it."""

import contextlib
import functools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from types import FrameType

import psutil  # type: ignore[import-untyped]

from horovod_megdet.cluster.launch.job import Command
from horovod_megdet.cluster.parent_death import end_with_parent
from horovod_megdet.errors import UserError
from horovod_megdet.printing import say

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The first of these asks the ranks to write a checkpoint and stop; the second ends them; the third kills them."""


def run_mpirun(command: Command) -> int:
    """Runs mpirun to its end and returns its exit code, which is that of the job. It passes SIGUSR1 to all ranks."""

    def ask_ranks(process: subprocess.Popen[bytes]) -> bool:
        process.send_signal(signal.SIGUSR1)
        return True

    return _run(command, ask_ranks)


def run_horovodrun(command: Command) -> int:
    """Runs horovodrun to its end and returns its exit code, which is that of the job."""
    return _run(command, _ask_local_ranks)


def _ask_local_ranks(process: subprocess.Popen[bytes]) -> bool:
    """Sends SIGUSR1 to the ranks on this machine, which horovodrun does not. One is enough: it tells all others."""
    asked = False
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            if _is_rank(child):
                child.send_signal(signal.SIGUSR1)
                asked = True
    return asked


def _is_rank(process: psutil.Process) -> bool:
    """Whether a process below horovodrun is a rank, rather than a child of a rank or a shell around one."""
    with contextlib.suppress(psutil.Error):
        parent = process.parent()
        return "HOROVOD_RANK" in process.environ() and parent is not None and "HOROVOD_RANK" not in parent.environ()
    return False


class _Relay:
    """Passes the signals that this process receives on to the launcher."""

    def __init__(self, ask_ranks: Callable[[subprocess.Popen[bytes]], bool]) -> None:
        self.ask_ranks = ask_ranks
        self.process: subprocess.Popen[bytes] | None = None
        self.stops = 0
        self.early: signal.Signals | None = None

    def attach(self, process: subprocess.Popen[bytes]) -> None:
        """Names the launcher; a signal that came too early is passed on now."""
        self.process = process
        if self.early:
            self.receive(self.early, None)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handles signals within the block."""
        previous = {number: signal.signal(number, self.receive) for number in (signal.SIGUSR1, *STOP_SIGNALS)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.process is None:
            self.early = signal.Signals(number)
            return
        self.stops += number in STOP_SIGNALS
        if self.stops <= 1:
            if self.ask_ranks(self.process):
                effect = "asking the ranks to write a checkpoint and stop; a second Ctrl-C ends them at once"
            else:
                effect = "no rank on this machine can be asked to stop; a second Ctrl-C ends all ranks"
            say(f"megdet launch: {name}: {effect}.")
        elif self.stops == 2:
            say(f"megdet launch: {name}: ending all ranks.")
            self.process.terminate()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def _run(command: Command, ask_ranks: Callable[[subprocess.Popen[bytes]], bool]) -> int:
    relay = _Relay(ask_ranks)
    with relay.installed():
        try:
            # In a session of its own, because a launcher that receives Ctrl-C ends everything at once. If this process
            # is killed, SIGTERM makes the launcher end the ranks and itself.
            process = subprocess.Popen(
                command.argv,
                env=os.environ | command.variables,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=functools.partial(end_with_parent, signal.SIGTERM),
            )
        except OSError as error:
            raise UserError(f"{command.argv[0]}: cannot be run: {error.strerror or error}.") from None
        relay.attach(process)
        exit_code = process.wait()
    return exit_code if exit_code >= 0 else 128 - exit_code
