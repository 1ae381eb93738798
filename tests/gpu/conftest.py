"""The device of the tests in this folder, and scripts that several ranks run on it.

MEGDET_TEST_DEVICE=cpu runs them on the CPU, to try the tests themselves without a GPU.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent
PARALLEL = FOLDER.parent / "parallel"
sys.path.append(str(PARALLEL))

DEVICE = torch.device(os.environ.get("MEGDET_TEST_DEVICE", "cuda"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips this folder where there is no GPU."""
    if DEVICE.type == "cpu" or torch.cuda.is_available():
        return
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none"))


@pytest.fixture(scope="session", autouse=True)
def _full_precision() -> None:
    """Without TF32, so that float32 means float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests compute."""
    return DEVICE


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``run(launcher, ranks, script, *arguments, timeout=120)`` runs a script and returns what it printed.

    Fails with that if the exit code is not 0. All ranks use one GPU, and OpenMP one thread each.
    """
    import launching

    def run_script(launcher: str, ranks: int, script: Path, *arguments: Any, timeout: float = 120) -> str:
        environment = launching.ENVIRONMENT | {
            "HOROVOD_MEGDET_SHARE_GPU": "1" if ranks > 1 else "0",
            "PYTHONPATH": f"{launching.PROJECT}:{PARALLEL}",
        }
        folder = tmp_path_factory.mktemp(script.stem)
        job = launching.Job(launcher, ranks, [str(each) for each in arguments], folder, script, environment)
        code = job.wait(timeout if DEVICE.type == "cuda" else 10 * timeout)
        if code:
            pytest.fail(f"{script.name} on {ranks} ranks ended with {code}:\n{job.output}", pytrace=False)
        return job.output

    return run_script
