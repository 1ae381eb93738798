"""The page that compares runs: what is read from their folders, the charts, the tables, and the page in a browser."""

import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from chromium import Tab
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from horovod_megdet import cli
from horovod_megdet.errors import UserError
from horovod_megdet.report.charts import BOTTOM, LABEL_HEIGHT, LEFT, MOST_POINTS, RIGHT, TOP, Axis, Line, _spread, chart
from horovod_megdet.report.comparison import (
    DARK,
    DARK_PAGE,
    LIGHT,
    LIGHT_PAGE,
    Table,
    metrics_table,
    notes,
    overview_table,
    settings_table,
    training_charts,
    write_comparison,
)
from horovod_megdet.report.curves import write_curves
from horovod_megdet.report.runs import read_runs

SETTINGS = {
    "model": {"backbone_norm": "cgbn"},
    "data": {"root": "", "train_annotations": "train.json", "val_annotations": "val.json"},
    "solver": {"base_lr": 0.02, "epochs": 3.0, "milestones": [2.0]},
    "output": {"run_dir": ""},
}


def train_row(step: int, **values: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "images_seen": 16 * step,
        "epoch": step / 10,
        "lr": 0.02,
        "loss": 3 / step,
        "images_per_second": 8.0,
        "mini_batch": 16,
        "noise_scale": None if step < 5 else 4.0 * step,
    } | values


def evaluation_row(step: int, **values: Any) -> dict[str, Any]:
    row = {"kind": "evaluation", "step": step, "images_seen": 16 * step, "epoch": step / 10, "AP": step / 100}
    return row | {"AP50": step / 60, "AP_large": None, "per_class": {"cell": step / 90, "ring": None}} | values


def rows_until(last_step: int) -> list[dict[str, Any]]:
    """A row of training for each step, and one of an evaluation for every tenth."""
    rows = []
    for step in range(1, last_step + 1):
        rows += [train_row(step)] + ([evaluation_row(step)] if step % 10 == 0 else [])
    return rows


ROWS = rows_until(30)


