"""How findings put ranks, hosts and amounts into words."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from horovod_megdet.doctor.facts import Facts

V = TypeVar("V", bound=Hashable)

SHOWN = 6
"""Names in a sentence."""


def grouped(pairs: Iterable[tuple[Facts, V]]) -> dict[V, list[Facts]]:
    """The ranks by their value, the most frequent value first."""
    groups: dict[V, list[Facts]] = {}
    for facts, value in pairs:
        groups.setdefault(value, []).append(facts)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def differing(pairs: Iterable[tuple[Facts, Hashable]], ranks: Sequence[Facts]) -> str:
    """`1.0 on node01, node02; 1.1 on node03`, or nothing where all values are the same."""
    groups = grouped(pairs)
    if len(groups) < 2:
        return ""
    return "; ".join(f"{value or 'none'} on {where(who, ranks)}" for value, who in groups.items())


def where(who: Sequence[Facts], ranks: Sequence[Facts]) -> str:
    """Names hosts, and ranks where only some of a host's are meant."""
    if len(who) == len(ranks) > 1:
        hosts = {facts.place.host for facts in ranks}
        return "all hosts" if len(hosts) > 1 else f"{hosts.pop()}"
    meant, all_ranks = (Counter(facts.place.host for facts in group) for group in (who, ranks))
    names: list[str] = []
    for facts in who:
        host = facts.place.host
        # One rank often speaks for its host.
        whole = meant[host] == all_ranks[host] or all(other.place.local_rank == 0 for other in who)
        name = host if whole else f"rank {facts.place.rank} on {host}"
        if name not in names:
            names.append(name)
    return some(names)


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def count(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(number: float) -> str:
    """Bytes for people to read."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


def seconds(number: float) -> str:
    """A time for people to read."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if number * factor >= 1:
            return f"{number * factor:.3g} {unit}"
    return f"{number * 1e6:.3g} us"
