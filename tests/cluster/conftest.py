"""Hosts and a Slurm cluster for the tests of this folder.

A test asks for ``hosts`` (four of them, see hosts.py) or ``slurm`` (the same with Slurm, see slurm.py), and for
``shared``, a folder of its own that all hosts see. A program on several of them, here two ranks on each of two:

    def test_two_hosts(hosts: Hosts, shared: Path) -> None:
        command = launch("mpirun", hosts, 2, ["megdet", "doctor", "--json"], among=[hosts[0], hosts[1]])
        done = hosts[0].run(command, cwd=shared, check=False)         # .returncode, .stdout

``launch`` (jobs.py) makes the command line for mpirun, horovodrun and megdet launch. Faults are planted on one host: in
its mounts (``hosts[1].run(["mount", ...])``; each has its own /tmp, /run and /dev/shm), in its network (``unplug``,
``limit_rate``), or in its environment (``hosts[1].run(["ssh", ...])`` has the one that sshd sets). A test that changes
a host ends with ``hosts[1].kill()`` and ``hosts[1].boot()``, or with ``slurm.boot_node`` where Slurm is used.

Where hosts cannot be made, the tests are skipped with the reason.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hosts as hosts_of_a_machine
import pytest
from hosts import Hosts, Unavailable
from jobs import ONLY_WHEN_STOPPED, Job, Training

import slurm as slurm_of_hosts
from slurm import Slurm

LONGEST = ("test_failing_fast", "test_slurm", "test_elastic_hosts")
"""The files that take longest, in this order. They come first, so that two workers end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks and sorts the tests of this folder, and leaves other ones where they are."""
    places = [place for place, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    for place in places:
        items[place].add_marker("cluster")
    order = {name: number for number, name in enumerate(LONGEST)}
    chosen = sorted((items[place] for place in places), key=lambda item: order.get(item.path.stem, len(LONGEST)))
    for place, item in zip(places, chosen, strict=True):
        items[place] = item


@pytest.fixture(autouse=True)
def no_job_is_left() -> Iterator[None]:
    """A test that fails leaves no job on the hosts, where the next one would find it."""
    yield
    for job in Job.started_by_test:
        if job.process.poll() is None:
            job.end()
    Job.started_by_test.clear()


@pytest.fixture(scope="session")
def cluster_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys, logs and states."""
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="session")
def hosts(cluster_folder: Path) -> Iterator[Hosts]:
    """Four hosts on one switch."""
    try:
        hosts_of_a_machine.check_available()
    except Unavailable as reason:
        pytest.skip(f"no hosts can be made here: {reason}")
    etc = {}
    if Path("/etc/slurm").is_dir():
        etc["slurm"] = slurm_of_hosts.write_configuration(cluster_folder, Hosts.NAMES[:4])
    with Hosts(4, cluster_folder, etc) as running:
        yield running


@pytest.fixture(scope="session")
def slurm(hosts: Hosts, cluster_folder: Path) -> Slurm:
    """The four hosts as nodes of a Slurm cluster."""
    try:
        slurm_of_hosts.check_available()
    except Unavailable as reason:
        pytest.skip(f"no Slurm can be started here: {reason}")
    return Slurm(hosts, cluster_folder)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder of one test on the disk that all hosts share."""
    return tmp_path


@pytest.fixture(scope="session")
def undisturbed(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Any]:
    """The result of two ranks on two hosts that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    training = Training(hosts, folder / "run", data, settings=ONLY_WHEN_STOPPED)
    job = training.start("mpirun")
    assert job.wait() == 0, job.output
    return training.result()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first training writes the generated data set for all."""
    return tmp_path_factory.mktemp("data") / "synthetic"
