"""Writes docs/findings.md from the lines of results alone."""

import json
from pathlib import Path

from experiments.figures import write_figure
from experiments.findings import CLEARLY, FINDINGS, RUNS, Finding
from experiments.outcomes import TRAINS, Outcomes
from experiments.results import Row
from experiments.verdicts import Table, table_options
from horovod_megdet.files import atomic_write

AGREES = 1e-5
"""Part of the norm by which gradients in float32 may differ."""

HEAD = f"""# MegDet's findings, tried on two cores

`make experiments` makes the runs and writes this page from `experiments/results/runs.jsonl`; edit nothing here. It goes
on where it was stopped; `make experiments LIST=1` says what is left.

The paper trained ResNet-50 on COCO with 16 to 256 images per step. This page looks for the same at the scale of two CPU
cores: ResNet-18, pre-trained on crops of generated shapes; 2,400 generated images of 128 to 192 pixels (2,311 of them
have objects); 6 epochs; two ranks; bfloat16. The linear rule starts from a rate of 0.01 at 8 images, which is k = 1 and
stands for the paper's 16; the paper's 256 images are k = 16. Gradients are not clipped. AP is measured on 200 other
images. A cell is a file of `experiments/cells`; it runs with seeds 0, 1 and 2.

CGBN shares its statistics over all images of a step up to k = 4, and over 32 beyond, the BN size that the paper found
best: there a step takes 2 or 4 passes of 32 images. Frozen BN has the statistics of the pre-training; its FPN has no
norm.

A run fails if its loss stops being finite, or if it collapses to a final AP below {TRAINS}. Tables give mean ± standard
deviation of the final AP of runs that did not fail, and in parentheses the number of runs. Seeds of one cell may come
from different machines, each of which made a backbone of its own (last table).

{CLEARLY}

AP is COCO's average precision. CGBN is Cross-GPU Batch Normalization: the BN size is the number of images that share
their statistics. n is the mini-batch, tr(Sigma) the variance of the gradient of a single image, and the noise scale B
the mini-batch at which noise and true gradient are equally large. [method.md](method.md) explains these, AGVM, LARS and
EMA.
"""


def write_page(rows: list[Row], mini_batch_256: Path, page: Path, figures: Path) -> None:
    """Writes the page and its figures; ``rows`` are the results of the cells as they are now."""
    outcomes = Outcomes(rows)
    sections = [HEAD, _summary(outcomes), *(_section(f, outcomes, page, figures) for f in FINDINGS)]
    sections += [_options(outcomes), _mini_batch_256(mini_batch_256), _made_with(rows)]
    with atomic_write(page) as file:
        file.write("\n".join(sections).encode())


def markdown(table: Table) -> str:
    """A table whose first row is the head."""
    head, *body = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([head, "|" + " --- |" * len(table[0]), *body]) + "\n"


def _summary(outcomes: Outcomes) -> str:
    table = [["finding", "verdict"]]
    for number, finding in enumerate(FINDINGS, start=1):
        table.append([f"{number}. {finding.title}", finding.verdict(outcomes).word])
    return markdown(table)


def _section(finding: Finding, outcomes: Outcomes, page: Path, figures: Path) -> str:
    verdict = finding.verdict(outcomes)
    path = figures / f"{finding.key}.svg"
    drawn = write_figure(finding.key, outcomes, path)
    parts = [
        f"## {FINDINGS.index(finding) + 1}. {finding.title}",
        f"Claim: {finding.claim} (Source: {finding.source}.)",
        f"Rule: {finding.rule}",
        markdown(finding.table(outcomes)).rstrip(),
        f"![{finding.title}]({path.relative_to(page.parent)})" if drawn else "No figure yet.",
        f"**{verdict.word[0].upper()}{verdict.word[1:]}.** {verdict.reason}",
    ]
    return "\n\n".join(parts) + "\n"


def _options(outcomes: Outcomes) -> str:
    """The section about other schedules and optimizers: a table without a verdict."""
    return (
        "## Other schedules and optimizers\n\nWhat else the configuration offers, at k = 8 with CGBN and warm-up; "
        f"no claim is tested.\n\n{markdown(table_options(outcomes))}"
    )


def _mini_batch_256(path: Path) -> str:
    """The section about one real mini-batch, from its file of results."""
    head = "## A real mini-batch of 256 images\n\n"
    if not path.exists():
        return f"{head}Not run yet: `python -m experiments.mini_batch_256`.\n"
    result = json.loads(path.read_text(encoding="utf-8"))
    steps = [["step", "rate", "loss", "time, s", "memory of the largest rank, MB"]]
    for step in result["steps"]:
        lr, loss, seconds, memory = step["lr"], step["loss"], step["step_seconds"], step["memory_mb"]
        steps.append([str(step["step"]), f"{lr:.2g}", f"{loss:.3f}", f"{seconds:.1f}", f"{memory:.0f}"])
    first, last = result["steps"][0]["loss"], result["steps"][-1]["loss"]
    difference = result["gradient_difference"]
    agree = "agree" if difference <= AGREES else "do not agree"
    return (
        f"{head}`python -m experiments.mini_batch_256` on {result['processor']}, {result['date']}: {result['ranks']} "
        f"ranks x {result['images_per_rank']} images of 64 pixels in one pass, BN size {result['bn_size']}, with "
        "square-root scaling of the rate.\n\n"
        f"{markdown(steps)}\n"
        f"The loss {'falls' if last < first else 'does not fall'}: {first:.3f} to {last:.3f}. With frozen norms, in "
        "float32, the gradient of the first step and the one that a single process computes from the same images "
        f"differ by {difference:.1e} of its norm: they {agree} to {AGREES:g}.\n"
    )


def _made_with(rows: list[Row]) -> str:
    """Where the runs were made."""
    table = [["processor", "versions", "pre-trained backbone", "dates", "runs", "cells: seeds"]]
    for place in sorted({_place(row) for row in rows}):
        here = [row for row in rows if _place(row) == place]
        dates = sorted(row["date"] for row in here)
        days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        processor, versions, weights = place
        table.append([processor, versions, f"`{weights}`", days, str(len(here)), _cells(here)])
    return f"## Made with\n\n{markdown(table)}" if rows else f"## Made with\n\nNo run yet; each cell needs {RUNS}.\n"


def _cells(rows: list[Row]) -> str:
    seeds: dict[str, list[int]] = {}
    for row in sorted(rows, key=lambda row: (row["cell"], row["seed"])):
        seeds.setdefault(row["cell"], []).append(row["seed"])
    return "; ".join(f"{cell}: {', '.join(map(str, found))}" for cell, found in seeds.items())


def _place(row: Row) -> tuple[str, str, str]:
    return row["processor"], ", ".join(f"{k} {v}" for k, v in row["versions"].items()), str(row["weights"])
