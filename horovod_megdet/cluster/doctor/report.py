"""What the doctor says: on the terminal, as JSON and as a plot."""

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
from horovod_megdet.cluster.doctor.network import Timing
from horovod_megdet.files import atomic_write
from horovod_megdet.report.curves import BLUE, INK, ORANGE
from horovod_megdet.report.tables import two_columns
from horovod_megdet.wording import count, seconds, size

ORDER = ("error", "warning", "ok")
STYLES = {"error": "bold red", "warning": "yellow", "ok": "green"}


def failed(findings: list[Finding]) -> bool:
    """Whether training would fail."""
    return any(finding.severity == "error" for finding in findings)


def show(examination: Examination, findings: list[Finding], console: Console) -> None:
    """Prints tables of hosts, settings and messages, then the findings, the worst last: they stand above the prompt."""
    console.print(_hosts(examination))
    main = examination.ranks[0]
    if main.settings:
        console.print(two_columns("Launch settings", list(main.settings.items())))
    if examination.timings and len(examination.ranks) > 1:
        console.print(_messages(examination.timings, len(examination.ranks)))
    console.print(listed(findings))
    console.print(verdict(findings))


def listed(findings: list[Finding]) -> Group:
    """The findings with their remedies, the worst last."""
    lines = []
    for severity in reversed(ORDER):
        for finding in findings:
            if finding.severity == severity:
                sentence = f"{finding.check}: {finding.sentence}".replace("\n", f"\n{'':8}")
                lines.append(Text.assemble((f"{severity:8}", STYLES[severity]), sentence))
                lines += [Text(f"{'':8}-> {finding.remedy}")] if finding.remedy else []
    return Group(*lines)


def verdict(findings: list[Finding]) -> str:
    """The last line."""
    numbers = Counter(finding.severity for finding in findings)
    counts = f"{count(numbers['error'], 'error')}, {count(numbers['warning'], 'warning')}"
    return f"Training would fail: {counts}." if failed(findings) else f"Training can start: {counts}."


def crowd(examination: Examination) -> str:
    """`4 ranks on 2 hosts`."""
    return f"{count(len(examination.ranks), 'rank')} on {count(len(examination.hosts), 'host')}"


def as_data(examination: Examination, findings: list[Finding]) -> dict[str, Any]:
    """Everything, for machines."""
    ranks = len(examination.ranks)
    known = dataclasses.asdict(examination)
    for timing, entry in zip(examination.timings, known["timings"], strict=True):
        entry["gbit_per_second"] = timing.bandwidth(ranks)
    return {
        "training_would_fail": failed(findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        **known,
    }


def write_plot(timings: list[Timing], ranks: int, title: str, path: Path) -> None:
    """Draws time and bandwidth of an allreduce over the size of its message; raises :class:`UserError`."""
    figure = Figure(figsize=(11, 4.5), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12, color=INK)
    time_panel, speed_panel = figure.subplots(1, 2)
    bare = [timing for timing in timings if timing.mpi]
    sizes, bare_sizes = [timing.bytes for timing in timings], [timing.bytes for timing in bare]
    speeds = [timing.bandwidth(ranks) for timing in timings]
    time_panel.plot(sizes, [1e6 * timing.horovod for timing in timings], "o-", color=BLUE, label="Horovod")
    speed_panel.plot(sizes, speeds, "o-", color=BLUE, label="Horovod")
    if bare:
        as_mpi = [dataclasses.replace(timing, horovod=timing.mpi or 0.0) for timing in bare]
        time_panel.plot(bare_sizes, [1e6 * timing.horovod for timing in as_mpi], "s--", color=ORANGE, label="bare MPI")
        speed_panel.plot(bare_sizes, [t.bandwidth(ranks) for t in as_mpi], "s--", color=ORANGE, label="bare MPI")
    for panel, label in ((time_panel, "time of an allreduce, microseconds"), (speed_panel, "Gbit/s sent by each rank")):
        panel.set(xscale="log", yscale="log", xlabel="bytes", ylabel=label)
        panel.set_xscale("log", base=2)
        panel.grid(True, color="#e6e6e6", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png", dpi=120)


def _hosts(examination: Examination) -> Table:
    main = examination.ranks[0]
    controller = f", controller {main.build.controller}" if main.build else ""
    table = Table(title=f"{crowd(examination)}{controller}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("host", "ranks", "cores", "threads", "GPUs", "memory", "/dev/shm", "temporary", "clock"):
        table.add_column(name, justify="left" if name == "host" else "right")
    numbers = Counter(facts.place.host for facts in examination.ranks)
    clocks = {clock.rank: clock for clock in examination.clocks}
    for facts in examination.host_ranks:
        clock = clocks.get(facts.place.rank)
        offset = f"{'+' if clock.offset >= 0 else '-'}{seconds(abs(clock.offset))}" if clock else ""
        table.add_row(facts.place.host, str(numbers[facts.place.host]), *_amounts(facts), offset)
    return table


def _amounts(facts: Facts) -> list[str]:
    memory, shared, temporary = facts.memory, facts.shared_memory, facts.temporary_disk
    return [
        f"{len(facts.processor.usable)} of {facts.processor.cores}" if facts.processor else "?",
        "?" if facts.threads is None else str(facts.threads),
        "?" if facts.gpus is None else str(len(facts.gpus)),
        size(memory.available) if memory else "?",
        size(shared.free) if shared else "?",
        size(temporary.free) if temporary else "?",
    ]


def _messages(timings: list[Timing], ranks: int) -> Table:
    bare = any(timing.mpi for timing in timings)
    table = Table(title="Allreduce", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("message", "Horovod", *(("bare MPI", "ratio") if bare else ()), "Gbit/s"):
        table.add_column(name, justify="right")
    for timing in timings:
        beside = [seconds(timing.mpi), f"{timing.horovod / timing.mpi:.2f}"] if timing.mpi else []
        table.add_row(size(timing.bytes), seconds(timing.horovod), *beside, f"{timing.bandwidth(ranks):.3g}")
    return table
