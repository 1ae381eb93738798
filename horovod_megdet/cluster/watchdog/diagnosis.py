"""What the heartbeats of a job mean, in one sentence: who is stuck, who waits for whom, which ranks were lost."""

from collections import defaultdict
from collections.abc import Iterable

from horovod_megdet.cluster.watchdog.heartbeats import Heartbeat

LOST_CONTACT = "lost contact"
"""Last words of a rank whose messages do not come through any more."""

WAITED = "waited for tensor"
"""The beginning of the last words of a rank that was told to end while it waited."""


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


def groups(beats: list[Heartbeat]) -> dict[str, list[Heartbeat]]:
    """The ranks by what they are stuck in: those to blame first, those that only wait for them last."""
    found: dict[str, list[Heartbeat]] = defaultdict(list)
    for beat in sorted(beats, key=lambda beat: (not beat.silent, beat.waiting_for is not None, beat.rank)):
        if beat.silent:
            found["silent"].append(beat)
        else:
            found[beat.doing].append(beat)
    return found


def diagnose(beats: list[Heartbeat]) -> str:
    """One sentence on why no rank gets on: who is stuck in what, and who waits for them."""
    clauses = []
    for name, ranks in groups(beats).items():
        if name == "silent":
            clauses.append(
                f"{name_ranks(ranks)}: silent for {max(beat.age for beat in ranks):.0f} s (stopped, or the host hangs; "
                f"last seen: {ranks[0].doing})"
            )
        else:
            clauses.append(f"{name_ranks(ranks)}: {name} for {max(beat.stuck_for for beat in ranks):.0f} s")
    return f"{_verdict(beats)}: {'; '.join(clauses)}."


def _verdict(beats: list[Heartbeat]) -> str:
    if any(beat.silent for beat in beats):
        return "A rank does not run any more"
    if not all(beat.waiting_for for beat in beats):
        return "A rank is stuck"
    if len({beat.waiting_for for beat in beats}) > 1:
        return "A deadlock: the ranks wait in different collectives"
    return "All ranks wait in the same collective, whose messages do not arrive"


def describe_lost_ranks(beats: list[Heartbeat]) -> str | None:
    """One sentence on which ranks were lost: those that were not told to end and have left no last words.

    None if there is nothing to tell.
    """
    if not beats:
        return None
    # Ranks are in lock-step, and the last heartbeat of the lost ones may be some seconds old.
    step = max(beat.step for beat in beats)
    at = f"at step {step}" if step else "before the first step"
    lost = [beat for beat in beats if beat.ended is None and not beat.received_sigterm]
    missing = sorted(set(range(max(beat.size for beat in beats))) - {beat.rank for beat in beats})
    failed = [beat for beat in beats if beat.ended and not beat.ended.startswith((LOST_CONTACT, WAITED))]
    clauses = [f"{name_ranks(lost)} lost {at} (last seen: {lost[0].doing})"] if lost else []
    clauses += [f"no sign of rank {_ranges(missing)}"] if missing else []
    clauses += [f"{name_ranks([beat])} {beat.ended} {at}" for beat in failed]
    others = [beat for beat in beats if beat.ended and beat not in failed]
    if clauses and others:
        clauses.append(f"{name_ranks(others)} {others[0].ended}")
    elif not clauses and any(beat.ended == LOST_CONTACT for beat in others):
        clauses.append(f"all ranks still ran {at}, but could not reach each other: {name_ranks(others)}")
    return f"{'; '.join(clauses)}." if clauses else None
