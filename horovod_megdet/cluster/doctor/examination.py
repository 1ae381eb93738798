"""What the checks look at, and what they find."""

from dataclasses import dataclass, field
from typing import Literal

from horovod_megdet.cluster.doctor.facts import Facts
from horovod_megdet.cluster.doctor.network import Clock, Timing
from horovod_megdet.cluster.doctor.shared import Shared

Severity = Literal["error", "warning", "ok"]


@dataclass(frozen=True)
class Finding:
    """One sentence about the machines, and one about what to do.

    An *error* means that training would fail, stop or give something else than what was asked for; a *warning*, that it
    would be slow or may fail.
    """

    check: str
    severity: Severity
    sentence: str
    remedy: str = ""


@dataclass(frozen=True)
class Examination:
    """All that is known. What could not be found out is empty."""

    ranks: list[Facts]
    """In the order of the ranks; rank 0 only where the others cannot be reached."""
    clocks: list[Clock] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    gradient_bytes: int = 0
    """What the ranks exchange in each step."""
    checkpoint_bytes: int = 0
    """What a checkpoint takes on disk, about."""
    failures: dict[str, str] = field(default_factory=dict)
    """Measurement that could not be made: why."""

    @property
    def hosts(self) -> list[str]:
        """Their names, in the order of the ranks."""
        return list(dict.fromkeys(facts.place.host for facts in self.ranks))

    @property
    def host_ranks(self) -> list[Facts]:
        """The first rank of each host."""
        return [facts for facts in self.ranks if facts.place.local_rank == 0] or self.ranks[:1]
