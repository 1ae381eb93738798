"""Fixtures that tests of several ranks share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import launching
import pytest

LAUNCHER = {"mpi": "mpirun", "gloo": "gloo"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker("parallel")


@pytest.fixture(autouse=True)
def no_job_is_left() -> Iterator[None]:
    """A test that fails leaves no job behind, which would slow down all others."""
    yield
    for job in launching.Job.started_by_test:
        job.kill()
    launching.Job.started_by_test.clear()


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CompletedProcess[str]]:
    """``run_ranks(script, ranks, *arguments, controller="mpi", timeout=120)``: runs a script of this folder, or a path.

    It runs with the torch that users have. Returns exit code and output (both streams of all ranks, in ``stdout``);
    fails with that output if the exit code is not 0.
    """

    def run(
        script: str, ranks: int, *arguments: str, controller: str = "mpi", timeout: float = 120
    ) -> CompletedProcess[str]:
        path = Path(__file__).parent / script
        folder = tmp_path_factory.mktemp(path.stem)
        job = launching.Job(LAUNCHER[controller], ranks, list(arguments), folder, path, launching.ENVIRONMENT)
        code = job.wait(timeout)
        if code:
            pytest.fail(f"{script} on {ranks} ranks ({controller}) ended with {code}:\n{job.output}", pytrace=False)
        return CompletedProcess([script, *arguments], code, job.output)

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the generated data set of ``tiny.yaml``, filled by the first run that needs it."""
    return tmp_path_factory.mktemp("data") / "synthetic"
