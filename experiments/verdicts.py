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


def no_warmup(k: int) -> str:
    return f"k{k:02}_no_warmup"


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
    pairs = {k: (outcomes[cgbn(k)], outcomes[no_warmup(k)]) for k in WARMUP_KS}
    better = [k for k, (warm, cold) in pairs.items() if clearly_better(warm, cold)]
    worse = [k for k, (warm, cold) in pairs.items() if clearly_better(cold, warm)]
    lost = [k for k, (warm, cold) in pairs.items() if not warm.trained and not cold.trained]
    reason = f"With the warm-up runs do clearly better at {_ks(better)}, and clearly worse at {_ks(worse)}."
    reason += f" At {_ks(lost)} none trains with or without it, so that it cannot tell." if lost else ""
    if len(lost) == len(WARMUP_KS):
        return Verdict(UNDECIDED, reason)
    return Verdict(REPRODUCED if better and not worse else NOT_REPRODUCED, reason)


def table_warmup(outcomes: Outcomes) -> Table:
    rows = [[str(k), str(outcomes[cgbn(k)]), str(outcomes[no_warmup(k)])] for k in WARMUP_KS]
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
        return Verdict(UNDECIDED, "No run trained.")
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
        return Verdict(NOT_REPRODUCED, f"{reason}, the last one included: the gap does not close.")
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


SERIES = {
    "CGBN": {k: cgbn(k) for k in KS},
    "CGBN, no warm-up": {k: no_warmup(k) for k in WARMUP_KS},
    "BN frozen": {k: frozen(k) for k in KS},
}
"""Cells at the linear rate, by k."""


def judge_variance(outcomes: Outcomes) -> Verdict:
    found: dict[int, float] = {}
    for name in ("CGBN, no warm-up", "CGBN"):
        found |= {k: noise.variance for k, cell in SERIES[name].items() if (noise := outcomes[cell].noise)}
    missing = [k for k in KS if k not in found]
    if not found:
        return Verdict(UNDECIDED, "Nothing was measured.")
    ratio = max(found.values()) / min(found.values())
    reason = f"The largest tr(Sigma) is {ratio:.2g} times the smallest, and with it the product."
    if missing:
        reason += f" At {_ks(missing)} no run trained, or nothing was measured."
    word = NOT_REPRODUCED if ratio > FACTOR else UNDECIDED if missing else REPRODUCED
    return Verdict(word, reason)


def table_variance(outcomes: Outcomes) -> Table:
    table = [["norm", "k", "n", "tr(Sigma)", "squared gradient", "rate", "rate² tr(Sigma) / n²", "runs that trained"]]
    for label, cells in SERIES.items():
        for k, cell in cells.items():
            if noise := outcomes[cell].noise:
                numbers = [noise.variance, noise.signal, noise.lr, noise.per_image]
                runs = str(len(outcomes[cell].trained))
                table.append([label, str(k), str(noise.images), *(f"{value:.3g}" for value in numbers), runs])
    return table


# 6. Where the linear rule breaks

BELOW, ABOVE = 2, 16
"""The mini-batches, as k, at which half the linear rate was tried: one below the noise scale and one above it."""


def half_rate(k: int) -> str:
    return f"k{k:02}_half_rate"


def noise_scale(outcomes: Outcomes) -> float | None:
    """B in images at the full rate, the median over the mini-batches; infinite where |g|^2 is lost in the noise."""
    measured = [noise for k in KS if (noise := outcomes[cgbn(k)].noise)]
    return statistics.median(noise.scale or math.inf for noise in measured) if measured else None


def judge_break(outcomes: Outcomes) -> Verdict:
    scale = noise_scale(outcomes)
    if scale is None or not math.isfinite(scale):
        return Verdict(UNDECIDED, "The noise scale was not measured, or the noise hides the gradient.")
    reason = (
        f"The noise scale is {scale:.3g} images, so that the best rate is {_best_rate(BELOW, scale):.2g} times the "
    )
    reason += f"linear one at {8 * BELOW} images, and {_best_rate(ABOVE, scale):.2g} times at {8 * ABOVE}."
    if not 8 * BELOW < scale < 8 * ABOVE:
        return Verdict(UNDECIDED, f"{reason} It does not lie between the two.")
    helps = [k for k in (BELOW, ABOVE) if clearly_better(outcomes[half_rate(k)], outcomes[cgbn(k)])]
    reason += f" Half the linear rate is clearly better at {_ks(helps)}."
    return Verdict(REPRODUCED if helps == [ABOVE] else NOT_REPRODUCED, reason)


def _best_rate(k: int, scale: float) -> float:
    """By the noise scale, relative to the linear rate."""
    return (8 + scale) / (8 * k + scale)


def table_break(outcomes: Outcomes) -> Table:
    table = [["k", "n", "noise scale B", "n / B", "best rate / linear rate", "AP at the linear rate", "at half of it"]]
    for k in KS:
        noise = outcomes[cgbn(k)].noise
        scale = noise.scale if noise else None
        numbers = [scale, 8 * k / scale, _best_rate(k, scale)] if scale else [None] * 3
        half = str(outcomes[half_rate(k)]) if k in (BELOW, ABOVE) else "–"
        table.append([str(k), str(8 * k), *(f"{x:.3g}" if x else "–" for x in numbers), str(outcomes[cgbn(k)]), half])
    return table


# 7. Past the linear rule

BEYOND = {
    "linear rate, 0.16": "k16_cgbn",
    "AGVM, 0.16": "k16_agvm",
    "LARS, 1.6": "k16_lars",
    "half the linear rate, 0.08": half_rate(16),
    "square-root scaling, 0.04": "k16_square_root",
}
"""Cells with 128 images per step, and the rates after their warm-up."""


def judge_beyond(outcomes: Outcomes) -> Verdict:
    linear, agvm = outcomes[cgbn(KS[-1])], outcomes["k16_agvm"]
    as_many = {name: cell for name, cell in BEYOND.items() if len(outcomes[cell].rows) >= len(linear.rows)}
    better = [name for name, cell in as_many.items() if clearly_better(outcomes[cell], linear)]
    reason = f"Clearly better than the linear rate, of what has as many runs: {'; '.join(better) or 'nothing'}."
    if agvm.factors:
        of_modules = ", ".join(f"{module} {value:.2f}" for module, value in agvm.factors.items())
        reason += f" AGVM's factors of the rate when its runs ended, whether they trained or not: {of_modules}."
    if not agvm.trained and not linear.trained:
        return Verdict(UNDECIDED, f"{reason} Neither AGVM nor the linear rate trains, so that it cannot tell.")
    return Verdict(REPRODUCED if clearly_better(agvm, linear) else NOT_REPRODUCED, reason)


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
