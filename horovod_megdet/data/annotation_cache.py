"""What was found out about an annotation file and its images, kept in a file that later starts map.

The file is found by the paths of the JSON, of the image folder and by how the images were checked. It is used if the
JSON is the same (size, time and inode, or else its content) and the image files are the same (sizes and times in a
listing). Anything else, such as a file that is damaged, of another version or of another user, is ignored, and is
replaced by the next one that is written.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from horovod_megdet.data.annotations import Annotations, from_mapping, to_arrays
from horovod_megdet.data.array_file import (
    DamagedFileError,
    MappedArrays,
    names_to_numbers,
    numbers_to_names,
    write_arrays,
)
from horovod_megdet.data.image_files import TOO_RECENT, CheckedFiles, CheckImages, recorded_time
from horovod_megdet.errors import UserError

FORMAT = "horovod_megdet annotations 1"
"""Changes whenever the content of the file, or what is checked, changes."""


@dataclass(frozen=True)
class Source:
    """The files of a data set, and where its cache may be."""

    annotations: Path
    """The COCO JSON."""
    images: Path
    """The folder that the file names in it are relative to."""
    check_images: CheckImages = "open"
    cache_dir: Path | None = None
    """Folder for the cache; None for the folder of the JSON or else the user's cache folder."""

    def places(self) -> list[Path]:
        """The files that may be the cache, in the order in which they are tried."""
        names = os.path.realpath(self.annotations), os.path.realpath(self.images), self.check_images
        key = hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:16]
        folders = [self.cache_dir] if self.cache_dir else [self.annotations.parent, *_user_cache()]
        return [folder / f".{self.annotations.name}.{key}.safetensors" for folder in folders]


def _user_cache() -> list[Path]:
    try:
        return [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "horovod_megdet")]
    except RuntimeError:
        return []  # a user without a home


@dataclass(frozen=True)
class JsonState:
    """What tells whether an annotation file has changed."""

    size: int
    time_ns: int
    """See :func:`~horovod_megdet.data.image_files.recorded_time`."""
    inode: int
    sha256: str = ""
    """Of the content; empty where that has not been read."""

    @classmethod
    def of(cls, path: Path, sha256: str = "") -> "JsonState":
        """The file at ``path``."""
        found = path.stat()
        return cls(found.st_size, recorded_time(found.st_mtime_ns), found.st_ino, sha256)

    def shows_no_change_since(self, recorded: "JsonState") -> bool:
        """Whether the content must still be the recorded one, without looking at it."""
        return self.time_ns != TOO_RECENT and replace(self, sha256=recorded.sha256) == recorded


@dataclass(frozen=True)
class Listed:
    """The image files that an annotation file lists, whether they are good or bad."""

    names: Sequence[str]
    states: NDArray[np.int64]
    """(n, 2), as :func:`~horovod_megdet.data.image_files.list_files` returns them."""
    checked: CheckedFiles

    def is_unchanged(self, states: NDArray[np.int64]) -> bool:
        """Whether a new listing of the same names shows that no file has changed."""
        return bool(_unchanged(states, self.states).all())

    def take_over(self, earlier: "Listed") -> None:
        """Takes what is known about the files that have not changed since they were checked earlier."""
        indices = {name: index for index, name in enumerate(earlier.names)}
        both = [(index, indices[name]) for index, name in enumerate(self.names) if name in indices]
        here, there = np.array(both, np.int64).reshape(-1, 2).T
        same = _unchanged(self.states[here], earlier.states[there])
        here, there = here[same], there[same]
        self.checked.headers[here] = earlier.checked.headers[there]
        errors = earlier.checked.errors
        self.checked.errors |= {
            index: errors[other] for index, other in zip(here.tolist(), there.tolist(), strict=True) if other in errors
        }


def _unchanged(states: NDArray[np.int64], earlier: NDArray[np.int64]) -> NDArray[np.bool_]:
    return (states == earlier).all(axis=1) & (states[:, 1] != TOO_RECENT)


@dataclass(frozen=True)
class Cache:
    """A cache file that is whole and of this version; whether it is up to date has to be seen."""

    mapping: MappedArrays

    @property
    def json(self) -> JsonState:
        """The annotation file that it was made from."""
        return JsonState(**json.loads(self.mapping.metadata["json"]))

    def listed(self) -> Listed:
        """The image files that it was made from."""
        arrays = self.mapping.arrays
        errors = json.loads(arrays["errors"].tobytes())
        checked = CheckedFiles(arrays["listed_headers"], {int(index): error for index, error in errors.items()})
        return Listed(numbers_to_names(arrays["listed_names"]).tolist(), arrays["listed_states"], checked)

    def annotations(self) -> Annotations:
        """What it holds, mapped."""
        return from_mapping(self.mapping)


def find(source: Source, digest: str) -> Cache | None:
    """The cache with this digest, which is known to be whole."""
    return next(caches(source, digest), None)


def caches(source: Source, digest: str | None = None) -> Iterator[Cache]:
    """The caches that are whole, or those with this digest; the preferred place first."""
    for path in source.places():
        try:
            mapping = MappedArrays.open(path)
            trusted = {0, os.geteuid(), source.annotations.stat().st_uid}
        except (OSError, DamagedFileError):
            continue
        if mapping.metadata.get("format") != FORMAT or mapping.owner not in trusted:
            continue
        if mapping.digest == digest if digest is not None else mapping.intact():
            yield Cache(mapping)


def save(source: Source, found: Annotations, listed: Listed, state: JsonState) -> tuple[str, Path | None, str]:
    """Writes the cache to the first place where that is possible.

    Returns the digest of its arrays and its path, or None and a sentence that says why there is none.
    """
    arrays = to_arrays(found) | {
        "listed_names": names_to_numbers(listed.names),
        "listed_states": listed.states,
        "listed_headers": listed.checked.headers,
        "errors": np.frombuffer(json.dumps(listed.checked.errors).encode(), np.uint8),
    }
    metadata = {"format": FORMAT, "json": json.dumps(asdict(state))}
    reasons = []
    for path in source.places():
        if _is_write_protected(path.parent):
            reasons.append(f"{path.parent}: nobody may write to this folder.")
            continue
        try:
            return write_arrays(path, arrays, metadata), path, ""
        except UserError as error:
            reasons.append(str(error))
    return "", None, " ".join(reasons)


def _is_write_protected(folder: Path) -> bool:
    """Whether the folder has no write permission for anyone; that is respected even where root could write."""
    try:
        return not folder.stat().st_mode & 0o222
    except OSError:
        return False
