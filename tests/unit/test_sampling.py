"""Anchors and RoIs of all images together: as torchvision has them one image at a time, and sampled by seeds alone."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_detector import build, example
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import _utils
from torchvision.models.detection import roi_heads as torchvision_roi_heads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou

from horovod_megdet.models import suppression
from horovod_megdet.models.boxes import decode, encode
from horovod_megdet.models.roi_heads import SAMPLED_ROIS
from horovod_megdet.models.rpn import SAMPLED_ANCHORS
from horovod_megdet.models.sampling import (
    BACKGROUND,
    IGNORED,
    Objects,
    Proposals,
    image_seeds,
    match,
    random_keys,
    sample,
)


def random_boxes(count: int, seed: int, grid: float = 4.0) -> Tensor:
    """Boxes with corners on a coarse grid, so that many overlap equally."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 12, (count, 2), generator=generator)
    sizes = torch.randint(1, 8, (count, 2), generator=generator)
    return torch.cat([corners, corners + sizes], dim=1) * grid


def as_objects(boxes: list[Tensor]) -> Objects:
    return Objects.of(
        [{"boxes": each, "labels": torch.ones(len(each), dtype=torch.int64)} for each in boxes], torch.float
    )


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=3), boxes=st.integers(1, 40), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_matches_are_those_of_torchvision(
    counts: list[int], boxes: int, seed: int, keep_best: bool, shared: bool
) -> None:
    truth = [random_boxes(count, seed + number) for number, count in enumerate(counts)]
    proposed = torch.stack([random_boxes(boxes, seed - 1 - number) for number in range(1 if shared else len(truth))])
    found = match(as_objects(truth), proposed, 0.5, 0.3, keep_best)
    matcher = _utils.Matcher(0.5, 0.3, allow_low_quality_matches=keep_best)
    names = {_utils.Matcher.BELOW_LOW_THRESHOLD: BACKGROUND, _utils.Matcher.BETWEEN_THRESHOLDS: IGNORED}
    for objects, own, matches in zip(truth, proposed.expand(len(truth), -1, -1), found, strict=True):
        expected = matcher(box_iou(objects, own)).tolist() if len(objects) else [BACKGROUND] * boxes
        assert matches.tolist() == [names.get(each, each) for each in expected]


