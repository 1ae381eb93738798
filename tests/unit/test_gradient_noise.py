"""The estimates of gradient noise, their averages, and what they mean for a mini-batch."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from horovod_megdet.models.modules import MODULES
from horovod_megdet.solver.gradient_noise import (
    ALL,
    GradientNoise,
    NoiseAverages,
    estimates,
    gain_in_words,
    gain_table,
)


class Weights(nn.Module):
    """Named as a detector; the gradient of ``loss(x)`` is ``x`` in every module."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"body": self._weight(), "fpn": self._weight()})
        self.rpn, self.roi_heads = self._weight(), self._weight()

    def _weight(self) -> nn.Module:
        return nn.Linear(3, 2, bias=False)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """() float: ``x`` is (2, 3)."""
        return sum((parameter * x).sum() for parameter in self.parameters())


@given(
    images=st.integers(1, 8),
    units=st.integers(2, 16),
    variance=st.floats(1e-3, 1e3),
    signal=st.floats(0, 1e3),
)
def test_estimates_invert_the_expectations(images: int, units: int, variance: float, signal: float) -> None:
    of_units, of_mean = signal + variance / images, signal + variance / (images * units)
    found = estimates(of_units, of_mean, images, units)
    assert found == pytest.approx((variance, signal), rel=1e-6, abs=1e-6 * (variance + signal))


def test_the_squared_gradient_can_be_negative() -> None:
    variance, signal = estimates(of_units=4.0, of_mean=0.0, images=1, units=2)
    assert (variance, signal) == (8.0, -4.0)
    averages = NoiseAverages()
    averages.add(dict.fromkeys(MODULES, variance), dict.fromkeys(MODULES, signal))
    assert averages.noise_scale() is None
    assert averages.row()["noise_scale"] is None
    assert averages.row()["squared_gradient"] == pytest.approx(-16)


def test_nothing_is_said_before_the_first_measurement() -> None:
    assert NoiseAverages().noise_scale() is None
    assert NoiseAverages().row() == {}


def test_numerator_and_denominator_are_averaged_apart_and_fade() -> None:
    averages = NoiseAverages()
    measured = [(2.0, 1.0), (4.0, 3.0), (9.0, -2.0)]
    for variance, signal in measured:
        averages.add(
            dict.fromkeys(MODULES, 0.0) | {"rpn": variance}, dict.fromkeys(MODULES, 0.0) | {"rpn": signal, "fpn": 1.0}
        )
    weights = [(49 / 50) ** age for age in (2, 1, 0)]
    variance, signal = (
        sum(weight * pair[i] for weight, pair in zip(weights, measured, strict=True)) / sum(weights) for i in (0, 1)
    )
    assert averages.variance_of("rpn") == averages.variance_of(ALL) == pytest.approx(variance)
    assert averages.signal_of("rpn") == pytest.approx(signal)
    assert averages.noise_scale("rpn") == pytest.approx(variance / signal)
    assert averages.noise_scale() == pytest.approx(variance / (signal + 1))
    assert averages.noise_scale("fpn") == 0
    assert averages.noise_scale("backbone") is None, "without any gradient there is no scale"


def test_after_a_restart_only_new_measurements_count() -> None:
    averages, new = NoiseAverages(), NoiseAverages()
    averages.add(dict.fromkeys(MODULES, 90.0), dict.fromkeys(MODULES, 9.0))
    averages.restart()
    assert averages == new
    for each in (averages, new):
        each.add(dict.fromkeys(MODULES, 2.0), dict.fromkeys(MODULES, 1.0))
    assert averages == new


def test_passes_of_one_rank_are_compared() -> None:
    """Four passes of two images on one process, a frozen module among them, against the gradients themselves."""
    torch.manual_seed(0)
    module = Weights()
    module.rpn.requires_grad_(False)
    noise = GradientNoise(module, images=2, accumulation=4, interval=1)
    gradients = torch.randn(4, 2, 3)
    with noise.measuring(0):
        for x in gradients:
            (module.loss(x) / 4).backward()
    noise.update(0, images=8, loss_scale=1.0, step_seconds=1.0)
    of_units = gradients.square().sum((1, 2)).mean().item()
    variance, signal = estimates(of_units, gradients.mean(0).square().sum().item(), images=2, units=4)
    for name in ("backbone", "fpn", "box_head"):
        assert noise.averages.variance_of(name) == pytest.approx(variance)
        assert noise.averages.signal_of(name) == pytest.approx(signal)
    assert noise.averages.variance_of("rpn") == 0
    assert noise.averages.variance_of() == pytest.approx(3 * variance)


