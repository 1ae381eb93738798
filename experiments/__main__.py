"""Makes the runs that are missing and writes docs/findings.md from the results; ``make experiments`` is short for it.

    python -m experiments                        all cells, three seeds each; again after an interruption goes on
    python -m experiments --list                 what is there, what is left and how long it takes
    python -m experiments --only 'k08_*' --seeds 1
    python -m experiments --quick                tiny versions of a few cells, in a folder of their own

Ctrl-C or SIGTERM stops a training after a checkpoint. A run that has its line of results is not made again; remove the
line to do so. Several drivers at once share the work.
"""

import argparse
import statistics
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

from experiments.cells import CELLS, Cell, Run, choose_runs, load_cells
from experiments.page import write_page
from experiments.results import Results, Row
from experiments.training import PROJECT, Laboratory, ProcessRunner, RunFailed
from horovod_megdet.arguments import positive
from horovod_megdet.errors import EXIT_CRASHED, EXIT_STOPPED, UserError

SECONDS_PER_RUN = 420.0
"""Where no run has told yet."""

QUICK_CELLS = "k01_frozen,k08_cgbn"
QUICK_CROPS = ["--crops", "128", "--epochs", "1"]
QUICK = (
    "model.fpn_channels=16",
    "model.box_head_channels=32",
    "model.rpn_candidates_train=64",
    "model.proposals_train=32",
    "data.synthetic_train_images=72",
    "data.synthetic_val_images=6",
    "data.shorter_side_train=[48]",
    "data.longer_side_train=72",
    "data.shorter_side_test=48",
    "data.longer_side_test=72",
    "data.workers=0",
    "solver.epochs=2",
    "solver.milestones=[1.5]",
    "solver.gammas=[0.1]",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERNS", help="cells such as k08_*,k16_cgbn, in this order")
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help="seeds 0 to N - 1 of each cell (default: 3, quick: 1)"
    )
    parser.add_argument("--list", action="store_true", help="only say what is there and what is left")
    parser.add_argument("--quick", action="store_true", help="tiny versions of a few cells, in runs/experiments-quick")
    parser.add_argument("--cells", type=Path, default=CELLS, help="folder of the cells (default: experiments/cells)")
    parser.add_argument("--folder", type=Path, help="where --quick writes everything")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    try:
        return run_all(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run_all(arguments: argparse.Namespace) -> int:
    """Makes the missing runs; returns the exit code."""
    runs_dir, results = PROJECT / "runs/experiments", Results(PROJECT / "experiments/results/runs.jsonl")
    docs = PROJECT / "docs"
    overrides: tuple[str, ...] = ()
    if arguments.quick:
        runs_dir = docs = (arguments.folder or PROJECT / "runs/experiments-quick").absolute()
        results = Results(runs_dir / "results.jsonl")
        overrides = (*QUICK, f"model.weights={runs_dir}/backbone.pth", f"data.synthetic_root={runs_dir}/data")
    if results.repair():
        say(f"{results.path}: the last line was incomplete and is removed; its run is made again.")
    cells, waiting = load_cells(arguments.cells, overrides)
    for name, sentence in waiting.items():
        say(f"{name} cannot be run by this version: {sentence}")
    only = arguments.only or (QUICK_CELLS if arguments.quick else "")
    runs = choose_runs(cells, only, arguments.seeds or (1 if arguments.quick else 3))
    if arguments.list:
        print_list(runs, results.rows())
        return 0
    laboratory = Laboratory(runs_dir, ProcessRunner(), say)
    failures = 0
    if missing(runs, results.rows()):
        laboratory.pretrain(runs_dir / "backbone.pth", QUICK_CROPS if arguments.quick else [])
    for run in missing(runs, results.rows()):
        if laboratory.processes.stop_requested:
            break
        left = missing(runs, results.rows())
        say(f"{run} starts; left: {len(left)} runs, about {duration(left, results.rows())}")
        try:
            row = laboratory.make(run, results, partial(say_evaluation, run))
        except RunFailed as error:
            say(f"error: {error}")
            failures += 1
            continue
        say(f"{run}: {outcome(row)}" if row else f"{run}: stopped, or another driver has made it or makes it now")
        update_page(cells, results, docs)
    update_page(cells, results, docs)
    return EXIT_STOPPED if laboratory.processes.stop_requested else EXIT_CRASHED if failures else 0


def update_page(cells: list[Cell], results: Results, docs: Path) -> None:
    """Writes findings.md from the lines that belong to the cells as they are now."""
    names = {cell.hash: cell.name for cell in cells}  # a cell may have been renamed since
    rows = [row | {"cell": names[row["hash"]]} for row in results.rows() if row["hash"] in names]
    write_page(rows, results.path.with_name("mini_batch_256.json"), docs / "findings.md", docs / "figures")


def missing(runs: list[Run], rows: list[Row]) -> list[Run]:
    """The runs that have no line of results."""
    there = {(row["hash"], row["seed"]) for row in rows}
    return [run for run in runs if run.key not in there]


def duration(runs: list[Run], rows: list[Row]) -> timedelta:
    """How long runs take, from what those of the same cell took, or else all that did not diverge."""
    timed = [row for row in rows if row["seconds"] is not None]
    known: dict[str, list[float]] = {}
    for row in timed:
        known.setdefault(row["hash"], []).append(row["seconds"])
    whole = [row["seconds"] for row in timed if row["outcome"] == "finished"]
    usual = statistics.median(whole) if whole else SECONDS_PER_RUN
    return timedelta(seconds=round(sum(statistics.median(known.get(run.cell.hash, [usual])) for run in runs)))


def print_list(runs: list[Run], rows: list[Row]) -> None:
    """One line for each cell: what its seeds gave, and how many are left."""
    left = missing(runs, rows)
    for cell in {run.cell.hash: run.cell for run in runs}.values():
        outcomes = [outcome(row) for row in rows if row["hash"] == cell.hash]
        seeds = sum(run.cell is cell for run in left)
        print(f"{cell.name:22} {'; '.join(outcomes) or '-'}" + (f"; {seeds} left" if seeds else ""))
    print(f"{len(left)} of {len(runs)} runs are left, about {duration(left, rows)}.")


def outcome(row: Row) -> str:
    """A line of results in words."""
    if row["outcome"] == "diverged":
        return f"diverged at step {row['diverged_at_step']}"
    return f"AP {row['evaluations'][-1]['AP']:.3f}"


def say_evaluation(run: Run, row: Row) -> None:
    say(f"{run}: epoch {row['epoch']:.2f}, AP {row['AP']:.3f}")


def say(sentence: str) -> None:
    print(sentence, flush=True)


if __name__ == "__main__":
    sys.exit(main())