def make_run(
    folder: Path,
    rows: list[dict[str, Any]] = ROWS,
    end: str = "",
    training_data: str = "a1b2",
    **changes: dict[str, Any],
) -> Path:
    """The folder of a run whose sections of the configuration have these changes."""
    checkpoint = folder / "checkpoints" / "step_00000030"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text(json.dumps({"training_data": training_data}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    sections = {section: values | changes.get(section, {}) for section, values in SETTINGS.items()}
    sections["output"] = {"run_dir": str(folder)} | changes.get("output", {})
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    return folder


def texts(table: Table) -> dict[str, list[str]]:
    return {title: [cell.text for cell in cells] for title, cells in table}


# Reading runs


def test_a_run_in_progress_with_a_broken_last_line_is_read(tmp_path: Path) -> None:
    make_run(tmp_path / "run", rows_until(9), end='{"kind": "train", "st')
    (run,) = read_runs([tmp_path / "run"])
    assert run.rows == rows_until(9)
    assert run.best_by("AP") is None
    assert texts(overview_table([run], tmp_path))["epochs"] == ["0.9 of 3"]
    assert metrics_table([run]) == []


def test_a_run_without_a_configuration_or_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    runs = read_runs([tmp_path / "run", make_run(tmp_path / "other")])
    assert notes(runs) == ["run has no config.yaml: its settings are unknown."]
    assert texts(settings_table(runs))["solver.base_lr"] == ["–", "0.02"]
    assert texts(overview_table(runs, tmp_path))["epochs"] == ["0.1", "3"]


def test_names_tell_runs_apart_and_a_run_given_twice_is_one_run(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name) for name in ("a/run", "b/run", "c")]
    assert [run.name for run in read_runs(paths)] == ["a/run", "b/run", f"{tmp_path.name}/c"]
    assert [run.name for run in read_runs([paths[0], tmp_path / "c" / ".." / "a" / "run"])] == ["run"]


def test_hours_follow_from_images_and_throughput(tmp_path: Path) -> None:
    speeds = [8.0] * 10 + [None] * 5 + [8.0] * 5 + [4.0] * 10
    rows = [train_row(step, images_per_second=speed) for step, speed in enumerate(speeds, start=1)]
    (run,) = read_runs([make_run(tmp_path / "run", rows)])
    seconds = 3600 * run.hours([{"images_seen": images} for images in (0, 8, 16 * 20, 16 * 25, 16 * 30, 16 * 30 + 4)])
    np.testing.assert_allclose(seconds, [0, 1, 40, 60, 80, 81])
    (unknown,) = read_runs([make_run(tmp_path / "unknown", [train_row(1, images_per_second=None), evaluation_row(10)])])
    assert np.isnan(unknown.hours(unknown.evaluations)).all()


def test_the_best_evaluation_is_the_first_of_equals_and_names_its_checkpoint_if_that_is_kept(tmp_path: Path) -> None:
    aps = {10: 0.2, 20: None, 30: 0.5, 40: 0.5}
    rows = [evaluation_row(step, AP=value) for step, value in aps.items()]
    (run,) = read_runs([make_run(tmp_path / "run", rows)])
    assert run.best_by("AP") == (0.5, rows[2])
    assert run.checkpoint_of(rows[2]) == tmp_path / "run" / "checkpoints" / "step_00000030"
    assert run.checkpoint_of(rows[0]) is None
    (run,) = read_runs([make_run(tmp_path / "earlier", rows[:1])])
    assert texts(overview_table([run], tmp_path))["best checkpoint"] == ["step 10, not kept"]


def test_bad_folders_are_sentences(tmp_path: Path) -> None:
    good = make_run(tmp_path / "good")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder/metrics\.jsonl: cannot be read: No such file.*a run directory\?"):
        read_runs([good, tmp_path / "folder"])
    empty = make_run(tmp_path / "empty", [])
    with pytest.raises(UserError, match=r"empty/metrics\.jsonl: it has no rows to draw yet"):
        read_runs([empty])
    assert notes(read_runs([good, empty])) == ["empty has no metrics yet."]
    (good / "config.yaml").write_text("solver: [1, 2]\n")
    with pytest.raises(UserError, match=r"good/config\.yaml: not the configuration of a run"):
        read_runs([good])
    (empty / "checkpoints" / "step_00000030" / "checkpoint.json").write_text("[]")
    with pytest.raises(UserError, match=r"checkpoint\.json: not the description of a checkpoint"):
        read_runs([empty])


# Charts


@pytest.mark.parametrize(
    ("axis", "values", "places"),
    [
        (Axis(0.0, 10.0, 40.0, 340.0), [0, 5, 10], [40, 190, 340]),
        (Axis(1.0, 100.0, 200.0, 0.0, logarithmic=True), [1, 10, 100], [200, 100, 0]),
    ],
)
def test_an_axis_places_values_and_its_ticks(axis: Axis, values: list[float], places: list[float]) -> None:
    np.testing.assert_allclose(axis.places(np.array(values)), places)
    ticks = axis.ticks()
    assert len(ticks) >= 3
    for place, text in ticks:
        assert place == pytest.approx(axis.places(np.array([float(text)]))[0], abs=0.06)


def line_of(y: list[float], run: int = 0) -> Line:
    return Line(run, np.arange(1.0, len(y) + 1), np.array(y))


def test_a_line_is_interrupted_where_there_is_no_value() -> None:
    drawn = chart("loss", "epoch", [line_of([1, 2, math.nan, 4, math.inf, 3])], ["run"], markers=True)
    assert drawn is not None
    ((_, path),) = drawn.paths
    assert re.sub(r"[\d. ]+", "", path.replace("h0", "h")) == "MhLMhMh"
    assert len(drawn.markers) == 4
    assert drawn.points[0]["y"] == ["1", "2", "4", "3"]
    assert drawn.summary == "loss over epoch, last: run 3"


def test_what_a_logarithmic_axis_does_not_have_is_left_out() -> None:
    drawn = chart("noise", "epoch", [line_of([0, -1, 5, 50])], ["run"], logarithmic=True)
    assert drawn is not None
    assert drawn.points[0]["y"] == ["5", "50"]


def test_without_values_there_is_no_chart() -> None:
    assert chart("loss", "epoch", [line_of([math.nan]), line_of([])], ["a", "b"]) is None


def test_long_lines_are_thinned_and_keep_their_ends() -> None:
    drawn = chart("loss", "epoch", [line_of(list(range(10_001)))], ["run"])
    assert drawn is not None
    shown = drawn.points[0]
    assert len(shown["x"]) == MOST_POINTS
    assert (shown["y"][0], shown["y"][-1]) == ("0", "10k")
    assert LEFT <= min(shown["px"]) <= max(shown["px"]) <= RIGHT
    assert TOP <= min(shown["py"]) <= max(shown["py"]) <= BOTTOM


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(LEFT, RIGHT), st.floats(TOP, BOTTOM)), max_size=8))
def test_labels_of_eight_runs_never_cover_each_other(ends: list[tuple[float, float]]) -> None:
    placed = _spread([(run, *end) for run, end in enumerate(ends)])
    assert sorted(run for run, _, _ in placed) == list(range(len(ends)))
    for (_, x, y), (_, other_x, other_y) in itertools.combinations(placed, 2):
        # Places are rounded to a tenth.
        assert abs(x - other_x) >= LABEL_HEIGHT - 0.1 or abs(y - other_y) >= LABEL_HEIGHT - 0.2
    assert all(TOP <= y <= BOTTOM for _, _, y in placed)


