"""What the progress of a rank and the heartbeats of all mean: who is stuck, who waits for whom, which ranks are lost.

Nothing here reads a clock or a file, prints, or ends anything: :mod:`.watchdog` does that.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from horovod_megdet.cluster.watchdog.heartbeats import Heartbeat, LastWords


class StallTimer:
    """How long the main thread has left no note in :mod:`horovod_megdet.progress`.

    Times are seconds of a monotonic clock, which the caller reads. ``timeout`` 0 never expires. An update that comes
    more than ``longest_pause`` seconds after the one before means that the whole process was stopped, and with it the
    watchdog; nothing is wrong then, and the timer starts anew.
    """

    def __init__(self, timeout: float, longest_pause: float, notes: int, now: float) -> None:
        self.timeout, self.longest_pause = timeout, longest_pause
        self.notes = notes
        self.progress_at = self.updated_at = now

    def update(self, notes: int, now: float) -> None:
        """Takes in how many notes the main thread has left so far."""
        if notes != self.notes or now - self.updated_at > self.longest_pause:
            self.notes, self.progress_at = notes, now
        self.updated_at = now

    def idle(self, now: float) -> float:
        """Seconds without progress."""
        return now - self.progress_at

    def expired(self, now: float) -> bool:
        """Whether the main thread has made no progress for longer than the timeout."""
        return 0 < self.timeout < self.idle(now)


@dataclass(frozen=True)
class Stall:
    """No rank makes progress."""

    sentence: str
    """Who is stuck in what, and who waits for whom."""
    witnesses: frozenset[int]
    """A rank of each group that is stuck in the same place: their stacks show where."""


@dataclass(frozen=True)
class LostRanks:
    """Ranks ended without a word, or crashed."""

    sentence: str
    """Which, at which step, and what the others did."""
    survivors: frozenset[int]
    """Ranks that are known to have run after that: they received SIGTERM, or left last words."""


def find_stall(beats: list[Heartbeat], timeout: float) -> Stall | None:
    """The verdict on a job of which one rank has made no progress for ``timeout`` seconds; None: keep waiting.

    A rank may have a good reason to let the others wait, such as an evaluation or a checkpoint. So it is a stall only
    if no rank has made progress for half of that time.
    """
    if any(beat.stuck_for < timeout / 2 for beat in beats):
        return None
    groups = _by_activity(beats)
    clauses = [_stuck(doing, ranks) for doing, ranks in groups.items()]
    return Stall(
        f"{_how_long(beats, timeout)} (runtime.stall_timeout). {_cause(beats)}: {'; '.join(clauses)}.",
        frozenset(min(beat.rank for beat in ranks) for ranks in groups.values()),
    )


def _how_long(beats: list[Heartbeat], timeout: float) -> str:
    least = min(beat.stuck_for for beat in beats)
    if least >= timeout:
        return f"no rank has made progress for {timeout:.0f} s"
    return f"no rank has made progress for {least:.0f} s, and one for {timeout:.0f} s"


def _by_activity(beats: list[Heartbeat]) -> dict[str, list[Heartbeat]]:
    """The ranks by what they are stuck in: those to blame first, those that only wait for them last."""
    suspects_first = sorted(beats, key=lambda beat: (not beat.silent, beat.waiting_for is not None, beat.rank))
    return _groups(suspects_first, lambda beat: "silent" if beat.silent else beat.doing)


def _stuck(doing: str, ranks: list[Heartbeat]) -> str:
    if doing == "silent":
        return (
            f"{name_ranks(ranks)}: silent for {max(beat.age for beat in ranks):.0f} s (stopped, or the host hangs; "
            f"last seen: {ranks[0].doing})"
        )
    return f"{name_ranks(ranks)}: {doing} for {max(beat.stuck_for for beat in ranks):.0f} s"


def _cause(beats: list[Heartbeat]) -> str:
    if any(beat.silent for beat in beats):
        return "A rank no longer runs"
    if not all(beat.waiting_for for beat in beats):
        return "A rank is stuck"
    if len({beat.waiting_for for beat in beats}) > 1:
        return "A deadlock, in which ranks wait in different collectives"
    return "All ranks wait in the same collective, whose messages do not arrive"


def find_lost_ranks(beats: list[Heartbeat]) -> LostRanks | None:
    """The verdict on a job that the launcher ends, or whose ranks lost contact; None if no rank was lost.

    Lost are those that neither received SIGTERM nor left last words.
    """
    if not beats:
        return None
    # Ranks are in lock-step, and the last heartbeat of the lost ones may be some seconds old.
    step = max(beat.step for beat in beats)
    at_step = f"at step {step}" if step else "before the first step"
    lost = [beat for beat in beats if not beat.last_words and not beat.received_sigterm]
    unseen = sorted(set(range(max(beat.size for beat in beats))) - {beat.rank for beat in beats})
    others_fault = (LastWords.LOST_CONTACT, LastWords.WAITED)
    failed = [beat for beat in beats if beat.last_words and beat.last_words not in others_fault]
    victims = [beat for beat in beats if beat.last_words in others_fault]
    clauses = [f"{name_ranks(lost)} lost {at_step} (last seen: {lost[0].doing})"] if lost else []
    clauses += [f"rank{'s' * (len(unseen) > 1)} {_ranges(unseen)} never wrote a heartbeat"] if unseen else []
    clauses += [f"{name_ranks([beat])} {beat.last_words} {at_step}" for beat in failed]
    if clauses:
        clauses += [f"{name_ranks(ranks)} {words}" for words, ranks in _groups(victims, _words_of_victim).items()]
    elif any(beat.last_words == LastWords.LOST_CONTACT for beat in victims):
        clauses.append(f"all ranks were still running {at_step}, but could not reach each other: {name_ranks(victims)}")
    else:
        return None
    survivors = frozenset(beat.rank for beat in beats if beat.received_sigterm or beat.last_words)
    return LostRanks(f"{'; '.join(clauses)}.", survivors)


def _words_of_victim(beat: Heartbeat) -> str:
    return f"waited for tensor {beat.waiting_for}" if beat.last_words == LastWords.WAITED else str(beat.last_words)


def _groups(beats: Iterable[Heartbeat], key: Callable[[Heartbeat], str]) -> dict[str, list[Heartbeat]]:
    found: dict[str, list[Heartbeat]] = defaultdict(list)
    for beat in beats:
        found[key(beat)].append(beat)
    return found


def name_ranks(beats: Iterable[Heartbeat]) -> str:
    """``rank 3 on node02``, ``ranks 0-7 on node01, 9 on node02``."""
    hosts: dict[str, list[int]] = defaultdict(list)
    for beat in beats:
        hosts[beat.host].append(beat.rank)
    parts = [f"{_ranges(ranks)} on {host}" for host, ranks in hosts.items()]
    plural = "s" if sum(map(len, hosts.values())) > 1 else ""
    return f"rank{plural} {', '.join(parts)}"


def _ranges(ranks: list[int]) -> str:
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
