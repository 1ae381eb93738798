"""Whether the launcher that started this rank is still there: without it nobody ends the ranks."""

import ctypes
import os
import signal
import sys

import psutil  # type: ignore[import-untyped]

LAUNCHERS = {
    "mpirun",
    "mpiexec",
    "mpiexec.hydra",
    "orterun",
    "orted",
    "prterun",
    "prted",
    "hydra_pmi_proxy",
    "horovodrun",
    "slurmstepd",
    "sshd",
}
"""Names of the processes that start ranks: launchers, their daemons on other hosts, and what starts those."""

_PR_SET_PDEATHSIG = 1


class LauncherWatch:
    """Remembers the processes between this one and its launcher."""

    def __init__(self) -> None:
        self.parent = os.getppid()
        ancestors = psutil.Process().parents()
        names = [process.name() for process in ancestors]
        # A launcher that goes by another name is beyond the parent; what is above it may end as it likes.
        nearest = next((place for place, name in enumerate(names) if name in LAUNCHERS), 0)
        self.chain = ancestors[: nearest + 1]

    def lost(self) -> str | None:
        """Name of the process that is gone, None while all are there."""
        for process in self.chain:
            # The first one may be a zombie or its number taken again; a child of a dead process has another parent.
            if process.pid == self.parent != os.getppid() or not _is_alive(process):
                return process._name or f"process {process.pid}"
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def die_with_parent() -> None:
    """Lets the kernel kill this process when its parent ends, which also reaches one that is stopped.

    For ranks that horovodrun started: nobody kills those on other hosts when their ssh connection ends. Not for others:
    the kernel means the parent's thread, and the daemons of MPI may start ranks from a thread that ends before them.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended in between
            os.kill(os.getpid(), signal.SIGKILL)
