"""What ``runtime.amp: auto`` and ``runtime.channels_last: auto`` stand for on the hardware of a run.

A type counts as fast on a device if training steps were measured to be faster in it than in float32 there
(docs/performance.md). All ranks take the same, so a type has to be fast on each of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from horovod_megdet import comm, launched
from horovod_megdet.config import Config, RuntimeConfig
from horovod_megdet.wording import some

HalfType = Literal["bfloat16", "float16"]
"""The types of autocast; bfloat16 comes first, since it needs no loss scaling."""


@dataclass(frozen=True)
class Ability:
    """What the device of a rank is fast at."""

    host: str
    device: str
    """``cpu`` or ``cuda``."""
    types: tuple[HalfType, ...]
    reason: str
    """What they follow from, in words."""


def probe(device: torch.device) -> Ability:
    """Looks at this rank's device."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        types: tuple[HalfType, ...] = ("bfloat16", "float16") if major >= 8 else ("float16",)
        return Ability(launched.host(), device.type, types, f"compute capability {major}.{minor}")
    if has_amx():
        return Ability(launched.host(), device.type, ("bfloat16",), "AMX-BF16")
    # With AVX512-BF16 alone, steps in bfloat16 were slower than in float32.
    return Ability(launched.host(), device.type, (), "no AMX-BF16")


def has_amx() -> bool:
    """Whether this host's processor multiplies matrices of bfloat16."""
    return "amx_bf16" in processor_flags()


def processor_flags() -> set[str]:
    """The flags of this host's processor, as Linux lists them; empty where it lists none."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def decide(config: Config, device: torch.device, saved: Config | None) -> tuple[Config, str]:
    """Puts a type and a layout in the place of ``auto``; returns the configuration and, in words, what it is and why.

    What is saved in a checkpoint stays, on whatever hardware; ``saved`` is its configuration, on rank 0 or on all.
    Collective.
    """
    runtime = config.runtime
    before = comm.broadcast_object(saved.runtime if saved else None, "saved precision")
    ranks = comm.gather_objects(probe(device), "precision")
    amp = runtime.amp
    why = "as configured"
    if amp == "auto":
        amp = before.amp if before else fastest(ranks)
        why = "as in the checkpoint" if before else _reasons(ranks)
    layout = runtime.channels_last
    if layout == "auto":
        on_gpus = all(rank.device == "cuda" for rank in ranks)
        layout = before.channels_last if before else on_gpus or amp == "bfloat16"
        if layout == "auto":  # saved when it was not yet resolved, and stood for this
            layout = on_gpus
    runtime = runtime.model_copy(update={"amp": amp, "channels_last": layout})
    words = f"{'float32' if amp == 'none' else amp}{', channels last' if layout else ''} ({why})"
    return config.model_copy(update={"runtime": runtime}), words


def fastest(ranks: list[Ability]) -> HalfType | Literal["none"]:
    """The type that ``auto`` takes: one that is fast on every rank."""
    return next((name for name in get_args(HalfType) if all(name in rank.types for rank in ranks)), "none")


def channels_last(runtime: RuntimeConfig) -> bool:
    """Whether activations have their channels last, after :func:`decide`."""
    assert runtime.channels_last != "auto"
    return runtime.channels_last


def _reasons(ranks: list[Ability]) -> str:
    hosts: dict[str, list[str]] = {}
    for rank in ranks:
        names = hosts.setdefault(rank.reason, [])
        names += [rank.host] if rank.host not in names else []
    return "; ".join(f"{reason} on {some(names)}" for reason, names in hosts.items())
