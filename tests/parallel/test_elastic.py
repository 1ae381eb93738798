"""Jobs whose ranks come and go, under Horovod's elastic driver: this machine stands for two hosts."""

import os
import shutil
import signal
from pathlib import Path

import launching
import pytest
from elastic_images import IMAGES, check_every_image_counts_once

from horovod_megdet.config import load_config
from horovod_megdet.engine import checkpoint
from horovod_megdet.errors import EXIT_STOPPED, EXIT_USER_ERROR
from horovod_megdet.report.rows import Rows, read_metrics

SCRIPT = Path(__file__).with_name("elastic_train.py")
NO_END = ("solver.epochs=100", "output.checkpoint_every_epochs=100", "output.log_every_images=2")
"""A run that does not end by itself, and writes a checkpoint only when it is asked to stop."""


def start(folder: Path, ranks: int, hosts: str, arguments: list[str], launcher: str = "elastic") -> launching.Job:
    """Starts an elastic job on ``hosts``, such as ``localhost:2 127.0.0.1:1``."""
    folder.mkdir(parents=True, exist_ok=True)
    find_hosts(folder, hosts)
    return launching.Job(launcher, ranks, arguments, folder, SCRIPT)


def find_hosts(folder: Path, hosts: str) -> None:
    """What the job's discovery program finds from now on."""
    new, program = folder / "hosts.new", folder / "hosts.sh"
    new.write_text(f"#!/bin/sh\nprintf '%s\\n' {hosts}\n")
    new.chmod(0o755)
    new.rename(program)


