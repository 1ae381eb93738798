"""Cross-GPU Batch Normalization (CGBN): batch statistics over the images of several ranks.

With n_i values per channel on rank i and M = sum n_i over the ranks of a group,

    mean = (1/M) sum x        var = (1/M) sum (x - mean)^2        y = weight * (x - mean) / sqrt(var + eps) + bias
    dx = weight / sqrt(var + eps) * (dy - (1/M) sum dy - xhat * (1/M) sum dy * xhat)

where the sums run over all ranks and xhat = (x - mean) / sqrt(var + eps). The n_i may differ and may be 0.

Messages are exchanged one at a time, in the order of the layers. The autograd engine executes the nodes of a graph
strictly in the reverse order of their creation whenever one thread does it all, so all ranks agree on the order in the
backward pass too. Gradient messages of an optimiser may be on their way at the same time: they have other names.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from horovod_megdet import comm
from horovod_megdet.layers import kernels
from horovod_megdet.layers.kernels import Statistics
from horovod_megdet.layers.recomputation import current_tape


class CrossGPUBatchNorm(_BatchNorm):
    """Batch normalisation of (N, C, *) inputs over all images of a group of ranks.

    Takes the place of ``nn.BatchNorm1d``, ``2d`` and ``3d``: the same arguments, parameters, buffers and state dict,
    and the same results as one of them given the group's inputs in one tensor. Float16 and bfloat16 inputs are
    accepted; statistics are always float64. Evaluation does not communicate, nor does a group of one rank. A forward
    pass in training is collective within the group, and so is its backward pass; second derivatives are refused.

    ``group`` are the ranks that share statistics, all by default. ``algorithm`` is ``one_pass`` (one allreduce of
    counts, sums and sums of squares) or ``two_pass`` (as in the paper: the mean, then the squared differences from
    it). ``path`` is part of the names of the layer's messages.

    Raises ``ValueError`` in training when the group has less than two values per channel.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        group: comm.Group | None = None,
        algorithm: str = "one_pass",
        path: str = "",
        **factory: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        if algorithm not in ("one_pass", "two_pass"):
            raise ValueError(f"algorithm must be one_pass or two_pass, not {algorithm!r}")
        self.group = group or comm.world()
        self.algorithm = algorithm
        # One shape for each name, even if two models of one process share their paths.
        self.message_name = f"cgbn.{path}.{num_features}"
        self.replaces: type[_BatchNorm] = nn.BatchNorm2d

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``input`` (N, C, *), by the group's statistics in training, else by the running ones."""
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected an input of (N, {self.num_features}, *), got {tuple(input.shape)}")
        if not self.training:
            by_batch = self.running_mean is None
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, by_batch, 0.0, self.eps
            )
        tape = current_tape.get()
        if self.group.size == 1:
            return self._normalise_alone(input, update=tape is None or not tape.replaying)
        if tape is not None and tape.replaying:
            statistics = tape.next()
        else:
            statistics = self._group_statistics(input.detach())
            self._update_running(statistics)
            if tape is not None:
                tape.append(statistics)
        output: Tensor = _Normalise.apply(input, self.weight, self.bias, statistics, self.group, self.message_name)
        return output

    def _group_statistics(self, x: Tensor) -> Statistics:
        if self.algorithm == "one_pass":
            message = comm.sum_(kernels.sums(x), self.message_name, self.group)
            statistics = Statistics.of_moments(message, self.eps)
        else:
            message = comm.sum_(kernels.sums(x)[: self.num_features + 1], f"{self.message_name}.mean", self.group)
            count, mean = message[0], message[1:] / message[0]
            var = comm.sum_(kernels.squared_differences(x, mean), f"{self.message_name}.var", self.group) / count
            statistics = Statistics.of(count, mean, var, self.eps)
        if x.numel() < 2 * self.num_features and statistics.count < 2:
            raise ValueError(
                f"{self.message_name}: expected more than one value per channel in the group, got "
                f"{int(statistics.count)}"
            )
        return statistics

    def _update_running(self, statistics: Statistics) -> None:
        if self.running_mean is not None and self.running_var is not None:
            statistics.update(self.running_mean, self.running_var, self._next_factor())

    def _next_factor(self) -> float:
        """Counts the batch and returns its weight in the running statistics; without a momentum they are averages."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _normalise_alone(self, x: Tensor, update: bool) -> Tensor:
        mean, var, factor = self.running_mean, self.running_var, 0.0
        if mean is not None and var is not None:
            if update:
                factor = self._next_factor()
            else:
                # Without buffers the operator would save other tensors than in the first forward pass.
                mean, var = mean.clone(), var.clone()
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, factor, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.group.size}, algorithm={self.algorithm}"


class _Normalise(torch.autograd.Function):
    """Normalisation by given statistics of the group, and the gradient that knows they depend on the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics,
        group: comm.Group,
        name: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, statistics.values)
        ctx.group, ctx.name, ctx.has_bias = group, name, bias is not None
        return kernels.normalise(x, weight, bias, statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values = ctx.saved_tensors
        statistics = Statistics(values)
        sums = kernels.gradient_sums(dy, x, statistics)
        dbias, dweight = (None, None) if weight is None else sums.to(weight.dtype, copy=True)
        dx = None
        if ctx.needs_input_grad[0]:
            total = comm.sum_(sums, f"{ctx.name}.backward", ctx.group)
            dx = kernels.input_gradient(dy, x, weight, statistics, total)
        return dx, dweight, dbias if ctx.has_bias else None, None, None, None


def convert_batch_norm(
    module: nn.Module, *, group: comm.Group | None = None, algorithm: str = "one_pass", path: str = ""
) -> nn.Module:
    """Replaces every ``BatchNorm1d``, ``2d`` and ``3d`` in ``module`` by a :class:`CrossGPUBatchNorm`.

    Returns the module, or the new layer if the module itself is one. Parameters and buffers are kept
    (the same tensors), and so are the keys of the state dict. The modules' paths, with ``path`` before them, name the
    messages: all ranks have to convert the same model.
    """

    def converted(layer: _BatchNorm, path: str) -> _BatchNorm:
        new = CrossGPUBatchNorm(**_arguments(layer), group=group, algorithm=algorithm, path=path)
        new.replaces = type(layer)
        return _take_over(new, layer)

    return replace_layers(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), converted, path)


