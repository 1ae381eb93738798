"""The thread that watches a rank: a job that makes no progress ends, and says why.

Nothing in a deadlocked collective, a stopped process or a loader that never returns raises an exception: all ranks
wait, for as long as the cluster lets them. So a thread of each rank checks every second whether the main thread makes
progress (see :mod:`horovod_megdet.progress`), writes that into the rank's heartbeat file for the others to read, and
ends the job when no rank has made progress for ``runtime.stall_timeout`` seconds. It also ends the rank when its
launcher is gone, and reports at which step ranks were lost when the launcher ends the remaining ones.

What heartbeats mean is decided in :mod:`horovod_megdet.cluster.watchdog.diagnosis`; here is what follows from it.
"""

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

from horovod_megdet import comm, launched
from horovod_megdet.cluster.parent_death import end_with_parent
from horovod_megdet.cluster.watchdog.diagnosis import LostRanks, StallTimer, find_lost_ranks, find_stall
from horovod_megdet.cluster.watchdog.heartbeats import Heartbeat, Heartbeats, LastWords
from horovod_megdet.cluster.watchdog.launcher_watch import LauncherWatch
from horovod_megdet.errors import EXIT_CRASHED, EXIT_STALLED
from horovod_megdet.printing import say, warn
from horovod_megdet.progress import progress

CHECK_EVERY = 1.0
"""Seconds between two checks of the main thread and the launcher."""

BEAT_EVERY = 5.0
"""Seconds between two heartbeats of a rank, in jobs of up to 50 ranks."""

BEATS_PER_SECOND = 10.0
"""Heartbeats of all ranks together, at most: each is some calls of the one file system that all share."""

TIME_FOR_LAST_WORDS = 0.4
"""Seconds that ranks have for their last words before one of them sums up. A launcher that has sent SIGTERM sends
SIGKILL after a second."""

LOOKS, LOOK = 7, 0.1
"""How often, and for how many seconds each, a rank that received SIGTERM looks whether it waits for others. One that
still computes by then is killed before it can report anything."""

TIME_FOR_STACKS = 3.0
"""Seconds that ranks have to print their stacks before one of them ends the job."""


