"""The heartbeat files of a run: what every rank last said about itself, for the other ranks and the user to read.

``<run_dir>/heartbeats/rank_00003.json`` is replaced every few seconds. A rank that is stopped, or whose host hangs, is
recognized by its silence. Ages are differences of modification times, which one file server sets: the hosts' clocks do
not matter.
"""

import contextlib
import json
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path

FOLDER = "heartbeats"
_REPORT = "reported-"


class LastWords(StrEnum):
    """Why a rank ends, as the end of a sentence: "rank 3 ..."."""

    CRASHED = "crashed"
    HAD_AN_ERROR = "had an error"
    INTERRUPTED = "was interrupted"
    LOST_CONTACT = "lost contact"
    """Another rank does not answer."""
    WAITED = "waited"
    """For a collective, when SIGTERM came."""


@dataclass(frozen=True)
class Heartbeat:
    """What one rank last wrote."""

    rank: int
    size: int
    """Number of ranks of the job."""
    host: str
    pid: int
    step: int
    doing: str
    """What it was doing, as the end of a sentence: "rank 3 is ..."."""
    waiting_for: str | None
    """Name of the collective that it was waiting in."""
    idle: float
    """Seconds without progress when it wrote."""
    interval: float
    """Seconds between two heartbeats."""
    received_sigterm: bool = False
    """Whether it received SIGTERM, and so is known to have run until then."""
    last_words: LastWords | None = None
    """Why it ends, if it was able to say."""
    age: float = field(default=0.0, compare=False)
    """Seconds since it wrote; known to the reader only."""

    @property
    def silent(self) -> bool:
        """Whether it missed its next heartbeats."""
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
        # Not flushed to disk: only the next few seconds matter, and training must not wait for it.
        try:
            temporary.write_text(json.dumps(content), encoding="utf-8")
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(path)

    def read(self) -> list[Heartbeat]:
        """The latest heartbeats, by rank, with their ages relative to the newest; ranks without one are left out.

        Raises OSError where the folder cannot be read, ValueError where a file is not a heartbeat.
        """
        found = []
        for path in sorted(self.folder.glob("rank_*.json")):
            # A rank that ends normally removes its file.
            with contextlib.suppress(FileNotFoundError):
                written = path.stat().st_mtime
                found.append((written, _parse(path.read_text(encoding="utf-8"))))
        if not found:
            return []
        newest, size = max((written, beat.size) for written, beat in found)
        # An earlier job with more ranks may have left some behind.
        return [replace(beat, age=newest - written) for written, beat in found if beat.rank < size]

    def claim_report(self, host: str = "") -> bool:
        """True for the first rank that asks, or the first of a host: that one finds out what happened, and reports it.

        Of hundreds of ranks that each read the heartbeats of all, none might be done before the launcher kills them.
        (If the one that asked first is killed in the middle of it, nobody reports.)
        """
        try:
            self._report(host).touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return True  # Ranks cannot find out who reports: better twice than not at all.
        return True

    def report(self, sentence: str, host: str = "") -> None:
        """Keeps what the rank that claimed the report tells the user, for the other ranks and for the next start.

        A launcher that ends may lose what ranks print at that moment.
        """
        with contextlib.suppress(OSError):
            self._report(host).write_text(sentence, encoding="utf-8")

    def drop_claim(self, host: str = "") -> None:
        """Gives up the claim of a rank that has nothing to report (yet), so that another may look."""
        with contextlib.suppress(OSError):
            self._report(host).unlink(missing_ok=True)

    def is_reported(self, host: str = "") -> bool:
        """Whether the rank that claimed the report has reported."""
        try:
            with self._report(host).open("rb") as file:  # NFS may answer stat() from memory
                return bool(file.read(1))
        except OSError:
            return False

    def take_report(self) -> str:
        """Returns what the previous job reported, and removes it: empty if that job reported nothing.

        Where each host reported, the longest: that host knew most.
        """
        reports = []
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.glob(f"{_REPORT}*")):
                reports.append(path.read_text(encoding="utf-8"))
                path.unlink(missing_ok=True)
        return max(reports, default="", key=len)

    def remove(self, rank: int, size: int) -> None:
        """Removes the file of a rank that ends normally; the last one removes the folder and an empty run directory.

        Rank 0 also removes what ranks beyond ``size`` have left, which an elastic job has lost.
        """
        # The folder may not be empty or not exist, or the disk may fail: then it stays, and nothing depends on it.
        with contextlib.suppress(OSError):
            self._path(rank).unlink(missing_ok=True)
            if rank == 0:
                self.take_report()
                for path in self.folder.glob("rank_*.json"):
                    if int(path.stem.removeprefix("rank_")) >= size:
                        path.unlink(missing_ok=True)
            self.folder.rmdir()
            self.run_dir.rmdir()  # a start that failed leaves no run behind

    def _report(self, host: str) -> Path:
        return self.folder / f"{_REPORT}{host}"

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"


def _parse(text: str) -> Heartbeat:
    content = json.loads(text)
    try:
        last_words = content.pop("last_words", None)
        return Heartbeat(**content, last_words=LastWords(last_words) if last_words else None)
    except (AttributeError, TypeError) as error:  # other fields: of another version of this program
        raise ValueError(str(error)) from error