def revert_batch_norm(module: nn.Module) -> nn.Module:
    """Replaces every :class:`CrossGPUBatchNorm` by the PyTorch layer that it replaced, for export.

    Returns the module, or the new layer if the module itself is one.
    """

    def reverted(layer: CrossGPUBatchNorm, path: str) -> _BatchNorm:
        return _take_over(layer.replaces(**_arguments(layer)), layer)

    return replace_layers(module, (CrossGPUBatchNorm,), reverted)


@torch.no_grad()
def average_running_statistics(module: nn.Module) -> None:
    """Makes running statistics the same on all ranks, where groups of ranks have their own. Collective.

    The mean becomes the mean of the means, the variance the mean of the variances plus the spread of the means. Layers
    that normalise over all ranks have nothing to average.
    """
    running = [
        (layer.running_mean, layer.running_var)
        for layer in module.modules()
        if isinstance(layer, _BatchNorm)
        and _ranks_together(layer) < comm.size()
        and layer.running_mean is not None
        and layer.running_var is not None
    ]
    if not running:
        return
    means = torch.cat([mean for mean, _ in running]).double()
    squares = torch.cat([var for _, var in running]).double() + means.square()
    total = comm.sum_(torch.cat([means, squares]), f"running_statistics.{2 * len(means)}")
    means, squares = (total / comm.size()).chunk(2)
    variances = (squares - means.square()).clamp_min_(0)
    sizes = [len(mean) for mean, _ in running]
    for (mean, var), new_mean, new_var in zip(running, means.split(sizes), variances.split(sizes), strict=True):
        mean.copy_(new_mean)
        var.copy_(new_var)


def _ranks_together(layer: _BatchNorm) -> int:
    return layer.group.size if isinstance(layer, CrossGPUBatchNorm) else 1


def _arguments(layer: _BatchNorm) -> dict[str, Any]:
    return {
        "num_features": layer.num_features,
        "eps": layer.eps,
        "momentum": layer.momentum,
        "affine": layer.affine,
        "track_running_stats": layer.track_running_stats,
        "device": "meta",
    }


def _take_over(new: _BatchNorm, old: _BatchNorm) -> _BatchNorm:
    """Gives ``new`` the parameters, buffers and mode of ``old``."""
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(new, name, getattr(old, name))
    return new.train(old.training)


def replace_layers(
    module: nn.Module,
    kinds: tuple[type, ...],
    make: Callable[[Any, str], nn.Module],
    path: str = "",
    done: dict[nn.Module, nn.Module] | None = None,
) -> nn.Module:
    """Replaces every layer of the given kinds in ``module`` by ``make(layer, its path)``; returns the module.

    A layer that occurs at several places stays one layer. ``done`` has those replaced so far.
    """
    done = {} if done is None else done
    if isinstance(module, kinds):
        if module not in done:
            done[module] = make(module, path)
        return done[module]
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = replace_layers(child, kinds, make, f"{path}.{name}" if path else name, done)
    return module
