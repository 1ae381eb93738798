"""The heartbeat files of a run: what every rank last said of itself, where every rank and the user can read it.

``<run_dir>/heartbeats/rank_00003.json`` is replaced every few seconds. A rank that is stopped, or whose host hangs, is
known by its silence. Ages are differences of modification times, which one file server sets: the hosts' clocks do not
matter.
"""

import contextlib
import json
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
    received_sigterm: bool = False
    """Whether it received SIGTERM, so that it is known to have run until then."""
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
