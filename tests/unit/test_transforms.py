"""Resizing and augmentation keep boxes on their objects; all randomness comes from the generator they are given."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from horovod_megdet.config import DataConfig
from horovod_megdet.data.transforms import (
    DetectionTransform,
    distort,
    evaluation_transforms,
    fit_size,
    training_transform,
)

Transformed = tuple[Tensor, Tensor]

sides = st.integers(1, 4000)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def white_rectangle(height: int, width: int, box: tuple[int, int, int, int]) -> Tensor:
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = 255
    return image


def box_of_white(image: Tensor) -> list[int]:
    rows, columns = torch.nonzero(image[0] > 127, as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def transformed(transform: DetectionTransform, image: Tensor, boxes: Tensor, random: torch.Generator) -> Transformed:
    size = (image.shape[1], image.shape[2])
    return transform.apply(image, boxes, size, transform.draw_size(size, random), random)


@given(height=sides, width=sides, shorter=st.integers(32, 1000), longer=st.integers(32, 2000))
def test_fit_size_keeps_the_bounds_and_the_shape(height: int, width: int, shorter: int, longer: int) -> None:
    new_height, new_width = fit_size((height, width), shorter, longer)
    new = sorted((new_height, new_width))
    assert new[1] <= longer
    assert new[0] <= shorter
    assert new[0] == shorter or new[1] == longer
    assert new_height == pytest.approx(height * new_width / width, abs=1 + max(height / width, width / height))


def test_fit_size_of_coco() -> None:
    assert fit_size((480, 640), 800, 1333) == (800, 1067)
    assert fit_size((640, 480), 800, 1333) == (1067, 800)
    assert fit_size((300, 1000), 800, 1333) == (400, 1333)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("shorter_side", [64, 128, 256])
def test_boxes_stay_on_their_objects(flip: float, shorter_side: int) -> None:
    box = (16, 24, 80, 56)
    transform = DetectionTransform((shorter_side,), 1000, horizontal_flip=flip)
    image, boxes = transformed(
        transform, white_rectangle(128, 192, box), torch.tensor([box], dtype=torch.float32), generator()
    )
    assert image.dtype == torch.uint8
    assert image.shape == (3, shorter_side, shorter_side * 3 // 2)
    assert boxes.dtype == torch.float32
    assert boxes[0].tolist() == pytest.approx(box_of_white(image), abs=1)
    assert (boxes[0, 0] < image.shape[2] / 4) == (flip == 0.0)


def test_boxes_of_an_image_that_was_decoded_at_half_its_size() -> None:
    box = (16, 24, 80, 56)
    transform = DetectionTransform((64,), 1000)
    image, boxes = transform.apply(
        white_rectangle(64, 96, (8, 12, 40, 28)),
        torch.tensor([box], dtype=torch.float32),
        size=(128, 192),
        new_size=(64, 96),
        generator=generator(),
    )
    assert boxes[0].tolist() == box_of_white(image)


def test_no_boxes() -> None:
    transform = DetectionTransform((64,), 1000, horizontal_flip=1.0, photometric=True)
    image, boxes = transformed(transform, white_rectangle(100, 100, (1, 1, 9, 9)), torch.empty(0, 4), generator())
    assert image.shape == (3, 64, 64)
    assert boxes.shape == (0, 4)


def test_randomness_comes_from_the_generator_alone() -> None:
    data = DataConfig(shorter_side_train=(40, 50, 60), longer_side_train=200, photometric=True)
    transform = training_transform(data)
    original = torch.randint(0, 256, (3, 30, 45), dtype=torch.uint8, generator=generator())
    boxes = torch.tensor([[3.0, 4.0, 20.0, 25.0]])
    state = torch.get_rng_state()
    results = [transformed(transform, original, boxes, generator(seed)) for seed in (*range(20), *range(20))]
    assert torch.equal(torch.get_rng_state(), state)
    for (image, moved), (same_image, same_moved) in zip(results[:20], results[20:], strict=True):
        assert torch.equal(image, same_image)
        assert torch.equal(moved, same_moved)
    assert {image.shape[1] for image, _ in results} == {40, 50, 60}, "every scale is drawn"
    flipped = [bool(moved[0, 0] > image.shape[2] / 2 - 10) for image, moved in results]
    assert any(flipped)
    assert not all(flipped)
    assert torch.equal(boxes, torch.tensor([[3.0, 4.0, 20.0, 25.0]])), "the input is untouched"


def test_evaluation_is_not_random() -> None:
    data = DataConfig(shorter_side_test=50, longer_side_test=70, photometric=True)
    (transform,) = evaluation_transforms(data, scales=())
    original = torch.randint(0, 256, (3, 30, 45), dtype=torch.uint8, generator=generator())
    first, _ = transformed(transform, original, torch.empty(0, 4), generator(1))
    second, _ = transformed(transform, original, torch.empty(0, 4), generator(2))
    assert torch.equal(first, second)
    assert first.shape == (3, 47, 70)


def test_distortion_changes_colors_within_reason() -> None:
    original = torch.randint(60, 200, (3, 30, 45), dtype=torch.uint8, generator=generator())
    changes = [(distort(original, generator(seed)).float() - original.float()).abs().mean() for seed in range(10)]
    assert min(changes) > 0
    assert 2 < sum(changes) / len(changes) < 60
