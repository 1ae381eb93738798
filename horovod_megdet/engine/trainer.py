"""The training loop.

Every rank runs the same loop in lock-step: the same number of steps and the same collectives in the same order. What a
rank finds out alone (a loss that is not finite, an unreadable image, a signal) travels in the one message that all
ranks sum before each backward pass, so that all act on it together.
"""

# What only rank 0 needs is imported where it does: drawing and TensorBoard take a second that all ranks would wait for.
import contextlib
import gc
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from horovod_megdet import comm, launched
from horovod_megdet.config import Config
from horovod_megdet.data.coco import CocoDataset
from horovod_megdet.data.loader import Batch, build_eval_loader, build_train_loader
from horovod_megdet.engine import checkpoint, hardware, random_state
from horovod_megdet.engine.signals import StopRequest
from horovod_megdet.errors import EXIT_NOT_SAVED, EXIT_STOPPED, NonFiniteLossError, UserError
from horovod_megdet.evaluation.coco import Evaluation, evaluate
from horovod_megdet.evaluation.table import render
from horovod_megdet.files import atomic_write
from horovod_megdet.layers.cross_gpu_bn import average_running_statistics
from horovod_megdet.models.detector import Detector, Losses
from horovod_megdet.models.weights import load_checkpoint
from horovod_megdet.printing import say
from horovod_megdet.progress import progress
from horovod_megdet.solver.optimizer import build_optimizer, set_lr
from horovod_megdet.solver.schedule import Schedule

if TYPE_CHECKING:
    from horovod_megdet.engine.metrics import MetricsLog


@dataclass
class Position:
    """How far training has come; saved in every checkpoint."""

    step: int = 0
    images_seen: int = 0
    best_ap: float = -1.0
    best_checkpoint: str | None = None