def test_a_pass_that_is_not_due_is_left_alone() -> None:
    module = Weights()
    noise = GradientNoise(module, images=1, accumulation=2, interval=3)
    counted = []
    for step in range(7):
        with noise.measuring(step):
            for _ in range(2):
                module.loss(torch.randn(2, 3)).backward()
        noise.update(step, images=2, loss_scale=1.0, step_seconds=1.0)
        counted.append(noise.averages.measurements)
        module.zero_grad()
    assert [after > before for before, after in zip([0, *counted], counted, strict=False)] == [
        True, False, False, True, False, False, True,
    ]  # fmt: skip
    assert not any(parameter._backward_hooks for parameter in module.parameters()), "all hooks are gone"


def test_an_automatic_interval_keeps_the_cost_under_a_hundredth() -> None:
    module = Weights()
    noise = GradientNoise(module, images=1, accumulation=2, interval="auto")

    def measure(step: int, step_seconds: float, measuring_seconds: float) -> int:
        with noise.measuring(step):
            module.loss(torch.randn(2, 3)).backward()
        noise.cost_seconds = measuring_seconds
        noise.update(step, images=1, loss_scale=1.0, step_seconds=step_seconds)
        return noise.averages.next_step - step

    assert measure(0, step_seconds=1.0, measuring_seconds=0.009) == 1
    assert measure(1, step_seconds=1.0, measuring_seconds=0.05) == 5
    assert measure(6, step_seconds=1.0, measuring_seconds=0.051) == 6


@pytest.mark.parametrize(("interval", "passes"), [("never", 2), ("auto", 1), (1, 1)])
def test_nothing_is_measured_where_nothing_can_be_compared(interval: int | str, passes: int) -> None:
    module = Weights()
    noise = GradientNoise(module, images=2, accumulation=passes, interval=interval)
    with noise.measuring(0):
        assert not any(parameter._backward_hooks for parameter in module.parameters())
        module.loss(torch.ones(2, 3)).backward()
    noise.update(0, images=2, loss_scale=1.0, step_seconds=1.0)
    assert not noise.enabled
    assert noise.averages == NoiseAverages()


def test_a_large_weight_loses_nothing_to_rounding() -> None:
    """A float32 sum over all of it would be off by a thousandth on CPUs."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"roi_heads": nn.Linear(12544, 512, bias=False)})
    gradients = torch.randn(2, 512, 12544) * torch.rand(512, 12544) ** 8
    noise = GradientNoise(module, images=1, accumulation=2, interval=1)
    with noise.measuring(0):
        for gradient in gradients:
            ((module["roi_heads"].weight * gradient).sum() / 2).backward()
    noise.update(0, images=2, loss_scale=1.0, step_seconds=1.0)
    expected = gradients.double().var(0).sum().item()
    assert noise.averages.variance_of() == pytest.approx(expected, rel=1e-5)


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e[+-]\d+)?", text)]


def test_what_a_mini_batch_gains_and_loses() -> None:
    table = dict(gain_table(noise_scale=256, mini_batch=256, reference=16))
    assert table["noise scale"] == "256 images; the mini-batch is 1 times as large"
    assert numbers(table["steps"]) == [2, 1.5], "at n = B twice the fewest steps, and twice the fewest images"
    assert numbers(table["images"]) == [2, 3]
    # at 16 images 1/17 of the largest rate, at 256 a half: 8.5 times, where the linear rule has 16 times
    assert numbers(table["learning rate"]) == pytest.approx([8.5 / 16, 16], rel=1e-3)
    # 17 times the fewest steps at 16 images, and 17/16 of the fewest images
    assert numbers(table["instead of 16 images"]) == pytest.approx([2 / 17, 2 / (17 / 16)], rel=1e-2)


def test_a_noise_scale_that_cannot_be_told_is_said_to_be_unknown() -> None:
    assert gain_in_words(None, 16).startswith("noise scale unknown")


@given(noise_scale=st.floats(1, 1e6), mini_batch=st.integers(1, 100_000))
def test_twice_the_mini_batch_saves_at_most_half_of_the_steps(noise_scale: float, mini_batch: int) -> None:
    words = gain_in_words(noise_scale, mini_batch)
    assert math.isclose(numbers(words)[0], noise_scale, rel_tol=0.01)
    saved = numbers(words)[-1]
    assert 0 <= saved <= 50
    # steps go with 1 + B / n
    expected = 100 * (1 - (1 + noise_scale / mini_batch / 2) / (1 + noise_scale / mini_batch))
    assert saved == pytest.approx(expected, abs=0.51)
