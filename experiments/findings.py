"""The findings: what is claimed and by whom, the cells that test it, and the rule of the verdict."""

from collections.abc import Callable
from dataclasses import dataclass

from experiments import verdicts
from experiments.outcomes import LEAST_DIFFERENCE, LEAST_FAILURES, NOISE_EPOCHS, Outcomes
from experiments.verdicts import Table, Verdict, cgbn, frozen, half_rate, no_warmup
from horovod_megdet.wording import count

SUMMARY = "a summary of the paper"
NOTES = "third-party notes on the paper's tables"
ABSTRACT = "the paper's abstract"

RUNS = 3
"""Of each cell, below which nothing is decided."""

CLEARLY = (
    f"'Clearly better' means that at least {LEAST_FAILURES} runs fewer fail, or that no more fail and the mean AP of "
    f"the others is higher by 2 standard errors of the difference and by {LEAST_DIFFERENCE}. If two cells of three "
    "runs are equally good, chance still makes a given one clearly better about once in 17 times."
)


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
    """Of which each needs :data:`RUNS` runs."""
    judge: Callable[[Outcomes], Verdict]
    """Called when every cell has enough runs."""
    table: Callable[[Outcomes], Table]

    def verdict(self, outcomes: Outcomes) -> Verdict:
        """The verdict: undecided while runs are missing."""
        short = {cell: len(outcomes[cell].rows) for cell in self.cells if len(outcomes[cell].rows) < RUNS}
        if not short:
            return self.judge(outcomes)
        there = ", ".join(f"{cell} {runs}" for cell, runs in short.items())
        return Verdict(verdicts.UNDECIDED, f"Each cell needs {count(RUNS, 'run')}; so far there are: {there}.")


ALL_CGBN = [cgbn(k) for k in verdicts.KS]
EPOCHS = f"epochs {' and '.join(map(str, NOISE_EPOCHS))}"

FINDINGS = [
    Finding(
        "batch-norm",
        "Large mini-batches need BN",
        "Without BN, large mini-batches (64 and 128, against 16) do not converge; with Cross-GPU BN every size does. "
        "Without BN, 32 failed in some runs, 64 needed half the rate, 128 never converged.",
        f"{SUMMARY}; the second sentence from {NOTES}",
        "Reproduced if with frozen BN all runs at k = 16 fail, and with CGBN none at any k.",
        [name(k) for k in verdicts.KS for name in (frozen, cgbn)],
        verdicts.judge_batch_norm,
        verdicts.table_batch_norm,
    ),
    Finding(
        "warm-up",
        "The linear rate needs the warm-up",
        "At the start of training the weights change fast; a low rate that rises to that of the linear rule prevents "
        "divergence.",
        SUMMARY,
        "Reproduced if at k = 8 or k = 16 runs are clearly better with the warm-up than without, and at neither "
        "clearly worse.",
        [name for k in verdicts.WARMUP_KS for name in (cgbn(k), no_warmup(k))],
        verdicts.judge_warmup,
        verdicts.table_warmup,
    ),
    Finding(
        "bn-size",
        "The BN size matters, and more is not always better",
        "A larger BN size is not always better; 32 images were best.",
        SUMMARY,
        f"At 64 images per step. Reproduced if BN size {verdicts.PAPERS_BN_SIZE} is clearly better than the smallest, "
        f"and the largest is not clearly better than {verdicts.PAPERS_BN_SIZE}.",
        list(verdicts.BN_SIZES.values()),
        verdicts.judge_bn_size,
        verdicts.table_bn_size,
    ),
    Finding(
        "first-epochs",
        "The small mini-batch is ahead in the first epochs",
        "In the first epochs the small mini-batch (16) is ahead of the large one (32); later it evens out.",
        SUMMARY,
        "With CGBN. Reproduced if the mean AP of k = 1 is ahead of that of k = 2 by 2 standard errors of the "
        f"difference and by {LEAST_DIFFERENCE} after epoch 1 or 2, and not at the end.",
        [cgbn(1), cgbn(2)],
        verdicts.judge_first_epochs,
        verdicts.table_first_epochs,
    ),
    Finding(
        "variance",
        "The linear rule's assumption: variance per image",
        "Gradients of single images are independent and of equal variance, so that the linear rate keeps the variance "
        "of the update per image, rate² tr(Sigma) / n², whatever the mini-batch n.",
        SUMMARY,
        f"In {EPOCHS}, most of all at their ends, of runs that train. Reproduced if with CGBN the largest tr(Sigma) is "
        f"at most {verdicts.FACTOR:g} times the smallest; the product goes with it, because the rate over n is fixed. "
        "Where no run trains with the warm-up, those without it count. The weights are not the same: after as many "
        "images a larger mini-batch has come less far. The estimate takes images as independent; with CGBN they are "
        "not quite: the images of a pass share their statistics, and at k = 1, 2 and 4 a pass has 8, 16 and 32.",
        [*ALL_CGBN, *(no_warmup(k) for k in verdicts.WARMUP_KS)],
        verdicts.judge_variance,
        verdicts.table_variance,
    ),
    Finding(
        "linear-rule",
        "The linear rule breaks at the noise scale",
        "While the mini-batch n is far below the noise scale B the best rate grows linearly; at n = B it is half of "
        "that. (8 + B) / (n + B) is the best rate over the linear one, starting from 8 images.",
        "McCandlish et al. 2018, An Empirical Model of Large-Batch Training; not a finding of MegDet",
        f"With CGBN. Reproduced if half the linear rate is clearly better at {8 * verdicts.ABOVE} images and not at "
        f"{8 * verdicts.BELOW}, and B lies in between. B is the median over k, in {EPOCHS}. (That a larger mini-batch "
        "comes less far with equally many images says nothing here: it takes fewer steps, also at its best rate.)",
        [*ALL_CGBN, half_rate(verdicts.BELOW), half_rate(verdicts.ABOVE)],
        verdicts.judge_break,
        verdicts.table_break,
    ),
    Finding(
        "beyond",
        "Past the linear rule",
        "AGVM, which gives each module of the detector a rate after its gradient variance, is better than the linear "
        "rule at large mini-batches (box AP 36.8 against 36.2 at 512 images).",
        "Xue et al., NeurIPS 2022; not a finding of MegDet",
        "Reproduced if AGVM is clearly better than the linear rate at k = 16; undecided if neither trains. The "
        "authors' configurations have 0.7 times the linear rate, and clip the gradient at the end of the warm-up; "
        "neither is done here.",
        [cgbn(verdicts.KS[-1]), "k16_agvm"],
        verdicts.judge_beyond,
        verdicts.table_beyond,
    ),
    Finding(
        "accuracy",
        "Accuracy grows a little with the mini-batch",
        "With Cross-GPU BN a larger mini-batch brings a small gain in accuracy; 256 images train COCO in 4 hours "
        "instead of 33, slightly better than 16.",
        f"{SUMMARY}, and {ABSTRACT}",
        "With CGBN. Reproduced if some k is clearly better than k = 1, and none clearly worse.",
        ALL_CGBN,
        verdicts.judge_accuracy,
        verdicts.table_accuracy,
    ),
]
