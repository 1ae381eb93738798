"""Elastic jobs: ranks come and go while the others go on, under Horovod's elastic driver and Gloo.

The driver (``horovodrun --min-np ... --host-discovery-script ...``) starts a process for each slot of the hosts that it
knows of, and gives them their ranks. After a change every process that is left asks it for its new place, and the ranks
begin anew:

    a rank is lost           collectives of the others raise LostRankError; the driver strikes the rank's host out
    a host joins or leaves   the driver tells rank 0, which tells all others at the next safe point: HostsChanged
    rejoin()                 hang up; ask for a place; meet the others; start Horovod

Horovod's own way through this (``hvd.elastic.run``) does not do here. It leaves the connections of a broken job open,
so that ranks that do not talk to the lost one notice the loss only at their timeout; and it asks for the new place and
connects in one step, in which an exception ends the process: where a new host is slow to start, or fails, all are lost.
"""

import contextlib
import http.client
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import horovod.torch as hvd
from horovod.runner.elastic.worker import WorkerNotificationManager

from horovod_megdet import launched
from horovod_megdet.comm import start
from horovod_megdet.comm.collectives import waiting_for
from horovod_megdet.errors import UserError
from horovod_megdet.printing import say
from horovod_megdet.progress import progress

LONGEST_START = 120.0
"""Seconds that the ranks wait for new ones to start. Then they go on without those that have ended meanwhile."""

LONGEST_SAVING = 60.0
"""Seconds that ranks wait until one of them has written a checkpoint, and until it tries again if it cannot."""

POLL_SECONDS = 0.2
"""Seconds between two looks at the store, and between two notes that this rank is still there."""

QUIET_SECONDS = 15.0
"""Seconds of waiting for a place after which the log says so, and what is in memory is saved: the hosts may not come.
Other ranks may take 10 s to notice that one is lost."""

REMOVED = -1
"""The rank that the driver gives a process that it has no place for."""


class HostsChanged(Exception):
    """Raised by all ranks together at a safe point: the driver knows of hosts that came or went."""


class RemovedError(Exception):
    """This process has no place in the job any more: its host was taken away, or one of its ranks failed."""


class StoppedError(Exception):
    """Raised by all ranks that wait for others together: the job is to stop, and the others do not come."""

    def __init__(self, saved: bool, placed: bool) -> None:
        super().__init__("the job is to stop")
        self.saved = saved
        """Whether one of the ranks has saved what all have in memory."""
        self.placed = placed
        """Whether it has a place in the job, and the driver counts its end."""


@dataclass(frozen=True)
class Unsaved:
    """What a rank has in memory."""

    step: int
    """Ranks with the same step have the same."""
    save: Callable[[], bool]
    """Saves it, unless it is saved already; False if that fails. Several ranks may do so at the same time."""


class _News:
    """Hears from the driver that hosts came or went. The driver tells only rank 0."""

    def __init__(self) -> None:
        self.changed = False
        self._manager: WorkerNotificationManager | None = None

    def listen(self) -> None:
        """Tells the driver where to send news; does so once."""
        if self._manager is None:
            self._manager = WorkerNotificationManager()
            self._manager.register_listener(self)
            self._manager.init()

    def on_hosts_updated(self, timestamp: int, update: int) -> None:
        """Called by Horovod, in a thread."""
        self.changed = True


_news = _News()
_connections: set[str] = set()
"""The kernel's names of the sockets that Horovod opened."""


def hosts_changed() -> bool:
    """Whether the driver has sent news of hosts since this rank joined; False in a job that is not elastic."""
    return _news.changed


def join(deterministic: bool = False, stopping: Callable[[], object] = lambda: False) -> None:
    """Starts Horovod with the place that the driver gave this process when it started it. Collective.

    ``stopping()``: whether the job is to stop; then others that are slow to start are not waited for. Raises
    :class:`RemovedError`, :class:`StoppedError` and :class:`UserError` as :func:`rejoin` does.
    """
    _news.listen()
    start.prepare(deterministic, groups=False)
    # Where it is set, Horovod 0.28.1 sends up to 128 MB at once when a process starts it for the first time, and up to
    # 1 MB when it starts it again, and ranks that differ in that read each other's messages wrongly. (Its
    # ParameterManager writes the default cycle time, 1, into the place of the threshold.) Gloo is not faster with it.
    os.environ.pop("HOROVOD_CYCLE_TIME", None)
    meeting = start.meet(LONGEST_START, stopping)
    if meeting == "stopped":
        raise StoppedError(saved=False, placed=False)
    if meeting == "complete":
        _connect()
    else:
        _take_new_place(stopping=lambda: False, unsaved=None)


def rejoin(lost: bool, stopping: Callable[[], object], unsaved: Unsaved | None) -> None:
    """Starts Horovod anew after a change, with the ranks that are there then. Collective.

    ``lost``: a rank does not answer. ``stopping()``: whether the job is to stop as soon as it can. ``unsaved``: what
    this rank has in memory, if it has anything; it is saved if the ranks have to wait. Waits until the driver has its
    minimum of ranks. Raises :class:`RemovedError` where this process is no longer needed, :class:`StoppedError` if
    others do not come while it is to stop, and :class:`UserError` if the driver gives up.
    """
    if lost:
        hang_up()
    hvd.shutdown()
    _take_new_place(stopping, unsaved)