class Trainer:
    """Trains a detector on all ranks; see :func:`horovod_megdet.engine.startup.build_trainer`."""

    def __init__(
        self,
        config: Config,
        detector: Detector,
        train_set: CocoDataset,
        val_set: CocoDataset,
        schedule: Schedule,
        compute_device: torch.device,
        stop_request: StopRequest,
        description: dict[str, Any],
    ) -> None:
        self.config = config
        self.detector = detector
        self.train_set, self.val_set = train_set, val_set
        self.schedule = schedule
        self.device = compute_device
        self.stop_request = stop_request
        self.description = description
        self.run_dir = Path(config.output.run_dir)
        self.optimizer = comm.distributed_optimizer(
            build_optimizer(detector, config.solver),
            detector,
            passes_per_step=schedule.accumulation,
            fp16=config.solver.compression == "fp16",
        )
        self.scaler = hardware.loss_scaler(config.runtime, compute_device)
        self.position = Position()
        self.stopping = False
        self.unsaved = False
        self.window = Window()
        self.log: MetricsLog  # rank 0 only

    def train(self) -> int:
        """Trains to the end, or until a signal; returns the exit code."""
        schedule, position, output = self.schedule, self.position, self.config.output
        evaluate_every = schedule.images(output.evaluate_every_epochs)
        checkpoint_every = schedule.images(output.checkpoint_every_epochs)
        if comm.is_main():
            from horovod_megdet.engine.metrics import MetricsLog

            self.log = MetricsLog(self.run_dir, schedule.total_images, position.images_seen, position.step)
        # A full collection would scan all that the imports made, and every other rank waits for it.
        gc.freeze()
        batches = iter(self._train_loader())
        evaluation = None
        while not schedule.finished(position.images_seen):
            before = position.images_seen
            self.train_step(batches)
            log_due = schedule.due(output.log_every_images, before, position.images_seen)
            save_due = self.stopping or schedule.due(checkpoint_every, before, position.images_seen)
            if log_due:
                self.write_metrics()
            if schedule.due(evaluate_every, before, position.images_seen):
                evaluation, is_best = self.evaluate()
                save_due = save_due or is_best
            if save_due or (self.unsaved and log_due):
                self.save()
            if self.stopping:
                break
        stopped = not schedule.finished(position.images_seen)
        if comm.is_main():
            if not stopped:
                self.write_report(evaluation)
            self.log.close()
        return EXIT_STOPPED if stopped else 0

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimiser step: ``accumulation`` forward and backward passes, averaged gradients, SGD."""
        started = time.perf_counter()
        progress.step = self.position.step + 1
        lr = self.schedule.lr(self.position.images_seen)
        set_lr(self.optimizer, lr)
        waited = 0.0
        for _ in range(self.schedule.accumulation):
            waiting = time.perf_counter()
            progress.set("waiting for the data loader")
            batch = next(batches).to(self.device)
            progress.set("computing")
            waited += time.perf_counter() - waiting
            with hardware.autocast(self.config.runtime, self.device):
                losses = self.detector.forward_losses(batch.images, batch.targets)
            loss = self._agree_on_losses(losses, batch)
            self.scaler.scale(loss / self.schedule.accumulation).backward()
        self._apply_gradients()
        self.position.step += 1
        self.position.images_seen += self.schedule.mini_batch
        self.window.add_step(lr, self.schedule.mini_batch, time.perf_counter() - started, waited)

    def _agree_on_losses(self, losses: Losses, batch: Batch) -> Tensor:
        """Returns the loss whose average over ranks is the loss of one process that holds the whole mini-batch.

        torchvision averages each loss over the anchors or RoIs that its rank sampled, and the ranks' counts differ. One
        message sums losses times counts, counts and flags over the ranks; each loss is then weighted by
        ``count * ranks / all counts``.
        """
        counts = torch.tensor([losses.counts[name] for name in losses.values], dtype=torch.float64)
        values = torch.stack([value.float() for value in losses.values.values()])
        flags = torch.tensor([bool(self.stop_request), batch.error is not None], dtype=torch.float64)
        mine = values.detach().double().cpu()
        total = comm.sum_(torch.cat([mine * counts, counts, flags]), name="losses")
        sums, (stop, bad_batch) = total[: len(mine)], total[-2:]
        all_counts = total[len(mine) : -2].clamp(min=1)  # a loss without samples on any rank is 0
        if bad_batch:
            self._handle_bad_batch(batch)
        if not torch.isfinite(sums).all():
            self._raise_not_finite(mine, batch)
        self.stopping = self.stopping or bool(stop)
        self.window.add_losses(dict(zip(losses.values, (sums / all_counts).tolist(), strict=True)))
        weights = (counts * comm.size() / all_counts).to(values)
        return (values * weights).sum()

    def _apply_gradients(self) -> None:
        comm.synchronize(self.optimizer)
        if self.config.solver.clip_gradient_norm is not None:
            self.scaler.unscale_(self.optimizer)  # after the allreduce, so that all ranks find the same infinities
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.config.solver.clip_gradient_norm)
        with self.optimizer.skip_synchronize():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _handle_bad_batch(self, batch: Batch) -> None:
        """Some rank could not read an image: ends all ranks, or, where bad data is skipped, says so and goes on."""
        if self.config.data.bad_annotations == "skip":
            if batch.error is not None:
                say(f"warning: rank {comm.rank()} on {launched.host()} trains without an image: {batch.error}")
            return
        with comm.agreement("batch"):
            if batch.error is not None:
                raise UserError(batch.error)

    def _raise_not_finite(self, losses: Tensor, batch: Batch) -> None:
        mine = None
        if not torch.isfinite(losses).all():
            mine = f"rank {comm.rank()} on {launched.host()}, images {[target['image_id'] for target in batch.targets]}"
        ranks = [where for where in comm.gather_objects(mine, "not_finite") if where]
        raise NonFiniteLossError(
            f"The loss is not finite at step {self.position.step + 1}: {'; '.join(ranks)}. The last good checkpoint is "
            "kept. Lower solver.base_lr, lengthen solver.warmup_epochs, set solver.clip_gradient_norm, or look at the "
            "images."
        )

    def write_metrics(self) -> None:
        """Gathers the ranks' times and memory, and writes one row of metrics on rank 0."""
        times = [self.window.step_seconds, self.window.data_seconds, hardware.memory_mb(self.device)]
        ranks = comm.gather(torch.tensor(times, dtype=torch.float64), "metrics")
        if comm.is_main():
            row = self.window.row() | {
                "data_seconds": ranks[:, 1].mean().item(),
                "step_seconds": ranks[:, 0].mean().item(),
                "step_seconds_min": ranks[:, 0].min().item(),
                "step_seconds_max": ranks[:, 0].max().item(),
                "memory_mb": ranks[:, 2].max().item(),
            }
            with warned("metrics"):
                self.log.train(self._where() | row)
        self.window = Window()

    def _where(self) -> dict[str, Any]:
        seen = self.position.images_seen
        return {"step": self.position.step, "images_seen": seen, "epoch": self.schedule.epoch(seen)}

    def evaluate(self) -> tuple[Evaluation, bool]:
        """Evaluates on the validation set; returns the evaluation and whether it is the best of the run so far."""
        progress.set("evaluating")
        average_running_statistics(self.detector)
        evaluation = evaluate_detector(self.config, self.detector, self.val_set, self.device)
        ap = evaluation.metrics["AP"]
        is_best = (
            ap > self.position.best_ap or self.position.best_checkpoint is None or math.isnan(self.position.best_ap)
        )
        if is_best:
            self.position.best_ap, self.position.best_checkpoint = ap, checkpoint.name(self.position.step)
        if comm.is_main():
            from horovod_megdet.report.curves import write_curves

            with warned("metrics, detections and curves"):
                self.log.evaluation(self._where() | evaluation.row(), render(evaluation))
                evaluation.write_detections(self.run_dir / "evaluation" / f"{checkpoint.name(self.position.step)}.json")
                write_curves(self.run_dir)
        return evaluation, is_best

    def write_report(self, evaluation: Evaluation | None) -> None:
        """Writes the page of validation images and ``summary.json``; nothing to do when a finished run is resumed."""
        progress.set("writing the report")
        if evaluation is not None:
            from horovod_megdet.report.pictures import PAGE_FILE, write_validation_page

            with warned("the report"):
                write_validation_page(
                    self.run_dir / PAGE_FILE,
                    self.val_set,
                    evaluation,
                    count=self.config.output.pictures,
                    title=f"{self.run_dir.name}, epoch {self.schedule.epoch(self.position.images_seen):.2f}",
                )
                with atomic_write(self.run_dir / "summary.json") as file:
                    file.write(
                        json.dumps(self.description | asdict(self.position) | evaluation.row(), indent=1).encode()
                    )
        self.log.console.print(
            f"Finished after {self.position.step} steps. Best AP {self.position.best_ap:.3f}: "
            f"{checkpoint.folder(self.run_dir) / str(self.position.best_checkpoint)}"
        )

    def save(self) -> None:
        """Writes a checkpoint. When that fails training goes on and tries again, unless this was the last chance."""
        progress.set("writing a checkpoint")
        average_running_statistics(self.detector)
        random_states = comm.gather_objects(random_state.capture(), "random")
        try:
            with comm.agreement("checkpoint"):
                if comm.is_main():
                    self._write_checkpoint(random_states)
            self.unsaved = False
        except UserError as error:
            if error.exit_code != EXIT_NOT_SAVED or self.stopping or self.schedule.finished(self.position.images_seen):
                raise
            self.unsaved = True
            if comm.is_main():
                say(f"warning: {error} Training goes on and tries again.")

    def _write_checkpoint(self, random_states: list[dict[str, Any]]) -> None:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": asdict(self.position),
            "random": random_states,
        }
        checkpoint.save(self.run_dir, self.detector.state_dict(), state, self.description | self._where())
        try:
            checkpoint.prune(self.run_dir, self.config.output.keep_checkpoints, self.position.best_checkpoint)
        except OSError as error:
            say(f"warning: older checkpoints could not be removed: {error}. Training goes on.")

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Goes on where a checkpoint was written. Collective only through what its callers agree on."""
        state = saved.state()
        load_checkpoint(self.detector, saved.path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.position = Position(**state["position"])
        if len(state["random"]) == comm.size():
            random_state.restore(state["random"][comm.rank()])
        else:
            random_state.seed(self.config.runtime.seed + self.position.step + comm.rank())

    def _train_loader(self) -> DataLoader[Batch]:
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


@contextlib.contextmanager
def warned(what: str) -> Iterator[None]:
    """Turns a failure to write something that training does not need, on rank 0 alone, into a warning."""
    try:
        yield
    except (OSError, UserError) as error:
        say(f"warning: {what} could not be written: {error} Training goes on.")


class Window:
    """Sums since the last row of metrics."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self.passes = self.steps = self.images = 0
        self.lr = self._step_seconds = self._data_seconds = 0.0

    def add_losses(self, losses: dict[str, float]) -> None:
        """Adds the mini-batch's losses of one pass."""
        self.passes += 1
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value

    def add_step(self, lr: float, images: int, seconds: float, data_seconds: float) -> None:
        """Adds one optimiser step."""
        self.lr = lr
        self.steps += 1
        self.images += images
        self._step_seconds += seconds
        self._data_seconds += data_seconds

    @property
    def step_seconds(self) -> float:
        """Mean time of a step on this rank."""
        return self._step_seconds / self.steps

    @property
    def data_seconds(self) -> float:
        """Mean time of a step that this rank waited for images."""
        return self._data_seconds / self.steps

    def row(self) -> dict[str, float]:
        """Mean losses, the last learning rate and the throughput."""
        losses = {name: value / self.passes for name, value in self.losses.items()}
        rate = self.images / self._step_seconds
        return {"lr": self.lr, "loss": math.fsum(losses.values()), **losses, "images_per_second": rate}


def evaluate_detector(
    config: Config, detector: Detector, dataset: CocoDataset, compute_device: torch.device
) -> Evaluation:
    """Evaluates on all ranks, each on its exact share of the data set; every rank gets the metrics."""
    loader = build_eval_loader(
        dataset, config.data, rank=comm.rank(), ranks=comm.size(), pin_memory=compute_device.type == "cuda"
    )
    return evaluate(
        detector, dataset, loader, compute_device, lambda: hardware.autocast(config.runtime, compute_device)
    )
