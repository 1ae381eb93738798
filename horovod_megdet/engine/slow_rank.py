"""The rank that all others wait for, found from the work of each rank in a step.

Ranks in lock-step take equally long for a step, however fast they are. What differs is their own work: the time of a
step without that spent in collectives, waiting for other ranks.
"""

from statistics import median

SLOWER = 1.3
"""How many times the median of the other ranks' work makes a rank slow. Small steps vary by a tenth or two."""

ROWS, STEPS = 2, 20
"""Rows of metrics and steps for which a rank has to be slow in succession before that is said."""


class SlowRank:
    """Notices a rank that stays slower than the rest. Equal on all ranks, which call it with the same numbers."""

    def __init__(self) -> None:
        self.rank = -1
        """The rank that is slow now; -1 if none is."""
        self.rows = self.steps = 0
        self.reported = False

    def update(self, work: list[float], steps: int) -> bool:
        """Takes in the seconds of own work per step of each rank, in rank order: a row of metrics about some steps.

        Returns whether :attr:`rank` has just turned out to be slow: once until it is not, or another one is.
        """
        slowest = max(range(len(work)), key=work.__getitem__)
        if len(work) == 1 or work[slowest] < SLOWER * typical_work(work):
            slowest = -1
        if slowest != self.rank:
            self.rank, self.rows, self.steps, self.reported = slowest, 0, 0, False
        self.rows += 1
        self.steps += steps
        if slowest < 0 or self.reported:
            return False
        self.reported = self.rows >= ROWS and self.steps >= STEPS
        return self.reported


def typical_work(work: list[float]) -> float:
    """The median over all ranks but the slowest."""
    return median(sorted(work)[:-1])


def describe_slow_rank(rank: int, host: str, work: list[float], data: float) -> str:
    """``rank 37 on node05 is 1.4 times slower than the others, which wait for it: ...``.

    ``data`` is the time of a step, in seconds, that the rank waits for images.
    """
    typical = typical_work(work)
    reason = f", {data:.2f} s of that waiting for images" if data > (work[rank] - typical) / 2 else ""
    return (
        f"rank {rank} on {host} is {work[rank] / typical:.1f} times slower than the others, which wait for it: it "
        f"works for {work[rank]:.2f} s of each step{reason}; the others work for {typical:.2f} s."
    )