def _take_new_place(stopping: Callable[[], object], unsaved: Unsaved | None) -> None:
    _news.changed = False  # what comes while it waits may be known by then: the ranks then meet once more than needed
    meeting: start.Meeting = "incomplete"
    while meeting != "complete":
        with waiting_for("place in the job"):
            place = _wait_for_place(stopping, unsaved)
        if place[0] == REMOVED:
            raise RemovedError
        launched.set_place(*place)
        meeting = start.meet(LONGEST_START, stopping)
        if meeting == "stopped":
            raise StoppedError(_Saving(unsaved).finish(), placed=True)
    _connect()


def _wait_for_place(stopping: Callable[[], object], unsaved: Unsaved | None) -> list[int]:
    """This process's new place. While too few ranks are left the driver gives none, for minutes."""
    answer: Future[list[int]] = Future()

    def ask() -> None:
        try:
            answer.set_result(_ask_for_place())
        except BaseException as error:
            answer.set_exception(error)

    # A daemon, unlike the threads of an executor: it does not keep a process that ends.
    asking = threading.Thread(target=ask, name="place", daemon=True)
    asking.start()
    store, saving, next_attempt = start.RendezvousStore(), _Saving(unsaved), QUIET_SECONDS
    while not answer.done():
        asking.join(POLL_SECONDS)
        progress.advance()  # a rank that waits for hosts has not stalled
        if store.seconds > next_attempt:
            if next_attempt == QUIET_SECONDS:
                say(
                    f"Rank {launched.rank()} on {launched.host()} is waiting for a new rank assignment: either another "
                    "rank has not noticed the change yet, or fewer ranks than the minimum are left and the launcher "
                    "waits for hosts."
                )
            saving.attempt()
            next_attempt = store.seconds + LONGEST_SAVING
        if store.seconds > start.TIMEOUT_TO_STOP and store.to_stop(stopping):
            saved = saving.finish()
            if not answer.done():  # otherwise it stops where the others wait for it
                raise StoppedError(saved, placed=False)
    return answer.result()


class _Saving:
    """Sees to it that what ranks have in memory is saved while they wait: by one of those that have the same."""

    def __init__(self, unsaved: Unsaved | None) -> None:
        self._unsaved = unsaved
        # The step is in the key: what a slow rank writes after all have their places must not count in the next wait.
        self._key = f"saving.{unsaved.step}" if unsaved else ""

    def attempt(self) -> bool | None:
        """Whether what this rank has is saved now; None where another rank sees to it."""
        store = start.RendezvousStore()
        if self._unsaved is None or store.read(f"{self._key}.done"):
            return True
        if not store.claim(self._key):
            return None
        if self._unsaved.save():
            store.write(f"{self._key}.done", True)
            return True
        store.release(self._key)
        return False

    def finish(self) -> bool:
        """The same at the end of the job: if the other rank does not come to an end with it, this one saves."""
        saved, store = self.attempt(), start.RendezvousStore()
        while saved is None and store.seconds < LONGEST_SAVING:
            time.sleep(POLL_SECONDS)
            saved = store.read(f"{self._key}.done")
        if saved is None and self._unsaved:
            return self._unsaved.save()
        return bool(saved)


def _connect() -> None:
    global _connections
    before = set(_sockets().values())
    os.environ["HOROVOD_ELASTIC"] = "0"  # or Horovod would ask for a place itself, and wait for all others to do so
    hvd.init()
    os.environ["HOROVOD_ELASTIC"] = "1"
    _connections = set(_sockets().values()) - before
    _news.listen()


def hang_up() -> None:
    """Closes the connections to the other ranks, so that they notice at once that this one does not go on.

    Horovod keeps them open until it starts again, and the others would wait for what this rank has not sent.
    """
    for descriptor, name in _sockets().items():
        if name in _connections:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                connection.shutdown(socket.SHUT_RDWR)


def _sockets() -> dict[int, str]:
    """The sockets of this process: file descriptors and the kernel's names."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the folder itself is closed
            if (name := str(link.readlink())).startswith("socket:"):
                found[int(link.name)] = name
    return found


def end_last() -> None:
    """Takes part in one more round of the driver, so that the exit code of this rank counts.

    Of the ranks that end in the same round, the first decides, which would be the one that the others have waited for.
    """
    with contextlib.suppress(UserError):
        _ask_for_place(start.TIMEOUT_TO_STOP)


def _ask_for_place(timeout: float | None = None) -> list[int]:
    """Asks for rank, number of ranks, local rank and size, cross rank and size; answered when all have asked."""
    server = f"{os.environ['HOROVOD_GLOO_RENDEZVOUS_ADDR']}:{os.environ['HOROVOD_GLOO_RENDEZVOUS_PORT']}"
    key = f"{os.environ['HOROVOD_HOSTNAME']}:{os.environ['HOROVOD_LOCAL_RANK']}"
    try:
        answer = start.ask_launcher(f"http://{server}/rank_and_size/{key}", timeout)
        return [int(number) for number in answer.decode().split(",")]
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise UserError(
            f"the launcher did not assign this process a rank: {error}. Too few hosts are left, or "
            "the launcher has ended. Start again with --resume."
        ) from None
