"""The thread that watches a rank: a job that gets nowhere ends, and says why.

Nothing in a deadlocked collective, a stopped process or a loader that never returns raises an exception: all ranks
wait, for as long as the cluster lets them. A thread of each rank therefore looks every second whether the main thread
got on (see :mod:`horovod_megdet.progress`), writes that into the rank's heartbeat file for the others to read, and ends
the job when no rank has got on for ``runtime.stall_timeout`` seconds. It also ends the rank when its launcher is gone,
and says at which step ranks were lost when the launcher ends the remaining ones.
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
from horovod_megdet.cluster.watchdog.diagnosis import WAITED, describe_lost_ranks, diagnose, groups
from horovod_megdet.cluster.watchdog.heartbeats import Heartbeat, Heartbeats
from horovod_megdet.cluster.watchdog.launcher_watch import LauncherWatch, die_with_parent
from horovod_megdet.errors import EXIT_CRASHED, EXIT_STALLED
from horovod_megdet.printing import say
from horovod_megdet.progress import progress

LOOK_EVERY = 1.0
"""Seconds between two looks at the main thread and the launcher."""

BEAT_EVERY = 5.0
"""Seconds between two heartbeats, at most; a quarter of the stall timeout if that is less."""

LAST_WORDS = 0.4
"""Seconds that ranks have for their last words before one of them sums up. A launcher that has sent SIGTERM sends
SIGKILL after a second."""

STACKS = 3.0
"""Seconds that ranks have to print their stacks before one of them ends the job."""


class Watchdog:
    """Watches this rank from :meth:`start` to :meth:`stop`, both called by the main thread.

    ``run_dir`` None keeps no heartbeat files; ``stall_timeout`` 0 never ends a job that gets nowhere.
    """

    def __init__(self, run_dir: Path | None, stall_timeout: float) -> None:
        self.stall_timeout = stall_timeout
        self.heartbeats = Heartbeats(run_dir) if run_dir else None
        self.rank, self.size = launched.rank(), launched.size()
        self.launcher = LauncherWatch() if launched.by_launcher() else None
        self.beat_every = min(BEAT_EVERY, stall_timeout / 4) if stall_timeout else BEAT_EVERY
        self.received_sigterm = False
        self.ended: str | None = None
        self._seen = progress.notes
        self._progress_at = self._looked_at = time.monotonic()
        self._wrote_at = -self.beat_every
        self._warned = False
        self._writing = threading.Lock()
        self._wakeup, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        if launched.by_horovodrun():
            die_with_parent()
        if self.heartbeats and self.rank == 0 and (told := self.heartbeats.take_report()):
            _say(f"The job before ended with: {told}")
        # A Python handler waits until the main thread leaves the collective; this pipe gets the signal at once.
        os.set_blocking(self._waker, False)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        """Ends watching in good order; the heartbeat goes."""
        signal.set_wakeup_fd(-1)
        os.close(self._waker)
        self._thread.join()
        os.close(self._wakeup)
        if self.heartbeats:
            self.heartbeats.remove(self.rank)

    def last_words(self, reason: str) -> None:
        """Leaves the reason why this rank ends for the others and for whoever looks afterwards."""
        self.ended = reason
        self._beat()

    def report_lost_ranks(self, on_each_host: bool = False) -> bool:
        """Says, on one rank, which ranks were lost, when those that are left have said their last words.

        ``on_each_host``: on one rank of each host, because what another one prints may not arrive. Returns whether
        ranks were lost, and others than this one know of it.
        """
        if self.heartbeats is None:
            return False
        time.sleep(LAST_WORDS)
        try:
            beats = self.heartbeats.read()
        except (OSError, ValueError) as error:
            _say(f"warning: which rank was lost is not known: the heartbeats cannot be read: {error}")
            return False
        losses = describe_lost_ranks(beats)
        if losses and self.heartbeats.claim_report(losses, launched.host() if on_each_host else ""):
            _say(f"error: {losses}")
        return losses is not None and any(
            beat.received_sigterm or beat.ended for beat in beats if beat.rank != self.rank
        )

    def _run(self) -> None:
        self._beat()  # at once: a rank may be lost in its first second
        while True:
            ready, _, _ = select.select([self._wakeup], [], [], min(LOOK_EVERY, self.beat_every))
            received = os.read(self._wakeup, 64) if ready else None
            if received == b"":
                return
            self._look()
            if received and signal.SIGTERM in received:
                self._terminated()

    def _look(self) -> None:
        now = time.monotonic()
        if progress.notes != self._seen or now - self._looked_at > 3 * self.beat_every:
            # A thread that comes that late was stopped, and with it the whole process: nothing is wrong then.
            self._seen, self._progress_at = progress.notes, now
        self._looked_at = now
        if self.launcher and (lost := self.launcher.lost()):
            _say(f"error: rank {self.rank} on {launched.host()} ends, because {lost}, which started it, is gone.")
            os._exit(EXIT_CRASHED)
        if now - self._wrote_at >= self.beat_every:
            self._beat()
        if self.stall_timeout and now - self._progress_at > self.stall_timeout:
            self._end_if_all_are_stuck()

    def _beat(self) -> None:
        """Writes the heartbeat; a disk that is full must not end the training."""
        if self.heartbeats is None:
            return
        with self._writing:
            self._wrote_at = time.monotonic()
            try:
                self.heartbeats.write(self._heartbeat())
            except OSError as error:
                if self.rank == 0 and not self._warned:
                    self._warned = True
                    _say(f"warning: no heartbeats, which name a rank that is stuck: {error}. Training goes on.")

    def _heartbeat(self) -> Heartbeat:
        now = progress
        return Heartbeat(
            rank=self.rank,
            size=self.size,
            host=launched.host(),
            pid=os.getpid(),
            step=now.step,
            doing=now.describe(),
            waiting_for=now.waiting_for,
            idle=round(time.monotonic() - self._progress_at, 3),
            interval=self.beat_every,
            received_sigterm=self.received_sigterm,
            ended=self.ended,
        )

    def _terminated(self) -> None:
        """The launcher ends this rank. If that is because another one is lost, this one waits for it and never returns
        from there, so the main thread cannot tell."""
        self.received_sigterm = True
        self._beat()
        # It may still have something to do before it waits, such as writing a checkpoint.
        if any(self._waits_for(LAST_WORDS / 4) for _ in range(4)):
            self.last_words(f"{WAITED} {progress.waiting_for}")
            if self.report_lost_ranks():
                # Open MPI would take a second for each rank of the host.
                os._exit(EXIT_CRASHED)
            self.ended = None  # it may have been a request to stop, and the other ranks just slow

    @staticmethod
    def _waits_for(seconds: float) -> bool:
        """Whether the main thread waits in one and the same collective for that long."""
        notes = progress.notes
        time.sleep(seconds)
        return progress.waiting_for is not None and progress.notes == notes

    def _end_if_all_are_stuck(self) -> None:
        self._beat()
        beats = self._all_heartbeats()
        # Another rank may have good reasons to let the others wait, such as an evaluation or a checkpoint.
        if any(beat.stuck_for < self.stall_timeout / 2 for beat in beats):
            return
        said = f"no rank has got on for {self.stall_timeout:.0f} s (runtime.stall_timeout). {diagnose(beats)}"
        reporter = self.heartbeats is None or self.heartbeats.claim_report(said)
        if reporter:
            _say(f"error: {said} The job ends; resume it with --resume. Stacks, the innermost call first:")
        if any(self.rank == min(beat.rank for beat in ranks) for ranks in groups(beats).values()):
            self._print_stacks()
        time.sleep(STACKS if reporter else 2 * STACKS)
        _end_job(EXIT_STALLED)

    def _all_heartbeats(self) -> list[Heartbeat]:
        """What is known of all ranks: this one only, where heartbeats are not kept or cannot be read."""
        if self.heartbeats:
            try:
                return self.heartbeats.read() or [self._heartbeat()]
            except (OSError, ValueError) as error:
                _say(f"warning: the heartbeats of the other ranks cannot be read: {error}")
        return [self._heartbeat()]

    def _print_stacks(self) -> None:
        _say(f"rank {self.rank} on {launched.host()}, step {progress.step}:")
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(sys.__stderr__ or 2)


def _say(sentence: str) -> None:
    # Who reads it may be gone, and that must not keep this thread from what it does next.
    with contextlib.suppress(OSError):
        say(sentence)


def _end_job(exit_code: int) -> None:
    # MPI may be what is stuck: then at least this rank ends, and the launcher sees to the others.
    threading.Timer(5.0, os._exit, [exit_code]).start()
    comm.abort(exit_code)