class Watchdog:
    """Watches this rank from :meth:`start` to :meth:`stop`, both called by the main thread.

    ``run_dir`` None keeps no heartbeat files; ``stall_timeout`` 0 never ends a job that makes no progress.
    """

    def __init__(self, run_dir: Path | None, stall_timeout: float) -> None:
        self.stall_timeout = stall_timeout
        self.heartbeats = Heartbeats(run_dir) if run_dir else None
        self.launcher = LauncherWatch() if launched.by_launcher() else None
        self.beat_every = beat_interval(launched.size(), stall_timeout)
        self.timer = StallTimer(stall_timeout, 3 * self.beat_every, progress.notes, time.monotonic())
        self.received_sigterm = False
        self.reason: LastWords | None = None
        self._wrote_at = -self.beat_every
        self._warned = False
        self._writing = threading.Lock()
        self._wakeup, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def rank(self) -> int:
        """The rank of this process, which changes in elastic jobs."""
        return launched.rank()

    def start(self) -> None:
        """Starts watching."""
        if launched.by_horovodrun():
            # Nobody kills ranks on other hosts when their ssh connection ends. Not under MPI, whose daemons may start
            # ranks from a thread that ends before them.
            end_with_parent(signal.SIGKILL)
        if self.heartbeats and self.rank == 0 and (report := self.heartbeats.take_report()):
            say(f"The previous job ended with: {report}")
        # A Python handler waits until the main thread leaves the collective; this pipe gets the signal at once.
        os.set_blocking(self._waker, False)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        """Stops watching a rank that ends normally; its heartbeat file goes."""
        signal.set_wakeup_fd(-1)
        os.close(self._waker)
        self._thread.join()
        os.close(self._wakeup)
        if self.heartbeats:
            self.heartbeats.remove(self.rank, launched.size())

    def last_words(self, reason: LastWords) -> None:
        """Leaves the reason why this rank ends, for the other ranks and for whoever looks afterwards."""
        self.reason = reason
        self._beat()

    def report_lost_ranks(self, on_each_host: bool = False, noticed: float | None = None) -> bool:
        """Reports which ranks were lost, as soon as the remaining ones have left their last words.

        They have noticed it, as this one, at the time ``noticed`` of the monotonic clock (default: now). One rank of
        the job reports, or one of each host: what the ranks of another host print may not arrive. Returns whether ranks
        were lost, and others than this one survived that.
        """
        if self.heartbeats is None:
            return False
        passed = 0.0 if noticed is None else time.monotonic() - noticed
        time.sleep(max(LOOK, TIME_FOR_LAST_WORDS - passed))
        host = launched.host() if on_each_host else ""
        for _ in range(LOOKS):
            if self.heartbeats.claim_report(host):
                return self._report_lost_ranks(self.heartbeats, host)
            if self.heartbeats.is_reported(host):
                # The rank that reported has survived. An elastic job goes on, though: there it may be an old report.
                return not launched.elastic() or self._others_survived(self._lost_ranks(self.heartbeats))
            time.sleep(LOOK / 2)
        return False

    def _report_lost_ranks(self, heartbeats: Heartbeats, host: str) -> bool:
        lost = self._lost_ranks(heartbeats)
        if lost:
            heartbeats.report(lost.sentence, host)
            say(f"error: {lost.sentence}")
        else:
            heartbeats.drop_claim(host)
        return self._others_survived(lost)

    @staticmethod
    def _lost_ranks(heartbeats: Heartbeats) -> LostRanks | None:
        try:
            return find_lost_ranks(heartbeats.read())
        except (OSError, ValueError) as error:
            warn(f"it is unknown which rank was lost, because the heartbeats cannot be read: {error}")
            return None

    def _others_survived(self, lost: LostRanks | None) -> bool:
        return lost is not None and bool(lost.survivors - {self.rank})

    def _watch(self) -> None:
        self._beat()  # at once: a rank may be lost in its first second
        while True:
            ready, _, _ = select.select([self._wakeup], [], [], min(CHECK_EVERY, self.beat_every))
            received = os.read(self._wakeup, 64) if ready else None
            if received == b"":
                return
            self._check()
            if received and signal.SIGTERM in received:
                self._handle_sigterm()

    def _check(self) -> None:
        now = time.monotonic()
        self.timer.update(progress.notes, now)
        if self.launcher and (gone := self.launcher.lost()):
            say(f"error: rank {self.rank} on {launched.host()} ends because {gone}, which started it, is gone.")
            os._exit(EXIT_CRASHED)
        if now - self._wrote_at >= self.beat_every:
            self._beat()
            if self.timer.expired(now):  # then too, reading the files of all ranks every second would be too much
                self._end_if_stalled()

    def _beat(self) -> None:
        """Writes the heartbeat; a full disk must not end the training."""
        if self.heartbeats is None:
            return
        with self._writing:
            self._wrote_at = time.monotonic()
            try:
                self.heartbeats.write(self._heartbeat())
            except OSError as error:
                if self.rank == 0 and not self._warned:
                    self._warned = True
                    warn(
                        f"heartbeats cannot be written: {error}. Training continues; without heartbeats, "
                        "nobody can tell which rank is stuck or lost."
                    )

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            rank=self.rank,
            size=launched.size(),
            host=launched.host(),
            pid=os.getpid(),
            step=progress.step,
            doing=progress.describe(),
            waiting_for=progress.waiting_for,
            idle=round(self.timer.idle(time.monotonic()), 3),
            interval=self.beat_every,
            received_sigterm=self.received_sigterm,
            last_words=self.reason,
        )

    def _handle_sigterm(self) -> None:
        """The launcher ends this rank. If that is because another rank is lost, the main thread waits for that one in a
        collective and never returns, so it cannot report."""
        self.received_sigterm, noticed = True, time.monotonic()
        self._beat()
        # It may still have something to do before it waits, such as a forward pass, or writing a checkpoint.
        if any(self._waits_for(LOOK) for _ in range(LOOKS)):
            self.last_words(LastWords.WAITED)
            if self.report_lost_ranks(noticed=noticed):
                # Open MPI would take a second for each rank of the host.
                os._exit(EXIT_CRASHED)
            self.reason = None  # it may have been a request to stop, and the other ranks are just slower

    @staticmethod
    def _waits_for(seconds: float) -> bool:
        """Whether the main thread waits in the same collective for that long."""
        notes = progress.notes
        time.sleep(seconds)
        return progress.waiting_for is not None and progress.notes == notes

    def _end_if_stalled(self) -> None:
        if self.heartbeats is None and launched.size() > 1 and progress.waiting_for is not None:
            return  # what the others do is not known: they may have a good reason to let this rank wait
        stall = find_stall(self._all_heartbeats(), self.stall_timeout)
        if stall is None:
            return
        reporter = self.heartbeats is None or self.heartbeats.claim_report()
        if reporter:
            if self.heartbeats:
                self.heartbeats.report(stall.sentence)
            say(f"error: {stall.sentence} The job ends; resume it with --resume. Stacks, innermost call first:")
        if self.rank in stall.witnesses:
            self._print_stacks()
        time.sleep(TIME_FOR_STACKS if reporter else 2 * TIME_FOR_STACKS)
        end_job(EXIT_STALLED)

    def _all_heartbeats(self) -> list[Heartbeat]:
        """The heartbeats of all ranks; of this one only, where files are not kept or cannot be read."""
        if self.heartbeats:
            try:
                return self.heartbeats.read() or [self._heartbeat()]
            except (OSError, ValueError) as error:
                warn(f"the heartbeats of the other ranks cannot be read: {error}")
        return [self._heartbeat()]

    def _print_stacks(self) -> None:
        say(f"rank {self.rank} on {launched.host()}, step {progress.step}:")
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(sys.__stderr__ or 2)


def beat_interval(ranks: int, stall_timeout: float) -> float:
    """Seconds between two heartbeats of a rank: a quarter of ``stall_timeout`` at most, unless that is 0."""
    interval = max(BEAT_EVERY, ranks / BEATS_PER_SECOND)
    return min(interval, stall_timeout / 4) if stall_timeout else interval


def end_job(exit_code: int) -> None:
    """Ends all ranks. MPI may be what is stuck: then at least this one ends, and the launcher ends the others."""
    threading.Timer(5.0, os._exit, [exit_code]).start()
    comm.abort(exit_code)
