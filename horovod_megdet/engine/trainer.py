"""The training loop.

Every rank runs the same loop in lock-step: the same number of steps and the same collectives in the same order. What a
rank finds out alone (a loss that is not finite, an unreadable image, a signal) travels in one message that all ranks
sum before each step, so that all act on it together.
"""

import gc
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from horovod_megdet import comm, launched
from horovod_megdet.data.loader import Batch, build_train_loader
from horovod_megdet.engine import checkpoint, hardware, random_state
from horovod_megdet.engine.checkpoint import Position, TrainingState
from horovod_megdet.engine.foundation import Foundation
from horovod_megdet.engine.losses import PassReport, agree_on_step, weigh_losses
from horovod_megdet.engine.metrics import Window
from horovod_megdet.engine.run_folder import RunFolder
from horovod_megdet.engine.slow_rank import SlowRank, describe_slow_rank
from horovod_megdet.engine.validation import evaluate_detector, in_one_view, note_evaluation, with_all_views
from horovod_megdet.errors import EXIT_NOT_SAVED, EXIT_STOPPED, NotFiniteError, UserError
from horovod_megdet.evaluation.coco import Evaluation
from horovod_megdet.layers.cross_gpu_bn import average_running_statistics
from horovod_megdet.models.detector import Detector
from horovod_megdet.models.weights import load_checkpoint
from horovod_megdet.printing import warn
from horovod_megdet.progress import progress
from horovod_megdet.solver.agvm import AGVM
from horovod_megdet.solver.averaging import averaged_model
from horovod_megdet.solver.gradient_noise import GradientNoise
from horovod_megdet.solver.optimizer import build_optimizer, load_optimizer, set_lr
from horovod_megdet.solver.schedule import Schedule

SKIPPED_STEPS = 32
"""How many steps in a row float16 may skip: each halves the loss scale, which starts at 2^16."""


