"""`auto` takes what the hardware of all ranks is fast at, and what a checkpoint has before that."""

from pathlib import Path
from typing import Any

import pytest
import torch

from horovod_megdet import comm
from horovod_megdet.config import Config
from horovod_megdet.engine import precision
from horovod_megdet.engine.precision import Ability

CPU = torch.device("cpu")
AMX = Ability("node1", "cpu", ("bfloat16",), "AMX-BF16")
OLD_CPU = Ability("node2", "cpu", (), "no AMX-BF16")
VOLTA = Ability("node3", "cuda", ("float16",), "compute capability 7.0")
AMPERE = Ability("node4", "cuda", ("bfloat16", "float16"), "compute capability 8.0")


def config(amp: str, channels_last: bool | str = "auto") -> Config:
    return Config.model_validate({"runtime": {"amp": amp, "channels_last": channels_last}})


def decide(monkeypatch: pytest.MonkeyPatch, mine: Config, ranks: list[Ability], saved: Config | None = None) -> Any:
    """Type and layout that ranks with these abilities decide on, and the words for it."""
    monkeypatch.setattr(comm, "gather_objects", lambda value, name: ranks)
    chosen, words = precision.decide(mine, CPU, saved)
    assert chosen == config(chosen.runtime.amp, chosen.runtime.channels_last), "nothing else changes"
    return (chosen.runtime.amp, chosen.runtime.channels_last), words


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([AMX, AMX], ("bfloat16", True)),
        ([OLD_CPU], ("none", False)),
        ([AMX, AMX, OLD_CPU], ("none", False)),
        ([VOLTA], ("float16", True)),
        ([AMPERE], ("bfloat16", True)),
        ([AMPERE, VOLTA], ("float16", True)),
        ([AMPERE, AMX], ("bfloat16", True)),
        ([VOLTA, AMX], ("none", False)),
    ],
)
def test_auto_takes_what_is_fast_on_every_rank(
    monkeypatch: pytest.MonkeyPatch, ranks: list[Ability], expected: tuple[str, bool]
) -> None:
    assert decide(monkeypatch, config("auto"), ranks)[0] == expected
    assert decide(monkeypatch, config("auto"), ranks[::-1])[0] == expected


def test_it_says_what_was_chosen_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide(monkeypatch, config("auto"), [AMX, AMX])[1] == "bfloat16, channels last (AMX-BF16 on node1)"
    words = decide(monkeypatch, config("auto"), [AMX, AMX, OLD_CPU])[1]
    assert words == "float32 (AMX-BF16 on node1; no AMX-BF16 on node2)"
    assert decide(monkeypatch, config("none"), [AMX])[1] == "float32 (as configured)"


@pytest.mark.parametrize(
    ("mine", "expected"),
    [
        (config("none"), ("none", False)),
        (config("bfloat16"), ("bfloat16", True)),
        (config("bfloat16", False), ("bfloat16", False)),
        (config("auto", False), ("none", False)),
        (config("none", True), ("none", True)),
    ],
)
def test_what_is_configured_stays(monkeypatch: pytest.MonkeyPatch, mine: Config, expected: tuple[str, bool]) -> None:
    assert decide(monkeypatch, mine, [OLD_CPU])[0] == expected


def test_a_resumed_run_keeps_its_precision_on_other_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = config("bfloat16", True)
    chosen, words = decide(monkeypatch, config("auto"), [OLD_CPU], saved)
    assert chosen == ("bfloat16", True)
    assert words == "bfloat16, channels last (as in the checkpoint)"
    assert decide(monkeypatch, config("auto"), [AMX], config("none", False))[0] == ("none", False)
    assert decide(monkeypatch, config("none", False), [AMX], saved)[0] == ("none", False), "unless it is told otherwise"


@pytest.mark.parametrize(("ranks", "layout"), [([AMX], False), ([AMPERE], True)])
def test_checkpoints_from_before_the_choice_was_saved_keep_their_layout(
    monkeypatch: pytest.MonkeyPatch, ranks: list[Ability], layout: bool
) -> None:
    """In them `auto` meant channels last on GPUs only, also in bfloat16."""
    assert decide(monkeypatch, config("bfloat16"), ranks, config("bfloat16", "auto"))[0] == ("bfloat16", layout)


@pytest.mark.parametrize(
    ("flags", "types", "reason"),
    [
        ("fpu avx512_bf16 amx_bf16", ("bfloat16",), "AMX-BF16"),
        ("fpu avx512_bf16", (), "no AMX-BF16"),
        ("", (), "no AMX-BF16"),
    ],
)
def test_processors_are_known_by_their_flags(
    monkeypatch: pytest.MonkeyPatch, flags: str, types: tuple[str, ...], reason: str
) -> None:
    monkeypatch.setattr(precision, "processor_flags", lambda: set(flags.split()))
    found = precision.probe(CPU)
    assert (found.device, found.types, found.reason) == ("cpu", types, reason)


def test_flags_are_those_that_linux_lists() -> None:
    if Path("/proc/cpuinfo").read_text().startswith("processor"):
        assert len(precision.processor_flags()) > 5
    assert precision.processor_flags() <= set(Path("/proc/cpuinfo").read_text().split())


@pytest.mark.parametrize(
    ("capability", "types"),
    [((7, 5), {"float16"}), ((8, 0), {"bfloat16", "float16"}), ((9, 0), {"bfloat16", "float16"})],
)
def test_gpus_are_known_by_their_compute_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], types: set[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert set(precision.probe(torch.device("cuda", 0)).types) == types
