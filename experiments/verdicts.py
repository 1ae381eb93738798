"""What the runs say about each finding: the verdict, and the table that it follows from. findings.py has the rules."""

import math
import statistics
from dataclasses import dataclass

from experiments.outcomes import Outcomes, clearly_above, clearly_better, mean_and_spread

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced at this scale", "undecided"

KS = (1, 2, 4, 8, 16)
"""Mini-batches as multiples of 8 images."""

Table = list[list[str]]


@dataclass(frozen=True)
class Verdict:
    """What the numbers say about a claim."""

    word: str
    reason: str


def frozen(k: int) -> str:
    return f"k{k:02}_frozen"


def cgbn(k: int) -> str:
    return f"k{k:02}_cgbn"


def _ks(ks: list[int]) -> str:
    return f"k = {', '.join(map(str, ks))}" if ks else "no k"


# 1. Mini-batch with and without BN


def judge_batch_norm(outcomes: Outcomes) -> Verdict:
    cgbn_fails = [k for k in KS if outcomes[cgbn(k)].failed]
    frozen_fails = [k for k in KS if not outcomes[frozen(k)].trained]
    some = [k for k in KS if outcomes[frozen(k)].failed and outcomes[frozen(k)].trained]
    reason = f"With CGBN, runs fail at {_ks(cgbn_fails)}. With frozen BN, all fail at {_ks(frozen_fails)}"
    reason += f", and some at {_ks(some)}." if some else "."
    largest = [max((k for k in KS if not outcomes[name(k)].failed), default=0) for name in (cgbn, frozen)]
    reason += f" The largest mini-batch that trains with every seed is {8 * largest[0]} with CGBN and {8 * largest[1]}"
    reason += f" without. At half the rate, 64 images without BN: {outcomes['k08_frozen_half_rate']}."
    return Verdict(REPRODUCED if KS[-1] in frozen_fails and not cgbn_fails else NOT_REPRODUCED, reason)


def table_batch_norm(outcomes: Outcomes) -> Table:
    rows = [[str(k), str(8 * k), f"{0.01 * k:g}", str(outcomes[frozen(k)]), str(outcomes[cgbn(k)])] for k in KS]
    half = ["8, half the rate", "64", "0.04", str(outcomes["k08_frozen_half_rate"]), "–"]
    return [["k", "images", "rate", "BN frozen", "CGBN"], *rows, half]


# 2. Warm-up

WARMUP_KS = (8, 16)


def judge_warmup(outcomes: Outcomes) -> Verdict:
    pairs = {k: (outcomes[cgbn(k)], outcomes[f"k{k:02}_no_warmup"]) for k in WARMUP_KS}
    needed = [k for k, (warm, cold) in pairs.items() if clearly_better(warm, cold)]
    lost = [k for k, (warm, _) in pairs.items() if not warm.trained]
    reason = f"With the warm-up runs do clearly better at {_ks(needed)}."
    reason += f" At {_ks(lost)} none trains with the warm-up either, so that it cannot tell." if lost else ""
    if len(lost) == len(WARMUP_KS):
        return Verdict(UNDECIDED, reason)
    return Verdict(REPRODUCED if needed else NOT_REPRODUCED, reason)


def table_warmup(outcomes: Outcomes) -> Table:
    rows = [[str(k), str(outcomes[cgbn(k)]), str(outcomes[f"k{k:02}_no_warmup"])] for k in WARMUP_KS]
    return [["k", "warm-up of 1 epoch", "none"], *rows]


# 3. BN size

BN_SIZES = {2: "k08_bn02", 4: "k08_bn04", 8: "k08_bn08", 16: "k08_bn16", 32: "k08_cgbn", 64: "k08_bn64"}
"""Cells by BN size, all with 64 images per step."""

PAPERS_BN_SIZE = 32
"""The one that the paper found best."""


