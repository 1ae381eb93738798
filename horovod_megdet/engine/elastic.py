"""Training in an elastic job: ranks come and go, and those that are left go on at the same image.

Between two changes of the ranks lies a session: one trainer, for the ranks that are there, and the plain loop. When a
session ends, each rank keeps the state after the last whole step. The next one begins with a new trainer, so that
mini-batch, learning rate, passes per step, batch normalization and loader follow the number of ranks as they do at the
start of a run, and the trainer takes over the state as it does from a checkpoint.

The state is kept by reference: the ranks communicate in a step, and so can lose each other, only before anything but
the running statistics of batch normalization has changed. Those are copied after each step.
"""

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from horovod_megdet import comm, launched
from horovod_megdet.config import Config
from horovod_megdet.data.loader import Batch
from horovod_megdet.engine import checkpoint
from horovod_megdet.engine.checkpoint import TrainingState
from horovod_megdet.engine.foundation import Foundation, lay_foundation
from horovod_megdet.engine.signals import StopRequest
from horovod_megdet.engine.startup import assemble, check_start, find_run, start_trainer, write_run_config
from horovod_megdet.engine.trainer import Trainer
from horovod_megdet.errors import EXIT_NOT_SAVED, EXIT_STOPPED, UserError
from horovod_megdet.models.detector import Detector
from horovod_megdet.printing import say
from horovod_megdet.run_files import CONFIG_FILE
from horovod_megdet.solver.schedule import Schedule


@dataclass(frozen=True)
class Snapshot:
    """The state after a whole step, on the CPU, and the ranks that came so far."""

    weights: dict[str, Tensor]
    """Those that are evaluated, as in a checkpoint."""
    state: TrainingState
    config: Config
    epoch: float
    hosts: tuple[str, ...]
    """The host of each rank."""
    mini_batch: int
    lr: float

    @property
    def progress(self) -> tuple[int, bool]:
        """How far it is: greater for a later one."""
        return self.state.position.step, self.state.unfinished is None


@dataclass(frozen=True)
class RankReport:
    """What a rank tells the others when they meet."""

    host: str
    progress: tuple[int, bool]
    """Of its snapshot; :data:`BEHIND` without one."""
    fingerprint: str
    """Of its configuration."""
    checked: bool
    """Whether it has been compared with the ranks of the session before."""


BEHIND = (-1, False)
"""The progress of a rank without a snapshot, less than that of any."""