def test_a_run_that_diverges_does_not_flatten_the_others(tmp_path: Path) -> None:
    diverged = [train_row(step, loss=2.0 if step < 8 else 10.0 ** (3 * step)) for step in range(1, 13)]
    steady = [train_row(step, loss=2.0) for step in range(1, 31)]
    runs = read_runs([make_run(tmp_path / "diverged", diverged), make_run(tmp_path / "steady", steady)])
    loss = training_charts(runs)[0]
    heights = BOTTOM - np.array(next(line for line in loss.points if line["run"] == 1)["py"])
    assert (heights > (BOTTOM - TOP) / 3).all()
    assert all(len(digits) <= 4 for _, path in loss.paths for digits in re.findall(r"(\d+)\.", path))


def test_ranks_over_time_are_drawn_where_they_change(tmp_path: Path) -> None:
    steady = [train_row(step, ranks=4) for step in range(1, 5)]
    change = {"kind": "ranks", "step": 2, "images_seen": 32, "epoch": 0.2, "ranks_before": 4, "ranks": 2}
    elastic = [*steady[:2], change, *(train_row(step, ranks=2) for step in (3, 4))]
    runs = read_runs([make_run(tmp_path / "steady", steady), make_run(tmp_path / "elastic", elastic)])
    drawn = next(chart for chart in training_charts(runs) if chart.title == "Ranks")
    assert [(line["x"], line["y"]) for line in drawn.points] == [
        (["0.1", "0.2", "0.3", "0.4"], ["4"] * 4),
        (["0.1", "0.2", "0.2", "0.2", "0.3", "0.4"], ["4", "4", "4", "2", "2", "2"]),
    ]
    assert all(chart.title != "Ranks" for chart in training_charts(runs[:1]))


# Tables and notes


