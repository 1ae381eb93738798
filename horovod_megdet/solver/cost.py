"""What communication costs on so many ranks: a latency and bandwidth model of the allreduce.

A message of n bytes among R ranks takes

    t(R, n) = latency * log2(R) + 2 n (R - 1) / R / bandwidth

the first term for the rounds of a tree, the second for a ring, in which each rank sends and receives its data twice. A
step sends, in each of its passes, one small message forward (two with ``algorithm: two_pass``) and one backward for
each CGBN layer, among the ranks that share statistics; and once the gradients of all weights, among all ranks.
"""

from dataclasses import dataclass
from math import log2

from torch import nn

from horovod_megdet.config import Config
from horovod_megdet.layers.cross_gpu_bn import CrossGPUBatchNorm
from horovod_megdet.models.norms import bn_group_size
from horovod_megdet.solver.schedule import Schedule

Rows = list[tuple[str, str]]

RANGE = 0.75, 1.3
"""What was measured lies between these multiples of the prediction; see docs/performance.md."""

_NORM_KEYS = {"backbone.body": "backbone_norm", "backbone.fpn": "fpn_norm", "roi_heads.box_head": "box_head_norm"}
"""By the part of the detector, the key of ``model`` that chooses its normalization."""


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in a step."""

    layers: int
    """CGBN layers."""
    channels: int
    """Of all of them together."""
    gradient_bytes: int
    group: int
    """Ranks that share statistics."""
    passes: int = 1
    layer_messages: int = 2
    """Messages of a layer in a pass."""

    @classmethod
    def of(cls, detector: nn.Module, config: Config, schedule: Schedule) -> "Traffic":
        """That of a detector which ``config`` describes. Raises :class:`UserError` where its BN size does not fit."""
        shared = [part for part, key in _NORM_KEYS.items() if getattr(config.model, key) == "cgbn"]
        modules = [module for name, module in detector.named_modules() if name.startswith(tuple(shared))]
        layers = [module for module in modules if isinstance(module, CrossGPUBatchNorm)]
        trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
        bytes_each = 2 if config.solver.compression == "fp16" else 4
        return cls(
            layers=len(layers),
            channels=sum(layer.num_features for layer in layers),
            gradient_bytes=bytes_each * sum(parameter.numel() for parameter in trained),
            group=bn_group_size(config.batch_norm, config.data.images_per_rank, schedule.ranks),
            passes=schedule.accumulation,
            layer_messages=3 if config.batch_norm.algorithm == "two_pass" else 2,
        )


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

    def step(self, ranks: int, traffic: Traffic) -> tuple[float, float]:
        """Seconds per step of (CGBN messages, gradients)."""
        return traffic.passes * self._cgbn_seconds(traffic), self.seconds(ranks, traffic.gradient_bytes)

    def _cgbn_seconds(self, traffic: Traffic) -> float:
        if traffic.group == 1:
            return 0.0
        size = 2 * 2 * 8 * traffic.channels  # forward and backward two float64 per channel
        rounds = traffic.layer_messages * traffic.layers * log2(traffic.group)
        return self.latency * rounds + self._ring_seconds(traffic.group, size)

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


def communication_table(cost: MessageCost, traffic: Traffic, ranks: int, step_seconds: float | None) -> Rows:
    """The prediction in words, row by row, with what it assumes; ``megdet plan`` prints it.

    ``step_seconds`` is the time of the forward and backward passes of a step on one rank without communication, if it
    is known.
    """
    messages, gradients = cost.step(ranks, traffic)
    number = traffic.layer_messages * traffic.layers * traffic.passes if traffic.group > 1 else 0
    rows = [
        ("CGBN", f"{traffic.layers} layers, {number} messages a step: {messages * 1e3:.1f} ms"),
        ("gradients", f"{traffic.gradient_bytes / 1e6:.0f} MB a step: {gradients * 1e3:.1f} ms"),
        ("assumed", f"{cost}, none of it overlapped with the backward pass"),
    ]
    if step_seconds is not None:
        low, total, high = (step_seconds + factor * (messages + gradients) for factor in (RANGE[0], 1, RANGE[1]))
        share = f"{1 - step_seconds / total:.0%} is communication"
        rows.append(("step", f"{total:.3f} s, of which {share}; expect {low:.3f} to {high:.3f} s"))
    return rows
