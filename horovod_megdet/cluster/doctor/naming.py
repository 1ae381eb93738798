"""How findings name the ranks and hosts that they are about."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from horovod_megdet.cluster.doctor.facts import Facts
from horovod_megdet.wording import some

V = TypeVar("V", bound=Hashable)


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