class Trainer:
    """Trains a detector on all ranks; see :func:`horovod_megdet.engine.startup.build_trainer`."""

    def __init__(self, foundation: Foundation, detector: Detector, schedule: Schedule) -> None:
        self.config = config = foundation.config
        self.device = device = foundation.device
        self.train_set, self.val_set = foundation.train_set, foundation.val_set
        self.stop_request = foundation.stop_request
        self.description = foundation.description
        self.detector = detector
        self.schedule = schedule
        with comm.agreement("optimizer"):
            optimizer = build_optimizer(detector, config.solver)
        self.optimizer = comm.distributed_optimizer(
            optimizer,
            detector,
            passes_per_step=schedule.accumulation,
            fp16=config.solver.compression == "fp16",
        )
        self.scaler = hardware.loss_scaler(config.runtime, device)
        self.noise = GradientNoise(
            detector, config.data.images_per_rank, schedule.accumulation, config.solver.noise_interval
        )
        self.agvm = AGVM()
        self.averaged: AveragedModel | None = None
        if config.solver.ema is not None:
            self.averaged = averaged_model(detector, config.solver.ema * schedule.dataset_images, schedule.mini_batch)
        self.position = Position(best_metric=config.output.best_metric)
        self.stopping = False
        self.hosts_changed = False
        """Whether hosts came or went, in an elastic job."""
        self.unfinished: int | None = None
        """Where the last step began, if what is due after it has yet to be done; see :meth:`after_step`."""
        self.unsaved = False
        """Whether the last checkpoint could not be written."""
        self.best_saved = self.position.best
        """The best evaluation whose checkpoint was written."""
        self.skipped_steps = 0
        """How many steps in a row float16 has skipped."""
        self.window = Window()
        self.slow_rank = SlowRank()
        self.run_folder = RunFolder(config)

    def train(self) -> int:
        """Trains to the end, early or not, or until a signal; returns the exit code."""
        try:
            return self.train_steps()
        except UserError as error:
            if error.on_all_ranks:  # after a crash of one rank, nobody may wait for its loggers
                self.run_folder.close()
            raise

    def train_steps(self) -> int:
        """The steps that are left, and what is due after each; returns the exit code."""
        self.open_log()
        # A full collection would scan all that the imports made, and every other rank waits for it.
        gc.freeze()
        batches = iter(self.train_loader())
        evaluation = None if self.unfinished is None else self.after_step(self.unfinished)
        while not (self.stopping or self.done):
            images_before = self.position.images_seen
            self.train_step(batches)
            evaluation = self.after_step(images_before) or evaluation
        return self.finish(evaluation)

    def open_log(self) -> None:
        """Opens the log of metrics where this position in training is."""
        self.run_folder.open_log(self.schedule.total_images, self.position, self.unfinished is not None)

    def after_step(self, images_before: int) -> Evaluation | None:
        """What is due after a step: metrics, an evaluation, a checkpoint. ``images_before`` had been seen before it."""
        schedule, output, seen = self.schedule, self.config.output, self.position.images_seen

        def due(every_images: int) -> bool:
            return schedule.due(every_images, images_before, seen)

        evaluation = None
        log_due = due(output.log_every_images)
        save_due = self.stopping or due(schedule.images(output.checkpoint_every_epochs))
        if log_due and self.window.steps:
            self.write_metrics()
        if due(schedule.images(output.evaluate_every_epochs)):
            evaluation, is_best = self.evaluate()
            save_due = save_due or is_best or self.done
        if save_due or (self.unsaved and log_due):
            self.save()
        return evaluation

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step: ``accumulation`` forward and backward passes, averaged gradients."""
        began, collectives_before = time.perf_counter(), progress.waited_seconds
        progress.step = self.position.step + 1
        lr = self.schedule.lr(self.position.images_seen)
        set_lr(self.optimizer, lr, self.agvm.factors)
        data_seconds, reports = 0.0, []
        with self.noise.measuring(self.position.step):
            for _ in range(self.schedule.accumulation):
                data_began = time.perf_counter()
                progress.set("waiting for the data loader")
                batch = next(batches).to(self.device)
                progress.set("computing")
                data_seconds += time.perf_counter() - data_began
                loss, report = self.forward(batch)
                self.scaler.scale(loss / self.schedule.accumulation).backward()
                reports.append(report)
        self.agree(reports)
        comm.synchronize(self.optimizer)
        images = sum(report.images_read for report in reports)
        self.noise.update(self.position.step, images, self.scaler.get_scale(), time.perf_counter() - began)
        self.apply_gradients()
        images_before = self.position.images_seen
        self.position.step += 1
        self.position.images_seen += self.schedule.mini_batch
        self.update_solver(images_before)
        seconds, collective_seconds = time.perf_counter() - began, progress.waited_seconds - collectives_before
        self.window.add_step(lr, self.schedule.mini_batch, seconds, collective_seconds, data_seconds)

    def forward(self, batch: Batch) -> tuple[Tensor, PassReport]:
        """A forward pass: this rank's part of the loss, and what all ranks agree on at the end of the step."""
        with hardware.autocast(self.config.runtime, self.device):
            losses = self.detector.forward_losses(batch.images, batch.targets)
        return weigh_losses(batch, losses)

    def agree(self, reports: list[PassReport]) -> None:
        """Shares what any rank found out in the step, before anyone takes it."""
        skip_unreadable = self.config.data.bad_annotations == "skip"
        agreed = agree_on_step(reports, bool(self.stop_request), self.position.step + 1, skip_unreadable)
        self.stopping = self.stopping or agreed.stop_requested
        self.hosts_changed = agreed.hosts_changed
        self.window.add_losses(agreed.losses)

    def apply_gradients(self) -> None:
        """Clips the averaged gradients and takes the step."""
        if self.config.solver.clip_gradient_norm is not None:
            self.scaler.unscale_(self.optimizer)  # after the allreduce, so that all ranks find the same infinities
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.config.solver.clip_gradient_norm)
        with self.optimizer.skip_synchronize():
            self.scaler.step(self.optimizer)
        self.update_loss_scale()
        self.optimizer.zero_grad()

    def update_loss_scale(self) -> None:
        """Lowers the loss scale of float16 after a step that it skipped, as all ranks do, for an infinite gradient.

        Raises :class:`NotFiniteError` if it skips one after the other, so that no scale is low enough.
        """
        if not self.scaler.is_enabled():
            return
        scale = self.scaler.get_scale()
        self.scaler.update()
        self.skipped_steps = self.skipped_steps + 1 if self.scaler.get_scale() < scale else 0
        if self.skipped_steps > SKIPPED_STEPS:
            raise NotFiniteError(
                f"The gradients are not finite in {self.skipped_steps} steps in a row, up to step "
                f"{self.position.step + 1}, however small the loss scale of float16 is"
            )

    def update_solver(self, images_before: int) -> None:
        """Updates what the solver keeps between steps: averages of the noise, AGVM's factors, averaged weights."""
        if self.schedule.warmup_ends(images_before, self.position.images_seen):
            self.noise.averages.restart()  # the noise of lower rates and of the first weights says nothing about these
        if self.config.solver.lr_modulation == "agvm":
            epochs = self.schedule.epoch(self.position.images_seen) - self.config.solver.warmup_epochs
            self.agvm.update(self.noise.averages, self.schedule.mini_batch, epochs)
        if self.averaged:
            self.averaged.update_parameters(self.detector)

    @property
    def done(self) -> bool:
        """Whether training is complete, or no better evaluation is waited for."""
        return self.schedule.finished(self.position.images_seen) or self.out_of_patience

    @property
    def out_of_patience(self) -> bool:
        """Whether the last ``solver.patience`` evaluations were all worse than the best. Equal on all ranks."""
        return 0 < self.config.solver.patience <= self.position.evaluations_since_best

    @property
    def evaluated_detector(self) -> Detector:
        """The weights that are evaluated and handed on: the averaged ones, where there are any."""
        return cast(Detector, self.averaged.module) if self.averaged else self.detector

    def write_metrics(self) -> None:
        """Gathers the ranks' times and memory, and writes one row of metrics."""
        window = self.window
        mine = [window.step_seconds, window.work_seconds, window.data_seconds, hardware.memory_mb(self.device)]
        gathered = comm.all_gather(torch.tensor(mine, dtype=torch.float64), "metrics")
        step_seconds, work_seconds, data_seconds, memory = gathered.unbind(1)
        row: dict[str, Any] = self.window.row() | {
            "data_seconds": data_seconds.mean().item(),
            "step_seconds": step_seconds.mean().item(),
            "work_seconds_min": work_seconds.min().item(),
            "work_seconds_max": work_seconds.max().item(),
            "memory_mb": memory.max().item(),
            "ranks": comm.size(),
            "mini_batch": self.schedule.mini_batch,
        }
        if self.noise.enabled:  # a run that measures no longer has averages from its checkpoint
            row |= self.noise.averages.row()
        if self.scaler.is_enabled():
            row["amp_scale"] = self.scaler.get_scale()
        if self.config.solver.lr_modulation == "agvm":
            row |= {f"lr_factor_{module}": factor for module, factor in self.agvm.factors.items()}
        self.run_folder.log_training(self._where() | row)
        if self.slow_rank.update(work_seconds.tolist(), window.steps):
            self.report_slow_rank(work_seconds.tolist(), data_seconds.tolist())
        self.window = Window()

    def report_slow_rank(self, work: list[float], data: list[float]) -> None:
        """Says which rank the others wait for. Collective."""
        rank = self.slow_rank.rank
        hosts = comm.gather_objects(launched.host(), "hosts")
        if comm.is_main():
            warn(describe_slow_rank(rank, hosts[rank], work, data[rank]))

    def evaluate(self) -> tuple[Evaluation, bool]:
        """Evaluates on the validation set; returns the evaluation and whether it is the best of the run so far."""
        progress.set("evaluating")
        average_running_statistics(self.evaluated_detector)
        checkpoint.check_finite(self.evaluated_detector.state_dict(), self.position.step)  # equal on all ranks
        config = in_one_view(self.config)
        evaluation = evaluate_detector(config, self.evaluated_detector, self.val_set, self.device)
        is_best = note_evaluation(self.position, evaluation)
        self.run_folder.log_evaluation(self._where(), evaluation)
        return evaluation, is_best

    def evaluate_multi_scale(self) -> Evaluation | None:
        """The multi-scale test at the end of training, if the configuration has one."""
        config = with_all_views(self.config)
        if config is None:
            return None
        progress.set("evaluating at several scales")
        evaluation = evaluate_detector(config, self.evaluated_detector, self.val_set, self.device)
        self.run_folder.log_evaluation(self._where(), evaluation, multi_scale=True)
        return evaluation

    def save(self) -> None:
        """Writes a checkpoint. When that fails training goes on and tries again, unless this was the last chance."""
        progress.set("writing a checkpoint")
        average_running_statistics(self.detector)
        average_running_statistics(self.evaluated_detector)
        random_states = comm.gather_objects(random_state.capture(), "random")
        try:
            with comm.agreement("checkpoint"):
                if comm.is_main():
                    self.write_checkpoint(random_states)
            self.unsaved, self.best_saved = False, self.position.best
        except UserError as error:
            self.position.best = self.best_saved
            if error.exit_code != EXIT_NOT_SAVED or self.stopping or self.done:
                raise
            self.unsaved = True
            if comm.is_main():
                warn(f"{error} Training goes on and tries again.")

    def state(self, random_states: list[dict[str, Any]]) -> TrainingState:
        """What training needs to go on, besides the weights of :attr:`evaluated_detector`."""
        return TrainingState(
            self.optimizer.state_dict(),
            self.scaler.state_dict(),
            self.position,
            random_states,
            noise=self.noise.averages,
            agvm=self.agvm,
            weights=self.detector.state_dict() if self.averaged else None,
        )

    def write_checkpoint(self, random_states: list[dict[str, Any]]) -> None:
        """Writes a checkpoint and removes those that are no longer kept; on rank 0. Raises :class:`UserError`."""
        state = self.state(random_states)
        run_dir, epoch = self.run_folder.path, self._where()["epoch"]
        saved = checkpoint.save(run_dir, self.evaluated_detector.state_dict(), state, self.description, epoch)
        self.run_folder.log_checkpoint(saved)
        try:
            checkpoint.prune(run_dir, self.config.output.keep_checkpoints, self.position.best_checkpoint, saved.name)
        except OSError as error:
            warn(f"older checkpoints could not be removed: {error}. Training goes on.")

    def finish(self, evaluation: Evaluation | None) -> int:
        """Writes the report of a finished run, if it was evaluated; returns the exit code."""
        position = self.position
        if not self.done:
            self.run_folder.close()
            return EXIT_STOPPED
        if evaluation is not None:  # there is none when a finished run is resumed
            multi_scale = self.evaluate_multi_scale()
            progress.set("writing the report")
            epoch = self._where()["epoch"]
            self.run_folder.write_report(self.description, position, epoch, self.val_set, evaluation, multi_scale)
            self.run_folder.write_model_cards(self.description, position, self.schedule, self.train_set, self.val_set)
        best = checkpoint.folder(self.run_folder.path) / str(position.best_checkpoint)
        self.run_folder.close(f"{self._how_it_ended()} Best {position.best_metric} {position.best_value:.3f}: {best}")
        return 0

    def _how_it_ended(self) -> str:
        position, epoch = self.position, self._where()["epoch"]
        if self.schedule.finished(position.images_seen):
            return f"Finished after {position.step} steps."
        return (
            f"Stopped early, after {position.step} steps, at epoch {epoch:.2f}: {position.evaluations_since_best} "
            f"evaluations in a row without a better {position.best_metric}. To go on from here, use --resume and a "
            f"solver.patience above {position.evaluations_since_best}, or 0."
        )

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Goes on where a checkpoint was written. It does not communicate: call it within :func:`comm.agreement`.

        Raises :class:`UserError`.
        """
        load_checkpoint(self.detector, saved.path)
        self.take_over(saved.state(), saved.path)

    def take_over(self, state: TrainingState, source: Path) -> None:
        """Takes over a state; the detector has its weights already. ``source`` is named in errors."""
        if self.averaged:
            self.averaged.module.load_state_dict(self.detector.state_dict())
            self.averaged.n_averaged.fill_(state.position.step)
        if state.weights:
            self.detector.load_state_dict(state.weights)
        load_optimizer(self.optimizer, state.optimizer, source)
        if state.scaler:  # empty where the run was not in float16 until now
            self.scaler.load_state_dict(state.scaler)
        self.position, self.noise.averages, self.unfinished = state.position, state.noise, state.unfinished
        finished = self.schedule.finished(self.position.images_seen)
        if self.position.best_metric != self.config.output.best_metric and not finished:
            self.position.forget_best(self.config.output.best_metric)
        self.best_saved = self.position.best
        if self.config.solver.lr_modulation == "agvm":
            self.agvm = state.agvm
        if len(state.random) == comm.size():
            random_state.restore(state.random[comm.rank()])
        else:
            random_state.seed(self.config.runtime.seed + self.position.step + comm.rank())

    def _where(self) -> dict[str, Any]:
        seen = self.position.images_seen
        return {"step": self.position.step, "images_seen": seen, "epoch": self.schedule.epoch(seen)}

    def train_loader(self) -> DataLoader[Batch]:
        """This rank's batches from here to the end of training."""
        start, mini_batch = self.position.images_seen, self.schedule.mini_batch
        steps = math.ceil((self.schedule.total_images - start) / mini_batch)
        return build_train_loader(
            self.train_set,
            self.config.data,
            seed=self.config.runtime.seed,
            rank=comm.rank(),
            ranks=comm.size(),
            start=start,
            stop=start + steps * mini_batch,
            pin_memory=self.device.type == "cuda",
        )
