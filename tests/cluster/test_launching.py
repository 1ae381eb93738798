"""Every launcher over two and four hosts, and what the ranks find there."""

import json
from pathlib import Path
from typing import Any

import pytest
from hosts import Host, Hosts
from jobs import Training, launch, left_behind, poll


# On two hosts, test_failing_fast.py has mpirun and megdet launch, and the groups below have horovodrun.
def test_train_on_four_hosts(hosts: Hosts, shared: Path, data: Path) -> None:
    short = {"solver.epochs": "0.1", "solver.milestones": "[0.05]", "solver.warmup_epochs": "0"}
    training = Training(hosts, shared / "run", data, among=4, settings=short)
    job = training.start("mpirun")
    assert job.wait() == 0, job.output
    assert "4, 1 on hostA, controller mpi" in job.output
    assert "Finished after" in job.output
    assert training.steps_done() >= 1
    assert poll(lambda: not left_behind(hosts), 15), left_behind(hosts)


def probe(hosts: Hosts, launcher: str, ranks_per_host: int, among: list[Host]) -> list[dict[str, Any]]:
    """What the ranks of probe.py print, by rank."""
    program = ["python", str(Path(__file__).with_name("probe.py"))]
    output = hosts[0].run(launch(launcher, hosts, ranks_per_host, program, among)).stdout
    lines = [line[line.index("{") :] for line in output.splitlines() if '{"rank"' in line]
    return sorted((json.loads(line) for line in lines), key=lambda said: said["rank"])


@pytest.mark.parametrize("launcher", ["horovodrun --mpi", "horovodrun --gloo"])
def test_horovodrun_on_four_hosts(hosts: Hosts, launcher: str) -> None:
    said = probe(hosts, launcher, 1, hosts[:])
    assert [rank["host"] for rank in said] == ["hostA", "hostB", "hostC", "hostD"]
    assert [rank["controller"] for rank in said] == [launcher.removeprefix("horovodrun --")] * 4
    assert [rank["sum"] for rank in said] == [1111] * 4
    assert poll(lambda: not left_behind(hosts), 15), left_behind(hosts)


@pytest.mark.parametrize("launcher", ["horovodrun --mpi", "horovodrun --gloo"])
def test_groups_of_batch_normalization_stay_on_their_host_and_links_have_their_rate(
    hosts: Hosts, launcher: str
) -> None:
    try:
        for host in hosts[:2]:
            host.limit_rate("1gbit")
        said = probe(hosts, launcher, 2, hosts[:2])
    finally:
        for host in hosts[:2]:
            host.limit_rate(None)
    assert [rank["host"] for rank in said] == ["hostA", "hostA", "hostB", "hostB"]
    assert [rank["group"] for rank in said] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["sum"] for rank in said] == [11, 11, 1100, 1100]
    # 32 MiB, at least once over the link, which takes 0.27 s
    assert max(rank["seconds"] for rank in said) > 0.25
