"""Measures how fast jobs end, with four ranks on two hosts, and writes the table of docs/reliability.md.

    sudo .venv/bin/python tests/cluster/measure.py            # 10 to 15 minutes on 2 cores
    sudo .venv/bin/python tests/cluster/measure.py --only "link down"    # prints, does not write

Every event of events.py hits a running job; each start resumes what the one before left, and the last one runs on a
disk that fills up and becomes read-only. MPI and Gloo add up four ranks in different orders, so there is a run for each
of them, and each has to end with the bits of a run that nothing disturbed.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from disk import failing_disk
from events import EVENTS, Event, happen
from hosts import PROJECT, Hosts
from jobs import Training

PAGE = PROJECT / "docs" / "reliability.md"
BEGIN, END = "<!-- measured: tests/cluster/measure.py -->", "<!-- end -->"
RANKS_PER_HOST = 2
# Steps for all events; four ranks take half as many an epoch as the two of the tests.
LONG = {"solver.epochs": "16", "output.evaluate_every_epochs": "16"}


def main() -> int:
    """Measures everything; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", default="", help="only events whose name contains this")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory(prefix="megdet-reliability-") as name:
        folder = Path(name) / "measure" / "cluster"
        folder.mkdir(parents=True)
        with Hosts(2, folder) as hosts:
            rows, identical = measure(hosts, folder, only)
    if not only:
        write(rows, identical)
    return 0


def measure(hosts: Hosts, folder: Path, only: str) -> tuple[list[tuple[Event, float]], dict[str, bool]]:
    """Rows of event and seconds, and whether the run of each controller ended with the right bits."""
    rows, identical = [], {}
    for controller, launcher in (("MPI", "mpirun"), ("Gloo", "horovodrun --gloo")):
        training = Training(hosts, folder / f"disturbed-{controller}", folder / "data", RANKS_PER_HOST, settings=LONG)
        for event in EVENTS:
            if ("gloo" in event.launcher) == (controller == "Gloo") and only in event.name:
                started = time.monotonic()
                seconds, _ = happen(event, training)
                rows.append((event, seconds))
                print(f"{event.name}, {event.launcher}: {seconds:.1f} s ({time.monotonic() - started:.0f} s in all)")
        if not only:
            undisturbed = Training(
                hosts,
                folder / f"undisturbed-{controller}",
                folder / "data",
                RANKS_PER_HOST,
                settings=LONG | {"output.checkpoint_every_epochs": "16"},
            )
            job = undisturbed.start(launcher)
            assert job.wait(300) == 0, job.output
            identical[controller] = failing_disk(training, launcher) == undisturbed.result()
            print(f"{controller}: the same bits as an undisturbed run: {identical[controller]}")
    return rows, identical


def write(rows: list[tuple[Event, float]], identical: dict[str, bool]) -> None:
    """Replaces the measured part of the page."""
    lines = [BEGIN, "", "| event | started with | limit, s | all ranks gone after, s |", "| --- | --- | --- | --- |"]
    order = list(dict.fromkeys(event.name for event in EVENTS))
    for event, seconds in sorted(rows, key=lambda row: order.index(row[0].name)):
        lines.append(f"| {event.name} | `{event.launcher}` | {event.limit:.0f} | {seconds:.1f} |")
    verdict = {controller: "the same bits" if same else "OTHER BITS" for controller, same in identical.items()}
    lines += ["", "After all these events and a full and a read-only disk, the run had, compared with an undisturbed"]
    lines += ["one, " + "; ".join(f"{text} ({controller})" for controller, text in verdict.items()) + ".", "", ""]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + "\n".join(lines) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
