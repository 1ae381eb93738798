"""Commands that take long: logged, and ended together with the set-up. Locks, for one set-up at a time."""

import contextlib
import fcntl
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SHOWN_LINES = 15
"""Lines of a failed command's output to show."""

held_locks: list[int] = []
"""File descriptors of the locks that this process holds. Commands inherit them: if only the set-up is killed, a lock is
free no sooner than the command that it left behind has ended."""


class SetupError(Exception):
    """The set-up cannot go on. ``str(error)`` says in one sentence what is missing, and how to get it."""


def say(message: str) -> None:
    """Print one line of progress at once."""
    print(f"setup: {message}", flush=True)


@dataclass
class Runner:
    """Runs long commands: one line before it starts, everything it prints into a log file."""

    logs: Path
    environ: Mapping[str, str]

    def run(self, step: str, message: str, command: Sequence[str], **variables: str) -> None:
        """Run ``command`` with ``variables`` added to its environment.

        Raises:
            SetupError: it failed; what it printed about errors follows the sentence.
        """
        say(message)
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{step}.log"
        with log.open("w", encoding="utf-8") as file:
            print("$", shlex.join(command), file=file, flush=True)
            # A signal between the start of the command and the try block would leave the command behind.
            unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**self.environ, **variables},
                start_new_session=True,  # so that all of it can be ended, compilers included
                pass_fds=held_locks,
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, unblocked),
            )
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
                code = process.wait()
            except BaseException:
                end_group(process)
                raise
        if code != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
            telling = [line for line in lines if re.search(r"error|could not", line, re.IGNORECASE)] or lines
            shown = "".join(f"\n    {line}" for line in telling[-SHOWN_LINES:])
            raise SetupError(f"{message} failed; all of its output is in {log}, and this may tell why:{shown}")


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End ``process`` and all that it started."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock file ``path``, saying ``waiting`` if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        held_locks.append(file.fileno())
        try:
            yield
        finally:
            held_locks.remove(file.fileno())
