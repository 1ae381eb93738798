"""Reading metrics.jsonl, also after a kill, and drawing it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from horovod_megdet.errors import UserError
from horovod_megdet.report.curves import LOSS_STYLES, draw_curves, write_curves
from horovod_megdet.report.rows import read_metrics, running_mean
from horovod_megdet.run_files import METRICS_FILE


def train_row(step: int, **values: Any) -> dict[str, Any]:
    losses = {key: (number + 1) / step for number, key in enumerate(LOSS_STYLES)}
    return {
        "kind": "train",
        "step": step,
        "images_seen": 16 * step,
        "epoch": step / 10,
        "lr": 0.02,
        "images_per_second": 8.0 + step % 3,
    } | (losses | values)


def evaluation_row(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "evaluation", "step": step, "images_seen": 16 * step, "epoch": step / 10} | (
        {"AP": step / 100, "AP50": step / 60} | values
    )


ROWS = [train_row(step) for step in range(1, 31)] + [evaluation_row(step) for step in (10, 20, 30)]


def write(run_dir: Path, rows: list[dict[str, Any]], end: str = "") -> Path:
    path = run_dir / METRICS_FILE
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end, encoding="utf-8")
    return path


def test_the_validation_loss_is_drawn_beside_the_losses_of_training() -> None:
    def curves(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
        panel = draw_curves(rows, "run").axes[0]
        assert panel.get_title() == "Loss"
        return {str(line.get_label()): list(line.get_ydata()) for line in panel.lines}

    with_loss = [train_row(step) for step in range(1, 31)] + [evaluation_row(step, loss=3 / step) for step in (10, 30)]
    assert curves(with_loss)["sum, validation"] == pytest.approx([0.3, 0.1])
    assert "sum, validation" not in curves(ROWS)


LINE = json.dumps(train_row(31)).encode() + "é\n".encode()


@pytest.mark.parametrize("length", range(0, len(LINE), 7))
def test_a_last_line_cut_anywhere_is_ignored(tmp_path: Path, length: int) -> None:
    path = write(tmp_path, ROWS)
    path.write_bytes(path.read_bytes() + LINE[:length])
    assert read_metrics(path) == ROWS


def test_a_last_line_cut_within_a_letter_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    path.write_bytes(path.read_bytes() + LINE[:-2])
    assert read_metrics(path) == ROWS


@pytest.mark.parametrize("damage", ['{"kind": "tra', "[1, 2]", "3", '{"step": 3}', "\x00\x00\x00"])
def test_damage_anywhere_else_is_reported_with_its_line(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path, ROWS[:4], end=damage + "\n" + json.dumps(ROWS[5]) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 5: not "):
        read_metrics(path)


def test_a_missing_file_and_an_empty_one_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read: No such file"):
        write_curves(tmp_path)
    write(tmp_path, [], end='{"kind"')
    with pytest.raises(UserError, match="no rows to draw yet"):
        write_curves(tmp_path)


def test_the_picture_is_written_whole_and_replaced(tmp_path: Path) -> None:
    write(tmp_path, ROWS[:20])
    first = write_curves(tmp_path).read_bytes()
    write(tmp_path, ROWS, end='{"kind": "train", "st')
    path = write_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    assert path.read_bytes() != first
    with Image.open(path) as picture:
        picture.load()
        assert picture.width > 1000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", METRICS_FILE]


def test_each_panel_shows_the_numbers_of_the_rows() -> None:
    losses, precision, rate, speed = draw_curves(ROWS, "run").axes
    train, evaluations = ROWS[:30], ROWS[30:]
    for row_key, line in zip(LOSS_STYLES, losses.lines[::2], strict=True):
        np.testing.assert_allclose(line.get_xydata(), [[row["epoch"], row[row_key]] for row in train])
    shown = {line.get_label(): line.get_xydata() for line in precision.lines}
    for key in ("AP", "AP50"):
        np.testing.assert_allclose(shown[key], [[row["epoch"], 100 * row[key]] for row in evaluations])
    np.testing.assert_allclose(rate.lines[0].get_ydata(), [row["lr"] for row in train])
    np.testing.assert_allclose(speed.lines[0].get_ydata(), [row["images_per_second"] for row in train])


def test_the_noise_scale_is_drawn_beside_the_mini_batch_if_measured() -> None:
    rows = [train_row(step, mini_batch=16, noise_scale=None if step < 3 else 10.0 * step) for step in range(1, 6)]
    noise, mini_batch = draw_curves(rows, "run").axes[-1].lines
    np.testing.assert_allclose(noise.get_ydata(), [math.nan, math.nan, 30, 40, 50])
    np.testing.assert_allclose(mini_batch.get_ydata(), [16] * 5)


@pytest.mark.parametrize(
    "rows",
    [
        [train_row(1)],
        [evaluation_row(1)],
        [train_row(1, lr=0.0, **dict.fromkeys(LOSS_STYLES, 0.0))],
        [train_row(step, loss=math.nan, loss_classifier=math.inf) for step in range(1, 9)],
        [train_row(step, images_per_second=None) for step in range(1, 9)],
        [train_row(1), evaluation_row(1, AP=None, AP50=None)],
        [train_row(1), evaluation_row(1, AP=0.0, AP50=0.0), evaluation_row(2, AP=None, AP50=None)],
        [train_row(1), evaluation_row(1, AP=1.0, AP50=1.0)],
        [train_row(step, noise_scale=None) for step in range(1, 9)],
        [train_row(1, noise_scale=0.7, mini_batch=2)],
    ],
)
def test_rows_of_a_run_that_only_began_or_went_wrong_are_drawn(
    tmp_path: Path, rows: list[dict[str, Any]], recwarn: pytest.WarningsRecorder
) -> None:
    write(tmp_path, rows)
    write_curves(tmp_path)
    assert [str(warning.message) for warning in recwarn] == []


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), max_size=30), st.integers(1, 10))
def test_the_running_mean_is_the_mean_of_the_neighbors(values: list[float], window: int) -> None:
    array = np.array(values, np.float64)
    smooth = running_mean(array, window)
    assert len(smooth) == len(array)
    for place, value in enumerate(smooth):
        near = array[max(0, place - window + 1) : place + window]
        near = near[np.isfinite(near)]
        assert value == pytest.approx(near.mean() if len(near) else math.nan, abs=1e-9, nan_ok=True)
