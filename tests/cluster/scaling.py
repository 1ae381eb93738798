"""Compares what ``megdet plan`` predicts for more hosts and slower links with what a training takes.

    sudo .venv/bin/python tests/cluster/scaling.py            # prints the table, some 10 minutes on 2 cores
    sudo .venv/bin/python tests/cluster/scaling.py --write    # and replaces it in docs/performance.md

The constants of the model are fitted to messages among 2 and 4 hosts, for each link. A small detector then trains on 2,
4 and 8 hosts with a rank each. All hosts share the cores of this machine, so that the same number of ranks without
limits of the links tells the time of computing; what a limit adds is communication, measured and predicted. A second
table has large messages in the ring that the project chooses, and as Open MPI sends them by itself.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from hosts import PROJECT, Hosts
from jobs import TINY, Training, launch

from horovod_megdet import comm
from horovod_megdet.config import load_config
from horovod_megdet.models.detector import build_detector
from horovod_megdet.printing import say
from horovod_megdet.report.rows import read_metrics
from horovod_megdet.solver.cost import MessageCost, Traffic
from horovod_megdet.solver.schedule import make_schedule

PAGE = PROJECT / "docs" / "performance.md"
BEGIN, END = "<!-- measured: tests/cluster/scaling.py -->", "<!-- end -->"
LINKS = ("1gbit", "100mbit")
HOSTS = (2, 4, 8)
FITTED_ON = (2, 4)
STEPS, WARM_UP = 9, 3
IMAGES_PER_RANK, EPOCH = 2, 24
LARGE = 4 * 2**20
"""Values of a large message, float32."""


@dataclass(frozen=True)
class Row:
    """A training on some hosts with a limit of their links."""

    link: str
    hosts: int
    without_limit: float
    """Seconds per step."""
    step: float
    predicted: float
    """Seconds that the limit adds to a step."""

    @property
    def measured(self) -> float:
        """Seconds that the limit adds to a step."""
        return self.step - self.without_limit


def main() -> int:
    """Measures everything; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the table in docs/performance.md")
    parser.add_argument("--links", nargs="+", default=LINKS, metavar="RATE", help="limits of the links (1gbit 100mbit)")
    parser.add_argument("--messages", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.messages:
        time_messages()
        return 0
    with tempfile.TemporaryDirectory(prefix="megdet-scaling-") as name:
        folder = Path(name) / "scaling" / "cluster"
        folder.mkdir(parents=True)
        with Hosts(max(HOSTS), folder) as hosts:
            text = "\n".join([*table(list(measure(hosts, folder, arguments.links))), "", *algorithms(hosts)])
    print(text)
    if arguments.write:
        before, rest = PAGE.read_text().split(BEGIN)
        after = rest.split(END, 1)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    return 0


def measure(hosts: Hosts, folder: Path, links: Sequence[str]) -> Iterator[Row]:
    """The rows of the table."""
    free = constants(hosts, None)
    without_limit = {number: step_seconds(hosts, folder, number, None) for number in HOSTS}
    for link in links:
        slow = constants(hosts, link)
        for number in HOSTS:
            step = step_seconds(hosts, folder, number, link)
            predicted = communication(slow, number) - communication(free, number)
            row = Row(link, number, without_limit[number], step, predicted)
            print(row, flush=True)
            yield row


def limit(hosts: Hosts, link: str | None) -> None:
    """Limits the links of all hosts."""
    for host in hosts:
        host.limit_rate(link)


def constants(hosts: Hosts, link: str | None) -> MessageCost:
    """The model's constants, from messages between some hosts."""
    limit(hosts, link)
    cost = MessageCost.fitted([(number, *messages(hosts, number)) for number in FITTED_ON], 4 * LARGE)
    print(f"{link or 'no limit'}: {cost}", flush=True)
    return cost


def messages(hosts: Hosts, number: int, *options: str) -> tuple[float, float]:
    """Seconds of a small and of a large message among so many hosts, with more options of mpirun."""
    program = ["python", str(Path(__file__).resolve()), "--messages"]
    command = launch("mpirun", hosts, 1, program, among=hosts[:number])
    done = hosts[0].run([command[0], *options, *command[1:]], timeout=300)
    small, large = json.loads(done.stdout.strip().splitlines()[-1])
    return small, large


def time_messages() -> None:
    """On each rank: the seconds of a small and of a large message; rank 0 prints them."""
    comm.init()
    seconds = []
    for message, name, repeats in ((torch.zeros(129).double(), "small", 200), (torch.zeros(LARGE), "large", 5)):
        times = []
        for _ in range(repeats):
            comm.barrier()
            began = time.perf_counter()
            comm.sum_(message, name)
            times.append(time.perf_counter() - began)
        seconds.append(statistics.median(times))
    if comm.is_main():
        say(json.dumps(seconds))
    comm.shutdown()


def step_seconds(hosts: Hosts, folder: Path, number: int, link: str | None) -> float:
    """Median seconds of a training step on so many hosts."""
    limit(hosts, link)
    mini_batch = number * IMAGES_PER_RANK
    epochs = STEPS * mini_batch / EPOCH
    settings = {
        "solver.epochs": f"{epochs}",
        "solver.milestones": "[]",
        "solver.gammas": "[]",
        "solver.warmup_epochs": "0",
        "solver.measure_noise": "never",
        "output.log_every_images": f"{mini_batch}",
        "output.checkpoint_every_epochs": f"{epochs}",
        "output.evaluate_every_epochs": f"{2 * epochs}",
    }
    training = Training(hosts, folder / f"{link}-{number}", folder / "data", among=number, settings=settings)
    job = training.start("mpirun")
    assert job.wait(600) == 0, job.output
    rows = [row for row in read_metrics(training.run_dir / "metrics.jsonl") if row["kind"] == "train"]
    return statistics.median(row["step_seconds"] for row in rows[WARM_UP:])


def communication(cost: MessageCost, ranks: int) -> float:
    """Seconds of communication in a step of the detector, as `megdet plan` predicts them."""
    config = load_config(TINY)
    detector = build_detector(config.model, config.batch_norm, 6)
    schedule = make_schedule(config.solver, EPOCH, ranks, config.data.images_per_rank)
    return sum(cost.step(ranks, Traffic.of(detector, config, schedule)))


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of the table."""
    yield "| links | hosts | step without the limit, s | with it, s | added, s | predicted, s | predicted / added |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        seconds = (row.without_limit, row.step, row.measured, row.predicted)
        texts = [f"{value:.2f}" for value in (*seconds, row.predicted / row.measured)]
        yield f"| {row.link} | {row.hosts} | {' | '.join(texts)} |"


def algorithms(hosts: Hosts) -> Iterator[str]:
    """The lines of the table of large messages."""
    yield f"| links | hosts | {4 * LARGE / 2**20:.0f} MiB in a ring, s | by Open MPI's choice, s | ratio |"
    yield "| --- | --- | --- | --- | --- |"
    for link in (None, LINKS[0]):
        limit(hosts, link)
        for number in HOSTS[1:]:
            _, ring = messages(hosts, number)
            _, other = messages(hosts, number, "--mca", "coll_tuned_use_dynamic_rules", "0")
            yield f"| {link or 'no limit'} | {number} | {ring:.3f} | {other:.3f} | {ring / other:.2f} |"


if __name__ == "__main__":
    sys.exit(main())
