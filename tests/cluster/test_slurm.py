"""The batch scripts, unchanged, on a real Slurm cluster with two nodes."""

import re
from pathlib import Path
from typing import Any

from hosts import PROJECT, VENV_BIN, Hosts, wait_for
from jobs import INTERFACE, ONLY_WHEN_STOPPED, Training

from slurm import Slurm

ENVIRONMENT = {
    "MEGDET_VENV": str(VENV_BIN.parent),
    "MEGDET_RANKS_PER_NODE": "1",
    "MEGDET_INTERFACE": INTERFACE,
}


class BatchJob:
    """A submitted training of the tiny configuration."""

    def __init__(self, slurm: Slurm, training: Training, script: str, **more: str) -> None:
        self.slurm, self.training = slurm, training
        self.file = training.run_dir.with_suffix(".out")
        environment = ENVIRONMENT | {"MEGDET_RUN_DIR": str(training.run_dir), **more}
        arguments = [
            argument for argument in training.arguments() if argument not in ("--run-dir", str(training.run_dir))
        ]
        self.number = slurm.submit(
            f"--nodes={training.among}",
            f"--output={self.file}",
            str(PROJECT / "slurm" / script),
            *arguments,
            env=environment,
        )

    @property
    def output(self) -> str:
        return self.file.read_text(errors="replace") if self.file.exists() else ""

    def wait_for(self, pattern: str, timeout: float = 60) -> None:
        """Waits for a line of the output."""
        wait_for(
            lambda: re.search(pattern, self.output, flags=re.MULTILINE),
            pattern,
            lambda: f"{self.output}\n{self.slurm.logs()}",
            timeout,
        )

    def wait_for_start(self, number: int) -> None:
        """Waits until a start of the job has trained two steps."""
        self.wait_for(rf"megdet: ==== job {self.number}, start {number},")
        done = self.training.steps_done()
        self.wait_for(rf"start {number},(.*\n)*step {done + 2} ")


def test_three_time_limits_and_a_lost_node_change_no_bit(
    slurm: Slurm, hosts: Hosts, shared: Path, data: Path, undisturbed: dict[str, Any]
) -> None:
    training = Training(hosts, shared / "run", data, settings=ONLY_WHEN_STOPPED)
    batch = BatchJob(slurm, training, "megdet.sbatch")
    for start in (1, 2, 3):
        batch.wait_for_start(start)
        slurm.run("scancel", "--signal=USR1", "--batch", str(batch.number))
    batch.wait_for_start(4)
    hosts[1].kill()
    batch.wait_for("a node was lost or the job stalled: failure 1,")
    slurm.boot_node(hosts[1])
    batch.wait_for("megdet: finished", timeout=120)
    assert re.search(rf"megdet: ==== job {batch.number}, start 5,", batch.output), "requeued after each of them"
    assert re.search(r"rank 1 on hostB lost at step \d+", batch.output)
    assert training.result() == undisturbed
    wait_for(lambda: slurm.state(batch.number) == "COMPLETED", "the job to be completed")


def test_srun_without_pmi_is_refused(slurm: Slurm, shared: Path, data: Path, hosts: Hosts) -> None:
    training = Training(hosts, shared / "run", data)
    program = ["python", str(PROJECT / "train.py"), *training.arguments()]
    output = slurm.run("srun", "--mpi=none", "--nodes=2", "--ntasks=2", *program, check=False)
    assert "srun started 2 processes that do not know about each other" in output
    assert not training.run_dir.exists()


def test_an_elastic_job_goes_on_without_a_node(slurm: Slurm, hosts: Hosts, shared: Path, data: Path) -> None:
    """Also when Slurm has given the node up; at a time limit it is requeued."""
    training = Training(hosts, shared / "run", data, among=3, settings={**ONLY_WHEN_STOPPED, "solver.epochs": "60"})
    batch = BatchJob(slurm, training, "megdet_elastic.sbatch", MEGDET_MIN_NODES="2")
    batch.wait_for(r"^(\[\d\]<stdout>:)?step 2 ")
    hosts[2].kill()
    batch.wait_for(r"3 -> 2 ranks at epoch [\d.]+ \(lost: 1 on hostC\)")
    wait_for(lambda: "hostC" in slurm.run("sinfo", "--states=down", "--format=%N"), "Slurm to give up", slurm.logs, 120)
    assert slurm.state(batch.number) == "RUNNING"
    slurm.run("scancel", "--signal=USR1", "--batch", str(batch.number))
    batch.wait_for(rf"megdet: ==== job {batch.number}, start 2, 3 nodes", timeout=120)
    batch.wait_for("Resuming after step", timeout=120)
    slurm.run("scancel", str(batch.number))
    slurm.boot_node(hosts[2])
