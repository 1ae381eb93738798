"""``megdet plan``: what it prints of the schedule, the communication and the noise scale."""

import json
import sys
from pathlib import Path

import pytest

from horovod_megdet import cli

PROJECT = Path(__file__).resolve().parents[2]


def plan(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    fixed = ["megdet", "plan", "--ranks", "8", "--images", "1000", "--set", "data.images_per_rank=2"]
    monkeypatch.setattr(sys, "argv", [*fixed, "--set", "solver.reference_batch_size=16", *arguments])
    return cli.main()


def write_metrics(run_dir: Path, *noise_scales: float | None) -> None:
    measured = enumerate(noise_scales)
    rows = [
        {"kind": "train", "step": step, "epoch": step / 4, "lr": 0.02, "noise_scale": scale} for step, scale in measured
    ]
    rows.append({"kind": "train", "step": len(rows), "epoch": len(rows) / 4, "lr": 0.02})
    low = {"kind": "train", "step": len(rows), "epoch": len(rows) / 4, "lr": 0.002}
    rows += [low | {"noise_scale": 900.0}] if any(noise_scales) else []
    rows.append({"kind": "evaluation", "step": len(rows), "epoch": len(rows) / 4, "AP": 0.1})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_nothing_is_said_of_the_noise_unless_it_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "16 images = 8 ranks x 2 images x 1 pass" in printed
    assert "noise scale" not in printed


def test_a_noise_scale_says_what_the_mini_batch_gains_and_loses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch, "--noise-scale", "48", "--set", "solver.mini_batch=48") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "48 images; the mini-batch is 1 times as large" in printed
    assert "instead of 16 images 0.5 times the steps, 1.5 times the images" in printed


def test_the_plan_of_the_guide_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (PROJECT / "docs/clusters.md").read_text()
    command, table = guide.split("    megdet plan ", 1)[1].split("\n\n", 2)[:2]
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sys, "argv", ["megdet", "plan", *command.split()])
    assert cli.main() == 0
    assert [line.strip() for line in capsys.readouterr().out.split("\n") if line] == [
        line.strip() for line in table.split("\n")
    ]


def test_a_bn_size_that_does_not_fit_the_ranks_is_no_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch, "--set", "batch_norm.bn_size=32") == 2
    error = capsys.readouterr().err
    assert "batch_norm.bn_size: 32 does not work with 8 ranks of 2 images; possible are 2, 4, 8, 16, or a" in error
    assert "or a multiple of 16 ranks" in error
    assert plan(monkeypatch, "--set", "batch_norm.bn_size=1") == 2
    assert "possible are 2, 4, 8, 16.\n" in capsys.readouterr().err


def test_the_data_set_of_the_demo_is_made_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sizes = ["--set", "data.synthetic_train_images=3", "--set", "data.synthetic_val_images=2"]
    for command in (["plan", "--ranks", "1"], ["check-data"], ["anchors", "--plot", str(tmp_path / "anchors.png")]):
        root = tmp_path / command[0]
        monkeypatch.setattr(sys, "argv", ["megdet", *command, *sizes, "--set", f"data.synthetic_root={root}"])
        assert cli.main() == 0
        assert (root / "annotations" / "train.json").exists()
    assert "0 problems" in capsys.readouterr().out


def test_a_noise_scale_may_be_below_one_image(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch, "--noise-scale", "0.5") == 0
    assert "the mini-batch is 32 times as large" in " ".join(capsys.readouterr().out.split())


def test_the_newest_noise_scale_at_the_full_rate_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_metrics(tmp_path, None, 99.0, 32.0, None)
    assert plan(monkeypatch, "--run", str(tmp_path)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Noise scale of {tmp_path}: 32 images, measured at epoch 0.50, the last time at the full" in printed
    assert "32 images; the mini-batch is 0.5 times as large" in printed


def test_a_run_without_a_noise_scale_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for noise_scales, why in (((), "the run has one rank"), ((None,), "so far the noise hides the gradient")):
        write_metrics(tmp_path, *noise_scales)
        assert plan(monkeypatch, "--run", str(tmp_path)) == 2
        assert f"{tmp_path / 'metrics.jsonl'}: no noise scale in it: {why}" in capsys.readouterr().err
    assert plan(monkeypatch, "--run", str(tmp_path / "missing")) == 2
    assert "Is " in capsys.readouterr().err


def test_wrong_numbers_and_arguments_without_effect_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments in (
        ["--noise-scale", "0"],
        ["--noise-scale", "nan"],
        ["--bandwidth-gbs", "0"],
        ["--latency-us", "-5"],
        ["--step-seconds", "0"],
        ["--run-dir", "runs/a"],
        ["--noise-scale", "10", "--run", str(tmp_path)],
    ):
        with pytest.raises(SystemExit, match="2"):
            plan(monkeypatch, *arguments)
    assert "not allowed with argument --noise-scale" in capsys.readouterr().err
