"""What trainers of two ranks do: measure gradient noise, clip gradients, and take the steps of all optimizers.

With ``gradients`` after the file of the result: only :func:`save_gradients`, for one process.
"""

import copy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import cgbn_common as common
import torch
from torch.nn.utils import parameters_to_vector

from horovod_megdet import comm
from horovod_megdet.config import load_config, override
from horovod_megdet.engine.startup import build_trainer
from horovod_megdet.engine.trainer import Trainer
from horovod_megdet.solver.optimizer import build_optimizer, set_lr

FOLDER = Path(sys.argv[1]).parent
STEPS = 6
"""Of four images: one epoch."""


def start(name: str, *settings: str) -> Trainer:
    """A new run of the tiny configuration."""
    folders = [f"output.run_dir={FOLDER / name}", f"data.synthetic_root={FOLDER / 'data'}"]
    return build_trainer(override(load_config(Path(__file__).with_name("tiny.yaml")), [*folders, *settings]), False)


def messages(trainer: Trainer) -> list[list[str]]:
    """The names of the sums of each step."""
    batches = iter(trainer.train_loader())
    found = []
    for _ in range(STEPS):
        with common.messages() as names:
            trainer.train_step(batches)
        found.append(list(names))
    return found


def steps_that_count() -> int:
    """How many steps of an epoch count, in one of which an image cannot be read."""
    trainer = start("unreadable", "data.bad_annotations=skip", "solver.warmup_epochs=0")
    if comm.is_main():
        image = trainer.train_set.path(3)
        image.write_bytes(image.read_bytes()[:-2000])
    comm.barrier()
    messages(trainer)
    return trainer.noise.averages.measurements


def steps_after_the_warm_up() -> int:
    """How many steps of an epoch count, in the middle of which the warm-up ends."""
    trainer = start("warm-up", "solver.warmup_epochs=0.5")
    messages(trainer)
    return trainer.noise.averages.measurements


def averaged_gradients(name: str, *settings: str) -> dict[str, torch.Tensor]:
    """Of the first step, as the optimizer gets them."""
    trainer = start(name, *settings)
    found: dict[str, torch.Tensor] = {}

    def note() -> None:
        found.update({key: each.grad.clone() for key, each in trainer.detector.named_parameters()})

    with mock.patch.object(trainer, "apply_gradients", note):
        trainer.train_step(iter(trainer.train_loader()))
    return found


def save_gradients() -> dict[str, Any]:
    """Writes those of a step of four images: of layers in which an image does not depend on the others of its pass."""
    without_statistics = ["model.backbone_norm=frozen", "model.fpn_norm=none"]
    gradients = averaged_gradients("gradients", "solver.mini_batch=4", *without_statistics)
    if comm.is_main():
        torch.save(gradients, FOLDER / "gradients.pt")
    return {}


def first_step(name: str, *settings: str) -> dict[str, Any]:
    """The noise, and the length of SGD's update, which starts at the gradient, over the learning rate."""
    trainer = start(name, "solver.weight_decay=0", *settings)
    before = parameters_to_vector(trainer.detector.parameters()).detach()
    trainer.train_step(iter(trainer.train_loader()))
    after = parameters_to_vector(trainer.detector.parameters()).detach()
    assert all(torch.equal(after, other) for other in comm.gather_objects(after, "test.after")), "ranks differ"
    length = float((after - before).double().norm()) / trainer.schedule.lr(0)
    return {"length": length, "noise": vars(trainer.noise.averages)}


def clipping() -> dict[str, dict[str, Any]]:
    """The first step without a limit, and with limits of half and twice the length of its gradient."""
    free = first_step("no limit")
    limits = {"half": free["length"] / 2, "twice": free["length"] * 2}
    clipped = {name: first_step(name, f"solver.clip_gradient_norm={limit}") for name, limit in limits.items()}
    return clipped | {"no limit": free}


def largest_difference(name: str, *settings: str) -> float:
    """Between the gradients of both layouts, in lengths of a parameter's gradient."""
    first = averaged_gradients(f"{name} first", *settings, "runtime.channels_last=false")
    last = averaged_gradients(f"{name} last", *settings, "runtime.channels_last=true")
    assert any(not gradient.is_contiguous() for gradient in last.values())
    return max(float((last[key] - first[key]).norm() / first[key].norm()) for key in first)


def steps_of_the_optimizer(name: str, *settings: str) -> bool:
    """Whether steps under Horovod have the bits of those of the optimizer alone, on the averaged gradients."""
    run = " ".join((name, *settings))
    trainer = start(run, f"solver.optimizer={name}", *settings)
    alone = copy.deepcopy(trainer.detector)
    optimizer = build_optimizer(alone, trainer.config.solver)
    apply = trainer.apply_gradients

    def both() -> None:
        for ours, theirs in zip(trainer.detector.parameters(), alone.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.clone()
        set_lr(optimizer, trainer.schedule.lr(trainer.position.images_seen), trainer.agvm.factors)
        optimizer.step()
        apply()

    with mock.patch.object(trainer, "apply_gradients", both):
        messages(trainer)
    start_weights = trainer.detector.parameters(), start(f"{run} again").detector.parameters()
    assert not any(map(torch.equal, *start_weights)), "every parameter has moved"
    return all(map(torch.equal, trainer.detector.parameters(), alone.parameters()))


def measure() -> dict[str, Any]:
    """Everything, on two ranks."""
    return save_gradients() | {
        "messages": {
            interval: messages(start(interval, f"solver.measure_noise={interval}")) for interval in ("never", "3")
        },
        "clipping": clipping(),
        "optimizers": {name: steps_of_the_optimizer(name) for name in ("lars", "adamw")}
        | {"sgd, channels last": steps_of_the_optimizer("sgd", "runtime.channels_last=true")},
        "layouts": {
            "float32": largest_difference("float32"),
            "float16 messages": largest_difference("float16", "solver.compression=fp16"),
        },
        "steps after the warm-up": steps_after_the_warm_up(),
        "steps that count": steps_that_count(),  # the last one: it damages an image
    }


if __name__ == "__main__":
    common.main(save_gradients if sys.argv[2:] == ["gradients"] else measure)