def test_the_tables_show_what_differs_and_mark_the_best(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    second = make_run(
        tmp_path / "second",
        [*ROWS[:-1], evaluation_row(30, AP=0.4, AP50=0.1, per_class={"cell": 0.9, "ring": None})],
        solver={"base_lr": 0.04, "milestones": [2.5], "ema": None},
    )
    runs = read_runs([first, second])
    keys = texts(settings_table(runs))
    assert keys["solver.base_lr"] == ["0.02", "0.04"]
    assert keys["solver.milestones"] == ["[2.0]", "[2.5]"]
    assert keys["solver.ema"] == ["null", "null"], "a run that does not know a key did what its default does"
    assert keys["model.backbone_norm"] == ["cgbn", "cgbn"]
    assert "output.run_dir" not in keys
    table = dict(metrics_table(runs))
    assert [(cell.text, cell.emphasis) for cell in table["AP, IoU 0.50:0.95"]] == [("30.0", False), ("40.0", True)]
    assert [(cell.text, cell.emphasis) for cell in table["AP50, IoU 0.50"]] == [("50.0", True), ("10.0", False)]
    assert [(cell.text, cell.emphasis) for cell in table["AP of cell"]] == [("33.3", False), ("90.0", True)]
    assert [(cell.text, cell.emphasis) for cell in table["AP of ring"]] == [("–", False), ("–", False)]


def test_runs_of_different_data_sets_get_a_note(tmp_path: Path) -> None:
    same, moved = make_run(tmp_path / "same"), make_run(tmp_path / "moved", data={"train_images": "/scratch/train"})
    assert notes(read_runs([same, moved])) == []

    other = make_run(tmp_path / "other", training_data="c3d4")
    assert notes(read_runs([same, moved, other])) == [
        "These runs train on different images, so their losses and epochs cannot be compared: same, moved / other."
    ]
    other_classes = make_run(tmp_path / "classes", [evaluation_row(30, AP=0.9, per_class={"cat": 0.3})])
    runs = read_runs([same, other_classes])
    assert notes(runs) == [
        "These runs are evaluated on different images, so their metrics cannot be compared: same / classes."
    ]
    assert not any(cell.emphasis for _, cells in metrics_table(runs) for cell in cells)
    assert texts(metrics_table(runs))["AP of cat"] == ["–", "30.0"]


def test_the_same_files_at_other_places_are_one_data_set(tmp_path: Path) -> None:
    below_root, absolute = (
        {"root": "/d", "val_annotations": "val.json"},
        {"root": "/e", "val_annotations": "/d/val.json"},
    )
    elsewhere = {"root": "/scratch", "val_annotations": "val.json", "synthetic_val_images": 7}
    other = {"root": "/d", "val_annotations": "test.json"}
    same = [make_run(tmp_path / f"{k}", data=data) for k, data in enumerate((absolute, below_root, elsewhere))]
    assert notes(read_runs(same)) == []
    assert "evaluated on different images" in notes(read_runs([*same, make_run(tmp_path / "3", data=other)]))[0]
    generated = [
        make_run(tmp_path / f"of {n}", data={"val_annotations": "synthetic:val", "synthetic_val_images": n})
        for n in (5, 6)
    ]
    assert "evaluated on different images" in notes(read_runs(generated))[0]


def test_what_decides_which_checkpoint_is_the_best_is_shown(tmp_path: Path) -> None:
    rows = [evaluation_row(10, AP=0.3, AP50=0.5, loss=2.0), evaluation_row(30, AP=0.2, AP50=0.6, loss=1.5)]
    rows.append(evaluation_row(30) | {"kind": "multi_scale", "AP": 0.25})
    decided = {"AP": "30.0 (epoch 1.0)", "AP50": "AP50 60.0 (epoch 3.0)", "loss": "loss 1.5 (epoch 3.0)"}
    decided["AP of cell"] = "AP of cell 33.3 (epoch 3.0)"
    for metric, text in decided.items():
        (run,) = read_runs([make_run(tmp_path / metric, rows, output={"best_metric": metric})])
        table = texts(overview_table([run], tmp_path))
        assert table["best AP"] == ["30.0 (epoch 1.0)"]
        assert table["AP of the multi-scale test"] == ["25.0"]
        assert table.get("best by output.best_metric") == (None if metric == "AP" else [text])
        assert table["best checkpoint"] == ["step 10, not kept" if metric == "AP" else "step_00000030"]


def test_what_is_no_number_is_shown_as_none(tmp_path: Path) -> None:
    bad = [math.inf, math.nan, "high", None]
    rows = [train_row(step, loss=value, images_per_second=value) for step, value in enumerate(bad, start=1)]
    rows += [evaluation_row(5, AP=math.nan, AP50=math.inf, AP75=0.25)]
    runs = [make_run(tmp_path / "bad", rows), make_run(tmp_path / "good", [evaluation_row(10, AP50=0.5)])]
    write_comparison(runs, tmp_path / "report.html")
    write_curves(runs[0])
    table = dict(metrics_table(read_runs(runs)))
    assert [(cell.text, cell.emphasis) for cell in table["AP, IoU 0.50:0.95"]] == [("–", False), ("10.0", True)]
    assert [(cell.text, cell.emphasis) for cell in table["AP50, IoU 0.50"]] == [("–", False), ("50.0", True)]


def test_a_row_that_does_not_say_where_it_is_from_is_named(tmp_path: Path) -> None:
    for value in (None, "3", math.nan):
        (tmp_path / f"{value}").mkdir()
        path = tmp_path / f"{value}" / "metrics.jsonl"
        path.write_text(json.dumps(train_row(1)) + "\n" + json.dumps(train_row(2, epoch=value)) + "\n")
        with pytest.raises(UserError, match=r'metrics.jsonl, line 2: .* its "step" or "epoch" is not a number'):
            read_runs([path.parent])


def test_a_run_that_is_still_starting_is_shown_beside_others(tmp_path: Path) -> None:
    starting = make_run(tmp_path / "starting")
    (starting / "metrics.jsonl").unlink()
    assert notes(read_runs([make_run(tmp_path / "other"), starting])) == ["starting has no metrics yet."]


def test_many_runs_are_told_apart_as_far_as_it_goes(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / f"{number}", ROWS[:2]) for number in range(20)])
    assert notes(runs) == ["There are 16 kinds of lines: run 17 looks like run 1, and so on."]
    for drawn in training_charts(runs):
        heights = sorted(y for _, _, y in drawn.labels)
        assert min(np.diff(heights)) > 5, "labels stand apart even where there is no room for whole ones"


