"""Ranks that read a data set together, as threads: who parses, who checks which files, and what each gets."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from test_annotation_cache import Folder

from horovod_megdet import launched
from horovod_megdet.data import image_files, reading
from horovod_megdet.data.coco import CocoDataset, load_dataset
from horovod_megdet.errors import UserError

T = TypeVar("T")

LIMIT = 60.0
"""Seconds after which ranks that wait for others in vain fail."""


class Job:
    """Some ranks, each a thread."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.values: list[Any] = [None] * size
        self.names: list[str] = [""] * size

    def run(self, work: Callable[["Rank"], T]) -> list[T | UserError]:
        """What each rank returned, or raised."""

        def one(number: int) -> T | UserError:
            HOST.name = f"host {number}"
            try:
                return work(Rank(self, number))
            except UserError as error:
                return error
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(one, range(self.size)))


class Rank:
    """One of them, as :class:`~horovod_megdet.data.reading.Ranks` wants it."""

    def __init__(self, job: Job, number: int) -> None:
        self.job, self.number = job, number

    def rank(self) -> int:
        return self.number

    def gather_objects(self, value: T, name: str) -> list[T]:
        self.job.values[self.number], self.job.names[self.number] = value, name
        self.job.barrier.wait(LIMIT)
        values, names = list(self.job.values), set(self.job.names)
        self.job.barrier.wait(LIMIT)
        assert len(names) == 1, f"ranks are in different collectives: {names}"
        return values

    def size(self) -> int:
        return self.job.size

    def exchange_objects(self, values: list[T], name: str) -> list[T]:
        return [sent[self.number] for sent in self.gather_objects(values, name)]

    @contextmanager
    def agreement(self, name: str) -> Iterator[None]:
        mine = None
        try:
            yield
        except UserError as error:
            mine = str(error)
        errors = [error for error in self.gather_objects(mine, f"agreement.{name}") if error]
        if errors:
            raise UserError("\n".join(sorted(set(errors))))


HOST = threading.local()


@pytest.fixture(autouse=True)
def hosts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Host of each thread; all the same unless a test changes that: ``hosts["host 1"] = "b"``."""
    names: dict[str, str] = {}
    monkeypatch.setattr(launched, "host", lambda: names.get(getattr(HOST, "name", ""), "a"))
    return names


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each JSON and image file was read."""
    read: Counter[str] = Counter()
    header, parse = image_files.read_header, reading.read_annotation_file
    monkeypatch.setattr(image_files, "read_header", lambda path: (read.update([str(path)]), header(path))[1])
    monkeypatch.setattr(reading, "read_annotation_file", lambda path: (read.update([str(path)]), parse(path))[1])
    return read


def loaded(results: list[CocoDataset | UserError]) -> list[CocoDataset]:
    assert all(isinstance(result, CocoDataset) for result in results), results
    return [result for result in results if isinstance(result, CocoDataset)]


def load(folder: Folder, rank: Rank, **options: Any) -> CocoDataset:
    return load_dataset(folder.annotations, folder.images, training=True, ranks=rank, **options)


def test_each_file_is_read_once_by_all_ranks_together(tmp_path: Path, work: Counter[str]) -> None:
    folder = Folder(tmp_path / "data", images=50)
    first = loaded(Job(4).run(lambda rank: load(folder, rank)))
    assert set(work.values()) == {1}
    assert len(work) == 51
    work.clear()
    second = loaded(Job(3).run(lambda rank: load(folder, rank)))
    assert not work
    assert len({dataset.fingerprint for dataset in first + second}) == 1
    assert all(dataset.ground_truth.mapping for dataset in first + second)


