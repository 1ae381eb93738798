"""What can happen to a job, and what it has to say: the rows of docs/reliability.md, for the tests and measure.py."""

import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from hosts import Process
from jobs import Job, Training, left_behind, poll

STALL_TIMEOUT = 6.0


@dataclass(frozen=True)
class Event:
    """Something that happens to a running job."""

    name: str
    launcher: str
    happen: Callable[[Training, Job], None] | None
    """What is done to it from outside; None if a fault is planted."""
    limit: float
    """Seconds after which no rank may be left."""
    says: tuple[str, ...] = ()
    """Regular expressions for what it has to print. {step} is any step, {victim} the last rank with its host."""
    fault: str | None = None
    """Kind of the fault that faulty.py plants in the last rank."""
    repair: Callable[[Training], None] | None = None
    """Restores the hosts."""
    only_measured: bool = False
    """For measure.py only, because the tests have a very similar one."""


def last_rank(training: Training) -> int:
    """The rank that things happen to."""
    return training.among * training.ranks_per_host - 1


def victim(training: Training, job: Job) -> Process:
    """The process of the last rank."""
    wanted = str(last_rank(training))
    for process in training.members[-1].processes(job.script):
        if wanted in (process.variable("OMPI_COMM_WORLD_RANK"), process.variable("HOROVOD_RANK")):
            return process
    raise AssertionError(f"rank {wanted} does not run:\n{job.output}")


def kill_rank(training: Training, job: Job) -> None:
    """Kills a rank, as the kernel's out-of-memory killer does."""
    victim(training, job).signal(signal.SIGKILL)


def stop_rank(training: Training, job: Job) -> None:
    """Stops a rank, which never continues."""
    victim(training, job).signal(signal.SIGSTOP)


def kill_host(training: Training, job: Job) -> None:
    """Ends a host, with all that runs on it."""
    training.members[-1].kill()


def unplug_host(training: Training, job: Job) -> None:
    """Cuts a host off the network; its processes continue."""
    training.members[-1].unplug()


def kill_launcher(name: str) -> Callable[[Training, Job], None]:
    """Sends SIGKILL to a launcher's process on the first host."""

    def happen(training: Training, job: Job) -> None:
        found = training.members[0].processes(name)
        assert found, f"no {name} runs"
        found[0].signal(signal.SIGKILL)

    return happen


def boot_host(training: Training) -> None:
    """Boots a killed host."""
    training.members[-1].boot()


def plug_host_in(training: Training) -> None:
    """Reconnects an unplugged host."""
    training.members[-1].plug_in()


MPI, GLOO = "megdet launch", "megdet launch --controller gloo"
LOST = (r"{victim}.* lost at step {step}",)
STALLED = f"no rank has made progress for {STALL_TIMEOUT:.0f} s"
STACK = r"{victim}, step {step}:\n(?:.*\n)*?.*File .*faulty.py"

EVENTS = [
    Event("rank killed", "mpirun", kill_rank, 5, LOST),
    Event("rank killed", "horovodrun --mpi", kill_rank, 5, LOST, only_measured=True),
    Event("rank killed", GLOO, kill_rank, 5, LOST, only_measured=True),
    Event("rank raises", MPI, None, 5, (r"{victim}, at step {step}, crashed",), fault="raise", only_measured=True),
    Event("rank raises", GLOO, None, 5, (r"{victim}, at step {step}, crashed",), fault="raise", only_measured=True),
    Event(
        "rank out of memory", MPI, None, 5, (r"{victim}, at step {step}, crashed", "allocate memory"), fault="memory"
    ),
    Event("host gone", MPI, kill_host, 5, LOST, repair=boot_host),
    Event("host gone", GLOO, kill_host, 5, LOST, repair=boot_host, only_measured=True),
    Event("link down", MPI, unplug_host, 15, (), repair=plug_host_in),
    Event(
        "link down", GLOO, unplug_host, 15, ("could not reach each other: .*{victim}|" + LOST[0],), repair=plug_host_in
    ),
    Event("rank stopped", MPI, stop_rank, STALL_TIMEOUT + 10, (STALLED, r"{victim}: silent")),
    Event("rank stopped", GLOO, stop_rank, 15, LOST, only_measured=True),
    Event(
        "deadlock",
        MPI,
        None,
        STALL_TIMEOUT + 10,
        (STALLED, "waiting for tensor only here", STACK),
        fault="deadlock",
        only_measured=True,
    ),
    Event(
        "deadlock", GLOO, None, STALL_TIMEOUT + 10, (STALLED, "waiting for tensor only here", STACK), fault="deadlock"
    ),
    Event(
        "loader hangs",
        MPI,
        None,
        STALL_TIMEOUT + 10,
        (STALLED, r"{victim}: waiting for the data loader", STACK),
        "loader",
    ),
    Event("launcher killed", "mpirun", kill_launcher("mpirun"), 15, only_measured=True),
    # What horovodrun has become by then:
    Event("launcher killed", "horovodrun --mpi", kill_launcher("mpirun"), 15, only_measured=True),
    Event("launcher killed", "horovodrun --gloo", kill_launcher("horovodrun"), 15, only_measured=True),
    Event("launcher killed", MPI, kill_launcher("megdet"), 15),
    Event("launcher killed", GLOO, kill_launcher("megdet"), 15, only_measured=True),
]


def happen(event: Event, training: Training) -> tuple[float, Job]:
    """Starts the job, lets the event happen in its third step, and returns the seconds until all ranks have ended.

    Fails if ranks or launchers are left on any host, or if the output does not say what it has to.
    """
    start = training.steps_done()
    number = last_rank(training)
    fault = f"{event.fault}:{number}:{start + 3}" if event.fault else None
    settings = {"runtime.stall_timeout": str(STALL_TIMEOUT)} if STALLED in event.says else {}
    job = training.start(event.launcher, fault, **settings)
    try:
        job.wait_for_step(start + 2)
        if event.happen:
            event.happen(training, job)
        else:
            job.wait_for_output("^planted fault")
        seconds = job.seconds_until_gone(time.monotonic(), event.limit + 20)
        job.wait(20)
        assert poll(lambda: not left_behind(training.hosts), 15), left_behind(training.hosts)
    finally:
        job.end()
        if event.repair:
            event.repair(training)
    host = training.members[-1].name
    report = training.kept_report()
    name = rf"(?:rank {number} on {host}|ranks [^;]*\b{number} on {host})"
    for pattern in event.says:
        expected = pattern.format(victim=name, step=r"[1-9]\d*")
        assert re.search(expected, f"{job.output}\n{report}"), f"not said: {expected}\n{job.output}\nkept: {report}"
    assert seconds <= event.limit, f"{seconds:.1f} s, {event.limit} s are the limit"
    return seconds, job
