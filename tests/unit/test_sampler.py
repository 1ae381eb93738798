"""The order of images and how ranks share it."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from horovod_megdet.data.sampler import GroupedBatchSampler, ImageStream, evaluation_shard

counts = st.integers(0, 40)
lengths = st.integers(1, 7)
seeds = st.integers(0, 2**40)


def sizes_of(landscape: int, portrait: int) -> NDArray[np.int64]:
    return np.array([(480, 640)] * landscape + [(640, 480)] * portrait).reshape(-1, 2)


streams = st.builds(
    lambda landscape, portrait, length, seed: ImageStream(sizes_of(landscape + 1, portrait), length, seed),
    counts,
    counts,
    lengths,
    seeds,
)


@given(stream=streams, epoch=st.integers(0, 20))
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
    assert whole == [(epoch, stream.order(epoch)[place]) for epoch, place in expected]


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

    def images(ranks: int, start: int, stop: int) -> list[tuple[int, int]]:
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
