"""Reading a data set together: of the ranks that see the same files, one parses and all check image files.

Nothing here imports Horovod, which loader workers must not load: the ranks are an argument, which is either
:mod:`horovod_megdet.comm` or :data:`ALONE`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np

from horovod_megdet import launched
from horovod_megdet.data import annotation_cache
from horovod_megdet.data.annotation_cache import Cache, JsonState, Listed, Source
from horovod_megdet.data.annotation_json import AnnotationFile, read_annotation_file
from horovod_megdet.data.annotations import Annotations
from horovod_megdet.data.image_files import CheckedFiles, check_files, list_files
from horovod_megdet.errors import UserError
from horovod_megdet.files import sha256
from horovod_megdet.printing import say, warn

T = TypeVar("T")

REPORT_SECONDS = 5.0
"""Seconds between two lines about the progress of a check."""


class Ranks(Protocol):
    """What reading needs of :mod:`horovod_megdet.comm`."""

    def rank(self) -> int:
        """This rank."""

    def size(self) -> int:
        """How many there are."""

    def gather_objects(self, value: T, name: str) -> list[T]:
        """The ranks' values, in rank order, on every rank."""

    def exchange_objects(self, values: list[T], name: str) -> list[T]:
        """Sends ``values[r]`` to each rank r; returns what the ranks sent to this one."""

    def agreement(self, name: str) -> AbstractContextManager[None]:
        """A :class:`UserError` in the block on any rank becomes one on all of them."""


