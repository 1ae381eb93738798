"""Cross-GPU Batch Normalization (CGBN): batch statistics over the images of several ranks.

With n_i values per channel on rank i and M = sum n_i over the ranks of a group,

    mean = (1/M) sum x        var = (1/M) sum (x - mean)^2        y = weight * (x - mean) / sqrt(var + eps) + bias
    dx = weight / sqrt(var + eps) * (dy - (1/M) sum dy - xhat * (1/M) sum dy * xhat)

where the sums run over all ranks and xhat = (x - mean) / sqrt(var + eps). The n_i may differ and may be 0.

A residual network adds a shortcut to y and takes the ReLU. On CPUs that happens in the pass that computes y, and the
ReLU's part of the gradient in the passes that compute dx.

Messages are exchanged one at a time, in the order of the layers. The autograd engine executes the nodes of a graph
strictly in the reverse order of their creation whenever one thread does it all, so all ranks agree on the order in the
backward pass too. Gradient messages of an optimizer may be in flight at the same time: they have other names.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from horovod_megdet import comm
from horovod_megdet.layers.kernels import PlainKernels, Rectifier, Statistics, activate, kernels_for
from horovod_megdet.layers.recomputation import current_tape


class CrossGPUBatchNorm(_BatchNorm):
    """Batch normalization of (N, C, *) inputs over all images of a group of ranks.

    A drop-in replacement for ``nn.BatchNorm1d``, ``2d`` and ``3d``: it has their arguments, parameters, buffers and
    state dict, and computes what one of them would compute from the whole group's input in one tensor. The input may
    be float16, bfloat16, float32 or float64; statistics are always float64. The forward pass in training is collective
    within the group, and so is its backward pass; evaluation does not communicate, nor does a group of one rank.
    Second derivatives are refused.

    ``group`` is the group of ranks that share statistics, all ranks by default. ``algorithm`` is ``one_pass`` (one
    allreduce of counts, sums and sums of squares) or ``two_pass`` (as in the paper: first the mean, then the squared
    differences from it). ``path`` becomes part of the names of the layer's messages.

    Raises ``ValueError`` in training if the group has fewer than two values per channel.
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
        # A name belongs to one shape, even if two models in one process have the same paths.
        self.message_name = f"cgbn.{path}.{num_features}"
        self.replaces: type[_BatchNorm] = nn.BatchNorm2d

    def forward(self, input: Tensor, shortcut: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalizes ``input`` (N, C, *): by the group's statistics in training, by the running ones otherwise.

        Then adds ``shortcut``, which has the shape of ``input``, and with ``relu`` returns max(0, y).
        """
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected an input of (N, {self.num_features}, *), got {tuple(input.shape)}")
        if shortcut is not None and shortcut.shape != input.shape:
            raise ValueError(f"expected a shortcut of {tuple(input.shape)}, got {tuple(shortcut.shape)}")
        if not self.training:
            by_batch = self.running_mean is None
            y = F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, by_batch, 0.0, self.eps
            )
            return activate(y, shortcut, relu)
        tape, kernels = current_tape.get(), kernels_for(input)
        if self.group.size == 1 and not (kernels.fuses and (relu or shortcut is not None)):
            y = self._normalize_alone(input, update=tape is None or not tape.replaying)
            return activate(y, shortcut, relu)
        if tape is not None and tape.replaying:
            statistics = tape.next()
        else:
            statistics = self._group_statistics(input.detach(), kernels)
            if self.running_mean is not None and self.running_var is not None:
                kernels.update_running(self.running_mean, self.running_var, statistics, self._next_factor())
            if tape is not None:
                tape.append(statistics)
        shortcut = None if shortcut is None else shortcut.to(input.dtype)
        output: Tensor = _Normalize.apply(
            input, shortcut, self.weight, self.bias, relu, statistics, kernels, self.group, self.message_name
        )
        return output

    def _group_statistics(self, x: Tensor, kernels: PlainKernels) -> Statistics:
        if self.algorithm == "one_pass":
            message = comm.sum_(kernels.sums(x), self.message_name, self.group)
            statistics = kernels.statistics(message, self.eps)
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

    def _next_factor(self) -> float:
        """Counts the batch and returns its weight in the running statistics; without a momentum they are an average."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _normalize_alone(self, x: Tensor, update: bool) -> Tensor:
        mean, var, factor = self.running_mean, self.running_var, 0.0
        if mean is not None and var is not None:
            if update:
                factor = self._next_factor()
            else:
                # Checkpointing compares the saved tensors, and without buffers the operator would save others.
                mean, var = mean.clone(), var.clone()
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, factor, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.group.size}, algorithm={self.algorithm}"


