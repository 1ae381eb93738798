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


def differing(pairs: Sequence[tuple[Facts, Hashable]]) -> str:
    """`1.0 on node01, node02; 1.1 on node03`, or nothing where all values are the same."""
    groups = grouped(pairs)
    if len(groups) < 2:
        return ""
    asked = [facts for facts, _ in pairs]
    return "; ".join(f"{value or 'none'} on {where(who, asked)}" for value, who in groups.items())


def where(who: Sequence[Facts], asked: Sequence[Facts]) -> str:
    """Names the hosts of those of the ranks asked that are meant, and the rank where it is not all of a host's."""
    meant, all_asked = (Counter(facts.place.host for facts in group) for group in (who, asked))
    if meant == all_asked and len(meant) > 1:
        return "all hosts"
    names = []
    for facts in who:
        host = facts.place.host
        names.append(host if meant[host] == all_asked[host] else f"rank {facts.place.rank} on {host}")
    return some(dict.fromkeys(names))


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
            return f"{_short(number)} {unit}"
        number /= 1024
    return f"{_short(number)} TiB"


def seconds(number: float) -> str:
    """A time for people to read."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if number * factor >= 1:
            return f"{_short(number * factor)} {unit}"
    return f"{_short(number * 1e6)} us"


def _short(number: float) -> str:
    """Three digits, or as many as stand before the point."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"
