"""What the doctor tells: on the terminal, as JSON and as a plot."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from horovod_megdet.cluster.doctor.examination import Examination, Finding
from horovod_megdet.cluster.doctor.facts import Facts
from horovod_megdet.cluster.doctor.measurements import Timing, bus_bandwidth
from horovod_megdet.files import atomic_write
from horovod_megdet.report.curves import BLUE, INK, ORANGE
from horovod_megdet.report.tables import two_columns
from horovod_megdet.wording import count, seconds, size

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
"""Severities in the order of the report: the worst last, where they stand right above the prompt."""


def would_fail(findings: list[Finding]) -> bool:
    """Whether training would fail."""
    return any(finding.severity == "error" for finding in findings)


def print_report(examination: Examination, findings: list[Finding], console: Console) -> None:
    """Prints tables of hosts, settings and messages, then the findings with their remedies, the worst last."""
    console.print(_host_table(examination))
    settings = examination.ranks[0].settings
    if settings:
        console.print(two_columns("Launch settings", list(settings.items())))
    if examination.timings:
        console.print(_message_table(examination.timings, len(examination.ranks)))
    console.print(_list_of(findings))
    numbers = Counter(finding.severity for finding in findings)
    verdict = "would fail" if would_fail(findings) else "can start"
    console.print(f"Training {verdict}: {count(numbers['error'], 'error')}, {count(numbers['warning'], 'warning')}.")


def as_json(examination: Examination, findings: list[Finding]) -> dict[str, Any]:
    """All that is known and found, for other programs."""
    known = dataclasses.asdict(examination)
    for timing, entry in zip(examination.timings, known["timings"], strict=True):
        entry["gbit_per_second"] = timing.bandwidth(len(examination.ranks))
    return {
        "training_would_fail": would_fail(findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        **known,
    }


def write_plot(timings: list[Timing], ranks: int, title: str, path: Path) -> None:
    """Plots time and bandwidth of an allreduce against the size of its message; raises :class:`UserError`."""
    figure = Figure(figsize=(11, 4.5), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12, color=INK)
    panels = time_panel, bandwidth_panel = figure.subplots(1, 2)
    horovod = [(timing.bytes, timing.horovod) for timing in timings]
    bare_mpi = [(timing.bytes, timing.mpi) for timing in timings if timing.mpi]
    for label, style, color, points in (("Horovod", "o-", BLUE, horovod), ("bare MPI", "s--", ORANGE, bare_mpi)):
        if points:
            sizes, times = zip(*points, strict=True)
            bandwidths = [bus_bandwidth(*point, ranks) for point in points]
            time_panel.plot(sizes, [1e6 * time for time in times], style, color=color, label=label)
            bandwidth_panel.plot(sizes, bandwidths, style, color=color, label=label)
    for panel, label in zip(panels, ("time of an allreduce, microseconds", "Gbit/s sent by each rank"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="bytes", ylabel=label)
        panel.set_xscale("log", base=2)
        panel.grid(True, color="#e6e6e6", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png", dpi=120)


def _list_of(findings: list[Finding]) -> Group:
    lines = []
    for severity, style in STYLES.items():
        for finding in findings:
            if finding.severity == severity:
                sentence = f"{finding.check}: {finding.sentence}".replace("\n", f"\n{'':8}")
                lines.append(Text.assemble((f"{severity:8}", style), sentence))
                lines += [Text(f"{'':8}-> {finding.remedy}")] if finding.remedy else []
    return Group(*lines)


def _host_table(examination: Examination) -> Table:
    build = examination.ranks[0].build
    controller = f", controller {build.controller}" if build else ""
    table = _table(
        f"{examination.ranks_on_hosts}{controller}",
        ["host", "ranks", "cores", "threads", "GPUs", "memory", "temporary", "clock"],
    )
    table.columns[0].justify = "left"
    numbers = Counter(facts.place.host for facts in examination.ranks)
    clocks = {clock.rank: clock for clock in examination.clocks}
    for facts in examination.host_ranks:
        clock = clocks.get(facts.place.rank)
        offset = f"{'+' if clock.offset >= 0 else '-'}{seconds(abs(clock.offset))}" if clock else ""
        table.add_row(facts.place.host, str(numbers[facts.place.host]), *_resources(facts), offset)
    return table


def _resources(facts: Facts) -> list[str]:
    memory, temporary = facts.memory, facts.temporary_disk
    return [
        f"{len(facts.processor.usable)} of {facts.processor.cores}" if facts.processor else "?",
        "?" if facts.threads is None else str(facts.threads),
        "?" if facts.gpus is None else str(len(facts.gpus)),
        size(memory.available) if memory else "?",
        size(temporary.free) if temporary else "?",
    ]


def _message_table(timings: list[Timing], ranks: int) -> Table:
    bare_mpi = ["bare MPI", "ratio"] if any(timing.mpi for timing in timings) else []
    table = _table("Allreduce", ["message", "Horovod", *bare_mpi, "Gbit/s"])
    for timing in timings:
        compared = [seconds(timing.mpi), f"{timing.horovod / timing.mpi:.2f}"] if timing.mpi else ["" for _ in bare_mpi]
        table.add_row(size(timing.bytes), seconds(timing.horovod), *compared, f"{timing.bandwidth(ranks):.3g}")
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right")
    return table