class _Alone:
    """One process that does not communicate."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1

    def gather_objects(self, value: T, name: str) -> list[T]:
        return [value]

    def exchange_objects(self, values: list[T], name: str) -> list[T]:
        return values

    @contextlib.contextmanager
    def agreement(self, name: str) -> Iterator[None]:
        yield


ALONE: Ranks = _Alone()
"""The ranks of a process that has been started without a launcher, or that reads for itself."""


def read_annotations(source: Source, ranks: Ranks = ALONE) -> Annotations:
    """The valid entries of a COCO JSON whose image files are good; mapped from a cache where there can be one.

    Collective over ``ranks``. Raises :class:`UserError` on all of them if nothing can be used: a missing file or
    folder, invalid JSON, a missing section, no images.
    """
    team = _Team(source, ranks)
    leader = _Leader(source)
    plan = team.by_leader(lambda: leader.begin(team.size), "data: look for the cache")
    digest = plan.digest
    # All ranks take part if one has to: hosts with copies of the data may differ in what they have kept.
    if any(ranks.gather_objects(digest is None, "data: anything to read")):
        checked = team.to_leader(
            check_files(source.images, plan.names, source.check_images, team.show_progress), "data: checked image files"
        )
        digest = team.by_leader(lambda: [plan.digest or leader.finish(checked)] * team.size, "data: build the cache")
    assert digest is not None
    return team.share(digest, leader)


@dataclass(frozen=True)
class _Plan:
    """What the leader of a team tells one of its members."""

    digest: str | None
    """Of a cache that is up to date; None if there is none."""
    names: list[str]
    """Image files that this member has to check first."""


@dataclass(frozen=True)
class _Reading:
    """All that a cache file is made of."""

    found: Annotations
    listed: Listed
    state: JsonState

    def keep(self, source: Source, seconds: float) -> str:
        """Writes the cache and says where, or why not; returns its digest, which is empty if there is none."""
        digest, path, reason = annotation_cache.save(source, self.found, self.listed, self.state)
        where = f"{launched.host()}: {source.annotations}: read with {len(self.listed.names):,} images"
        if path:
            say(f"{where} in {seconds:.1f} s; the next start finds the result in {path}.")
        else:
            warn(f"{where} in {seconds:.1f} s, and at every start, because the result cannot be kept: {reason}")
        return digest


@dataclass(frozen=True)
class _ParsedSource:
    """An annotation file, and what is known about the image files that it lists before they are checked."""

    file: AnnotationFile
    state: JsonState
    listed: Listed
    unchecked: list[int]
    """Indices of the image files that have to be checked."""

    @classmethod
    def of(cls, source: Source, earlier: Cache | None) -> "_ParsedSource":
        """Reads the JSON; image files that have not changed since an ``earlier`` cache count as checked."""
        state = JsonState.of(source.annotations)  # before reading, so that a later change will be noticed
        file = read_annotation_file(source.annotations)
        names = [image.file for image in file.images]
        if source.check_images == "trust":
            listed = Listed(names, np.zeros((len(names), 2), np.int64), file.sizes_as_written())
        else:
            listed = Listed(names, list_files(source.images, names), CheckedFiles.unknown(len(names)))
            if earlier:
                listed.take_over(earlier.listed())
        return cls(file, replace(state, sha256=file.sha256), listed, listed.checked.unchecked())

    def names(self) -> list[str]:
        """The image files that have to be checked."""
        return [self.listed.names[index] for index in self.unchecked]

    def finish(self, parts: list[CheckedFiles]) -> _Reading:
        """The whole, with what the members of a team found out about their shares of :meth:`names`."""
        for place, part in enumerate(parts):
            self.listed.checked.put(self.unchecked[place :: len(parts)], part)
        return _Reading(self.file.pack(self.listed.checked), self.listed, self.state)


class _Leader:
    """What one rank does for all that see the same files: :meth:`begin`, and :meth:`finish` if that has no digest."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.started = time.monotonic()
        self.parsed: _ParsedSource | None = None
        self.reading: _Reading | None = None

    def begin(self, members: int) -> list[_Plan]:
        """Finds a cache that is up to date, or else parses the JSON and divides the image files that are to be checked.

        Returns the plan of each member.
        """
        earlier = None
        for cache in annotation_cache.caches(self.source):
            self.reading = _up_to_date(self.source, cache)
            if self.reading:
                return [_Plan(cache.mapping.digest, [])] * members
            earlier = earlier or cache
        self.parsed = _ParsedSource.of(self.source, earlier)
        names = self.parsed.names()
        return [_Plan(None, names[place::members]) for place in range(members)]

    def finish(self, parts: list[CheckedFiles]) -> str:
        """Puts together what the members found out about the files, and writes the cache; returns its digest."""
        assert self.parsed is not None
        self.reading = self.parsed.finish(parts)
        self.parsed = None
        return self.keep(self.reading)

    def keep(self, reading: _Reading) -> str:
        """Writes a cache where this rank can; returns its digest, which is empty if there is none."""
        return reading.keep(self.source, time.monotonic() - self.started)


def _up_to_date(source: Source, cache: Cache) -> _Reading | None:
    """What the cache holds, or None if the annotation file or an image file has changed since."""
    listed, state = cache.listed(), JsonState.of(source.annotations)
    if state.shows_no_change_since(cache.json):
        state = cache.json
    else:
        state = replace(state, sha256=sha256(source.annotations))
        if state.sha256 != cache.json.sha256:
            return None
    if source.check_images != "trust" and not listed.is_unchanged(list_files(source.images, listed.names)):
        return None
    reading = _Reading(cache.annotations(), listed, state)
    if state != cache.json:
        annotation_cache.save(source, reading.found, listed, state)
    return reading


