"""Training jobs on the hosts of a test."""

import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hosts import PROJECT, VENV_BIN, Host, Hosts, wait_for

from horovod_megdet.engine import checkpoint
from horovod_megdet.run_files import CONFIG_FILE

TINY = PROJECT / "tests" / "parallel" / "tiny.yaml"
INTERFACE = "eth0"

SETTINGS = {
    "runtime.deterministic": "true",
    "solver.epochs": "6",
    "solver.milestones": "[4]",
    "output.log_every_images": "1",
    "output.checkpoint_every_epochs": "0.3",
    "output.evaluate_every_epochs": "6",
}
"""A run that writes a line for each step and a checkpoint for every other step."""
ONLY_WHEN_STOPPED = {"output.checkpoint_every_epochs": "6"}
"""Checkpoints only when the run stops and at its end: it then takes half the time."""


def launch(
    launcher: str, hosts: Hosts, ranks_per_host: int, program: list[str], among: list[Host] | None = None
) -> list[str]:
    """The command line for a program on all ranks, as users type it.

    ``mpirun``, ``horovodrun --mpi``, ``horovodrun --gloo``, ``megdet launch`` or ``megdet launch --controller gloo``.
    """
    among = among or list(hosts)
    ranks = str(len(among) * ranks_per_host)
    places = ",".join(f"{host.name}:{ranks_per_host}" for host in among)
    name, *options = launcher.split()
    if name == "mpirun":
        argv = [str(VENV_BIN / "mpirun"), "-np", ranks, "--host", places, "--map-by", "slot", "--bind-to", "none"]
        argv += ["--mca", "btl_tcp_if_include", INTERFACE, "--mca", "oob_tcp_if_include", INTERFACE]
        return [*argv, "-x", "PATH", "-x", "PYTHONPATH", *program]
    if name == "horovodrun":
        argv = ["horovodrun", *options, "-np", ranks, "-H", places, "--network-interfaces", INTERFACE]
        if "--mpi" in options:
            argv += ["--mpi-args", f"--prefix {shlex.quote(str(VENV_BIN.parent))}"]
        return [*argv, *program]
    assert launcher.startswith("megdet launch")
    hostfile = hosts.hostfile(ranks_per_host, among)
    return [*launcher.split(), "--hostfile", str(hostfile), "--interface", INTERFACE, "--", *program]


@dataclass
class Training:
    """A run of the tiny configuration that is started repeatedly in one run directory."""

    hosts: Hosts
    run_dir: Path
    data: Path
    ranks_per_host: int = 1
    among: int = 2
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def members(self) -> list[Host]:
        """The hosts that the job runs on."""
        return list(self.hosts)[: self.among]

    def arguments(self, **more: str) -> list[str]:
        """Arguments of train.py; resumes if there is something to resume from."""
        settings = {**SETTINGS, "data.synthetic_root": str(self.data), **self.settings, **more}
        arguments = ["--config", str(TINY), "--run-dir", str(self.run_dir)]
        for name, value in settings.items():
            arguments += ["--set", f"{name}={value}"]
        return arguments + (["--resume"] if (self.run_dir / CONFIG_FILE).exists() else [])

    def start(self, launcher: str, fault: str | None = None, **settings: str) -> "Job":
        """Starts it under a launcher, with a ``fault`` of faulty.py if one is given."""
        script = Path(__file__).with_name("faulty.py") if fault else PROJECT / "train.py"
        program = ["python", str(script), *self.arguments(**settings)]
        environment = {"MEGDET_FAULT": fault} if fault else {}
        if fault and launcher.startswith("megdet"):
            launcher += " --env MEGDET_FAULT"
        command = launch(launcher, self.hosts, self.ranks_per_host, program, self.members)
        if fault and launcher == "mpirun":
            command[1:1] = ["-x", "MEGDET_FAULT"]
        return Job(self.hosts, command, script.name, self.run_dir.with_suffix(".log"), environment)

    def steps_done(self) -> int:
        """The step of the newest checkpoint, from which the next start continues."""
        return max(
            (int(path.name.removeprefix("step_")) for path in self.run_dir.glob("checkpoints/step_*")), default=0
        )

    def kept_report(self) -> str:
        """What the ended job keeps for the next start to report, since its launcher may have lost it."""
        return "\n".join(path.read_text() for path in self.run_dir.glob("heartbeats/reported*"))

    def result(self) -> dict[str, Any]:
        """Name and hashes of the newest checkpoint: equal only if every bit is."""
        newest = checkpoint.newest(self.run_dir, report=print)
        return {"name": newest.path.name, **newest.bits()}


class Job:
    """A running job, started on the first host."""

    started_by_test: ClassVar[list["Job"]] = []
    """The jobs that the running test has started."""

    def __init__(self, hosts: Hosts, command: list[str], script: str, log: Path, environment: dict[str, str]) -> None:
        self.hosts, self.script, self.log = hosts, script, log
        log.unlink(missing_ok=True)
        log.touch()
        self.process = hosts[0].start(command, log, cwd=log.parent, env=environment)
        self.started_by_test.append(self)

    @property
    def output(self) -> str:
        """What it has printed so far, without the prefixes that launchers add to each line."""
        text = self.log.read_text(errors="replace")
        return re.sub(r"^(\S+ \S+ +\d+ [\d:]+ \d+)?\[[\d,]+\]<std\w+>:", "", text, flags=re.MULTILINE)

    def wait_for_output(self, pattern: str, timeout: float = 90) -> None:
        """Polls until a line of the output matches; the job must not end before."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.output, flags=re.MULTILINE):
            assert self.process.poll() is None, (
                f"ended with {self.process.returncode} without {pattern!r}:\n{self.output}"
            )
            assert time.monotonic() < deadline, f"waited {timeout} s in vain for {pattern!r}:\n{self.output}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        """Polls until a step is complete."""
        self.wait_for_output(rf"^step {step} ")

    def wait(self, timeout: float = 120) -> int:
        """Waits for the launcher's exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None

    def ranks(self) -> list[Any]:
        """The processes of all ranks, and their loader workers, on all hosts."""
        return self.hosts.processes(self.script)

    def seconds_until_gone(self, since: float, timeout: float) -> float:
        """Waits until no rank is left on any host; returns the seconds from ``since`` until then."""
        wait_for(lambda: not self.ranks(), "the ranks to end", lambda: self.output, timeout)
        return time.monotonic() - since

    def end(self) -> None:
        """Kills what still runs of it on all hosts."""
        for host in self.hosts:
            for process in host.processes():
                if "sshd:" not in process.arguments[0] and process.script not in DAEMONS:
                    process.signal(signal.SIGKILL)
        self.process.wait()


DAEMONS = {"munged", "slurmctld", "slurmscriptd", "slurmd", "sshd"}


def left_behind(hosts: Hosts) -> list[str]:
    """Processes on the hosts other than their daemons, as `host: command line`."""
    return [
        f"{host.name}: {' '.join(process.arguments)[:150]}"
        for host in hosts
        for process in host.processes()
        if process.script not in DAEMONS and not process.arguments[0].startswith("sshd:")
    ]


def poll(condition: Callable[[], Any], timeout: float) -> bool:
    """Whether a condition becomes true within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
