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

    After step t of ``mini_batch`` images, average <- keep x average + (1 - keep) x weights, with

        keep = min(exp(-mini_batch / images_of_memory), t / (9 + t))

    so that what a step did fades by 1/e over ``images_of_memory`` images, and faster after the first steps, whose
    weights are still random. The first step is copied; so are counters, after every step.
    """
    slowest = math.exp(-mini_batch / images_of_memory)

    def average(averages: TensorList, values: TensorList, step: Tensor | int) -> None:
        before = int(step)
        keep = min(slowest, (1 + before) / (10 + before))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - keep)
        else:
            torch._foreach_copy_(averages, values)

    return AveragedModel(module, multi_avg_fn=torch.no_grad()(average), use_buffers=True)
