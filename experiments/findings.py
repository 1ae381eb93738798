"""The findings: what is claimed and by whom, the cells that test it, the rule of the verdict, and the table."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from experiments.outcomes import LEAST_DIFFERENCE, TRAINS, Outcomes, clearly_above, mean_and_spread
from horovod_megdet.wording import count

SUMMARY = "a summary of the paper"
NOTES = "third-party notes on the paper's tables"
ABSTRACT = "the paper's abstract"

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced at this scale", "undecided"

KS = (1, 2, 4, 8, 16)
"""Mini-batches as multiples of 8 images."""

RUNS = 3
"""Of each cell, below which nothing is decided."""

CLEARLY = f"'Clearly' means by 2 standard errors of the difference and by {LEAST_DIFFERENCE} AP."

Table = list[list[str]]


@dataclass(frozen=True)
class Verdict:
    """What the numbers say about a claim."""

    word: str
    reason: str


@dataclass(frozen=True)
class Finding:
    """A claim and how it is tested."""

    key: str
    """Name of its figure."""
    title: str
    claim: str
    source: str
    rule: str
    """How the verdict follows from the numbers, in words; ``judge`` does it."""
    cells: list[str]
    judge: Callable[[Outcomes], Verdict]
    """Called when every cell has enough runs."""
    table: Callable[[Outcomes], Table]
    runs: int = RUNS

    def verdict(self, outcomes: Outcomes) -> Verdict:
        """The verdict: undecided while runs are missing."""
        short = {cell: len(outcomes[cell].rows) for cell in self.cells if len(outcomes[cell].rows) < self.runs}
        if not short:
            return self.judge(outcomes)
        there = ", ".join(f"{cell} {runs}" for cell, runs in short.items())
        return Verdict(UNDECIDED, f"Each cell needs {count(self.runs, 'run')}, and there are: {there}.")


def frozen(k: int) -> str:
    return f"k{k:02}_frozen"


def cgbn(k: int) -> str:
    return f"k{k:02}_cgbn"


def _ks(ks: list[int]) -> str:
    return f"k = {', '.join(map(str, ks))}" if ks else "no k"


# 1. Mini-batch with and without BN


def judge_batch_norm(outcomes: Outcomes) -> Verdict:
    cgbn_fails = [k for k in KS if outcomes[cgbn(k)].failed]
    frozen_fails = [k for k in KS if len(outcomes[frozen(k)].failed) == len(outcomes[frozen(k)].rows)]
    some = [k for k in KS if outcomes[frozen(k)].failed and k not in frozen_fails]
    reason = f"With CGBN, runs fail at {_ks(cgbn_fails)}. With frozen BN, all fail at {_ks(frozen_fails)}"
    reason += f" and some at {_ks(some)}." if some else "."
    return Verdict(REPRODUCED if KS[-1] in frozen_fails and not cgbn_fails else NOT_REPRODUCED, reason)


def table_batch_norm(outcomes: Outcomes) -> Table:
    rows = [[str(k), str(8 * k), f"{0.01 * k:g}", str(outcomes[frozen(k)]), str(outcomes[cgbn(k)])] for k in KS]
    half = ["8, half the rate", "64", "0.04", str(outcomes["k08_frozen_half_rate"]), "–"]
    return [["k", "images", "rate", "BN frozen", "CGBN"], *rows, half]


# 2. Warm-up

WARMUP_KS = (8, 16)


def judge_warmup(outcomes: Outcomes) -> Verdict:
    needed = []
    for k in WARMUP_KS:
        cold, warm = outcomes[f"k{k:02}_no_warmup"], outcomes[cgbn(k)]
        if len(cold.failed) > len(warm.failed) or clearly_above(warm.ap, cold.ap):
            needed.append(k)
    reason = f"Without warm-up more runs fail, or AP is clearly lower, at {_ks(needed)} of {_ks(list(WARMUP_KS))}."
    return Verdict(REPRODUCED if needed else NOT_REPRODUCED, reason)


def table_warmup(outcomes: Outcomes) -> Table:
    rows = [[str(k), str(outcomes[cgbn(k)]), str(outcomes[f"k{k:02}_no_warmup"])] for k in WARMUP_KS]
    return [["k", "warm-up of 1 epoch", "none"], *rows]


# 3. BN size

BN_SIZES = {2: "k08_bn02", 4: "k08_bn04", 8: "k08_bn08", 16: "k08_bn16", 32: "k08_cgbn", 64: "k08_bn64"}
"""Cells by BN size, all with 64 images per step."""


def judge_bn_size(outcomes: Outcomes) -> Verdict:
    ap = {size: outcomes[cell].ap for size, cell in BN_SIZES.items()}
    trained = {size: statistics.fmean(values) for size, values in ap.items() if values}
    if not trained:
        return Verdict(NOT_REPRODUCED, "No run came to its end.")
    best, largest = max(trained, key=lambda size: trained[size]), max(ap)
    worse = [size for size in ap if clearly_above(ap[best], ap[size]) or not ap[size]]
    level = [size for size in ap if size != largest and ap[size] and not clearly_above(ap[largest], ap[size])]
    reason = f"The best mean is that of BN size {best}; clearly below it: {', '.join(map(str, worse)) or 'none'}. "
    reason += f"Not clearly below the largest, {largest}: {', '.join(map(str, level)) or 'none'}."
    return Verdict(REPRODUCED if worse and level else NOT_REPRODUCED, reason)


def table_bn_size(outcomes: Outcomes) -> Table:
    return [["BN size, images", "final AP"], *([str(size), str(outcomes[cell])] for size, cell in BN_SIZES.items())]


# 4. The first epochs


def judge_first_epochs(outcomes: Outcomes) -> Verdict:
    small, large = outcomes[cgbn(1)], outcomes[cgbn(2)]
    epochs = [epoch for epoch in small.epochs if clearly_above(small.ap_at(epoch), large.ap_at(epoch))]
    ahead = f"k = 1 is clearly ahead of k = 2 after epochs {', '.join(map(str, epochs)) or '(none)'}"
    last = small.epochs[-1]
    if last in epochs:
        return Verdict(NOT_REPRODUCED, f"{ahead}, the last one included: it does not even out.")
    return Verdict(REPRODUCED if epochs and epochs[0] <= 2 else NOT_REPRODUCED, f"{ahead}, and not at the end.")


def table_first_epochs(outcomes: Outcomes) -> Table:
    epochs = sorted({epoch for k in KS for epoch in outcomes[cgbn(k)].epochs})
    rows = []
    for k in KS:
        values = [mean_and_spread(outcomes[cgbn(k)].ap_at(epoch)) for epoch in epochs]
        rows.append([str(k), *values, str(len(outcomes[cgbn(k)].rows) or "not run yet")])
    return [["k", *(f"epoch {epoch}" for epoch in epochs), "runs"], *rows]


# 5. The linear rule's assumption

FACTOR = 2.0
"""Within which tr(Sigma) may differ between mini-batches."""


def judge_variance(outcomes: Outcomes) -> Verdict:
    found = {k: noise.variance for k in KS if (noise := outcomes[cgbn(k)].noise)}
    if len(found) < len(KS):
        return Verdict(UNDECIDED, f"The noise was measured for {_ks(list(found))} only.")
    ratio = max(found.values()) / min(found.values())
    word = REPRODUCED if ratio <= FACTOR else NOT_REPRODUCED
    return Verdict(word, f"The largest tr(Sigma) is {ratio:.2g} times the smallest, and with it the product.")


def table_variance(outcomes: Outcomes) -> Table:
    table = [["norm", "k", "n", "tr(Sigma)", "|g|²", "rate", "rate² tr(Sigma) / n²", "runs"]]
    for label, cell in (("CGBN", cgbn), ("BN frozen", frozen)):
        for k in KS:
            if noise := outcomes[cell(k)].noise:
                numbers = [noise.variance, noise.signal, noise.lr, noise.per_image]
                runs = str(len(outcomes[cell(k)].rows))
                table.append([label, str(k), str(noise.images), *(f"{value:.3g}" for value in numbers), runs])
    return table


# 6. Where the linear rule breaks

NEAR = 4.0
"""Factor within which the mini-batch that falls behind counts as near the noise scale."""


def first_behind(outcomes: Outcomes) -> int | None:
    """The smallest k with CGBN that fails or ends clearly below k = 1."""
    ap = outcomes[cgbn(1)].ap
    return next((k for k in KS[1:] if outcomes[cgbn(k)].failed or clearly_above(ap, outcomes[cgbn(k)].ap)), None)


def noise_scale(outcomes: Outcomes) -> float | None:
    """B in images at the full rate: the median over the mini-batches."""
    scales = [noise.scale for k in KS if (noise := outcomes[cgbn(k)].noise)]
    known = [scale for scale in scales if scale is not None]
    return statistics.median(known) if known else None


def judge_break(outcomes: Outcomes) -> Verdict:
    scale, k = noise_scale(outcomes), first_behind(outcomes)
    if scale is None:
        return Verdict(UNDECIDED, "The noise scale was not measured, or |g|² could not be told from the noise.")
    if k is None:
        word = REPRODUCED if scale >= 8 * KS[-1] / NEAR else NOT_REPRODUCED
        return Verdict(word, f"No mini-batch up to {8 * KS[-1]} falls behind; the noise scale is {scale:.3g} images.")
    ratio = 8 * k / scale
    reason = (
        f"The first mini-batch that falls behind is {8 * k}, {ratio:.2g} times the noise scale, {scale:.3g} images."
    )
    return Verdict(REPRODUCED if 1 / NEAR <= ratio <= NEAR else NOT_REPRODUCED, reason)


def table_break(outcomes: Outcomes) -> Table:
    table = [["k", "n", "noise scale B", "n / B", "best rate / linear rate", "final AP, CGBN"]]
    for k in KS:
        noise = outcomes[cgbn(k)].noise
        scale = noise.scale if noise else None
        numbers = [scale, 8 * k / scale, (8 + scale) / (8 * k + scale)] if scale else [None] * 3
        table.append([str(k), str(8 * k), *(f"{x:.3g}" if x else "–" for x in numbers), str(outcomes[cgbn(k)])])
    return table


# 7. Past the linear rule

BEYOND = {
    "linear rate": "k16_cgbn",
    "AGVM": "k16_agvm",
    "LARS": "k16_lars",
    "half the linear rate": "k16_half_rate",
    "square-root scaling": "k16_square_root",
}
"""Cells with 128 images per step."""


def judge_beyond(outcomes: Outcomes) -> Verdict:
    linear = outcomes[BEYOND["linear rate"]]
    better = [
        name
        for name, cell in BEYOND.items()
        if clearly_above(outcomes[cell].ap, linear.ap) or len(outcomes[cell].failed) < len(linear.failed)
    ]
    reason = f"Clearly better than the linear rate: {', '.join(better) or 'nothing'}."
    return Verdict(REPRODUCED if "AGVM" in better else NOT_REPRODUCED, reason)


def table_beyond(outcomes: Outcomes) -> Table:
    return [["at 128 images", "final AP"], *([name, str(outcomes[cell])] for name, cell in BEYOND.items())]


# 8. Accuracy


def judge_accuracy(outcomes: Outcomes) -> Verdict:
    ap = {k: outcomes[cgbn(k)].ap for k in KS}
    behind = [k for k in KS[1:] if not ap[k] or clearly_above(ap[1], ap[k])]
    steps = ", ".join(f"{outcomes[cgbn(k)].rows[0]['evaluations'][-1]['step']} at k = {k}" for k in KS if ap[k])
    reason = f"Clearly below k = 1: {_ks(behind)}. All see the same number of images, and take so many steps: {steps}."
    return Verdict(NOT_REPRODUCED if behind else REPRODUCED, reason)


def table_accuracy(outcomes: Outcomes) -> Table:
    table = [["k", "final AP", "AP50", "images/s"]]
    for k in KS:
        outcome = outcomes[cgbn(k)]
        ap50 = [row["evaluations"][-1]["AP50"] for row in outcome.rows if row["outcome"] == "finished"]
        speed = [row["images_per_second"] for row in outcome.rows if row["images_per_second"]]
        rate = f"{statistics.median(speed):.3g}" if speed else "–"
        table.append([str(k), str(outcome), mean_and_spread(ap50), rate])
    return table


ALL_CGBN = [cgbn(k) for k in KS]

FINDINGS = [
    Finding(
        "batch-norm",
        "Large mini-batches need BN",
        "Without BN, large mini-batches (64 and 128, against 16) do not converge; with Cross-GPU BN every size does. "
        "Without BN, 32 failed in some runs, 64 needed half the rate, 128 never converged.",
        f"{SUMMARY}; the second sentence from {NOTES}",
        f"Reproduced if with frozen BN all runs at k = 16 fail, and with CGBN none at any k. A run fails if its loss "
        f"stops being finite or its final AP is below {TRAINS}.",
        [name(k) for k in KS for name in (frozen, cgbn)],
        judge_batch_norm,
        table_batch_norm,
    ),
    Finding(
        "warm-up",
        "The linear rate needs the warm-up",
        "At the start of training the weights change fast; a low rate that rises to that of the linear rule prevents "
        "divergence.",
        SUMMARY,
        f"Reproduced if at k = 8 or k = 16 more runs without warm-up fail, or their AP is clearly lower. {CLEARLY}",
        [name for k in WARMUP_KS for name in (cgbn(k), f"k{k:02}_no_warmup")],
        judge_warmup,
        table_warmup,
    ),
    Finding(
        "bn-size",
        "The BN size matters, and more is not always better",
        "A larger BN size is not always better; 32 images were best.",
        SUMMARY,
        f"At 64 images per step. Reproduced if some BN size is clearly below the best, and some smaller BN size is not "
        f"clearly below the largest. {CLEARLY}",
        list(BN_SIZES.values()),
        judge_bn_size,
        table_bn_size,
    ),
    Finding(
        "first-epochs",
        "The small mini-batch is ahead in the first epochs",
        "In the first epochs the small mini-batch (16) is ahead of the large one (32); later it evens out.",
        SUMMARY,
        f"With CGBN. Reproduced if k = 1 is clearly ahead of k = 2 after epoch 1 or 2, and not at the end. {CLEARLY}",
        [cgbn(1), cgbn(2)],
        judge_first_epochs,
        table_first_epochs,
    ),
    Finding(
        "variance",
        "The linear rule's assumption: variance per image",
        "Gradients of single images are independent and of equal variance, so that the linear rate keeps the variance "
        "of the update per image, rate² tr(Sigma) / n², whatever the mini-batch n.",
        SUMMARY,
        f"With CGBN, averaged over the epochs at the full rate. Reproduced if the largest tr(Sigma) over all k is at "
        f"most {FACTOR:g} times the smallest; the product goes with it, because the rate over n is fixed.",
        ALL_CGBN,
        judge_variance,
        table_variance,
        runs=1,
    ),
    Finding(
        "linear-rule",
        "The linear rule breaks at the noise scale",
        "While the mini-batch n is far below the noise scale B the best rate grows linearly; at n = B it is half of "
        "that. (8 + B) / (n + B) is the best rate over the linear one, starting from 8 images.",
        "McCandlish et al. 2018, An Empirical Model of Large-Batch Training; not a finding of MegDet",
        f"Reproduced if the first n that fails or ends clearly below k = 1 lies within a factor of {NEAR:g} of B (the "
        f"median over k, at the full rate). {CLEARLY}",
        ALL_CGBN,
        judge_break,
        table_break,
    ),
    Finding(
        "beyond",
        "Past the linear rule",
        "AGVM, which gives each module of the detector a rate after its gradient variance, is better than the linear "
        "rule at large mini-batches (box AP 36.8 against 36.2 at 512 images).",
        "Xue et al., NeurIPS 2022; not a finding of MegDet",
        f"Reproduced if AGVM is clearly above the linear rate at k = 16, or fails in fewer runs. {CLEARLY}",
        list(BEYOND.values()),
        judge_beyond,
        table_beyond,
    ),
    Finding(
        "accuracy",
        "Accuracy grows a little with the mini-batch",
        "With Cross-GPU BN a larger mini-batch brings a small gain in accuracy; 256 images train COCO in 4 hours "
        "instead of 33, slightly better than 16.",
        f"{SUMMARY}, and {ABSTRACT}",
        f"With CGBN. Reproduced if no k ends clearly below k = 1. {CLEARLY}",
        ALL_CGBN,
        judge_accuracy,
        table_accuracy,
    ),
]
