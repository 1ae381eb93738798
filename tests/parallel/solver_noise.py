"""Measures gradient noise on all ranks, and computes the same from the gradients of single images."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import cgbn_common as common
import torch
from cgbn_detector import SMALL, build, make_images
from torch import Tensor, nn

from horovod_megdet import comm
from horovod_megdet.config import BatchNormConfig, ModelConfig
from horovod_megdet.data.loader import Batch
from horovod_megdet.engine.losses import weigh_losses
from horovod_megdet.models.detector import Detector, build_detector
from horovod_megdet.models.modules import MODULES, trainable_parameters
from horovod_megdet.models.norms import bn_group
from horovod_megdet.solver.gradient_noise import ALL, GradientNoise, NoiseAverages, estimates

PER_UNIT = 2
FROZEN = {"weights": "imagenet", "trainable_stages": 4, "backbone_norm": "frozen", "fpn_norm": "none"}
Estimates = dict[str, tuple[float, float]]
"""(tr(Sigma), |g|^2) by module and of all."""


class Measured:
    """A detector or another module whose gradients Horovod averages, and their noise."""

    def __init__(
        self, module: nn.Module, images: int = PER_UNIT, passes: int = 1, fp16: bool = False, loss_scale: float = 1.0
    ) -> None:
        self.passes, self.loss_scale = passes, loss_scale
        self.images = images
        self.noise = GradientNoise(module, images, passes, interval=1)
        sgd = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.0)
        self.optimizer = comm.distributed_optimizer(sgd, module, passes, fp16)

    def step(self, losses: Iterator[Tensor], images_read: int | None = None) -> Estimates:
        """Takes a step of this rank's losses, one for each pass; returns the estimates of this step alone."""
        averages, self.noise.averages = self.noise.averages, NoiseAverages()
        with self.noise.measuring(0):
            for loss in itertools.islice(losses, self.passes):
                (loss * self.loss_scale / self.passes).backward()
        comm.synchronize(self.optimizer)
        self.noise.update(0, images_read or self.images * self.passes, self.loss_scale, step_seconds=1.0)
        self.optimizer.zero_grad()
        found, self.noise.averages = self.noise.averages, averages
        if not found.measurements:
            return {}
        return {name: (found.variance_of(name), found.signal_of(name)) for name in (*MODULES, ALL)}


def loss_of_pass(detector: Detector, images: list[Tensor], targets: list[dict[str, Any]]) -> Tensor:
    """This rank's part of the loss of a pass, weighted as in training."""
    batch = Batch(images, [target | {"image_id": target["seed"], "index": target["seed"]} for target in targets])
    return weigh_losses(batch, detector.forward_losses(images, targets))[0]


def mean(steps: list[Estimates]) -> Estimates:
    """The mean of the estimates over steps."""
    tensors = {name: torch.tensor([step[name] for step in steps], dtype=torch.float64) for name in steps[0]}
    return {name: tuple(values.mean(0).tolist()) for name, values in tensors.items()}


def difference(ours: Estimates, theirs: Estimates) -> float:
    """The largest difference of an estimate, relative to tr(Sigma) or to |G|^2, which the estimates are made of."""
    errors = [
        abs(mine - other) / (abs(theirs[name][0]) + abs(theirs[name][1]))
        for name in theirs
        for mine, other in zip(ours[name], theirs[name], strict=True)
    ]
    assert len(errors) == 2 * (len(MODULES) + 1)
    return max(errors)