class ElasticTrainer(Trainer):
    """A trainer for one session, which keeps the state after each step."""

    def __init__(self, foundation: Foundation, detector: Detector, schedule: Schedule) -> None:
        super().__init__(foundation, detector, schedule)
        self._statistics = list(self.detector.buffers())
        self._kept_statistics = [value.clone() for value in self._statistics]
        self._kept_position = replace(self.position)
        self.change: dict[str, Any] | None = None
        """The row of metrics about the change of ranks that this session began with."""

    def go_on(self, snapshot: Snapshot, hosts: tuple[str, ...]) -> None:
        """Takes over the state in which the session before has ended. ``hosts``: of the ranks of this one."""
        self.detector.load_state_dict(snapshot.weights)
        self.take_over(snapshot.state, self.run_folder.path)
        lr = self.schedule.lr(self.position.images_seen)
        self.change = self._where() | {
            "ranks_before": len(snapshot.hosts),
            "ranks": len(hosts),
            "mini_batch_before": snapshot.mini_batch,
            "mini_batch": self.schedule.mini_batch,
            "lr_before": snapshot.lr,
            "lr": lr,
            "hosts_lost": dict(Counter(snapshot.hosts) - Counter(hosts)),
            "hosts_joined": dict(Counter(hosts) - Counter(snapshot.hosts)),
        }

    def open_log(self) -> None:
        """Opens the log, and reports the change of ranks in it."""
        super().open_log()
        self.keep()  # of a checkpoint, where the run was resumed from one
        if self.change:
            self.run_folder.log_change(self.change)

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step, after which its state is kept. Before it, all that was due is done: a safe point.

        Raises :class:`comm.HostsChanged` on all ranks together.
        """
        before = self.position.images_seen
        self.unfinished, self._kept_position = None, replace(self.position)
        if self.hosts_changed:
            raise comm.HostsChanged
        super().train_step(batches)
        self.unfinished = before
        self.keep()

    def keep(self) -> None:
        """Keeps the state as it is now."""
        self._kept_position = replace(self.position)
        torch._foreach_copy_(self._kept_statistics, self._statistics)

    def rewind(self) -> None:
        """Puts the trainer back to the last whole step."""
        torch._foreach_copy_(self._statistics, self._kept_statistics)
        self.position = self._kept_position

    def snapshot(self, hosts: tuple[str, ...]) -> Snapshot:
        """The state as it is now, without communication. ``hosts``: of the ranks."""
        state = self.state(random_states=[])
        return Snapshot(
            weights=_on_cpu(self.evaluated_detector.state_dict()),
            state=replace(
                state,
                optimizer=_on_cpu(state.optimizer),
                weights=_on_cpu(state.weights),
                unfinished=self.unfinished,
            ),
            config=self.config,
            epoch=self._where()["epoch"],
            hosts=hosts,
            mini_batch=self.schedule.mini_batch,
            lr=self.schedule.lr(self.position.images_seen),
        )


class ElasticRun:
    """This process's part in an elastic run, through all of its sessions."""

    def __init__(self, config: Config, resume: bool, stop_request: StopRequest) -> None:
        check_elastic(config)
        self.config = config
        self.resume = resume
        self.stop_request = stop_request
        self.attempted = False
        """Whether this process has tried to start the run."""
        self.foundation: Foundation | None = None
        self.checked = False
        """Whether all ranks that are there have been compared, and the foundation is theirs."""
        self.snapshot: Snapshot | None = None

    def train(self) -> int:
        """Trains to the end, or until a signal, through all changes of the ranks; returns the exit code.

        Raises :class:`comm.RemovedError` where this process is no longer needed.
        """
        while True:
            try:
                return self._session()
            except comm.LostRankError:
                lost = True
            except comm.HostsChanged:
                lost = False
            # What the training loop froze includes the trainer of the session that has ended.
            gc.unfreeze()
            gc.collect()
            try:
                comm.rejoin(lost, self._is_to_stop, self._unsaved())
            except comm.StoppedError as stop:
                if stop.placed:
                    comm.end_last()
                return EXIT_STOPPED if stop.saved else EXIT_NOT_SAVED

    def _is_to_stop(self) -> bool:
        """Before its first session a rank has nothing to save, and ends later."""
        return self.snapshot is not None and bool(self.stop_request)

    def _unsaved(self) -> comm.Unsaved | None:
        """What this rank has in memory and can write."""
        if not self.snapshot or not self.foundation:
            return None
        return comm.Unsaved(self.snapshot.state.position.step, self._save)

    def _save(self) -> bool:
        """Writes the state in memory as a checkpoint, without a trainer; False, and a sentence, if that fails.

        An existing checkpoint of the same step is kept: all ranks may have written it, with more in it.
        """
        assert self.snapshot
        assert self.foundation
        snapshot, run_dir = self.snapshot, Path(self.foundation.config.output.run_dir)
        path = checkpoint.folder(run_dir) / checkpoint.name(snapshot.state.position.step)
        if checkpoint.is_whole(path):
            return True
        try:
            checkpoint.save(run_dir, snapshot.weights, snapshot.state, self.foundation.description, snapshot.epoch)
        except UserError as error:
            if checkpoint.is_whole(path):  # by another rank, meanwhile
                return True
            say(f"error: {error}")
            return False
        say(f"The state in memory is written: {path}")
        return True

    def _session(self) -> int:
        hosts = self._meet()
        trainer = self._go_on(self.snapshot, hosts) if self.snapshot else self._start()
        try:
            return trainer.train()
        except (comm.LostRankError, comm.HostsChanged) as change:
            if isinstance(change, comm.LostRankError):
                comm.hang_up()  # before the loggers are closed, which may take half a minute
            trainer.rewind()
            self.snapshot = trainer.snapshot(hosts)
            trainer.run_folder.close()
            raise

    def _meet(self) -> tuple[str, ...]:
        """Brings all ranks to the latest state that one of them has; returns the host of each. Collective.

        A rank may have taken a step in which others lost contact, and new ranks have no state.
        """
        progress = self.snapshot.progress if self.snapshot else BEHIND
        mine = RankReport(launched.host(), progress, self.config.fingerprint(), self.checked)
        reports = comm.gather_objects(mine, "meet")
        latest = max(report.progress for report in reports)
        first = next(rank for rank, report in enumerate(reports) if report.progress == latest)
        if mine.fingerprint != reports[first].fingerprint:
            raise UserError("its configuration is not that of the run, so that it cannot join. Use the same files.")
        if latest != BEHIND and any(report.progress != latest for report in reports):
            received = comm.broadcast_object(self.snapshot if comm.rank() == first else None, "snapshot", first)
            self.snapshot = self.snapshot if progress == latest else received
        self.checked = all(report.checked for report in reports)
        return tuple(report.host for report in reports)

    def _start(self) -> ElasticTrainer:
        """Starts the run, or goes on from a checkpoint. If a rank is lost in the middle of it, all start once more."""
        check_start(self.config)
        resume = self._resumes()
        saved = find_run(self.config, resume)
        self.foundation = lay_foundation(self.config, self.stop_request, saved.config if saved else None)
        self.checked = True
        return start_trainer(self.foundation, resume, saved, ElasticTrainer)

    def _resumes(self) -> bool:
        """Whether to go on with a run: if the user says so, or if an attempt to start had already begun it."""
        begun = comm.is_main() and (Path(self.config.output.run_dir) / CONFIG_FILE).exists()
        ranks = comm.gather_objects((self.attempted, begun), "attempts")
        self.attempted = True
        return self.resume or (any(attempted for attempted, _ in ranks) and ranks[0][1])

    def _go_on(self, snapshot: Snapshot, hosts: tuple[str, ...]) -> ElasticTrainer:
        try:
            if not self.checked or self.foundation is None:
                check_start(self.config)
                self.foundation = lay_foundation(self.config, self.stop_request, snapshot.config)
                self.checked = True
            trainer = assemble(self.foundation, ElasticTrainer, load=False)
        except UserError:  # agreed on by all: these ranks cannot train together, or not share the mini-batch
            if comm.is_main():
                say("These ranks cannot continue together.")
                if unsaved := self._unsaved():
                    unsaved.save()
            raise
        trainer.go_on(snapshot, hosts)
        write_run_config(self.foundation)  # the disk of another rank 0 may be another one
        return trainer


def check_elastic(config: Config) -> None:
    """Raises :class:`UserError` for what an elastic job cannot do."""
    if config.batch_norm.bn_size not in ("world", config.data.images_per_rank):
        raise UserError(
            f"batch_norm.bn_size: {config.batch_norm.bn_size} does not work in an elastic job: Horovod ends the "
            "ranks of a group that has lost one. Use world, or for statistics of single ranks data.images_per_rank = "
            f"{config.data.images_per_rank}."
        )


def _on_cpu(value: Any) -> Any:
    """Tensors in containers, on the CPU: those that are there already, and copies of others."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value
