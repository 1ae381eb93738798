"""The order of images and how ranks share it."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from horovod_megdet.data.repeat_factors import UNIT, RepeatFactors
from horovod_megdet.data.sampler import GroupedBatchSampler, ImageStream, PlannedImage, evaluation_shard

counts = st.integers(0, 40)
lengths = st.integers(1, 7)
seeds = st.integers(0, 2**40)


def sizes_of(landscape: int, portrait: int) -> NDArray[np.int64]:
    return np.array([(480, 640)] * landscape + [(640, 480)] * portrait).reshape(-1, 2)


def stream_of(landscape: int, portrait: int, length: int, seed: int, drawn: list[float] | None) -> ImageStream:
    sizes = sizes_of(landscape + 1, portrait)
    factors = None
    if drawn:
        of_images = np.resize(np.rint(np.array(drawn) * UNIT).astype(np.int64), len(sizes))
        factors = RepeatFactors(of_images, np.ones(1))
    return ImageStream(sizes, length, seed, factors)


plain_streams = st.builds(stream_of, counts, counts, lengths, seeds, st.none())
factors_of_images = st.lists(st.floats(1, 4), min_size=1, max_size=5)
repeating_streams = st.builds(stream_of, counts, counts, lengths, seeds, factors_of_images)
streams = st.one_of(plain_streams, repeating_streams)


@given(stream=plain_streams, epoch=st.integers(0, 20))
def test_an_epoch_is_every_image_once(stream: ImageStream, epoch: int) -> None:
    assert sorted(stream.order(epoch)) == list(range(len(stream)))


@given(stream=streams, epoch=st.integers(0, 20))
def test_runs_at_aligned_positions_are_of_one_group(stream: ImageStream, epoch: int) -> None:
    length, start = stream.images_per_rank, epoch * len(stream)
    portrait = stream.portrait[stream.order(epoch)]
    first = -start % length
    runs = [portrait[at : at + length] for at in range(first, len(stream) - length + 1, length)]
    mixed = [run for run in runs if 0 < run.sum() < length]
    assert len(mixed) <= 1, "only leftovers are mixed"


@given(stream=streams, position=st.integers(0, 500), count=st.integers(0, 100), parts=st.integers(1, 5))
def test_the_stream_is_the_same_however_it_is_cut(stream: ImageStream, position: int, count: int, parts: int) -> None:
    whole = stream.indices(position, count)
    edges = [position + count * part // parts for part in range(parts + 1)]
    pieces = [stream.indices(a, b - a) for a, b in itertools.pairwise(edges)]
    assert [image for piece in pieces for image in piece] == whole
    expected = [divmod(at, len(stream)) for at in range(position, position + count)]
    assert [image[:2] for image in whole] == [(epoch, stream.order(epoch)[place]) for epoch, place in expected]


@given(stream=streams, ranks=st.integers(1, 9), start=st.integers(0, 200), images=st.integers(0, 200))
def test_ranks_share_the_stream_in_lock_step(stream: ImageStream, ranks: int, start: int, images: int) -> None:
    stop = start + images
    samplers = [GroupedBatchSampler(stream, rank, ranks, start, stop) for rank in range(ranks)]
    batches = [list(sampler) for sampler in samplers]
    assert {len(sampler) for sampler in samplers} == {len(batches[0])} == {len(own) for own in batches}
    dealt = [image for one_pass in zip(*batches, strict=True) for batch in one_pass for image in batch]
    assert dealt == stream.indices(start, len(dealt)), "disjoint, nothing left out"
    images_per_pass = ranks * stream.images_per_rank
    assert images <= len(dealt) < images + images_per_pass


@given(
    stream=streams,
    ranks=st.integers(1, 6),
    other_ranks=st.integers(1, 6),
    passes=st.integers(0, 10),
)
def test_resuming_on_another_number_of_ranks_continues_at_the_same_image(
    stream: ImageStream, ranks: int, other_ranks: int, passes: int
) -> None:
    position = passes * ranks * stream.images_per_rank
    stop = position + 3 * other_ranks * stream.images_per_rank

    def images(ranks: int, start: int, stop: int) -> list[PlannedImage]:
        dealt = zip(*(GroupedBatchSampler(stream, rank, ranks, start, stop) for rank in range(ranks)), strict=True)
        return [image for one_pass in dealt for batch in one_pass for image in batch]

    resumed = images(ranks, 0, position) + images(other_ranks, position, stop)
    assert resumed == images(1, 0, stop)


def test_order_depends_on_seed_and_epoch_only() -> None:
    sizes = sizes_of(50, 50)
    orders = [ImageStream(sizes, 2, seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    again = ImageStream(sizes, 2, 1)
    assert [again.order(epoch).tolist() for epoch in (5, 1, 0, 1)][1] == orders[3]


def test_both_groups_are_spread_over_the_epoch() -> None:
    stream = ImageStream(sizes_of(500, 500), 2, seed=3)
    halves = np.split(stream.portrait[stream.order(0)], 2)
    assert all(0.4 < half.mean() < 0.6 for half in halves)


@pytest.mark.parametrize("start", [10, 11])
def test_nothing_to_do(start: int) -> None:
    sampler = GroupedBatchSampler(ImageStream(sizes_of(5, 0), 2, 0), 0, 1, start, 10)
    assert list(sampler) == []
    assert len(sampler) == 0


# Repeat factors


@given(stream=repeating_streams, epoch=st.integers(0, 20))
def test_an_image_comes_as_often_as_its_factor_says_rounded_up_or_down(stream: ImageStream, epoch: int) -> None:
    assert stream.factors
    factors, images = stream.factors.of_images / UNIT, len(stream.portrait)
    often = np.bincount(stream.order(epoch), minlength=images)
    assert often.sum() == len(stream) == np.ceil(factors.sum())
    assert (often >= np.floor(factors)).all()
    assert (often <= np.ceil(factors + 1 / images + 2 / UNIT)).all()


@given(stream=repeating_streams, epoch=st.integers(0, 3))
def test_repeats_of_an_image_are_numbered(stream: ImageStream, epoch: int) -> None:
    planned = stream.indices(epoch * len(stream), len(stream))
    assert len(set(planned)) == len(planned), "no two places have the same augmentation"
    seen: dict[int, int] = {}
    for place in planned:
        assert place == (epoch, place.image, seen.get(place.image, 0))
        seen[place.image] = place.repeat + 1


def test_over_many_epochs_the_mean_is_the_factor() -> None:
    drawn, epochs = [1.0, 1.0, 1.25, 1.5, 2.0, 3.9], 2000
    stream = stream_of(19, 10, 2, 1, drawn)
    assert stream.factors
    often = sum(np.bincount(stream.order(epoch), minlength=30) for epoch in range(epochs)) / epochs
    expected = stream.factors.of_images / UNIT
    expected = expected + (np.ceil(expected.sum()) - expected.sum()) / 30
    # The number of times varies by less than one: its standard deviation is at most a half.
    np.testing.assert_allclose(often, expected, atol=4 * 0.5 / np.sqrt(epochs))


def test_repeats_of_one_epoch_are_not_those_of_the_next() -> None:
    stream = stream_of(40, 0, 2, 1, [1.5])
    often = [np.bincount(stream.order(epoch)).tolist() for epoch in range(4)]
    assert len({tuple(counts) for counts in often}) == 4


def test_factors_of_one_are_an_epoch_with_every_image_once() -> None:
    stream = stream_of(20, 11, 2, 3, [1.0])
    assert len(stream) == 32
    assert sorted(stream.order(1)) == list(range(32))


def test_without_factors_the_order_is_that_of_earlier_versions() -> None:
    assert ImageStream(sizes_of(5, 4), 2, 7).order(3).tolist() == [1, 5, 8, 4, 3, 0, 2, 7, 6]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 2000)), max_size=60),
    ranks=st.integers(1, 9),
)
def test_evaluation_takes_every_image_exactly_once(sizes: list[tuple[int, int]], ranks: int) -> None:
    array = np.array(sizes, dtype=np.int32).reshape(-1, 2)
    shards = [evaluation_shard(array, rank, ranks) for rank in range(ranks)]
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(sizes)))
    lengths = [len(shard) for shard in shards]
    assert max(lengths) - min(lengths) <= 1
