"""Ranks on different hardware agree on one precision, which a run keeps."""

import json
import shutil
from pathlib import Path

import launching
import pytest

from horovod_megdet.config import RuntimeConfig, load_config
from horovod_megdet.engine import checkpoint

SCRIPT = Path(__file__).with_name("precision_ranks.py")
AUTO = ("runtime.amp=auto", "runtime.channels_last=auto")


def train(flags: str, run_dir: Path, data: Path, *arguments: str) -> str:
    """Runs train.py on two ranks whose processors have these flags; returns its output."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    words = [flags, *launching.tiny(run_dir, *AUTO, data=data), *arguments]
    job = launching.Job("mpirun", 2, words, run_dir.parent, SCRIPT)
    assert job.wait() == 0, job.output
    return job.output


def precision_of(run_dir: Path) -> tuple[str, bool | str]:
    """Type and layout in the configuration that a run keeps; the checkpoints have the same."""
    runtime: RuntimeConfig = load_config(run_dir / "config.yaml").runtime
    assert checkpoint.newest(run_dir, report=pytest.fail).config.runtime == runtime
    return runtime.amp, runtime.channels_last


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run on two ranks that claim to be fast in bfloat16."""
    run_dir = tmp_path_factory.mktemp("fast") / "run"
    assert "bfloat16, channels last (AMX-BF16 on " in train("amx_bf16,amx_bf16", run_dir, data)
    return run_dir


def test_mixed_ranks_take_what_all_are_fast_at(data: Path, tmp_path: Path) -> None:
    output = train("amx_bf16,avx512_bf16", tmp_path / "run", data)
    assert "float32 (AMX-BF16 on " in output
    assert "no AMX-BF16 on " in output
    assert precision_of(tmp_path / "run") == ("none", False)


def test_resumed_on_slower_ranks_a_run_keeps_its_precision_bit_for_bit(fast: Path, data: Path, tmp_path: Path) -> None:
    assert precision_of(fast) == ("bfloat16", True)
    run_dir = tmp_path / "run"
    shutil.copytree(fast, run_dir)
    for later in sorted(checkpoint.folder(run_dir).glob("step_*"))[1:]:
        shutil.rmtree(later)
    assert "bfloat16, channels last (as in the checkpoint)" in train("sse2,sse2", run_dir, data, "--resume")
    assert precision_of(run_dir) == ("bfloat16", True)
    assert launching.final_hashes(run_dir) == launching.final_hashes(fast)


def test_evaluation_of_a_checkpoint_takes_the_precision_of_its_run(fast: Path, data: Path) -> None:
    newest = checkpoint.newest(fast, report=pytest.fail).path
    in_run = json.loads((fast / "evaluation" / f"{newest.name}.json").read_text())
    train("sse2,sse2", fast, data, "--eval-only")
    assert in_run
    assert json.loads((newest / "detections.json").read_text()) == in_run
