"""From a configuration to a trainer, checking on the way that all ranks start from the same."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from horovod_megdet import comm, launched
from horovod_megdet.config import Config
from horovod_megdet.data.coco import CocoDataset
from horovod_megdet.data.configured import load_split
from horovod_megdet.data.sampler import ImageStream
from horovod_megdet.engine import checkpoint, hardware, precision, random_state
from horovod_megdet.engine.foundation import Foundation, generate_data, lay_foundation
from horovod_megdet.engine.run_folder import find_checkpoint, write_config
from horovod_megdet.engine.signals import StopRequest
from horovod_megdet.engine.trainer import Trainer
from horovod_megdet.engine.validation import check_best_metric
from horovod_megdet.errors import UserError
from horovod_megdet.models.detector import Detector, build_detector
from horovod_megdet.models.norms import bn_group
from horovod_megdet.models.weights import download_weights, load_checkpoint, load_weights
from horovod_megdet.printing import say
from horovod_megdet.report.tables import console, two_columns
from horovod_megdet.solver.agvm import check_agvm
from horovod_megdet.solver.schedule import make_schedule
from horovod_megdet.versions import NUMERICAL, versions
from horovod_megdet.wording import some

T = TypeVar("T", bound=Trainer)


def start_horovod(get_config: Callable[[], Config]) -> Config:
    """Starts Horovod for the configuration that ``get_config`` reads. An error of one rank becomes one of all."""
    with comm.agreement("configuration"):
        try:
            config = get_config()
        except UserError:
            comm.init()  # the other ranks have to hear of it
            raise
        comm.init(deterministic=config.runtime.deterministic, groups=config.batch_norm.bn_size != "world")
    return config


def build_trainer(config: Config, resume: bool, stop_request: StopRequest | None = None) -> Trainer:
    """Builds the trainer of this rank. Collective; raises :class:`UserError` on all ranks alike."""
    check_start(config)
    saved = find_run(config, resume)
    foundation = lay_foundation(config, stop_request, saved.config if saved else None)
    return start_trainer(foundation, resume, saved, Trainer)


def check_start(config: Config) -> None:
    """Raises :class:`UserError` on all ranks unless they have the same configuration and versions. Collective."""
    comm.check_same({"configuration": config.fingerprint(), **versions(NUMERICAL)}, "start")


def find_run(config: Config, resume: bool) -> checkpoint.Checkpoint | None:
    """Looks at the run directory; see :func:`find_checkpoint`. Collective."""
    with comm.agreement("run directory"):
        return find_checkpoint(Path(config.output.run_dir), resume)


def assemble(foundation: Foundation, kind: type[T], load: bool) -> T:
    """Builds what depends on the number of ranks, and a trainer of it. Collective.

    ``load`` reads the pre-trained weights that the configuration names.
    """
    config, train_set = foundation.config, foundation.train_set
    with comm.agreement("schedule"):
        schedule = make_schedule(config.solver, len(foundation.stream), comm.size(), config.data.images_per_rank)
        check_agvm(config, schedule)
        check_best_metric(config, train_set.class_names)
    detector = start_detector(config, len(train_set.class_names), foundation.device, load)
    return kind(foundation, detector, schedule)


def start_trainer(foundation: Foundation, resume: bool, saved: checkpoint.Checkpoint | None, kind: type[T]) -> T:
    """Builds the trainer that starts a run, or goes on from a checkpoint, which rank 0 has found. Collective."""
    trainer = assemble(foundation, kind, load=True)
    if resume:
        with comm.agreement("resume"):
            resume_from(trainer, saved)
    write_run_config(foundation)
    if comm.is_main():
        _print_start(trainer, foundation.precision_choice, foundation.stream)
    return trainer


def write_run_config(foundation: Foundation) -> None:
    """Writes the configuration into the run directory. Collective."""
    with comm.agreement("configuration file"):
        if comm.is_main():
            write_config(Path(foundation.config.output.run_dir), foundation.config)


def resume_from(trainer: Trainer, found: checkpoint.Checkpoint | None) -> None:
    """Loads on every rank the checkpoint that rank 0 found, if any."""
    path = comm.broadcast_object(str(found.path) if found else "", "checkpoint path")
    if not path:
        return
    with comm.agreement("checkpoint to resume"):  # another host may not see it, or see it damaged
        saved = found or checkpoint.read(path)
    comm.check_same({"checkpoint": str(saved.bits())}, "checkpoint to resume")
    _check_continues(trainer, saved)
    trainer.resume(saved)
    before, now = saved.config.output.best_metric, trainer.config.output.best_metric
    if comm.is_main() and now != before and now == trainer.position.best_metric:
        say(f"output.best_metric changed from {before} to {now}; the search for the best checkpoint starts over.")


def _check_continues(trainer: Trainer, saved: checkpoint.Checkpoint) -> None:
    """Raises :class:`UserError` if the trainer cannot go on from the checkpoint."""
    if saved.run.training_data != trainer.train_set.fingerprint:
        raise UserError(
            f"{saved.path}: {trainer.config.data.train_annotations} is not the training data that this checkpoint was "
            "trained on, so its position in the data means nothing. Restore the data, or start a new run with "
            "model.weights set to this checkpoint."
        )
    factor, other = saved.config.data.repeat_factor, trainer.config.data.repeat_factor
    if factor != other:
        raise UserError(
            f"{saved.path}: this checkpoint was trained with data.repeat_factor: {factor:g}, so with {other:g} its "
            f"position in the data means nothing. Use {factor:g}, or start a new run with model.weights set to this "
            "checkpoint."
        )
    theirs, ours = saved.config.solver.optimizer, trainer.config.solver.optimizer
    if theirs != ours:
        raise UserError(
            f"{saved.path}: this checkpoint has the state of solver.optimizer: {theirs}, which {ours} cannot continue. "
            f"Use {theirs}, or start a new run with model.weights set to this checkpoint."
        )


def start_detector(config: Config, num_classes: int, device: torch.device, load: bool = True) -> Detector:
    """Builds the detector with its starting weights, equal on all ranks, on the device.

    Without ``load`` it gets other weights later, so that none are read.
    """
    if load:
        with comm.agreement("download of weights"):
            if comm.local_rank() == 0:  # once for all ranks of a host
                download_weights(config.model)
    random_state.seed(config.runtime.seed)
    with comm.agreement("model"):
        group = bn_group(config.batch_norm, config.data.images_per_rank)
        layout = precision.channels_last(config.runtime)
        detector = build_detector(config.model, config.batch_norm, num_classes, group=group, channels_last=layout)
        notices = load_weights(detector, config.model) if load else []
    if comm.is_main():
        for notice in notices:
            say(notice)
    if load and config.model.weights != "none":
        comm.check_same({"starting weights": weights_hash(detector)}, "weights")
    detector = detector.to(device)
    if load:
        comm.broadcast_weights(detector)
    detector.train()
    return detector


def weights_hash(detector: Detector) -> str:
    """SHA-256 of the backbone's weights, where pre-trained weights go."""
    digest = hashlib.sha256()
    for name, value in detector.state_dict().items():
        if "backbone" in name:
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class EvaluationSetup:
    """A checkpoint's detector, and what it is evaluated on."""

    config: Config
    """With the checkpoint's precision in the place of ``auto``."""
    detector: Detector
    val_set: CocoDataset
    device: torch.device
    checkpoint: Path
    """The folder of the checkpoint."""


