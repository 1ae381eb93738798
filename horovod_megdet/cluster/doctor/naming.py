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
    """`1.0 on node01, node02; 1.1 on node03`, or an empty string if all values are the same."""
    groups = grouped(pairs)
    if len(groups) < 2:
        return ""
    everyone = [facts for facts, _ in pairs]
    return "; ".join(f"{value or 'none'} on {where(ranks, everyone)}" for value, ranks in groups.items())


def where(ranks: Sequence[Facts], everyone: Sequence[Facts]) -> str:
    """Names the hosts of ``ranks``, or the ranks one by one where they are not all that ``everyone`` has of a host."""
    named, total = (Counter(facts.place.host for facts in group) for group in (ranks, everyone))
    if named == total and len(named) > 1:
        return "all hosts"
    names = []
    for facts in ranks:
        host = facts.place.host
        names.append(host if named[host] == total[host] else facts.name)
    return some(dict.fromkeys(names))
