"""What holds for all tests."""

from collections.abc import Iterator

import hypothesis
import pytest
from chromium import EXECUTABLE, Tab, chromium

# A test must not fail because the machine is slow: speed has benchmarks.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A tab of a real browser."""
    if EXECUTABLE is None:
        pytest.skip("there is no Chromium on this machine (Debian: apt-get install chromium)")
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab
