"""What one would use instead of our Cross-GPU BN, written after the published schemes, to compare them on CPUs."""

from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from horovod_megdet.layers.cross_gpu_bn import replace_layers


class FiveMessageBatchNorm(nn.BatchNorm2d):
    """The scheme of ``hvd.SyncBatchNorm``, which refuses CPU tensors: three allgathers forward, two sums backward."""

    running_mean: Tensor
    running_var: Tensor
    momentum: float
    message_name: str

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) in and out."""
        return _FiveMessages.apply(input, self.weight, self.bias, self)


class _FiveMessages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: "FiveMessageBatchNorm") -> Tensor:
        channels, name = x.shape[1], layer.message_name
        var, mean = torch.var_mean(x, dim=(0, 2, 3), unbiased=False)
        count = torch.tensor([x.numel() // channels], dtype=torch.float32)
        handles = [
            hvd.allgather_async(value[None], name=f"{name}.{what}")
            for what, value in (("count", count), ("mean", mean), ("var", var))
        ]
        counts, means, variances = (hvd.synchronize(handle) for handle in handles)
        shares = counts / counts.sum()
        mean = (means * shares).sum(0)
        var = ((variances + (means - mean).square()) * shares).sum(0)
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(var, layer.momentum)
        ctx.save_for_backward(x, weight, mean, var, counts.sum())
        ctx.eps, ctx.name = layer.eps, name
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, layer.eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        invstd = (var + ctx.eps).rsqrt()
        xmu = x - mean.view(1, -1, 1, 1)
        local_dy, local_dy_xmu = dy.sum(dim=(0, 2, 3)), (dy * xmu).sum(dim=(0, 2, 3))
        handles = [
            hvd.allreduce_async(value, op=hvd.Sum, name=f"{ctx.name}.{what}")
            for what, value in (("dy", local_dy), ("dy_xmu", local_dy_xmu))
        ]
        sum_dy, sum_dy_xmu = (hvd.synchronize(handle) for handle in handles)
        slope = invstd.square() * sum_dy_xmu / count
        centerd = dy - (sum_dy / count).view(1, -1, 1, 1) - xmu * slope.view(1, -1, 1, 1)
        dx = centerd * (weight * invstd).view(1, -1, 1, 1)
        return dx, local_dy_xmu * invstd, local_dy, None


def convert(model: nn.Module, kind: type[_BatchNorm]) -> nn.Module:
    """Replaces the plain BatchNorm layers of ``model`` with the alternative."""

    def make(layer: nn.BatchNorm2d, path: str) -> nn.Module:
        new = kind(layer.num_features, layer.eps, layer.momentum)
        if isinstance(new, FiveMessageBatchNorm):
            new.message_name = path
        new.load_state_dict(layer.state_dict())
        return new

    return replace_layers(model, (nn.BatchNorm2d,), make)