class _Normalize(torch.autograd.Function):
    """Normalization by the group's statistics; its gradient takes into account that they depend on the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        statistics: Statistics,
        kernels: PlainKernels,
        group: comm.Group,
        name: str,
    ) -> Tensor:
        y = kernels.normalize(x, weight, bias, statistics, shortcut, relu)
        # The next layer keeps the output of a ReLU for its own gradient, so that it costs no memory here.
        ctx.save_for_backward(x, y if relu else None, weight, bias, statistics.values, statistics.narrow)
        ctx.kernels, ctx.group, ctx.name, ctx.has_shortcut = kernels, group, name, shortcut is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, values, narrow = ctx.saved_tensors
        statistics = Statistics(values, narrow)
        rectifier = None if y is None else Rectifier(y, weight, bias, ctx.has_shortcut)
        dz, sums = ctx.kernels.gradient_sums(dy, x, statistics, rectifier)
        dbias, dweight = (None, None) if weight is None else sums.to(weight.dtype, copy=True)
        dx = None
        if ctx.needs_input_grad[0]:
            total = comm.sum_(sums, f"{ctx.name}.backward", ctx.group)
            dx = ctx.kernels.input_gradient(dz, x, weight, statistics, total, rectifier)
        return dx, dz if ctx.has_shortcut else None, dweight, None if bias is None else dbias, *[None] * 5


def convert_batch_norm(
    module: nn.Module, *, group: comm.Group | None = None, algorithm: str = "one_pass", path: str = ""
) -> nn.Module:
    """Replaces every ``BatchNorm1d``, ``2d`` and ``3d`` in ``module`` by a :class:`CrossGPUBatchNorm`.

    Returns the module, or the new layer if the module itself is one. Parameters and buffers stay the same tensors, and
    the keys of the state dict stay the same. The modules' paths, prefixed by ``path``, name the messages: all ranks
    have to convert the same model.
    """

    def converted(layer: _BatchNorm, path: str) -> _BatchNorm:
        new = CrossGPUBatchNorm(**_arguments(layer), group=group, algorithm=algorithm, path=path)
        new.replaces = type(layer)
        return _take_over(new, layer)

    return replace_layers(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), converted, path)


def revert_batch_norm(module: nn.Module) -> nn.Module:
    """Replaces every :class:`CrossGPUBatchNorm` by the kind of PyTorch layer that it replaced, for export.

    Returns the module, or the new layer if the module itself is one.
    """

    def reverted(layer: CrossGPUBatchNorm, path: str) -> _BatchNorm:
        return _take_over(layer.replaces(**_arguments(layer)), layer)

    return replace_layers(module, (CrossGPUBatchNorm,), reverted)


@torch.no_grad()
def average_running_statistics(module: nn.Module) -> None:
    """Makes the running statistics of layers whose groups have their own the same on all ranks. Collective.

    The mean becomes the mean of the groups' means, the variance the mean of their variances plus the variance of their
    means. Layers that share statistics over all ranks already agree.
    """
    running = [
        (layer.running_mean, layer.running_var)
        for layer in module.modules()
        if isinstance(layer, _BatchNorm)
        and _group_size(layer) < comm.size()
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


def _group_size(layer: _BatchNorm) -> int:
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
    """Moves the parameters, buffers and mode of ``old`` to ``new``."""
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

    A layer that occurs in several places stays one layer. ``done`` maps the layers replaced so far to the new ones.
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