def judge_bn_size(outcomes: Outcomes) -> Verdict:
    by_size = {size: outcomes[cell] for size, cell in BN_SIZES.items()}
    means = {size: statistics.fmean(outcome.ap) for size, outcome in by_size.items() if outcome.ap}
    if not means:
        return Verdict(NOT_REPRODUCED, "No run trained.")
    worse = [size for size, outcome in by_size.items() if clearly_better(by_size[PAPERS_BN_SIZE], outcome)]
    better = [size for size, outcome in by_size.items() if clearly_better(outcome, by_size[PAPERS_BN_SIZE])]
    reason = f"Clearly worse than BN size {PAPERS_BN_SIZE}: {', '.join(map(str, worse)) or 'none'}; clearly better: "
    reason += f"{', '.join(map(str, better)) or 'none'}. The best mean is that of {max(means, key=lambda s: means[s])}."
    matters, grows = min(by_size) in worse, max(by_size) in better
    return Verdict(REPRODUCED if matters and not grows else NOT_REPRODUCED, reason)


def table_bn_size(outcomes: Outcomes) -> Table:
    return [["BN size, images", "final AP"], *([str(size), str(outcomes[cell])] for size, cell in BN_SIZES.items())]


# 4. The first epochs


def judge_first_epochs(outcomes: Outcomes) -> Verdict:
    small, large = outcomes[cgbn(1)], outcomes[cgbn(2)]
    if small.failed or large.failed:
        return Verdict(UNDECIDED, "Some runs fail.")
    ahead = [epoch for epoch in small.epochs if clearly_above(small.ap_at(epoch), large.ap_at(epoch))]
    reason = f"k = 1 is clearly ahead of k = 2 after epochs {', '.join(map(str, ahead))}" if ahead else ""
    if not ahead:
        return Verdict(NOT_REPRODUCED, "k = 1 is never clearly ahead of k = 2.")
    if small.epochs[-1] in ahead:
        return Verdict(NOT_REPRODUCED, f"{reason}, the last one included: it does not even out.")
    return Verdict(REPRODUCED if ahead[0] <= 2 else NOT_REPRODUCED, f"{reason}, and not at the end.")


def table_first_epochs(outcomes: Outcomes) -> Table:
    epochs = sorted({epoch for k in KS for epoch in outcomes[cgbn(k)].epochs})
    rows = []
    for k in KS:
        outcome = outcomes[cgbn(k)]
        values = [_so_far(outcome.ap_at(epoch), len(outcome.rows)) for epoch in epochs]
        rows.append([str(k), *values, str(len(outcome.rows) or "not run yet")])
    return [["k", *(f"epoch {epoch}" for epoch in epochs), "runs"], *rows]


def _so_far(values: list[float], runs: int) -> str:
    """Mean and spread, with the number of values where some runs have ended before."""
    return mean_and_spread(values) + (f" ({len(values)})" if 0 < len(values) < runs else "")


# 5. The linear rule's assumption

FACTOR = 2.0
"""Within which tr(Sigma) may differ between mini-batches."""


def judge_variance(outcomes: Outcomes) -> Verdict:
    found = {k: noise.variance for k in KS if (noise := outcomes[cgbn(k)].noise)}
    missing = [k for k in KS if k not in found]
    without = f" At {_ks(missing)} no run trained, or nothing was measured." if missing else ""
    if len(found) < 3:
        return Verdict(UNDECIDED, f"There is something to compare at {_ks(list(found))} only.{without}")
    ratio = max(found.values()) / min(found.values())
    word = REPRODUCED if ratio <= FACTOR else NOT_REPRODUCED
    return Verdict(word, f"The largest tr(Sigma) is {ratio:.2g} times the smallest, and with it the product.{without}")


def table_variance(outcomes: Outcomes) -> Table:
    table = [["norm", "k", "n", "tr(Sigma)", "squared gradient", "rate", "rate² tr(Sigma) / n²", "runs"]]
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

LOWER_RATES = ("half the linear rate, 0.08", "square-root scaling, 0.04")
"""The rows of :data:`BEYOND` that tell whether it is the rate that is too high."""


def first_behind(outcomes: Outcomes) -> int | None:
    """The smallest k with CGBN that is clearly worse than k = 1."""
    return next((k for k in KS[1:] if clearly_better(outcomes[cgbn(1)], outcomes[cgbn(k)])), None)


