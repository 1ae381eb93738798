"""An evaluation has the same result on any number of ranks."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import evaluation_ranks
import pytest
import torch

from horovod_megdet.data.synthetic import ensure_synthetic

MANY, TWO = 7, 2
JOBS = ("noisy", "detector", "views", "few images")


@dataclass(frozen=True)
class Results:
    """The results of a job."""

    ranks: list[dict[str, Any]]
    """What each rank returned."""
    files: dict[str, str]
    """The detections as written."""


def read(folder: Path, ranks: int) -> Results:
    seen = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return Results(seen, {job: (folder / f"{job}.json").read_text() for job in JOBS})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    ensure_synthetic(root / "many", train_images=1, val_images=MANY)
    ensure_synthetic(root / "two", train_images=1, val_images=TWO)
    return root


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """In this process, without a launcher."""
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: the order of sums depends on it
    evaluation_ranks.main(root, folder)
    torch.set_num_threads(threads)
    return read(folder, 1)


@pytest.fixture(
    scope="module", params=[(2, "mpi"), (3, "mpi"), (2, "gloo")], ids=lambda param: f"{param[0]} {param[1]}"
)
def together(
    request: pytest.FixtureRequest,
    run_ranks: Callable[..., CompletedProcess[str]],
    root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Results:
    """On several ranks."""
    ranks, controller = request.param
    folder = tmp_path_factory.mktemp("together")
    run_ranks("evaluation_ranks.py", ranks, str(root), str(folder), controller=controller)
    return read(folder, ranks)


@pytest.mark.parametrize("job", JOBS)
def test_metrics_and_detections_do_not_depend_on_the_number_of_ranks(
    alone: Results, together: Results, job: str
) -> None:
    assert [rank[job]["row"] for rank in together.ranks] == [alone.ranks[0][job]["row"]] * len(together.ranks)
    assert together.files[job] == alone.files[job]


def test_a_missing_or_duplicate_image_would_change_these_numbers(alone: Results) -> None:
    assert 0.1 < alone.ranks[0]["noisy"]["row"]["AP"] < 0.9
    assert len(json.loads(alone.files["detector"])) > 10 * MANY
    assert alone.files["views"] != alone.files["detector"]


@pytest.mark.parametrize(("job", "images"), [("noisy", MANY), ("few images", TWO)])
def test_every_image_is_predicted_once_and_ranks_have_equal_shares(together: Results, job: str, images: int) -> None:
    shares = [rank[job]["mine"] for rank in together.ranks]
    assert sum(shares) == images
    assert max(shares) - min(shares) <= 1
    assert [rank[job]["images"] for rank in together.ranks] == [images] * len(shares)


def test_the_validation_loss_has_the_same_bits_on_any_number_of_ranks(alone: Results, together: Results) -> None:
    expected = alone.ranks[0]["losses"]
    assert all(value > 0 for value in expected.values())
    assert [rank["losses"] for rank in together.ranks] == [expected] * len(together.ranks)


def test_an_unreadable_image_on_one_rank_is_an_error_on_all(together: Results) -> None:
    last = len(together.ranks) - 1
    assert len({rank["error"] for rank in together.ranks}) == 1
    assert together.ranks[0]["error"].startswith(f"broken.jpg: not an image. (rank {last} on ")
