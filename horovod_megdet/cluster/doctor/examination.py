"""What the checks look at, and what they find."""

from dataclasses import dataclass, field
from typing import Literal

from horovod_megdet.cluster.doctor.facts import Facts
from horovod_megdet.cluster.doctor.measurements import Clock, Timing
from horovod_megdet.cluster.doctor.run_directory import RunDirectory
from horovod_megdet.wording import count

Severity = Literal["error", "warning", "ok"]


@dataclass(frozen=True)
class Finding:
    """One sentence on the state of the machines, and one on what to do about it.

    An *error* means that training would fail, stop, or do something other than what was asked for; a *warning*, that it
    would be slow or may fail.
    """

    severity: Severity
    sentence: str
    remedy: str = ""
    check: str = ""
    """Name of the check that found it, which :func:`~horovod_megdet.cluster.doctor.checks.examine` fills in."""


def error(sentence: str, remedy: str) -> Finding:
    return Finding("error", sentence, remedy)


def warning(sentence: str, remedy: str) -> Finding:
    return Finding("warning", sentence, remedy)


def ok(sentence: str) -> Finding:
    return Finding("ok", sentence)


@dataclass
class Examination:
    """All that is known so far: one measurement after the other fills it in. What is not known is empty."""

    ranks: list[Facts]
    """In rank order; only this rank until the ranks have found each other."""
    clocks: list[Clock] = field(default_factory=list)
    run_directory: list[RunDirectory] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    gradient_bytes: int = 0
    """Size of the gradients that the ranks average in each step."""
    checkpoint_bytes: int = 0
    """Approximate size of a checkpoint on disk."""
    failures: dict[str, str] = field(default_factory=dict)
    """Measurements that failed, and why."""

    @property
    def hosts(self) -> list[str]:
        """The hosts' names, in rank order."""
        return list(dict.fromkeys(facts.place.host for facts in self.ranks))

    @property
    def host_ranks(self) -> list[Facts]:
        """The first rank of each host."""
        return [facts for facts in self.ranks if facts.place.local_rank == 0] or self.ranks[:1]

    @property
    def ranks_on_hosts(self) -> str:
        """`4 ranks on 2 hosts`."""
        return f"{count(len(self.ranks), 'rank')} on {count(len(self.hosts), 'host')}"
