"""Averaged weights: an exponential moving average (EMA) of weights and normalization statistics over training.

It smooths out the noise of the last steps, as a lower learning rate would. torch's ``AveragedModel`` holds it.
"""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

TensorList = tuple[Tensor, ...] | list[Tensor]


def averaged_model(module: nn.Module, images_of_memory: float, mini_batch: int) -> AveragedModel:
    """A copy of ``module`` whose floating point tensors follow it: ``update_parameters(module)`` after each step.

    What a step of ``mini_batch`` images did fades by 1/e over ``images_of_memory`` images. In the first steps, whose
    weights are still random, the average forgets faster: step t keeps at most (1 + t) / (10 + t) of it. Counters are
    copied.
    """
    slowest = math.exp(-mini_batch / images_of_memory)

    def average(averages: TensorList, values: TensorList, step: Tensor | int) -> None:
        number = int(step)
        keep = min(slowest, (1 + number) / (10 + number))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - keep)
        else:
            torch._foreach_copy_(averages, values)

    return AveragedModel(module, multi_avg_fn=torch.no_grad()(average), use_buffers=True)