@given(seed=st.integers(0, 10**6))
def test_offsets_are_those_of_torchvision(seed: int) -> None:
    boxes, truth = random_boxes(7, seed), random_boxes(7, seed + 1)
    coder = _utils.BoxCoder((10.0, 10.0, 5.0, 5.0))
    offsets = encode(truth, boxes, (10.0, 5.0))
    assert torch.equal(offsets, coder.encode_single(truth, boxes))
    far = offsets + 40 * torch.randn(7, 4, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(decode(far, boxes, (10.0, 5.0)), coder.decode_single(far, boxes))
    torch.testing.assert_close(decode(offsets, boxes, (10.0, 5.0)), truth)


def test_random_keys_are_splitmix64() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert random_keys(torch.tensor([0]), 4)[0, 1:].tolist() == [value & (2**63 - 1) for value in published]


def test_sampling_depends_on_the_seed_of_the_image_alone() -> None:
    one = torch.tensor([3] * 30 + [BACKGROUND] * 50 + [IGNORED] * 9)
    other = torch.tensor([BACKGROUND] * 70 + [IGNORED] * 19)

    def drawn(images: list[Tensor], seeds: list[int]) -> list[list[int]]:
        samples = sample(torch.stack(images), torch.tensor(seeds), 20, 0.5)
        rows = zip(samples.indices, samples.valid, strict=True)
        return [sorted(indices[valid].tolist()) for indices, valid in rows]

    state = torch.get_rng_state()
    first, second = drawn([one, other], [5, 6])
    assert drawn([other, one], [6, 5])[1] == first
    assert drawn([one], [7])[0] != first
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(index < 30 for index in first) == sum(30 <= index < 80 for index in first) == 10
    assert len(set(second)) == 20
    assert max(second) < 70


def test_every_box_is_drawn_equally_often() -> None:
    matches = torch.tensor([0] * 10 + [BACKGROUND] * 40)
    samples = sample(matches.expand(4000, -1), torch.arange(4000), 20, 0.25)
    drawn = torch.bincount(samples.indices[samples.valid], minlength=50)
    # 5 of 10 and 15 of 40: expected 2000 and 1500, each with a standard deviation of about 31.
    assert (drawn[:10] - 2000).abs().max() < 150
    assert (drawn[10:] - 1500).abs().max() < 150


@pytest.mark.parametrize(("positives", "negatives"), [(0, 3), (2, 0), (2, 5), (30, 5), (0, 0)])
def test_with_few_candidates_fewer_are_drawn(positives: int, negatives: int) -> None:
    matches = torch.tensor([[0] * positives + [BACKGROUND] * negatives])
    samples = sample(matches, torch.tensor([1]), 16, 0.25)
    indices = samples.indices[samples.valid].tolist()
    assert sum(index < positives for index in indices) == min(4, positives)
    assert sum(index >= positives for index in indices) == min(16 - min(4, positives), negatives)


class Given:
    """A sampler for torchvision that returns chosen samples as the masks it wants."""

    def __init__(self, matches: Tensor, samples: Any) -> None:
        self.masks: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels, indices, valid in zip(matches, samples.indices, samples.valid, strict=True):
            drawn = torch.zeros_like(labels, dtype=torch.bool).index_fill_(0, indices[valid], True)
            self.masks[0].append((drawn & (labels >= 0)).to(torch.uint8))
            self.masks[1].append((drawn & (labels == BACKGROUND)).to(torch.uint8))

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        sizes = [len(each) for each in labels]
        cut = [[mask[:size] for mask, size in zip(masks, sizes, strict=True)] for masks in self.masks]
        return cut[0], cut[1]


def test_losses_and_proposals_of_the_rpn_are_those_of_torchvision() -> None:
    detector, (images, targets) = build().train(), example(3)
    batch, _ = detector.transform(images)
    features = {name: level.detach() for name, level in detector.backbone(batch.tensors).items()}
    for scale in (1.0, 30.0):  # the second sends boxes out of the image and makes others too small
        torch.nn.init.normal_(detector.rpn.head.bbox_pred.weight, std=0.01 * scale)
        proposals, losses = detector.rpn(batch, features, targets)
        anchors = detector.rpn.anchor_generator(batch, list(features.values()))[0]
        matches = match(as_objects([target["boxes"] for target in targets]), anchors[None], 0.7, 0.3, keep_best=True)
        samples = sample(matches, 2 * image_seeds(targets, anchors.device), 32, 0.5)
        detector.rpn.fg_bg_sampler = Given(matches, samples)
        expected, expected_losses = RegionProposalNetwork.forward(detector.rpn, batch, features, targets)
        assert losses.pop(SAMPLED_ANCHORS) == 96
        assert losses.keys() == expected_losses.keys()
        for name, loss in losses.items():
            torch.testing.assert_close(loss, expected_losses[name])
        for ours, theirs in zip(proposals.of_each_image(), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_losses_of_the_roi_heads_are_those_of_torchvision() -> None:
    detector, (images, targets) = build(box_head_norm="none").train(), example(3)
    heads = detector.roi_heads
    batch, _ = detector.transform(images)
    features = {name: level.detach() for name, level in detector.backbone(batch.tensors).items()}
    proposals = [8.0 * random_boxes(40, number, 1.0) for number in range(3)]
    torch.nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.1)
    rows, valid = torch.stack(proposals), torch.ones(3, 40, dtype=torch.bool)
    _, losses = heads(features, Proposals(rows, valid), batch.image_sizes, targets)
    objects = as_objects([target["boxes"] for target in targets])
    matches = match(objects, torch.cat([rows, objects.boxes], dim=1), 0.5, 0.5, keep_best=False)
    matches = matches.masked_fill(~torch.cat([valid, objects.valid], dim=1), IGNORED)
    heads.fg_bg_sampler = Given(matches, sample(matches, 2 * image_seeds(targets, matches.device) + 1, 32, 0.25))
    _, expected = torchvision_roi_heads.RoIHeads.forward(heads, features, proposals, batch.image_sizes, targets)
    assert 60 < losses.pop(SAMPLED_ROIS) <= 96
    assert losses.keys() == expected.keys()
    assert losses["loss_box_reg"] > 0
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])


class Waits(TorchDispatchMode):
    """Counts the operators for whose result the host has to wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"aten::nonzero": 0, "aten::_local_scalar_dense": 0, "aten::masked_select": 0}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name() in self.counts:
            self.counts[function.name()] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("count", [1, 4])
def test_where_the_host_waits_in_a_forward_pass(count: int) -> None:
    detector, batch = build().train(), example(count)
    with Waits() as waits:
        detector.forward_losses(*batch)
    # For the sampled RoIs. On a GPU torchvision's RoIAlign waits once more for each level.
    assert waits.counts == {"aten::nonzero": 1, "aten::_local_scalar_dense": 0, "aten::masked_select": 0}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("threshold", [0.7, 0.5, 0.0])
def test_the_boxes_kept_are_those_of_torchvision(threads: int, threshold: float) -> None:
    sizes = [900, 200, 3, 0, 1]
    boxes = torch.stack([random_boxes(sum(sizes), seed=seed, grid=3.7) for seed in range(3)])
    boxes[2] += torch.rand(boxes[2].shape, generator=torch.Generator().manual_seed(3))
    valid = torch.rand(boxes.shape[:2], generator=torch.Generator().manual_seed(4)) > 0.1
    boxes = boxes.masked_fill(~valid[..., None], 0)
    falling = torch.linspace(1, 0.1, sum(sizes)).expand(3, -1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kept = suppression.not_suppressed(boxes, falling, valid, sizes, threshold, training=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(kept, suppression.image_by_image(boxes, falling, sizes, threshold))
    assert kept.any()
    assert not kept.all()
    assert suppression.not_suppressed(boxes[:0], falling[:0], valid[:0], sizes, threshold, training=True).shape[0] == 0
