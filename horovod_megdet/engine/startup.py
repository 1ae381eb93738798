"""From a configuration to a trainer, checking on the way that all ranks start from the same."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from horovod_megdet import comm, launched
from horovod_megdet.config import Config
from horovod_megdet.data.coco import CocoDataset, check_same_classes
from horovod_megdet.data.configured import load_split, make_synthetic
from horovod_megdet.data.loader import image_stream
from horovod_megdet.data.sampler import ImageStream
from horovod_megdet.engine import checkpoint, hardware, precision, random_state
from horovod_megdet.engine.checkpoint import RunDescription
from horovod_megdet.engine.run_folder import find_checkpoint, write_config
from horovod_megdet.engine.signals import StopRequest
from horovod_megdet.engine.trainer import Trainer
from horovod_megdet.engine.validation import check_best_metric
from horovod_megdet.errors import UserError
from horovod_megdet.models.detector import Detector, build_detector
from horovod_megdet.models.norms import bn_group
from horovod_megdet.models.weights import load_checkpoint, load_weights
from horovod_megdet.printing import say
from horovod_megdet.report.tables import console, two_columns
from horovod_megdet.solver.agvm import check_agvm
from horovod_megdet.solver.schedule import make_schedule
from horovod_megdet.versions import NUMERICAL, versions
from horovod_megdet.wording import some


def build_trainer(config: Config, resume: bool, stop_request: StopRequest | None = None) -> Trainer:
    """Builds the trainer of this rank. Collective; raises :class:`UserError` on all ranks alike."""
    comm.check_same({"configuration": config.fingerprint(), **versions(NUMERICAL)}, "start")
    run_dir = Path(config.output.run_dir)
    with comm.agreement("run directory"):
        saved = find_checkpoint(run_dir, resume)
    with comm.agreement("device"):
        device = hardware.choose(config.runtime)
    # Compared above with `auto` in it: what it stands for follows from what all ranks know, so that it is equal, too.
    config, why = precision.decide(config, device, saved.config if saved else None)
    train_set, val_set = load_datasets(config)
    with comm.agreement("schedule"):
        stream = image_stream(train_set, config.data, config.runtime.seed)
        schedule = make_schedule(config.solver, len(stream), comm.size(), config.data.images_per_rank)
        check_agvm(config, schedule)
        check_best_metric(config, train_set.class_names)
    detector = start_detector(config, len(train_set.class_names), device)
    description = RunDescription(
        config=config.model_dump(mode="json"),
        class_names=train_set.class_names,
        category_ids=train_set.category_ids,
        training_data=train_set.fingerprint,
        versions=versions(NUMERICAL),
    )
    trainer = Trainer(config, detector, train_set, val_set, schedule, device, stop_request, description)
    if resume:
        with comm.agreement("resume"):
            resume_from(trainer, saved)
    with comm.agreement("configuration file"):
        if comm.is_main():
            write_config(run_dir, config)
    if comm.is_main():
        _print_start(trainer, why, stream)
    return trainer


def resume_from(trainer: Trainer, found: checkpoint.Checkpoint | None) -> None:
    """Loads on every rank the checkpoint that rank 0 found, if any."""
    path = comm.broadcast_object(str(found.path) if found else "", "checkpoint path")
    if not path:
        return
    saved = found or checkpoint.read(path)
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
    trainer.resume(saved)
    before, now = saved.config.output.best_metric, trainer.config.output.best_metric
    if before != now and comm.is_main():
        say(f"output.best_metric was {before} until now: the best checkpoint is looked for anew, by {now}.")


def load_datasets(config: Config) -> tuple[CocoDataset, CocoDataset]:
    """Loads training and validation set on every rank and checks that all ranks see the same."""
    data = config.data
    with comm.agreement("synthetic data"):
        make_synthetic(data)
    train_set = load_split(data, training=True, ranks=comm)
    val_set = load_split(data, training=False, ranks=comm)
    with comm.agreement("classes"):
        check_same_classes(train_set, val_set)
    comm.check_same({"training data": train_set.fingerprint, "validation data": val_set.fingerprint}, "data")
    return train_set, val_set


def start_detector(config: Config, num_classes: int, device: torch.device) -> Detector:
    """Builds the detector with its starting weights, equal on all ranks, on the device."""
    random_state.seed(config.runtime.seed)
    with comm.agreement("model"):
        group = bn_group(config.batch_norm, config.data.images_per_rank)
        layout = precision.channels_last(config.runtime)
        detector = build_detector(config.model, config.batch_norm, num_classes, group=group, channels_last=layout)
        notices = load_weights(detector, config.model)
    if comm.is_main():
        for notice in notices:
            say(notice)
    if config.model.weights != "none":
        comm.check_same({"starting weights": weights_hash(detector)}, "weights")
    detector = detector.to(device)
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


def build_for_evaluation(
    config: Config, path: Path
) -> tuple[Config, Detector, CocoDataset, torch.device, checkpoint.Checkpoint]:
    """Builds the detector of a checkpoint and the validation set of a configuration.

    Returns the configuration with the checkpoint's precision in the place of ``auto``.
    """
    with comm.agreement("device"):
        device = hardware.choose(config.runtime)
    with comm.agreement("synthetic data"):
        make_synthetic(config.data)
    val_set = load_split(config.data, training=False, ranks=comm)
    with comm.agreement("checkpoint description"):
        saved = checkpoint.read(path)
        if saved.run.class_names != val_set.class_names:
            raise UserError(
                f"{saved.path}: the checkpoint knows the classes {saved.run.class_names}, the validation "
                f"set has {val_set.class_names}."
            )
    comm.check_same({"validation data": val_set.fingerprint}, "validation data")
    config, _ = precision.decide(config, device, saved.config)
    layout, classes = precision.channels_last(config.runtime), len(val_set.class_names)
    detector = build_detector(config.model, config.batch_norm, classes, group=comm.world(), channels_last=layout)
    with comm.agreement("checkpoint"):
        load_checkpoint(detector, saved.path)
    return config, detector.to(device).eval(), val_set, device, saved


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
