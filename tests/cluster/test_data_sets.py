"""Hosts with disks of their own and hosts with a shared disk load a data set."""

import json
import re
from pathlib import Path
from typing import Any

from hosts import Hosts
from jobs import launch

from horovod_megdet.data.synthetic import ensure_synthetic

IMAGES = 40
RANKS_PER_HOST = 4


def start(hosts: Hosts, root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What the ranks of reading.py say, by rank, and which hosts read the data set and say where they keep that."""
    program = ["python", str(Path(__file__).with_name("reading.py"))]
    program += [str(root / "annotations" / "train.json"), str(root / "images" / "train")]
    output = hosts[0].run(launch("mpirun", hosts, RANKS_PER_HOST, program), timeout=300).stdout
    ranks = [json.loads(line[line.index("{") :]) for line in output.splitlines() if '{"rank"' in line]
    pattern = rf"(host\w): {root}/annotations/train\.json: read with {IMAGES} images .* finds the result in {root}/"
    return sorted(ranks, key=lambda said: said["rank"]), sorted(re.findall(pattern, output))


def check(ranks: list[dict[str, Any]]) -> None:
    assert len(ranks) == 4 * RANKS_PER_HOST
    assert len({rank["fingerprint"] for rank in ranks}) == 1
    assert all(rank["mapped"] for rank in ranks)


def test_hosts_without_a_shared_disk_keep_a_cache_each(hosts: Hosts, shared: Path) -> None:
    ensure_synthetic(shared / "data", train_images=IMAGES, val_images=1)
    own = Path("/tmp/data of this host")
    try:
        for host in hosts:
            host.run(["cp", "-r", str(shared / "data"), str(own)])
        for readers in (list(hosts.names), []):
            ranks, read_by = start(hosts, own)
            check(ranks)
            assert read_by == readers
    finally:
        for host in hosts:
            host.run(["rm", "-rf", str(own)])


def test_hosts_with_a_shared_disk_keep_one(hosts: Hosts, shared: Path) -> None:
    ensure_synthetic(shared / "data", train_images=IMAGES, val_images=1)
    for readers in (1, 0):
        ranks, read_by = start(hosts, shared / "data")
        check(ranks)
        assert len(read_by) == readers
    assert len(list((shared / "data" / "annotations").glob(".train.json.*"))) == 1
