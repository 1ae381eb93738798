"""A real Slurm on the hosts of a test: munged and slurmd on every host, slurmctld on the first.

Every node says that it has 8 GPUs and 64 cores, so that batch scripts for such nodes run as they are. Needs Debian's
slurm-wlm and munge.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from hosts import SEARCH, Host, Hosts, Unavailable, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
DAEMON_ENVIRONMENT = {"PATH": SEARCH, "HOME": "/root"}

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={controller}
AuthType=auth/munge
# A requeued job starts when its credentials have expired: 2 minutes by default.
AuthInfo=cred_expire=5
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
GresTypes=gpu
ReturnToService=2
KillWait=5
MinJobAge=600
SlurmdTimeout=30
InactiveLimit=0
SlurmdParameters=config_overrides
NodeName={nodes} CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:8
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""


def write_configuration(folder: Path, names: tuple[str, ...]) -> Path:
    """Writes what is to be /etc/slurm on all hosts, and returns that folder."""
    etc = folder / "etc_slurm"
    etc.mkdir()
    nodes = ",".join(names)
    (etc / "slurm.conf").write_text(CONFIGURATION.format(controller=names[0], nodes=nodes, folder=folder))
    (etc / "gres.conf").write_text(f"NodeName={nodes} Name=gpu File={folder}/gpu[0-7]\n")
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    return etc


def check_available() -> None:
    """Raises :class:`Unavailable` where Slurm cannot be started."""
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=SEARCH)]:
        raise Unavailable(f"no {', '.join(missing)}: install slurm-wlm and munge")
    if not Path("/etc/slurm").is_dir():
        raise Unavailable("no /etc/slurm: install slurm-wlm")


class Slurm:
    """The cluster; made on :class:`Hosts` that see :func:`write_configuration`'s folder as /etc/slurm."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        (folder / "state").mkdir()
        self._key = folder / "munge.key"
        self._key.write_bytes(os.urandom(128))
        self._key.chmod(0o400)
        for host in hosts:
            self._start_munge(host)
        self._start_daemon(hosts[0], ["slurmctld", "-D", "-i"])
        for host in hosts:
            self._start_slurmd(host)
        wait_for(lambda: self._idle_nodes() == len(hosts), "all nodes to be idle", self.logs, timeout=30)

    def boot_node(self, host: Host) -> None:
        """Brings a node back that was killed."""
        host.boot()
        self._start_munge(host)
        self._start_slurmd(host)

    def run(self, *arguments: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        """Runs a client command such as ``squeue`` on the first host; returns its output."""
        return self.hosts[0].run(list(arguments), check=check, env=env).stdout

    def submit(self, *arguments: str, env: Mapping[str, str]) -> int:
        """Submits a batch script with options before it and arguments behind it; returns the job's number."""
        return int(self.run("sbatch", "--parsable", *arguments, env=env).strip().splitlines()[-1])

    def state(self, job: int) -> str:
        """RUNNING, PENDING, COMPLETED, FAILED, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", str(job), check=False)
        return shown.partition("JobState=")[2].partition(" ")[0]

    def logs(self) -> str:
        """The ends of the daemons' logs, for messages."""
        paths = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in paths)

    def _idle_nodes(self) -> int:
        shown = self.run("sinfo", "--noheader", "--states=idle", "--format=%D", check=False).split()
        return int(shown[0]) if shown and shown[0].isdigit() else 0

    def _start_munge(self, host: Host) -> None:
        places = {"key-file": self._key, "log-file": self.folder / f"munged.{host.name}.log"}
        places |= {name: Path("/run/munge") / name for name in ("seed-file", "pid-file")}
        socket = Path("/run/munge/munge.socket.2")
        host.run(["mkdir", "-p", str(socket.parent)])
        options = [f"--{name}={path}" for name, path in places.items()]
        self._start_daemon(host, ["munged", "--foreground", "--force", f"--socket={socket}", *options])
        wait_for(lambda: host.run(["test", "-S", str(socket)], check=False).returncode == 0, "munged", self.logs)

    def _start_slurmd(self, host: Host) -> None:
        self._start_daemon(host, ["slurmd", "-D", "-N", host.name])

    def _start_daemon(self, host: Host, arguments: list[str]) -> None:
        with (self.folder / f"daemons.{host.name}.log").open("ab") as log:
            subprocess.Popen(
                host.command(arguments),
                env=DAEMON_ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