def test_a_run_of_another_user_can_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    before = sorted(run.iterdir())
    monkeypatch.setattr(sys, "argv", ["megdet", "report", str(run), "--output", str(tmp_path / "page.html")])
    assert cli.main() == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert sorted(run.iterdir()) == before


def test_without_a_checkpoint_the_configuration_tells_training_sets_apart(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", data={"train_annotations": "all.json"})
    assert notes(read_runs([first, second])) == []
    (second / "checkpoints" / "step_00000030" / "checkpoint.json").unlink()
    assert notes(read_runs([first, second]))[0].startswith("These runs train on different images")


# The page


def test_the_page_needs_nothing_beside_it_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "runs" / name) for name in ("a b", "50% #1", "<i>&'\"")]
    (runs[0] / "validation.html").write_text("")
    page = write_comparison(runs, tmp_path / "pages" / "report.html")
    html = page.read_text(encoding="utf-8")
    links = re.findall(r'href="([^"]*)"', html)
    assert len(links) == 7  # a checkpoint and a folder each, and one validation page
    assert all((page.parent / unquote(link)).exists() and link.startswith("../runs/") for link in links)
    assert "<i>&" not in html
    assert not re.search(r"https?:|src=|@import|url\((?!#)", html)


def test_the_command_writes_the_page_of_one_run_beside_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["megdet", "report", str(run)])
    assert cli.main() == 0
    assert capsys.readouterr().out.splitlines() == [str(run / "report.html"), str(run / "curves.png")]
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "<title>run</title>" in html
    assert "All settings" in html
    assert html.count("<figure") == 7


def test_the_command_compares_runs_and_leaves_their_folders_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["megdet", "report", "a", "b"])
    assert cli.main() == 0
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "report.html"])
    monkeypatch.setattr(sys, "argv", ["megdet", "report", "a", "c"])
    assert cli.main() == UserError.exit_code
    assert "c/metrics.jsonl: cannot be read" in capsys.readouterr().err
    assert runs