def noise_scale(outcomes: Outcomes) -> float | None:
    """B in images at the full rate, the median over the mini-batches; infinite where |g|^2 is lost in the noise."""
    measured = [noise for k in KS if (noise := outcomes[cgbn(k)].noise)]
    return statistics.median(noise.scale or math.inf for noise in measured) if measured else None


def judge_break(outcomes: Outcomes) -> Verdict:
    scale, k = noise_scale(outcomes), first_behind(outcomes)
    if scale is None or not math.isfinite(scale):
        return Verdict(UNDECIDED, "The noise scale was not measured, or the noise hides the gradient.")
    linear = outcomes[cgbn(KS[-1])]
    lower = [name for name in LOWER_RATES if clearly_better(outcomes[BEYOND[name]], linear)]
    reason = f"The noise scale is {scale:.3g} images. At {8 * KS[-1]} images, clearly better than the linear rate: "
    reason += f"{', '.join(lower) or 'no lower rate'}."
    if k is None:
        word = REPRODUCED if scale >= 8 * KS[-1] / NEAR else NOT_REPRODUCED
        return Verdict(word, f"No mini-batch up to {8 * KS[-1]} is clearly worse. {reason}")
    ratio = 8 * k / scale
    reason = f"The first mini-batch that is clearly worse is {8 * k}, {ratio:.2g} times the noise scale. {reason}"
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
    "linear rate, 0.16": "k16_cgbn",
    "AGVM, 0.16": "k16_agvm",
    "LARS, 1.6": "k16_lars",
    LOWER_RATES[0]: "k16_half_rate",
    LOWER_RATES[1]: "k16_square_root",
}
"""Cells with 128 images per step, and the rates after their warm-up."""


def judge_beyond(outcomes: Outcomes) -> Verdict:
    linear = outcomes[cgbn(KS[-1])]
    better = [name for name, cell in BEYOND.items() if clearly_better(outcomes[cell], linear)]
    reason = f"Clearly better than the linear rate: {'; '.join(better) or 'nothing'}."
    factors = outcomes["k16_agvm"].factors
    if factors:
        of_modules = ", ".join(f"{module} {value:.2f}" for module, value in factors.items())
        reason += f" AGVM's last factors of the rate: {of_modules}."
    word = REPRODUCED if clearly_better(outcomes["k16_agvm"], linear) else NOT_REPRODUCED
    return Verdict(word, reason)


def table_beyond(outcomes: Outcomes) -> Table:
    return [["at 128 images", "final AP"], *([name, str(outcomes[cell])] for name, cell in BEYOND.items())]


# 8. Accuracy


def judge_accuracy(outcomes: Outcomes) -> Verdict:
    first, larger = outcomes[cgbn(1)], {k: outcomes[cgbn(k)] for k in KS[1:]}
    worse = [k for k, outcome in larger.items() if clearly_better(first, outcome)]
    better = [k for k, outcome in larger.items() if clearly_better(outcome, first)]
    trained = {k: outcomes[cgbn(k)].trained for k in KS}
    steps = [f"{rows[0]['evaluations'][-1]['step']} at k = {k}" for k, rows in trained.items() if rows]
    reason = f"Clearly better than k = 1: {_ks(better)}; clearly worse: {_ks(worse)}. All see the same number of "
    reason += f"images, so that their numbers of steps differ: {', '.join(steps) or 'none trained'}."
    return Verdict(REPRODUCED if better and not worse else NOT_REPRODUCED, reason)


def table_accuracy(outcomes: Outcomes) -> Table:
    table = [["k", "final AP", "AP50"]]
    for k in KS:
        outcome = outcomes[cgbn(k)]
        ap50 = [row["evaluations"][-1]["AP50"] for row in outcome.trained]
        table.append([str(k), str(outcome), mean_and_spread(ap50)])
    return table


# What else there is to choose, without a claim

OPTIONS = {
    "SGD, two steps of the rate": "k08_cgbn",
    "cosine schedule": "k08_cosine",
    "EMA over half an epoch": "k08_ema",
    "AdamW, rate 0.0008": "k08_adamw",
}
"""Cells with 64 images per step."""


def table_options(outcomes: Outcomes) -> Table:
    return [["at 64 images", "final AP"], *([name, str(outcomes[cell])] for name, cell in OPTIONS.items())]
