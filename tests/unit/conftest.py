"""What holds for all tests."""

from collections.abc import Iterator
from unittest import mock

import hypothesis
import pytest
from chromium import EXECUTABLE, Tab, chromium

# A test must not fail because the machine is slow: speed has benchmarks.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads only get into each other's way with small tensors."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def twins() -> Iterator[None]:
    """This process is one of two ranks with the same data: each sum is twice its own."""
    from horovod_megdet import comm

    with mock.patch.object(comm, "sum_", lambda tensor, name, group=None: tensor.mul_(2)):
        yield


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A tab of a real browser."""
    if EXECUTABLE is None:
        pytest.skip("there is no Chromium on this machine (Debian: apt-get install chromium)")
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab
