"""How large messages and objects travel."""

from pathlib import Path

import launching
import pytest

SCRIPTS = Path(__file__).parent


def summed_in(folder: Path, **environment: str) -> str:
    folder.mkdir()
    job = launching.Job("mpirun", 4, [], folder, SCRIPTS / "ring_order.py", launching.QUICK_START | environment)
    assert job.wait() == 0, job.output
    return job.output.strip()


def test_open_mpi_sums_gradients_in_a_ring_unless_the_user_has_rules(tmp_path: Path) -> None:
    assert summed_in(tmp_path / "ours") == "ring: True, in rank order: False"
    theirs = summed_in(tmp_path / "theirs", OMPI_MCA_coll_tuned_use_dynamic_rules="0")
    assert theirs == "ring: False, in rank order: False"


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_objects_of_any_length_reach_all_ranks(launcher: str, tmp_path: Path) -> None:
    job = launching.Job(launcher, 3, [], tmp_path, SCRIPTS / "objects.py")
    assert job.wait() == 0, job.output
    for rank in range(3):
        assert f"rank {rank}: right: True, gathered in 1 message" in job.output