def build_for_evaluation(config: Config, path: Path) -> EvaluationSetup:
    """Builds the detector of a checkpoint, and the validation set of a configuration. Collective.

    ``path`` is a checkpoint folder or a run directory. Raises :class:`UserError`.
    """
    with comm.agreement("device"):
        device = hardware.set_up_process(config.runtime)
    generate_data(config.data)
    val_set = load_split(config.data, training=False, ranks=comm)
    with comm.agreement("checkpoint to evaluate"):  # a training may write a newer one meanwhile
        newest = str(checkpoint.read(path).path) if comm.is_main() else ""
    path = Path(comm.broadcast_object(newest, "checkpoint to evaluate"))
    with comm.agreement("checkpoint description"):
        saved = checkpoint.read(path)
        if saved.run.class_names != val_set.class_names:
            raise UserError(
                f"{saved.path}: the checkpoint knows the classes {saved.run.class_names}, the validation "
                f"set has {val_set.class_names}."
            )
    same = {"configuration": config.fingerprint(), "validation data": val_set.fingerprint}
    comm.check_same(same | {"checkpoint": str(saved.bits())}, "evaluation")
    config, _ = precision.decide(config, device, saved.config)
    layout, classes = precision.channels_last(config.runtime), len(val_set.class_names)
    detector = build_detector(config.model, config.batch_norm, classes, group=comm.world(), channels_last=layout)
    with comm.agreement("checkpoint"):
        load_checkpoint(detector, saved.path)
    return EvaluationSetup(config, detector.to(device).eval(), val_set, device, saved.path)


def _print_start(trainer: Trainer, precision_choice: str, stream: ImageStream) -> None:
    config, out = trainer.config, console()
    environment = [
        ("ranks", f"{comm.size()}, {comm.local_size()} on {launched.host()}, controller {comm.controller()}"),
        ("device", f"{trainer.device}, {torch.get_num_threads()} threads per rank"),
        ("precision", precision_choice),
        ("cores", f"rank 0 has {len(os.sched_getaffinity(0))} of {os.cpu_count()}"),
        ("model", f"{config.model.backbone} FPN {config.model.fpn_channels}, weights {config.model.weights}"),
        (
            "training set",
            f"{len(trainer.train_set)} images, {len(trainer.train_set.class_names)} classes: "
            + ", ".join(trainer.train_set.class_names[:10]),
        ),
        *_repeats(stream, trainer.train_set.class_names),
        ("validation set", f"{len(trainer.val_set)} images"),
        ("run directory", config.output.run_dir),
    ]
    environment += [(name, value) for name, value in comm.launch_settings().items()]
    out.print(two_columns("Run", environment))
    out.print(two_columns("Schedule", trainer.schedule.table()))
    skipped = len(trainer.train_set.problems) + len(trainer.val_set.problems)
    if skipped:
        out.print(f"{skipped} bad annotations or images are skipped; `megdet check-data` lists them.")
    if config.solver.measure_noise not in ("auto", "never") and not trainer.noise.enabled:
        out.print("The gradient's noise is not measured: one rank with one pass per step has nothing to compare.")
    if trainer.position.step:
        epoch = trainer.schedule.epoch(trainer.position.images_seen)
        out.print(f"Resuming after step {trainer.position.step}, epoch {epoch:.2f}.")


def _repeats(stream: ImageStream, class_names: list[str]) -> list[tuple[str, str]]:
    """What repeat factors make of an epoch, and the most repeated classes."""
    if stream.factors is None:
        return []
    of_classes = stream.factors.of_classes
    repeated = [f"{class_names[k]} x{of_classes[k]:.2f}" for k in np.argsort(-of_classes) if of_classes[k] > 1]
    classes = f"repeated are the images of {some(repeated)}" if repeated else "no class is rare enough to be repeated"
    return [("an epoch", f"{len(stream)} images of the {len(stream.portrait)}: {classes}")]
