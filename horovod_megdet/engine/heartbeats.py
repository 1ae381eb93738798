"""The heartbeat files of a run: what every rank last said of itself, where every rank and the user can read it.

``<run_dir>/heartbeats/rank_00003.json`` is replaced every few seconds. A rank that is stopped, or whose host hangs, is
known by its silence. Ages are differences of modification times, which one file server sets: the hosts' clocks do not
matter.
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

FOLDER = "heartbeats"
_REPORTED = "reported-"


@dataclass(frozen=True)
class Heartbeat:
    """What one rank last wrote."""

    rank: int
    size: int
    host: str
    pid: int
    step: int
    doing: str
    """What it did, as the end of a sentence."""
    waiting_for: str | None
    """The tensor that it waited for."""
    idle: float
    """Seconds without progress when it wrote."""
    interval: float
    """Seconds after which it wants to write again."""
    told: bool = False
    """Whether it got SIGTERM, so that it is known to have run until then."""
    ended: str | None = None
    """Its last words, if it could say any: why it ends."""
    age: float = field(default=0.0, compare=False)
    """Seconds since it wrote; known to the reader only."""

    @property
    def silent(self) -> bool:
        """Whether it should have written again since."""
        return self.age > 3 * self.interval

    @property
    def stuck_for(self) -> float:
        """Seconds without progress, as far as is known."""
        return self.idle + self.age


class Heartbeats:
    """The heartbeat folder of a run."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.folder = run_dir / FOLDER

    def write(self, beat: Heartbeat) -> None:
        """Replaces the file of a rank in one step; raises OSError."""
        path = self._path(beat.rank)
        temporary = path.with_suffix(".tmp")
        content = asdict(beat)
        del content["age"]
        self.folder.mkdir(parents=True, exist_ok=True)
        # Not flushed to disk: it is for readers of the next seconds, and training must not wait for it.
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(path)

    def read(self) -> list[Heartbeat]:
        """The newest heartbeats, by rank, with their ages as of the newest of all; ranks without one are left out.

        Raises OSError where the folder cannot be read.
        """
        found = []
        for path in sorted(self.folder.glob("rank_*.json")):
            # A rank that ends in good order removes its file.
            with contextlib.suppress(FileNotFoundError):
                written = path.stat().st_mtime
                found.append((written, Heartbeat(**json.loads(path.read_text(encoding="utf-8")))))
        if not found:
            return []
        newest, size = max((written, beat.size) for written, beat in found)
        # A job of more ranks may have left some behind.
        return [_aged(beat, newest - written) for written, beat in found if beat.rank < size]

    def claim_report(self, sentence: str, host: str = "") -> bool:
        """True for the first rank that asks, or the first of a host: the one that tells the user what happened.

        The sentence is kept for the next start: a launcher that ends may lose what ranks print then.
        """
        try:
            with (self.folder / f"{_REPORTED}{host}").open("x", encoding="utf-8") as file:
                file.write(sentence)
        except FileExistsError:
            return False
        except OSError:
            return True  # Nobody can be asked: better told twice than not at all.
        return True

    def take_report(self) -> str:
        """The job starts anew: returns what was told of the one before, and forgets it.

        Where each host has told it, the longest: that one knew most.
        """
        told = []
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.glob(f"{_REPORTED}*")):
                told.append(path.read_text(encoding="utf-8"))
                path.unlink(missing_ok=True)
        return max(told, default="", key=len)

    def remove(self, rank: int) -> None:
        """Takes a rank that ends in good order off; the last one removes the folder, and an empty run directory."""
        # Not empty, not there, or on a disk that fails: then it stays, and nothing depends on it.
        with contextlib.suppress(OSError):
            self._path(rank).unlink(missing_ok=True)
            if rank == 0:
                self.take_report()
            self.folder.rmdir()
            self.run_dir.rmdir()  # a start that failed leaves no run behind

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"


def _aged(beat: Heartbeat, age: float) -> Heartbeat:
    return Heartbeat(**(asdict(beat) | {"age": age}))


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


LOST_CONTACT = "lost contact"
"""Last words of a rank whose messages do not come through any more."""

WAITED = "waited for tensor"
"""The beginning of the last words of a rank that was told to end while it waited."""


def describe_losses(beats: list[Heartbeat]) -> str | None:
    """One sentence on which ranks were lost: those that were not told to end and have left no last words.

    None if there is nothing to tell.
    """
    if not beats:
        return None
    # Ranks are in lock-step, and the last heartbeat of the lost ones may be some seconds old.
    step = max(beat.step for beat in beats)
    at = f"at step {step}" if step else "before the first step"
    lost = [beat for beat in beats if beat.ended is None and not beat.told]
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
