"""The files of a folder of images: what a listing shows of them, and the sizes in their headers."""

import contextlib
import itertools
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from horovod_megdet.data.images import ImageFileError, read_header, read_image
from horovod_megdet.progress import progress

CheckImages = Literal["open", "decode", "trust"]

FILE_THREADS = 8
"""Threads that check image files where that means waiting: on a network file system, milliseconds for each of them."""

FILES_PER_TASK = 64
"""Image files that a thread takes at a time, so that distributing them costs next to nothing."""

MISSING = -1
"""In place of size and time of a file that does not exist."""

TOO_RECENT = -2
"""In place of the time of a file that may change once more without a change of its time."""

TIME_RESOLUTION = 2 * 10**9
"""Nanoseconds within which a file system may give two changes of a file the same time."""


@dataclass
class CheckedFiles:
    """What a check found out about some image files."""

    headers: NDArray[np.int32]
    """(n, 4): height and width as displayed, after EXIF orientation, and as stored; 0 for a bad file."""
    errors: dict[int, str]
    """By index, what is wrong with a bad file, as the end of a sentence that names it."""

    @classmethod
    def unknown(cls, count: int) -> "CheckedFiles":
        """Before the check of ``count`` files."""
        return cls(np.zeros((count, 4), np.int32), {})

    def unchecked(self) -> list[int]:
        """Indices of the files that nothing is known about."""
        return [index for index in np.flatnonzero(~self.headers.any(axis=1)).tolist() if index not in self.errors]

    def put(self, indices: Sequence[int], found: "CheckedFiles") -> None:
        """Takes in what was found out about the files at these indices."""
        self.headers[list(indices)] = found.headers
        self.errors |= {indices[index]: error for index, error in found.errors.items()}


def recorded_time(time_ns: int) -> int:
    """A file's time of change, as far as an equal time later on shows that it has not changed since."""
    return TOO_RECENT if time.time_ns() - time_ns < TIME_RESOLUTION else time_ns


def list_files(folder: Path, names: Sequence[str]) -> NDArray[np.int64]:
    """(n, 2), size in bytes and :func:`recorded_time` of each file, from a listing of the folders they are in."""
    wanted, found = set(names), {}
    now = time.time_ns()
    for parent in {name.rpartition("/")[0] for name in wanted}:
        prefix = f"{parent}/" if parent else ""
        # A folder that cannot be listed, or a link that leads nowhere: its files are missing.
        with contextlib.suppress(OSError), os.scandir(folder / parent) as entries:
            for entry in entries:
                progress.advance()
                name = prefix + entry.name
                if name in wanted:
                    with contextlib.suppress(OSError):
                        state = entry.stat()
                        found[name] = state.st_size, state.st_mtime_ns
    states = np.array([found.get(name, (MISSING, MISSING)) for name in names], np.int64).reshape(-1, 2)
    states[now - states[:, 1] < TIME_RESOLUTION, 1] = TOO_RECENT
    return states


def check_files(
    folder: Path, names: Sequence[str], check_images: CheckImages, done: Callable[[int], None] = lambda count: None
) -> CheckedFiles:
    """Reads the header of each file, and decodes all of it where that is asked for.

    Files that have to be waited for are read in threads. ``done`` is called with the number of files checked so far.
    """

    def check(name: str) -> tuple[int, int, int, int] | str:
        path = folder / name
        try:
            header = read_header(path)
            if check_images == "decode":
                read_image(path)
        except ImageFileError as error:
            return str(error).removeprefix(f"{path}: ")
        return (*header.size, *header.stored_size)

    def results() -> Iterator[list[tuple[int, int, int, int] | str]]:
        tasks = [names[at : at + FILES_PER_TASK] for at in range(0, len(names), FILES_PER_TASK)]
        for number, task in enumerate(tasks):
            before = _waits()
            result = [check(name) for name in task]
            waited = _waits() - before
            yield result
            # In memory or on a fast disk, threads would only take Python's lock from each other.
            if waited > len(task) / 2:
                with ThreadPoolExecutor(FILE_THREADS) as threads:
                    yield from threads.map(lambda task: [check(name) for name in task], tasks[number + 1 :])
                return

    found = CheckedFiles.unknown(len(names))
    for index, result in enumerate(itertools.chain.from_iterable(results())):
        progress.advance()
        if isinstance(result, str):
            found.errors[index] = result
        else:
            found.headers[index] = result
        done(index + 1)
    return found


def _waits() -> int:
    """How often this thread has waited, for a file system or for another thread."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