class _Team:
    """The ranks that see the same files: those of one host, or of all that share a file system."""

    def __init__(self, source: Source, ranks: Ranks) -> None:
        self.source, self.ranks = source, ranks
        with ranks.agreement("data: files"):
            identity = _identity(source)
        identities = ranks.gather_objects(identity, "data: files")
        self.members = [rank for rank, other in enumerate(identities) if other == identity]
        self.place, self.size = self.members.index(ranks.rank()), len(self.members)
        self.leads = self.place == 0
        self.shown = time.monotonic()

    def by_leader(self, work: Callable[[], list[T]], name: str) -> T:
        """Every leader does the work, which gives a value for each of its members; returns, or raises, this one's.

        Collective.
        """
        values: list[T] = []
        error = ""
        if self.leads:
            try:
                values = work()
            except UserError as caught:
                error = str(caught)
        errors = self.ranks.gather_objects(error, f"{name}: errors")
        if any(errors):
            with self.ranks.agreement(name):
                if error := errors[self.members[0]]:
                    raise UserError(error)
        sent = dict(zip(self.members, values, strict=True)) if self.leads else {}
        value = self._exchange(sent, name)[self.members[0]]
        assert value is not None
        return value

    def to_leader(self, value: T, name: str) -> list[T]:
        """Returns the values of all members on their leader; on other ranks nothing. Collective."""
        received = self._exchange({self.members[0]: value}, name)
        return [part for member in self.members if (part := received[member]) is not None]

    def _exchange(self, sent: dict[int, T], name: str) -> list[T | None]:
        """Sends a value to some ranks; returns what each rank sent to this one."""
        return self.ranks.exchange_objects([sent.get(rank) for rank in range(self.ranks.size())], name)

    def show_progress(self, count: int) -> None:
        """Says how far the check of image files has come, from time to time."""
        if self.leads and time.monotonic() - self.shown > REPORT_SECONDS:
            self.shown = time.monotonic()
            say(f"{launched.host()}: {self.source.images}: checked {count * self.size:,} image files so far.")

    def share(self, digest: str, leader: _Leader) -> Annotations:
        """The result on all ranks: mapped, or else a copy of the leader's. Collective.

        A rank may not see the cache: it could not be written, or it is in a folder that each host has for itself. Then
        one rank of each such host writes a cache of its own.
        """
        cache = self._cache(digest)
        views = self.ranks.gather_objects((launched.host(), cache is not None), "data: see the cache")
        if all(sees for _, sees in views):
            assert cache is not None
            return cache.annotations()
        blind = [member for member in self.members if not views[member][1]]
        copies = self.ranks.gather_objects(leader.reading if self.leads and blind else None, "data: annotations")
        copy = copies[self.members[0]]
        writers = {views[member][0]: member for member in reversed(blind)}
        if not digest:
            writers.pop(views[self.members[0]][0], None)  # the leader's host, where writing has failed
        kept = self._kept_copies(copy, leader, writers.get(launched.host()))
        cache = cache or self._cache(kept)
        if cache is not None:
            return cache.annotations()
        assert copy is not None
        return copy.found

    def _kept_copies(self, copy: _Reading | None, leader: _Leader, writer: int | None) -> str:
        """The rank ``writer`` writes a cache of its host; returns that of this host, or "". Collective."""
        mine = ""
        if writer == self.ranks.rank():
            assert copy is not None
            mine = leader.keep(copy)
        digests = self.ranks.gather_objects(mine, "data: caches of other hosts")
        return "" if writer is None else digests[writer]

    def _cache(self, digest: str) -> Cache | None:
        return annotation_cache.find(self.source, digest) if digest else None


def _identity(source: Source) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is equal on two hosts only if they see the same files, or copies of a whole file system.

    The time of the last change of an inode cannot be set: files that were copied one by one have another.
    """
    try:
        annotations = source.annotations.stat()
    except FileNotFoundError:
        raise UserError(f"{source.annotations}: no such annotation file.") from None
    except OSError as error:
        raise UserError(f"{source.annotations}: the annotation file cannot be read: {error}.") from None
    if not source.images.is_dir():
        raise UserError(f"{source.images}: no such image folder (the images of {source.annotations}).")
    folder = source.images.stat()
    return (
        (annotations.st_size, annotations.st_ino, annotations.st_mtime_ns, annotations.st_ctime_ns),
        (folder.st_ino, folder.st_mtime_ns, folder.st_ctime_ns),
    )
