"""What communication costs on so many ranks: a latency and bandwidth model of the allreduce.

A message of n bytes among R ranks takes

    t(R, n) = latency * log2(R) + 2 n (R - 1) / R / bandwidth

the first term for the rounds of a tree, the second for a ring, in which each rank sends and receives its data twice. A
step sends one small message forward and one backward for each CGBN layer, and the gradients of all weights.
"""

from dataclasses import dataclass
from math import log2

from torch import nn

from horovod_megdet.layers.cross_gpu_bn import CrossGPUBatchNorm

Rows = list[tuple[str, str]]

RANGE = 0.75, 1.3
"""Between how many times the prediction lies what was measured; see docs/performance.md."""


@dataclass(frozen=True)
class MessageCost:
    """The two constants of a network, as ``megdet doctor`` or ``benchmarks/cross_gpu_bn.py`` measures them."""

    latency: float
    """Seconds per doubling of the ranks."""
    bandwidth: float
    """Bytes per second."""

    def seconds(self, ranks: int, size: int) -> float:
        """Time of one allreduce of ``size`` bytes."""
        if ranks == 1:
            return 0.0
        return self.latency * log2(ranks) + self._ring_seconds(ranks, size)

    def step(self, ranks: int, layers: int, channels: int, gradient_bytes: int) -> tuple[float, float]:
        """Seconds per step of (CGBN messages, gradients) for so many CGBN layers of ``channels`` channels together."""
        if ranks == 1:
            return 0.0, 0.0
        bytes_of_messages = 2 * 2 * 8 * channels  # forward and backward two float64 per channel
        messages = 2 * layers * self.latency * log2(ranks) + self._ring_seconds(ranks, bytes_of_messages)
        return messages, self.seconds(ranks, gradient_bytes)

    def _ring_seconds(self, ranks: int, size: int) -> float:
        return 2 * size * (ranks - 1) / ranks / self.bandwidth

    @classmethod
    def fitted(cls, measured: list[tuple[int, float, float]], large_bytes: int) -> "MessageCost":
        """Fits (ranks, seconds of a small message, seconds of one of ``large_bytes``), averaged over the ranks."""
        latency = sum(small / log2(ranks) for ranks, small, _ in measured) / len(measured)
        per_byte = sum(
            (large - small) * ranks / (2 * (ranks - 1) * large_bytes) for ranks, small, large in measured
        ) / len(measured)
        return cls(latency, 1 / per_byte)

    def __str__(self) -> str:
        return f"{self.latency * 1e6:.0f} us per doubling of the ranks, {self.bandwidth / 1e9:.2f} GB/s"


def communication_table(cost: MessageCost, detector: nn.Module, ranks: int, step_seconds: float | None) -> Rows:
    """The prediction for a detector in words, row by row, with what it assumes; ``megdet plan`` prints it.

    ``step_seconds`` is the time of a forward and backward pass on one rank without communication, if it is known.
    """
    layers = [layer for layer in detector.modules() if isinstance(layer, CrossGPUBatchNorm)]
    channels = sum(layer.num_features for layer in layers)
    size = sum(p.numel() * p.element_size() for p in detector.parameters() if p.requires_grad)
    messages, gradients = cost.step(ranks, len(layers), channels, size)
    rows = [
        ("CGBN", f"{len(layers)} layers, {2 * len(layers)} messages a step: {messages * 1e3:.1f} ms"),
        ("gradients", f"{size / 1e6:.0f} MB a step: {gradients * 1e3:.1f} ms"),
        ("assumed", f"{cost}, nothing of it hidden behind the backward pass"),
    ]
    if step_seconds is not None:
        low, total, high = (step_seconds + factor * (messages + gradients) for factor in (RANGE[0], 1, RANGE[1]))
        share = f"{1 - step_seconds / total:.0%} is communication"
        rows.append(("step", f"{total:.3f} s, of which {share}; {low:.3f} to {high:.3f} s to be expected"))
    return rows
