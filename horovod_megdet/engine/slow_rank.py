"""The rank that all others wait for, told by what each rank does itself in a step.

Ranks in lock-step take equally long for a step, however fast they are. What differs is their own work: the time of a
step without that spent in collectives, waiting for other ranks.
"""

from statistics import median

SLOWER = 1.3
"""How many times the median of the other ranks' work makes a rank slow. Small steps vary by a tenth or two."""

ROWS = 2
"""Rows of metrics for which a rank has to be slow in succession before that is said: one may be a coincidence."""


class SlowRank:
    """Notices a rank that stays slower than the rest. Equal on all ranks, which call it with the same numbers."""

    def __init__(self) -> None:
        self.rank: int | None = None
        self.rows = 0

    def update(self, work: list[float]) -> bool:
        """Takes in the seconds of own work per step of each rank, in rank order; one row of metrics.

        Returns whether :attr:`rank` has just turned out to be slow: once until it is not, or another one is.
        """
        slowest = max(range(len(work)), key=work.__getitem__)
        if len(work) == 1 or work[slowest] < SLOWER * typical_work(work):
            self.rank, self.rows = None, 0
            return False
        self.rows = self.rows + 1 if slowest == self.rank else 1
        self.rank = slowest
        return self.rows == ROWS


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
        f"works for {work[rank]:.2f} s of each step{reason}, they for {typical:.2f} s."
    )
