"""What two ranks measure on one GPU, exchanging its tensors through the host."""

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import cgbn_common as common
import cgbn_detector
import cgbn_layer
import torch
from torch import Tensor

from horovod_megdet import comm
from horovod_megdet.config import load_config, override
from horovod_megdet.engine.startup import build_trainer
from horovod_megdet.engine.trainer import Trainer

FOLDER = Path(sys.argv[1]).parent
DEVICE = torch.device(sys.argv[2])
C, EPS = 32, 1e-5
"""See test_kernels.py; the layers' eps."""


def bound(case: cgbn_layer.Case) -> float:
    """What a layer's error may be: see test_kernels.py."""
    unit = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps
    return C * unit * math.hypot(1, case.mean / math.hypot(case.std, math.sqrt(EPS))) + torch.finfo(case.dtype).eps


def layers() -> dict[str, dict[str, list[float]]]:
    """For each algorithm and case the errors that are too large, with their bound."""
    found: dict[str, dict[str, list[float]]] = {}
    for algorithm, (name, case) in itertools.product(("one_pass", "two_pass"), cgbn_layer.CASES.items()):
        errors = common.worst(cgbn_layer.compare(case, algorithm, comm.world(), DEVICE))
        found[f"{algorithm}: {name}"] = {key: [error, bound(case)] for key, error in errors.items()}
    return found


def start(name: str, *settings: str) -> Trainer:
    """A new run of the tiny configuration."""
    tiny = load_config(Path(cgbn_layer.__file__).with_name("tiny.yaml"))
    folders = [f"output.run_dir={FOLDER / name}", f"data.synthetic_root={FOLDER / 'data'}"]
    return build_trainer(override(tiny, [*folders, f"runtime.device={DEVICE.type}", *settings]), False)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of the trained parameters."""
    return {name: each.detach().cpu().clone() for name, each in trainer.detector.named_parameters()}


def same_on_all_ranks(tensors: dict[str, Tensor]) -> bool:
    """Whether every bit is."""
    first, *others = comm.gather_objects(tensors, "test.same")
    return all(torch.equal(first[name], other[name]) for other in others for name in first)


def training(*settings: str) -> dict[str, Any]:
    """Four steps: whether all ranks have the same weights, and all of these have moved and are finite."""
    trainer = start("_".join(("training", *settings)), *settings)
    before, batches = weights(trainer), iter(trainer.train_loader())
    for _ in range(4):
        trainer.train_step(batches)
    after = weights(trainer)
    return {
        "device": trainer.device.type,
        "same": same_on_all_ranks(after),
        "moved": all(not torch.equal(before[name], after[name]) for name in before),
        "finite": all(bool(each.isfinite().all()) for each in after.values()),
    }


def overflow() -> list[dict[str, Any]]:
    """A step, one in which a gradient of the last rank overflows, and one after it, with float16."""
    trainer = start("overflow", "runtime.amp=float16")
    # so small that nothing else overflows
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 64.0})
    parameter = trainer.detector.roi_heads.box_predictor.cls_score.weight
    batches, steps = iter(trainer.train_loader()), []
    for overflows in (False, True, False):
        before = weights(trainer)
        factor = math.inf if overflows and comm.rank() == comm.size() - 1 else 1.0
        hook = parameter.register_hook(lambda gradient, factor=factor: gradient * factor)
        trainer.train_step(batches)
        hook.remove()
        after = weights(trainer)
        steps.append(
            {
                "scales": comm.gather_objects(trainer.scaler.get_scale(), "test.scales"),
                "same": same_on_all_ranks(after),
                "moved": any(not torch.equal(before[name], after[name]) for name in before),
                "finite": all(bool(each.isfinite().all()) for each in after.values()),
            }
        )
    return steps


def measure() -> dict[str, Any]:
    """Everything."""
    if DEVICE.type == "cuda":
        torch.cuda.set_device(0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return {
        "layers": layers(),
        "detector, float64": cgbn_detector.agreement_with_one_process(torch.float64, cgbn_detector.LOSSES, DEVICE),
        "training": {
            name: training(*settings)
            for name, settings in {
                "float32": (),
                "bfloat16, recomputation": ("runtime.amp=bfloat16", "model.activation_checkpointing=blocks"),
                "float16 messages": ("solver.compression=fp16",),
            }.items()
        },
        "overflow": overflow(),
    }


if __name__ == "__main__":
    common.main(measure)
