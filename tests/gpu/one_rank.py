"""What the trainer of one rank does on the GPU: mixed precision, and checkpoints from one device to the other."""

import json
import sys
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from horovod_megdet import comm
from horovod_megdet.config import load_config, override
from horovod_megdet.engine import checkpoint
from horovod_megdet.engine.startup import build_trainer
from horovod_megdet.engine.trainer import Trainer

FOLDER, DEVICE = Path(sys.argv[1]).parent, sys.argv[2]
TINY = Path(__file__).parent.parent / "parallel" / "tiny.yaml"
STEPS = 4


def start(name: str, device: str, *settings: str, resume: bool = False) -> Trainer:
    """A new run of the tiny configuration on a device, or one that goes on."""
    folders = [f"output.run_dir={FOLDER / name}", f"data.synthetic_root={FOLDER / 'data'}"]
    changes = [*folders, f"runtime.device={device}", *settings]
    return build_trainer(override(load_config(TINY), changes), resume)


def train(trainer: Trainer, steps: int) -> None:
    """Takes steps from where the trainer is."""
    batches = iter(trainer.train_loader())
    for _ in range(steps):
        trainer.train_step(batches)


def on_cpu(value: Any) -> Any:
    """The same nested value with its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: on_cpu(each) for key, each in value.items()}
    return [on_cpu(each) for each in value] if isinstance(value, list | tuple) else value


def state(trainer: Trainer) -> dict[str, Any]:
    """Weights, buffers, the optimizer's state and the scaler's, on the CPU."""
    parts = trainer.detector.state_dict(), trainer.optimizer.state_dict()["state"], trainer.scaler.state_dict()
    return {"weights": on_cpu(dict(parts[0])), "optimizer": on_cpu(parts[1]), "scaler": parts[2]}


def same(ours: Any, theirs: Any) -> bool:
    """Whether two nested values are equal to the bit."""
    if isinstance(ours, Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


def finite(trainer: Trainer) -> bool:
    """Whether all weights and buffers are."""
    return all(bool(each.isfinite().all()) for each in trainer.detector.state_dict().values())


def mixed_precision(amp: str) -> dict[str, Any]:
    """Some steps: whether the weights moved and are finite."""
    trainer = start(amp, DEVICE, f"runtime.amp={amp}")
    before = state(trainer)["weights"]
    train(trainer, STEPS)
    return {"moved": not same(before, state(trainer)["weights"]), "finite": finite(trainer)}


def change_of_device(first: str, second: str, amp: str) -> dict[str, bool]:
    """A checkpoint of one device goes on on the other: every bit of the state arrives, and it trains on."""
    name, settings = f"{first}_{second}_{amp}", (f"runtime.amp={amp}", "solver.clip_gradient_norm=10")
    trainer = start(name, first, *settings)
    train(trainer, STEPS)
    trainer.save()
    saved = state(trainer)
    resumed = start(name, second, *settings, resume=True)
    arrived = same(saved, state(resumed)) and resumed.position == trainer.position
    device = next(resumed.detector.parameters()).device.type
    train(resumed, STEPS)
    return {
        "arrived": arrived,
        "device": device == second and {each.device.type for each in _state_tensors(resumed)} == {second},
        "moved": not same(saved["weights"], state(resumed)["weights"]),
        "finite": finite(resumed),
    }


def _state_tensors(trainer: Trainer) -> list[Tensor]:
    states = trainer.optimizer.state_dict()["state"].values()
    return [value for each in states for value in each.values() if isinstance(value, Tensor)]


def nccl() -> dict[str, float]:
    """Sums of GPU tensors by Horovod's own operations, on a communicator of one rank; empty where it has no NCCL."""
    if DEVICE != "cuda" or not comm.built_features()["nccl"]:
        return {}
    found = {}
    for dtype in (torch.float16, torch.float32, torch.float64):
        x = torch.arange(1000, device=DEVICE, dtype=dtype)
        hvd.allreduce_(x, op=hvd.Sum, name=f"test.sum.{dtype}")
        hvd.broadcast_(x, root_rank=0, name=f"test.broadcast.{dtype}")
        found[str(dtype)] = float((x - torch.arange(1000, device=DEVICE, dtype=dtype)).abs().max())
    return found


def deterministic() -> dict[str, Any]:
    """An interrupted run and one that is not, with deterministic kernels: whether weights and state have the same bits.

    The last part: deterministic kernels stay on in this process.
    """
    settings = ("runtime.deterministic=true", "runtime.amp=bfloat16", "solver.clip_gradient_norm=10")
    whole = start("whole", DEVICE, *settings)
    train(whole, 2 * STEPS)
    whole.save()
    trainer = start("interrupted", DEVICE, *settings)
    train(trainer, STEPS)
    trainer.save()
    resumed = start("interrupted", DEVICE, *settings, resume=True)
    step = resumed.position.step
    train(resumed, STEPS)
    resumed.save()
    ends = [checkpoint.newest(FOLDER / name, report=print) for name in ("whole", "interrupted")]
    return {
        "resumed after": step,
        "steps": [each.step for each in ends],
        "same": ends[0].bits() == ends[1].bits(),
        "on": torch.are_deterministic_algorithms_enabled(),
    }


def main() -> None:
    comm.init()
    result = {
        "mixed precision": {amp: mixed_precision(amp) for amp in ("float16", "bfloat16")},
        "change of device": {
            f"{first} to {second}, {amp}": change_of_device(first, second, amp)
            for first, second in sorted({(DEVICE, "cpu"), ("cpu", DEVICE)})
            for amp in ("none", "float16")
        },
        "nccl": nccl(),
        "deterministic": deterministic(),
    }
    Path(sys.argv[1]).write_text(json.dumps(result))
    comm.shutdown()


if __name__ == "__main__":
    main()