def test_hosts_with_disks_of_their_own_read_each_its_own(
    tmp_path: Path, work: Counter[str], hosts: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    folders = [Folder(tmp_path / name, images=20) for name in "ab"]
    hosts.update({"host 2": "b", "host 3": "b"})
    results = loaded(Job(4).run(lambda rank: load(folders[rank.number // 2], rank)))
    assert set(work.values()) == {1}
    assert len(work) == 42
    assert len({dataset.fingerprint for dataset in results}) == 1
    said = capfd.readouterr().err
    for name, folder in zip("ab", folders, strict=True):
        assert f"{name}: {folder.annotations}: read with 20 images" in said
        assert str(folder.caches()[0]) in said


def test_a_host_that_has_a_cache_waits_for_one_that_has_none(
    tmp_path: Path, work: Counter[str], hosts: dict[str, str]
) -> None:
    folders = [Folder(tmp_path / name, images=20) for name in "ab"]
    hosts.update({"host 2": "b", "host 3": "b"})
    loaded(Job(1).run(lambda rank: load(folders[0], rank)))
    work.clear()
    results = loaded(Job(4).run(lambda rank: load(folders[rank.number // 2], rank)))
    assert len({dataset.fingerprint for dataset in results}) == 1
    assert set(work.values()) == {1}
    assert len(work) == 21, "only the host without a cache reads"


def test_ranks_share_what_could_not_be_kept(
    tmp_path: Path, work: Counter[str], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path / "data")
    (tmp_path / "file").write_text("")
    results = loaded(Job(3).run(lambda rank: load(folder, rank, cache_dir=tmp_path / "file" / "below")))
    assert set(work.values()) == {1}, "one parses for all even so"
    assert len({dataset.fingerprint for dataset in results}) == 1
    assert capfd.readouterr().err.count("cannot be kept") == 1


def test_hosts_with_cache_folders_of_their_own_keep_a_copy_each(
    tmp_path: Path, work: Counter[str], hosts: dict[str, str]
) -> None:
    folder = Folder(tmp_path / "data")
    hosts.update({"host 2": "b", "host 3": "b"})

    def start(rank: Rank) -> CocoDataset:
        return load(folder, rank, cache_dir=tmp_path / f"home of {launched.host()}")

    first = loaded(Job(4).run(start))
    assert set(work.values()) == {1}
    work.clear()
    second = loaded(Job(4).run(start))
    assert not work
    assert len({dataset.fingerprint for dataset in first + second}) == 1
    assert all(dataset.ground_truth.mapping for dataset in first + second)
    assert [len(list((tmp_path / f"home of {host}").iterdir())) for host in "ab"] == [1, 1]


def test_a_host_without_room_gets_a_copy(tmp_path: Path, work: Counter[str], hosts: dict[str, str]) -> None:
    folder = Folder(tmp_path / "data")
    (tmp_path / "file").write_text("")
    hosts["host 1"] = "b"
    places = [tmp_path / "good", tmp_path / "file" / "below"]
    results = loaded(Job(2).run(lambda rank: load(folder, rank, cache_dir=places[rank.number])))
    assert set(work.values()) == {1}
    assert [dataset.ground_truth.mapping is not None for dataset in results] == [True, False]
    assert len({dataset.fingerprint for dataset in results}) == 1


def no_json(folder: Folder) -> None:
    folder.annotations.unlink()


def bad_json(folder: Folder) -> None:
    folder.annotations.write_text("{")


def no_images(folder: Folder) -> None:
    folder.images.rename(folder.images.with_name("away"))


def missing_image(folder: Folder) -> None:
    (folder.images / "2.png").unlink()


SPOILED = {
    no_json: "no such annotation file",
    bad_json: "not valid JSON",
    no_images: "no such image folder",
    missing_image: "image 2 (2.png): no such image file",
}


@pytest.mark.parametrize(("spoil", "sentence"), SPOILED.items())
@pytest.mark.parametrize("everywhere", [True, False])
def test_an_error_on_one_rank_ends_all(
    tmp_path: Path, spoil: Callable[[Folder], None], sentence: str, everywhere: bool
) -> None:
    good, bad = Folder(tmp_path / "good"), Folder(tmp_path / "bad")
    spoil(bad)
    results = Job(3).run(lambda rank: load(bad if everywhere or rank.number == 2 else good, rank))
    assert {str(result) for result in results} == {str(results[0])}
    assert sentence in str(results[0])


def test_a_cache_that_is_replaced_meanwhile_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job writes a cache of other content just before this one's ranks map theirs."""
    folder = Folder(tmp_path / "data")
    expected = folder.load(cache_dir=tmp_path / "elsewhere").fingerprint
    other = Folder(tmp_path / "other", images=4)
    other.load()
    share = reading._Team.share

    def replaced(team: Any, digest: str, leader: Any) -> Any:
        if team.leads:
            other.caches()[0].replace(folder.caches()[0])
        team.ranks.gather_objects(None, "replaced")
        return share(team, digest, leader)

    monkeypatch.setattr(reading._Team, "share", replaced)
    results = loaded(Job(2).run(lambda rank: load(folder, rank)))
    assert [dataset.fingerprint for dataset in results] == [expected] * 2


def test_a_long_check_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading, "REPORT_SECONDS", 0.0)
    folder = Folder(tmp_path / "data", images=10)
    loaded(Job(2).run(lambda rank: load(folder, rank)))
    said = capfd.readouterr().err
    assert f"a: {folder.images}: checked 10 image files so far." in said
