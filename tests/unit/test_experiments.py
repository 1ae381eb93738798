"""The experiments: cells and their hashes, lines of results, the rules of the verdicts, and the page."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import verdicts
from experiments.__main__ import update_page
from experiments.cells import CELLS, RANKS, Cell, Run, choose_runs, load_cells
from experiments.findings import FINDINGS, Finding
from experiments.outcomes import NOISE_EPOCHS, Outcomes, between, clearly_above, clearly_better, mean_and_spread
from experiments.page import write_page
from experiments.pretraining import SIDE, crops
from experiments.results import Results, Row
from experiments.training import Laboratory, ProcessRunner, describe, prune
from experiments.verdicts import KS, NOT_REPRODUCED, REPRODUCED, UNDECIDED, cgbn, frozen, half_rate, no_warmup
from horovod_megdet.config import load_config
from horovod_megdet.data.synthetic import CLASSES
from horovod_megdet.errors import EXIT_NOT_FINITE, UserError
from horovod_megdet.models.modules import MODULES
from horovod_megdet.solver.gradient_noise import NoiseAverages
from horovod_megdet.solver.schedule import make_schedule


def write_cell(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.yaml").write_text(text)


def line(cell: str, seed: int, ap: float | list[float] | None, **more: Any) -> Row:
    """A line of results: a run with these APs by epoch, or a diverged one."""
    by_epoch = [] if ap is None else [ap] if isinstance(ap, float) else ap
    evaluations = [{"epoch": e, "step": 10 * e, "AP": v, "AP50": v} for e, v in enumerate(by_epoch, start=1)]
    outcome = "diverged" if ap is None else "finished"
    row = {"cell": cell, "hash": f"hash of {cell}", "seed": seed, "outcome": outcome, "evaluations": evaluations}
    row |= {"diverged_at_step": 24 if ap is None else None, "mini_batch": 8 * int(cell[1:3]), "training": []}
    row |= {"images_per_second": 40.0, "seconds": 300.0, "processor": "2 x A", "versions": {"torch": "2"}}
    return row | {"weights": "abc", "date": "2026-01-01"} | more


def lines(ap: dict[str, float | list[float] | None], seeds: int = 3, **more: Any) -> list[Row]:
    """Lines of several cells, with a little spread between the seeds."""
    spread = [0.0, 0.002, -0.002]
    rows = []
    for cell, value in ap.items():
        for seed in range(seeds):
            values = (
                value if value is None else [v + spread[seed] for v in ([value] if isinstance(value, float) else value)]
            )
            rows.append(line(cell, seed, values, **more))
    return rows


def finding(key: str) -> Finding:
    return next(found for found in FINDINGS if found.key == key)


def verdict(key: str, rows: list[Row]) -> str:
    return finding(key).verdict(Outcomes(rows)).word


# Cells


def test_every_cell_can_be_run_and_every_finding_has_its_cells() -> None:
    cells, waiting = load_cells()
    assert not waiting
    assert len({cell.hash for cell in cells}) == len(cells), "two cells are the same"
    for cell in cells:
        schedule = make_schedule(cell.config.solver, 2311, RANKS, cell.config.data.images_per_rank)
        assert schedule.mini_batch == 8 * int(cell.name[1:3])
        if cell.config.batch_norm.bn_size != "world":
            assert cell.config.batch_norm.bn_size == cell.config.data.images_per_rank
    names = {cell.name for cell in cells}
    shown = {name for found in FINDINGS for name in found.cells}
    shown |= {*verdicts.BEYOND.values(), *verdicts.OPTIONS.values()}
    assert shown | {"k08_frozen_half_rate"} == names


def test_bn_sizes_are_those_of_the_table() -> None:
    cells = {cell.name: cell.config for cell in load_cells()[0]}
    for size, name in verdicts.BN_SIZES.items():
        data, batch_norm = cells[name].data, cells[name].batch_norm
        together = RANKS * data.images_per_rank if batch_norm.bn_size == "world" else batch_norm.bn_size
        assert together == size


@pytest.mark.parametrize(
    ("cell", "rate"),
    [(cgbn(k), 0.01 * k) for k in KS]
    + [
        (half_rate(2), 0.01),
        (half_rate(16), 0.08),
        ("k16_square_root", 0.04),
        ("k16_lars", 1.6),
        ("k08_adamw", 0.0008),
    ],
)
def test_rates(cell: str, rate: float) -> None:
    config = load_config(CELLS / f"{cell}.yaml")
    schedule = make_schedule(config.solver, 2311, RANKS, config.data.images_per_rank)
    assert schedule.peak_lr == pytest.approx(rate)
    assert schedule.warmup_lr == config.solver.base_lr


def test_the_hash_is_of_what_the_cell_and_its_base_say(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("solver:\n  epochs: 6\n")
    folder = tmp_path / "cells"
    folder.mkdir()
    write_cell(folder, "a", "base: ../base.yaml\nmodel:\n  fpn_channels: 64\n")
    write_cell(folder, "b", "# A comment.\nmodel: {fpn_channels: 64}\nbase: ../base.yaml\n")
    write_cell(folder, "c", "base: ../base.yaml\nmodel:\n  fpn_channels: 32\n")
    a, b, c = load_cells(folder)[0]
    assert a.hash == b.hash != c.hash
    before = a.hash
    (tmp_path / "base.yaml").write_text("solver:\n  epochs: 7\n")
    assert load_cells(folder)[0][0].hash != before
    assert load_cells(folder, ("solver.epochs=6",))[0][0].hash == before
    assert Run(a, 0).key != Run(a, 1).key


def test_a_cell_with_an_unknown_key_waits(tmp_path: Path) -> None:
    write_cell(tmp_path, "good", "solver: {epochs: 1}")
    write_cell(tmp_path, "new", "solver: {not_there_yet: 1}")
    cells, waiting = load_cells(tmp_path)
    assert [cell.name for cell in cells] == ["good"]
    assert "not_there_yet" in waiting["new"]


def test_one_seed_of_every_cell_comes_first_and_patterns_keep_their_order() -> None:
    cells, _ = load_cells()
    runs = [(run.cell.name, run.seed) for run in choose_runs(cells, "k16_cgbn,k01_*", 2)]
    assert runs == [(name, seed) for seed in (0, 1) for name in ("k16_cgbn", "k01_cgbn", "k01_frozen")]
    assert len(choose_runs(cells, "", 3)) == 3 * len(cells)
    with pytest.raises(UserError, match="k99"):
        choose_runs(cells, "k01_cgbn,k99*", 1)


# Results


def test_an_incomplete_last_line_is_passed_over_and_removed(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "runs.jsonl")
    assert results.rows() == []
    assert not results.repair()
    results.append(line("k01_cgbn", 0, 0.7))
    whole = results.path.read_bytes()
    results.path.write_bytes(whole + whole[:50])
    assert [row["seed"] for row in results.rows()] == [0]
    assert results.repair()
    assert results.path.read_bytes() == whole
    assert not results.repair()


def test_a_line_after_an_incomplete_one_is_whole(tmp_path: Path) -> None:
    results = Results(tmp_path / "runs.jsonl")
    results.path.write_bytes(b'{"cell": "k01')
    results.append(line("k02_cgbn", 1, None))
    assert [(row["cell"], row["outcome"]) for row in results.rows()] == [("k02_cgbn", "diverged")]


NO_EVALUATION = '{"cell": "k01_cgbn", "seed": 0, "hash": "0", "outcome": "finished", "evaluations": []}'


@pytest.mark.parametrize("bad", ["{", "[]", '{"cell": "k01_cgbn"}', NO_EVALUATION])
def test_a_damaged_line_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(f"{json.dumps(line('k01_cgbn', 0, 0.7))}\n{bad}\n{json.dumps(line('k01_cgbn', 1, 0.7))}\n")
    with pytest.raises(UserError, match="line 2"):
        Results(path).rows()


# One run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "backbone.pth").write_bytes(b"weights")
    path = CELLS / "k08_frozen.yaml"
    overrides = (f"model.weights={tmp_path / 'backbone.pth'}",)
    return Run(Cell("k08_frozen", path, overrides, load_config(path, list(overrides))), 1)


@pytest.mark.parametrize(
    "error",
    [
        "The loss is not finite at step 24: rank 1",
        "The weights are not finite after step 24.",
        "The gradients are not finite in 33 steps in a row, up to step 24",
    ],
)
def test_a_diverged_run_is_described_with_its_step(tmp_path: Path, run: Run, error: str) -> None:
    (tmp_path / "log.txt").write_text(f"step 20\nerror: {error}\n")
    rows = [
        {
            "kind": "train",
            "step": 10,
            "epoch": 0.3,
            "lr": 0.03,
            "loss": 2.0,
            "images_per_second": 30.0,
            "memory_mb": 900,
        },
        {"kind": "train", "step": 20, "epoch": 0.6, "lr": 0.05, "loss": float("nan"), "images_per_second": 32.0}
        | {"memory_mb": 950, "gradient_variance": 3.0, "squared_gradient": 0.5, "noise_scale": 6.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = describe(run, tmp_path, EXIT_NOT_FINITE, 61.0)
    assert (row["outcome"], row["diverged_at_step"], row["evaluations"]) == ("diverged", 24, [])
    assert (row["hash"], row["seed"], row["mini_batch"]) == (*run.key, 64)
    assert row["training"] == [
        {"epoch": 0.6, "step": 20, "lr": 0.05, "loss": None}
        | {"gradient_variance": 3.0, "squared_gradient": 0.5, "noise_scale": 6.0}
    ]
    assert (row["images_per_second"], row["memory_mb"]) == (31.0, 950)
    Results(tmp_path / "runs.jsonl").append(row)
    assert Results(tmp_path / "runs.jsonl").rows() == [row]


def test_a_finished_run_is_described_by_epochs(tmp_path: Path, run: Run) -> None:
    rows: list[Row] = []
    for step in range(1, 7):
        measured = {"step": step, "epoch": step / 3, "lr": 0.08, "loss": 1 / step}
        rows.append({"kind": "train", **measured, "images_per_second": 30.0, "memory_mb": 900})
        if step % 3 == 0:
            rows.append({"kind": "evaluation", "step": step, "epoch": step / 3, "AP": step / 10, "AP50": 0.9})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = describe(run, tmp_path, 0, 61.0)
    assert [(e["epoch"], e["AP"]) for e in row["evaluations"]] == [(1.0, 0.3), (2.0, 0.6)]
    assert [entry["step"] for entry in row["training"]] == [3, 6]
    assert row["outcome"] == "finished"


def test_a_run_that_another_driver_has_is_left_to_it(tmp_path: Path, run: Run) -> None:
    """The lock is another process's, as it would be of another driver."""
    folder = tmp_path / run.folder
    folder.mkdir()
    program = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(folder / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    other.stdout.readline()
    try:
        laboratory = Laboratory(tmp_path, _NeverRuns(), print)
        assert laboratory.make(run, Results(tmp_path / "runs.jsonl"), lambda row: None) is None
    finally:
        other.communicate(b"\n")


def test_a_run_that_has_its_line_by_now_is_not_made_again(tmp_path: Path, run: Run) -> None:
    results = Results(tmp_path / "runs.jsonl")
    results.append(line("k08_frozen", run.seed, None) | {"hash": run.cell.hash})
    assert Laboratory(tmp_path, _NeverRuns(), print).make(run, results, lambda row: None) is None


class _NeverRuns(ProcessRunner):
    def __init__(self) -> None:
        pass

    def run(self, *arguments: object, **more: object) -> int:
        raise AssertionError("a run was started")


def test_pruning_leaves_what_a_report_reads(tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "log.txt", "lock", "summary.json"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "lock", "log.txt", "metrics.jsonl"]


def test_crops_are_shapes_with_their_classes() -> None:
    images, labels = crops(20)
    again, _ = crops(20)
    assert images.shape == (20, 3, SIDE, SIDE)
    assert torch.equal(images, again)
    assert len(labels) == 20
    assert set(labels.tolist()) <= set(range(len(CLASSES)))


# Verdicts

APs = dict[str, float | list[float] | None]
TRAINED: APs = {cgbn(k): 0.7 for k in KS} | {frozen(k): 0.75 for k in KS}


def by_seed(cell: str, *ap: float | None) -> list[Row]:
    """Lines of a cell whose seeds have these final APs, or diverged."""
    return [line(cell, seed, value) for seed, value in enumerate(ap)]


def test_statistics() -> None:
    assert mean_and_spread([0.5, 0.52]) == "0.510 ± 0.014"
    assert mean_and_spread([0.5]) == "0.500"
    assert clearly_above([0.70, 0.71, 0.72], [0.60, 0.61, 0.62])
    assert not clearly_above([0.70, 0.71, 0.72], [0.695, 0.705, 0.715]), "below the least difference"
    assert not clearly_above([0.5, 0.9], [0.4, 0.8]), "within two standard errors"
    assert not clearly_above([0.9], [0.1, 0.1]), "one run shows no spread"


@pytest.mark.parametrize(
    ("one", "other", "better"),
    [
        ((0.7, 0.71, 0.72), (0.6, 0.61, 0.62), True),
        ((0.7, 0.71, 0.72), (0.7, 0.71, 0.72), False),
        ((0.7, 0.71, 0.72), (None, 0.01, 0.72), True),
        ((0.7, 0.71, 0.72), (0.7, 0.71, None), False),
        ((0.7, 0.71, None), (0.6, 0.61, 0.62), False),
        ((0.6, 0.61, 0.62), (0.7, 0.71, None), False),
        ((None, None, None), (None, None, None), False),
    ],
    ids=["above", "level", "two fail", "one fails", "above and one fails", "below and the other fails", "all fail"],
)
def test_clearly_better(one: tuple[float | None, ...], other: tuple[float | None, ...], better: bool) -> None:
    outcomes = Outcomes(by_seed("k01_cgbn", *one) + by_seed("k02_cgbn", *other))
    assert clearly_better(outcomes[cgbn(1)], outcomes[cgbn(2)]) == better


def test_a_cell_in_words_has_the_number_of_each_kind_of_run() -> None:
    outcomes = Outcomes(by_seed("k01_cgbn", 0.7, 0.02, None) + by_seed("k01_cgbn", 0.7))
    assert str(outcomes[cgbn(1)]) == "0.700 (1); collapsed to 0.020 (1); diverged at step 24 (1)"
    assert str(outcomes[cgbn(2)]) == "not run yet"


def test_between_two_rows_there_are_the_steps_between_them() -> None:
    averages, rows = NoiseAverages(), []
    for step, value in enumerate([100.0] * 5 + [3.0] * 4, start=1):
        averages.add(dict.fromkeys(MODULES, value / 4), dict.fromkeys(MODULES, value / 4))
        rows.append({"step": step, **averages.row()})
    assert rows[-1]["gradient_variance"] > 40
    assert between(rows[4], rows[8], "gradient_variance") == pytest.approx(3.0)
    later = [row | {"step": 10 * row["step"]} for row in rows]
    assert between(later[4], later[8], "gradient_variance") == pytest.approx(3.0), "not every step was measured"
    for row in rows:
        del row["noise_measurements"]
    assert between(rows[4], rows[8], "gradient_variance") == pytest.approx(3.0), "a line of before"


@pytest.mark.parametrize("found", FINDINGS, ids=lambda found: found.key)
def test_without_runs_every_finding_is_undecided(found: Finding) -> None:
    assert found.verdict(Outcomes([])).word == UNDECIDED
    assert all("not run yet" in row or "–" in row for row in found.table(Outcomes([]))[1:])


def test_batch_norm() -> None:
    failing = TRAINED | {frozen(8): None, frozen(16): None}
    assert verdict("batch-norm", lines(failing)) == REPRODUCED
    assert verdict("batch-norm", lines(failing, seeds=2)) == UNDECIDED
    assert verdict("batch-norm", lines(TRAINED)) == NOT_REPRODUCED
    collapsed = finding("batch-norm").verdict(Outcomes(lines(failing | {cgbn(16): [0.02]})))
    assert collapsed.word == NOT_REPRODUCED
    assert "trains with every seed is 64 with CGBN and 32 without" in collapsed.reason
    rows = lines(failing)
    one_trains = [line(frozen(16), 2, 0.6) if (r["cell"], r["seed"]) == (frozen(16), 2) else r for r in rows]
    assert verdict("batch-norm", one_trains) == NOT_REPRODUCED


def test_warm_up() -> None:
    without: APs = {"k08_no_warmup": 0.7, "k16_no_warmup": None}
    assert verdict("warm-up", lines(TRAINED | without)) == REPRODUCED
    assert verdict("warm-up", lines(TRAINED | without | {"k16_no_warmup": 0.6})) == REPRODUCED
    assert verdict("warm-up", lines(TRAINED | without | {"k16_no_warmup": 0.7})) == NOT_REPRODUCED
    one = finding("warm-up").verdict(Outcomes(lines(TRAINED | without | {cgbn(16): 0.01})))
    assert one.word == NOT_REPRODUCED
    assert "At k = 16 none trains with or without it" in one.reason
    fails = {cgbn(8): 0.01, cgbn(16): None}
    neither: APs = {"k08_no_warmup": None, "k16_no_warmup": 0.02}
    assert verdict("warm-up", lines(TRAINED | neither | fails)) == UNDECIDED
    reason = finding("warm-up").verdict(Outcomes(lines(TRAINED | without | fails)))
    assert reason.word == NOT_REPRODUCED
    assert "clearly worse at k = 8." in reason.reason, "the runs without the warm-up train"
    mixed: APs = {"k08_no_warmup": 0.6, "k16_no_warmup": 0.3, cgbn(16): None}
    assert verdict("warm-up", lines(TRAINED | mixed)) == NOT_REPRODUCED, "better at one, worse at the other"


def test_bn_size() -> None:
    ap: APs = dict.fromkeys(verdicts.BN_SIZES.values(), 0.7)
    assert verdict("bn-size", lines(ap)) == NOT_REPRODUCED, "no size matters"
    assert verdict("bn-size", lines(ap | {"k08_bn02": 0.6})) == REPRODUCED
    assert verdict("bn-size", lines(ap | {"k08_bn02": None})) == REPRODUCED
    assert verdict("bn-size", lines(ap | {"k08_bn08": 0.6})) == NOT_REPRODUCED, "only one in between is worse"
    growing = dict(zip(ap, (0.5, 0.55, 0.6, 0.65, 0.7, 0.75), strict=True))
    assert verdict("bn-size", lines({**growing})) == NOT_REPRODUCED, "more is always better"
    assert verdict("bn-size", lines(dict.fromkeys(ap))) == UNDECIDED, "none trains"


def test_first_epochs() -> None:
    small = [0.4, 0.5, 0.7]
    assert verdict("first-epochs", lines({cgbn(1): small, cgbn(2): [0.3, 0.45, 0.7]})) == REPRODUCED
    assert verdict("first-epochs", lines({cgbn(1): small, cgbn(2): [0.3, 0.4, 0.6]})) == NOT_REPRODUCED
    assert verdict("first-epochs", lines({cgbn(1): small, cgbn(2): small})) == NOT_REPRODUCED
    assert verdict("first-epochs", lines({cgbn(1): None, cgbn(2): small})) == UNDECIDED


def noisy(variance: dict[int, float], signal: float, ap: dict[int, float | list[float] | None]) -> list[Row]:
    """Lines of the CGBN cells with measured noise; the rows of the warm-up and of lower rates must not count."""
    rows = []
    for k in KS:
        averages, training = NoiseAverages(), []
        for epoch in range(1, 6):
            chosen = epoch in NOISE_EPOCHS
            averages.add(dict.fromkeys(MODULES, variance[k] / 4 if chosen else 1e6), dict.fromkeys(MODULES, signal / 4))
            training.append({"step": epoch, "epoch": float(epoch), "lr": 0.01 * k, **averages.row()})
        training.append({"step": 6, "epoch": 6.0, "lr": 0.01 * k})
        rows += lines({cgbn(k): ap[k]}, training=training)
        if k in verdicts.WARMUP_KS:
            rows += lines({no_warmup(k): 0.6}, training=training)
    return rows


def test_variance() -> None:
    ap: dict[int, float | list[float] | None] = dict.fromkeys(KS, 0.7)
    level = dict.fromkeys(KS, 4.0)
    assert verdict("variance", noisy(level, 0.1, ap)) == REPRODUCED
    assert verdict("variance", noisy(level | {16: 9.0}, 0.1, ap)) == NOT_REPRODUCED
    assert verdict("variance", noisy(level | {16: 9.0}, 0.1, ap | {16: 0.01})) == NOT_REPRODUCED, "without warm-up"
    assert verdict("variance", noisy(level, 0.1, ap | {16: 0.01})) == REPRODUCED, "without warm-up"
    assert verdict("variance", noisy(level, 0.1, ap | {4: None})) == UNDECIDED, "nothing trains at k = 4"
    assert verdict("variance", noisy(level | {1: 9.0}, 0.1, ap | {4: None})) == NOT_REPRODUCED, "the others differ"
    cells = [*(cgbn(k) for k in KS), *(no_warmup(k) for k in verdicts.WARMUP_KS)]
    assert verdict("variance", lines(dict.fromkeys(cells, 0.7))) == UNDECIDED, "nothing was measured"
    noise = Outcomes(noisy(level, 0.1, ap))[cgbn(4)].noise
    assert noise is not None
    assert noise.scale == pytest.approx(40)
    assert noise.per_image == pytest.approx(0.04**2 * 4 / 32**2)


def test_linear_rule() -> None:
    ap: dict[int, float | list[float] | None] = dict.fromkeys(KS, 0.7)
    level = dict.fromkeys(KS, 4.0)

    def word(signal: float, half_of_128: float | None, half_of_16: float | None = 0.7) -> str:
        halves: APs = {half_rate(16): half_of_128, half_rate(2): half_of_16}
        return verdict("linear-rule", noisy(level, signal, ap | {16: 0.4}) + lines(halves))

    assert word(0.1, half_of_128=0.5) == REPRODUCED, "B = 40"
    assert word(0.1, half_of_128=0.4) == NOT_REPRODUCED, "half the rate does not help at 128 images"
    assert word(0.1, half_of_128=None) == NOT_REPRODUCED
    assert word(0.1, half_of_128=0.5, half_of_16=0.75) == NOT_REPRODUCED, "it helps at 16 images, too"
    assert word(0.1, half_of_128=0.5, half_of_16=0.6) == REPRODUCED
    assert word(0.001, half_of_128=0.5) == UNDECIDED, "B = 4000: above both mini-batches"
    assert word(2.0, half_of_128=0.5) == UNDECIDED, "B = 2: below both"
    assert word(-0.1, half_of_128=0.5) == UNDECIDED, "no signal"
    mixed = Outcomes(noisy(level, -0.1, ap)[:9] + noisy(level, 0.1, ap)[9:])
    assert verdicts.noise_scale(mixed) == float("inf"), "three of five have no signal"


def test_beyond_the_linear_rule() -> None:
    ap: APs = dict.fromkeys(verdicts.BEYOND.values(), 0.5)
    assert verdict("beyond", lines(ap)) == NOT_REPRODUCED
    assert verdict("beyond", lines(ap | {"k16_agvm": 0.55})) == REPRODUCED
    assert verdict("beyond", lines(ap | {"k16_cgbn": None})) == REPRODUCED
    assert verdict("beyond", lines(ap | {"k16_half_rate": 0.55})) == NOT_REPRODUCED
    assert verdict("beyond", lines(ap | {"k16_cgbn": None, "k16_agvm": 0.01})) == UNDECIDED, "neither trains"
    assert verdict("beyond", lines(ap | {"k16_agvm": None})) == NOT_REPRODUCED
    factors = [{"step": 9, "lr_factor_backbone": 1.0, "lr_factor_fpn": 1.5}]
    rows = [line("k16_agvm", seed, 0.5, training=factors) for seed in range(3)]
    reason = finding("beyond").verdict(Outcomes(lines(ap) + rows)).reason
    assert "factors of the rate when its runs ended, whether they trained or not: backbone 1.00, fpn 1.50." in reason


def test_accuracy() -> None:
    level: APs = {cgbn(k): 0.7 for k in KS}
    assert verdict("accuracy", lines(level)) == NOT_REPRODUCED, "nothing grows"
    assert verdict("accuracy", lines(level | {cgbn(4): 0.72})) == REPRODUCED
    assert verdict("accuracy", lines(level | {cgbn(4): 0.72, cgbn(16): 0.6})) == NOT_REPRODUCED
    first_fails = by_seed(cgbn(2), None, 0.7, 0.71)
    assert verdict("accuracy", lines(level | {cgbn(4): 0.72}) + first_fails) == REPRODUCED, "one run can be chance"


# The page


def test_the_page_without_runs(tmp_path: Path) -> None:
    write_page([], tmp_path / "none.json", tmp_path / "findings.md", tmp_path / "figures")
    text = (tmp_path / "findings.md").read_text()
    assert text.count("**Undecided.**") == len(FINDINGS)
    assert "not run yet" in text
    assert not (tmp_path / "figures").exists()


def test_the_page_with_some_runs(tmp_path: Path) -> None:
    rows = lines({frozen(1): 0.75, cgbn(1): 0.72, frozen(8): None}) + lines({cgbn(8): 0.5}, seeds=1)
    mini_batch = {"ranks": 16, "images_per_rank": 16, "bn_size": 32, "gradient_difference": 2e-7, "date": "2026-01-01"}
    steps = [{"step": s, "loss": 2.75 - s / 4, "lr": 0.02, "step_seconds": 9.0, "memory_mb": 800.0} for s in (1, 2)]
    (tmp_path / "one.json").write_text(json.dumps(mini_batch | {"processor": "2 x A", "steps": steps}))
    for _ in range(2):
        write_page(rows, tmp_path / "one.json", tmp_path / "findings.md", tmp_path / "figures")
    text = (tmp_path / "findings.md").read_text()
    assert "The loss falls: 2.500 to 2.250." in text
    assert "they agree to 1e-05" in text
    assert "| 1 | 8 | 0.01 | 0.750 ± 0.002 (3) | 0.720 ± 0.002 (3) |" in text
    assert "| 8 | 64 | 0.08 | diverged at step 24, 24, 24 (3) | 0.500 (1) |" in text
    assert "| 1 | 0.02 | 2.500 | 9.0 | 800 |" in text
    assert "2.0e-07" in text
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert "figures/batch-norm.svg" in links
    assert all((tmp_path / link).read_text().lstrip().startswith("<?xml") for link in links)


def test_a_renamed_cell_keeps_its_runs_and_a_changed_one_loses_them(tmp_path: Path, run: Run) -> None:
    results = Results(tmp_path / "runs.jsonl")
    results.append(line("k08_old_name", 0, 0.7) | {"hash": run.cell.hash})
    results.append(line("k08_frozen", 1, 0.6) | {"hash": "of a cell that was changed"})
    update_page([run.cell], results, tmp_path)
    assert "| 8 | 64 | 0.08 | 0.700 (1) | not run yet |" in (tmp_path / "findings.md").read_text()


def test_figures_do_not_change_when_results_do_not(tmp_path: Path) -> None:
    drawn = []
    for name in ("a", "b"):
        write_page(lines(TRAINED), tmp_path / "none.json", tmp_path / name / "findings.md", tmp_path / name / "figures")
        drawn.append((tmp_path / name / "figures/batch-norm.svg").read_bytes())
    assert drawn[0] == drawn[1]