# Colors


def linear_rgb(color: str) -> np.ndarray:
    values = np.array([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def oklab(linear: np.ndarray) -> np.ndarray:
    """Ottosson's OKLab, in which distances are about as large as they look."""
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ np.clip(linear, 0, 1))


SIGHT = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
"""Machado et al. 2009, "A Physiologically-based Model for Simulation of Color Vision Deficiency", severity 1."""


@pytest.mark.parametrize(("colors", "page"), [(LIGHT, LIGHT_PAGE), (DARK, DARK_PAGE)])
@pytest.mark.parametrize("sight", SIGHT)
def test_colors_of_runs_differ_for_everyone_and_stand_out_from_the_page(
    colors: tuple[str, ...], page: str, sight: str
) -> None:
    seen = [oklab(SIGHT[sight] @ linear_rgb(color)) for color in colors]
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) >= 0.085
    luminances = [float(np.dot([0.2126, 0.7152, 0.0722], linear_rgb(color))) + 0.05 for color in (page, *colors)]
    assert all(max(luminances[0], other) / min(luminances[0], other) >= 3 for other in luminances[1:])


# In a browser


@pytest.fixture(scope="module")
def page_of_eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    names = ["cgbn", "a-rather-long-name-of-a-run-without-any-blank-that-goes-on-and-on", *"cdefg", "<script>"]
    runs = []
    for number, name in enumerate(names):
        rows = [row | {"loss": row.get("loss", 1) * (1 + number / 9)} for row in rows_until(30 - number)]
        runs.append(make_run(folder / name, rows, solver={"base_lr": 0.01 * number}))
    return write_comparison(runs, folder / "report.html")


PAGE_COLORS = {"light": (246, 247, 249), "dark": (13, 17, 23)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1440])
def test_the_page_fits_screens_and_follows_the_scheme(
    tab: Tab, page_of_eight: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    tab.open(page_of_eight, width, 800, scheme)
    # The page itself never scrolls sideways; wide tables do.
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    wide = tab.evaluate("[...document.querySelectorAll('.scroll')].some(box => box.scrollWidth > box.clientWidth)")
    assert wide or width > 375
    charts = tab.evaluate("[...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect().width)")
    assert len(charts) == 7
    assert min(charts) > 280
    smallest = tab.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
    )
    assert smallest > 9
    tab.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        colors = picture.convert("RGB").getcolors(1 << 24)
        assert picture.width == width
        assert picture.convert("RGB").getpixel((2, 2)) == PAGE_COLORS[scheme]
    expected = {tuple(bytes.fromhex(color[1:])) for color in {"light": LIGHT, "dark": DARK}[scheme]}
    assert colors is not None
    assert expected <= {color for _, color in colors}
    problems = [event for event in tab.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert problems == []
    requests = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert requests == [page_of_eight.as_uri()]


def test_the_pointer_shows_values_and_a_button_hides_a_run(tab: Tab, page_of_eight: Path) -> None:
    tab.open(page_of_eight, 1440, 900, "light")
    place = tab.evaluate("(({x, y, width, height}) => [x + width * 0.65, y + height / 2])"
                         "(document.querySelector('figure svg').getBoundingClientRect())")  # fmt: skip
    assert tab.evaluate("document.getElementById('values').hidden")
    tab.move_pointer(*place)
    text = tab.evaluate("document.getElementById('values').innerText")
    assert not tab.evaluate("document.getElementById('values').hidden")
    assert "cgbn" in text
    assert "20" in text.split()  # AP in % at epoch 2
    shown = "[...document.querySelectorAll('figure [data-run=\"0\"]')].some(part => part.getClientRects().length)"
    assert tab.evaluate(shown)
    tab.evaluate("document.querySelector('button').click()")
    assert not tab.evaluate(shown)
    assert tab.evaluate("document.querySelector('button').ariaPressed") == "false"
    tab.move_pointer(place[0] + 1, place[1])
    assert "cgbn" not in tab.evaluate("document.getElementById('values').innerText")