def rank_on(job: launching.Job, host: str, local_rank: int = 0) -> int:
    """The process id of a rank on a host."""
    place = {f"HOROVOD_HOSTNAME={host}".encode(), f"HOROVOD_LOCAL_RANK={local_rank}".encode()}
    for pid in job.ranks():
        if place <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
            return pid
    raise AssertionError(f"no rank {local_rank} on {host}:\n{job.output}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder of a job of two ranks. One is killed in a step, and comes back; then rank 0 ends at the evaluation of
    the first epoch, and after it has come back, rank 0 ends before a checkpoint is written."""
    folder = tmp_path_factory.mktemp("elastic")
    arguments = launching.tiny(folder / "run", "solver.epochs=3", "output.log_every_images=2", data=data)
    job = start(folder, 2, "localhost:1 127.0.0.1:1", [*arguments, "--ends"])
    job.wait_for_output("step 2 ", timeout=120)
    os.kill(rank_on(job, "127.0.0.1"), signal.SIGKILL)
    assert job.wait(400) == 0, job.output
    return folder


def metrics(folder: Path, kind: str) -> Rows:
    return [row for row in read_metrics(folder / "run" / "metrics.jsonl") if row["kind"] == kind]


def test_every_image_counts_once_in_each_epoch(run: Path) -> None:
    check_every_image_counts_once(run, epochs=3)


def test_the_others_go_on_and_lost_hosts_come_back(run: Path) -> None:
    changes = metrics(run, "ranks")
    assert [(row["ranks_before"], row["ranks"]) for row in changes] == 3 * [(2, 1), (1, 2)]
    for row in changes:
        assert (row["mini_batch_before"], row["mini_batch"]) == (2 * row["ranks_before"], 2 * row["ranks"])
        assert row["lr"] / row["lr_before"] == pytest.approx(row["ranks"] / row["ranks_before"])
    host = next(iter(changes[0]["hosts_lost"]))
    output = (run / "log.txt").read_text()
    assert f"2 -> 1 ranks at epoch {changes[0]['epoch']:.2f} (lost: 1 on {host}): mini-batch 4 -> 2, learning" in output
    assert (run / "ended_evaluating").exists()
    assert (run / "ended_writing").exists()
    assert not (run / "run" / "heartbeats").exists()


def test_what_was_due_when_a_rank_ended_is_done_once(run: Path) -> None:
    """The evaluation in which rank 0 ended, and the checkpoint that it did not write."""
    evaluations = metrics(run, "evaluation")
    assert [int(row["epoch"]) for row in evaluations] == [1, 2, 3]
    saved = [checkpoint.read(path) for path in sorted((run / "run" / "checkpoints").iterdir())]
    positions = [row["images_seen"] for row in metrics(run, "train")]
    assert positions == sorted(set(positions))
    assert all(one.images_seen in positions for one in saved)
    assert saved[-1].images_seen >= 3 * IMAGES


def test_an_evaluation_that_was_due_is_done_after_a_resume(run: Path, data: Path, tmp_path: Path) -> None:
    """Ranks that wait for others write their state as it was after the last step, before what was due then."""
    copy = Path(shutil.copytree(run / "run", tmp_path / "run"))
    (copy / "summary.json").unlink()
    saved = checkpoint.newest(copy, report=pytest.fail)
    state = saved.state()
    state.unfinished = state.position.images_seen - 4
    checkpoint.save(copy, saved.weights(), state, saved.run, saved.epoch)
    code, output = launching.run(
        "python", 1, [*launching.tiny(copy, "solver.epochs=3", data=data), "--resume"], tmp_path
    )
    assert code == 0, output
    assert (copy / "summary.json").exists()
    assert [int(row["epoch"]) for row in metrics(tmp_path, "evaluation")] == [1, 2, 3]
    assert checkpoint.newest(copy, report=pytest.fail).state().unfinished is None


def test_its_checkpoints_resume_elsewhere(run: Path, data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run / "run", tmp_path / "run"))
    arguments = [*launching.tiny(copy, "solver.epochs=3.5", data=data), "--resume"]
    code, output = launching.run("python", 1, arguments, tmp_path)
    assert code == 0, output
    assert "Resuming after step" in output
    assert checkpoint.newest(copy, report=pytest.fail).images_seen >= 3.5 * IMAGES
    assert load_config(copy / "config.yaml").solver.epochs == 3.5


def test_a_mini_batch_that_the_remaining_ranks_cannot_share(data: Path, tmp_path: Path) -> None:
    """All end with a sentence, and what is in memory is written."""
    arguments = launching.tiny(tmp_path / "run", "solver.mini_batch=6", "output.log_every_images=2", data=data)
    job = start(tmp_path, 3, "localhost:2 127.0.0.1:1", arguments)
    job.wait_for_output("step 1 ", timeout=120)
    os.kill(rank_on(job, "127.0.0.1"), signal.SIGKILL)
    assert job.wait(120) == EXIT_USER_ERROR, job.output
    assert "solver.mini_batch = 6 is not a multiple of 4 = 2 ranks x 2 images" in job.output
    steps = [row["step"] for row in metrics(tmp_path, "train")]
    assert checkpoint.newest(tmp_path / "run", report=pytest.fail).step >= steps[-1] >= 1


def test_a_job_that_waits_for_a_rank_stops_when_it_is_asked_to(data: Path, tmp_path: Path) -> None:
    """The new rank has ended before it has met the others, which would wait for it for two minutes."""
    arguments = launching.tiny(tmp_path / "run", *NO_END, data=data)
    job = start(tmp_path, 2, "localhost:2", [*arguments, "--broken", "127.0.0.1"])
    job.wait_for_output("step 2 ", timeout=120)
    find_hosts(tmp_path, "localhost:2 127.0.0.1:1")
    job.wait_for_output("broken", timeout=60)
    os.kill(rank_on(job, "localhost", local_rank=1), signal.SIGUSR1)
    assert job.wait(60) == EXIT_STOPPED, job.output
    assert "The state in memory is written" in job.output
    assert checkpoint.newest(tmp_path / "run", report=pytest.fail).step >= 2


def test_a_job_below_its_minimum_waits_for_hosts_and_stops_when_it_is_asked_to(data: Path, tmp_path: Path) -> None:
    """A host that is lost and comes back is what the job waits for; without it, it can only stop."""
    arguments = launching.tiny(tmp_path / "run", *NO_END, data=data)
    job = start(tmp_path, 2, "localhost:1 127.0.0.1:1", arguments, "elastic_pair")
    job.wait_for_output("step 2 ", timeout=120)
    os.kill(rank_on(job, "127.0.0.1"), signal.SIGKILL)
    job.wait_for_output("2 -> 2 ranks at epoch", timeout=120)
    find_hosts(tmp_path, "localhost:1")
    job.wait_for_output("is waiting for a new rank assignment", timeout=90)
    job.wait_for_output("The state in memory is written")
    os.kill(rank_on(job, "localhost"), signal.SIGUSR1)
    assert job.wait(60) == EXIT_STOPPED, job.output
    assert job.output.count("The state in memory is written") == 1
    assert checkpoint.newest(tmp_path / "run", report=pytest.fail).step >= 2
