"""How large messages travel."""

from pathlib import Path

import launching

SCRIPT = Path(__file__).with_name("ring_order.py")


def summed_in(folder: Path, **environment: str) -> str:
    folder.mkdir()
    job = launching.Job("mpirun", 4, [], folder, SCRIPT, launching.QUICK_START | environment)
    assert job.wait() == 0, job.output
    return job.output.strip()


def test_open_mpi_sums_gradients_in_a_ring_unless_the_user_has_rules(tmp_path: Path) -> None:
    assert summed_in(tmp_path / "ours") == "ring: True, in rank order: False"
    theirs = summed_in(tmp_path / "theirs", OMPI_MCA_coll_tuned_use_dynamic_rules="0")
    assert theirs == "ring: False, in rank order: False"
