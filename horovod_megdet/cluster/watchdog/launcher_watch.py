"""Whether the launcher that started this rank is still alive: without it nobody ends the ranks."""

import os

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
    "sshd-session",
}
"""Names of the processes that start ranks: launchers, their daemons on other hosts, and what starts those."""


class LauncherWatch:
    """Remembers the processes between this one and its launcher."""

    def __init__(self) -> None:
        self.parent = os.getppid()
        ancestors = [(process, process.name()) for process in psutil.Process().parents()]
        # A launcher with an unknown name may be the parent, or far above it. Then only the parent is watched, because
        # what is above a launcher may end without harm.
        nearest = next((place for place, (_, name) in enumerate(ancestors) if name in LAUNCHERS), 0)
        self.chain = ancestors[: nearest + 1]

    def lost(self) -> str | None:
        """Name of a process that has ended; None while all are alive."""
        for process, name in self.chain:
            # The parent may be a zombie, or another process may have its number. An orphan has another parent.
            if process.pid == self.parent != os.getppid() or not _is_alive(process):
                return name
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