def rounds(images: int) -> list[list[tuple[int, int]]]:
    """A round robin: in each round every image is in one pair, and over all rounds every two are together once."""
    others = list(range(1, images))
    found = []
    for turn in range(images - 1):
        line = [0, *others[turn:], *others[:turn]]
        found.append(list(zip(line[: images // 2], line[: images // 2 - 1 : -1], strict=True)))
    return found


def from_single_images(detector: Detector, images: list[Tensor], targets: list[dict[str, Any]]) -> Estimates:
    """The sample variance of the gradients of single images, and |g|^2 = |G|^2 - tr(Sigma) / n, on one process."""
    parameters = trainable_parameters(detector)
    rows: dict[str, list[Tensor]] = {module: [] for module in MODULES}
    for image, target in zip(images, targets, strict=True):
        losses = detector.forward_losses([image], [target])
        assert {int(count) for count in losses.counts.values()} == {32}, (
            "the loss of a mini-batch is the mean of its images' losses"
        )
        sum(losses.values.values()).backward()
        for module in MODULES:
            rows[module].append(torch.cat([p.grad.flatten() for p in parameters[module]]))
        detector.zero_grad()
    found = {}
    for module, gradients in rows.items():
        matrix = torch.stack(gradients)
        variance = matrix.var(0).sum().item()
        found[module] = (variance, matrix.mean(0).square().sum().item() - variance / len(images))
    return with_all(found)


def against_single_images(passes: int, fp16: bool = False) -> float:
    """Every two images share a unit once, so that the mean over the rounds is exactly the sample variance.

    (The variance of a mean of b out of n images drawn without replacement is the sample variance x (1/b - 1/n).)
    """
    images, targets = make_images([(64, 64)] * PER_UNIT * comm.size() * passes)
    detector = build(torch.float64, **FROZEN)
    expected = from_single_images(detector, images, targets)
    measured = Measured(detector, passes=passes, fp16=fp16)

    def losses(pairs: list[tuple[int, int]]) -> Iterator[Tensor]:
        for pair in pairs[comm.rank() :: comm.size()]:
            yield loss_of_pass(detector, [images[i] for i in pair], [targets[i] for i in pair])

    steps = [measured.step(losses(pairs)) for pairs in rounds(len(images))]
    return difference(mean(steps), expected)


def against_gradients_of_units() -> float:
    """With CGBN in groups of two ranks: from the gradient of each rank, computed apart and gathered."""
    images, targets = make_images([(64, 64 + 32 * (comm.rank() % 2))] * PER_UNIT)
    images = [image.roll(7 * comm.rank(), dims=2) for image in images]
    batch_norm = BatchNormConfig(bn_size=2 * PER_UNIT)
    torch.manual_seed(1)
    detector = build_detector(ModelConfig(**SMALL), batch_norm, 2, group=bn_group(batch_norm, PER_UNIT)).double()

    def losses() -> Iterator[Tensor]:
        yield loss_of_pass(detector, images, targets)

    parameters = trainable_parameters(detector)
    gradients = iter(torch.autograd.grad(next(losses()), [p for module in MODULES for p in parameters[module]]))
    mine = [torch.cat([next(gradients).flatten() for _ in parameters[module]]) for module in MODULES]
    units = comm.gather_objects(mine, "test.units")
    expected = {}
    for number, module in enumerate(MODULES):
        matrix = torch.stack([unit[number] for unit in units])
        of_units, of_mean = matrix.square().sum(1).mean().item(), matrix.mean(0).square().sum().item()
        expected[module] = estimates(of_units, of_mean, PER_UNIT, len(units))
    return difference(Measured(detector).step(losses()), with_all(expected))


def with_all(modules: Estimates) -> Estimates:
    """Adds the sums over the modules."""
    variances, signals = zip(*modules.values(), strict=True)
    return modules | {ALL: (sum(variances), sum(signals))}


MEANS = dict(zip(MODULES, (2.0, 0.5, 0.1, 0.0), strict=True))
DEVIATIONS = dict(zip(MODULES, (1.0, 2.0, 1.0, 0.5), strict=True))
"""Of each component of the gradients of :class:`Vectors`."""


class Vectors(nn.Module):
    """Named as a detector: the gradient of an image is a vector drawn from a normal distribution for each module."""

    SIZE = 16

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"body": self._vector(), "fpn": self._vector()})
        self.rpn, self.roi_heads = self._vector(), self._vector()

    def _vector(self) -> nn.Module:
        return nn.Linear(self.SIZE, 1, bias=False)

    def truth(self) -> Estimates:
        """tr(Sigma) and |g|^2."""
        return with_all({m: (self.SIZE * DEVIATIONS[m] ** 2, self.SIZE * MEANS[m] ** 2) for m in MODULES})

    def losses(self, images: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The losses of passes of so many images, without end."""
        parts = dict(zip(MODULES, (self.backbone["body"], self.backbone["fpn"], self.rpn, self.roi_heads), strict=True))
        while True:
            loss = torch.zeros(())
            for module, part in parts.items():
                drawn = torch.randn(images, self.SIZE, generator=generator)
                loss = loss + part(drawn * DEVIATIONS[module] + MEANS[module]).mean()
            yield loss


def against_known_covariance(passes: int) -> dict[str, list[float]]:
    """By module: the errors of both mean estimates in standard errors, and these relative to tr(Sigma) + |g|^2.

    A step compares a gradient of each rank and pass, and has one degree of freedom fewer than it has gradients. The
    steps of each of 8 seeds have 100 in all.
    """
    steps = math.ceil(100 / (comm.size() * passes - 1))
    module = Vectors()
    measured = Measured(module, images=3, passes=passes)
    found = []
    for seed in range(8):
        losses = module.losses(3, torch.Generator().manual_seed(1000 * seed + comm.rank()))
        found += [measured.step(losses) for _ in range(steps)]
    result = {}
    for name, truth in module.truth().items():
        values = torch.tensor([step[name] for step in found], dtype=torch.float64)
        error = values.mean(0) - torch.tensor(truth, dtype=torch.float64)
        deviation = values.std(0) / math.sqrt(len(values))
        result[name] = [*(error / deviation).tolist(), *(deviation / sum(truth)).tolist()]
    return result


def bad_input() -> dict[str, Any]:
    """What steps give that have no images on one rank, gradients that are not finite, or none at all."""
    module = Vectors()
    measured = Measured(module, images=3)
    losses = module.losses(3, torch.Generator().manual_seed(comm.rank()))
    first = comm.rank() == 0
    zero = (loss * 0 for loss in losses)
    nan = (loss + module.rpn.weight.sum() * (math.nan if first else 1.0) for loss in losses)
    return {
        "good": len(measured.step(losses)),
        "image skipped on one rank": len(measured.step(losses, images_read=2 if first else 3)),
        "nan in one module of one rank": len(measured.step(nan)),
        "zero": measured.step(zero),
    }


def agreement() -> dict[str, bool]:
    """Whether all ranks have the same averages, and measure again in the same step."""
    module = Vectors()
    measured = Measured(module, images=3)
    measured.noise.interval = "auto"
    for step in range(5):
        with measured.noise.measuring(step):
            next(module.losses(3, torch.Generator().manual_seed(comm.rank()))).backward()
        comm.synchronize(measured.optimizer)
        measured.noise.update(step, 3, 1.0, step_seconds=1e-4 * (1 + comm.rank()))
        measured.optimizer.zero_grad()
    averages = measured.noise.averages
    states = comm.gather_objects(vars(averages), "test.averages")
    return {"the same": all(state == states[0] for state in states), "not in every step": averages.next_step > 5}


def loss_scale() -> float:
    """The difference that a loss scale makes to the estimates of a step."""

    def estimated(scale: float) -> Estimates:
        module = Vectors()
        losses = module.losses(3, torch.Generator().manual_seed(comm.rank()))
        return Measured(module, images=3, loss_scale=scale).step(losses)

    return difference(estimated(1024.0), estimated(1.0))


def measure() -> dict[str, Any]:
    """Everything, in some seconds."""
    if comm.size() == 2:
        single = {"2 passes": against_single_images(passes=2), "fp16": against_single_images(passes=1, fp16=True)}
    else:
        single = {"1 pass": against_single_images(passes=1)}
    return {
        "single images": single,
        "cgbn": against_gradients_of_units(),
        "loss scale": loss_scale(),
        "known covariance": {f"{passes} passes": against_known_covariance(passes) for passes in (1, 3)},
        "bad input": bad_input(),
        "agreement": agreement(),
    }


if __name__ == "__main__":
    common.main(measure)
