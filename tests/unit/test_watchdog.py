"""The watchdog's judgement: what it says of heartbeats, when it ends a job, and when it keeps still."""

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from horovod_megdet import launched
from horovod_megdet.cluster.watchdog import watchdog
from horovod_megdet.cluster.watchdog.diagnosis import describe_lost_ranks, diagnose, name_ranks
from horovod_megdet.cluster.watchdog.heartbeats import Heartbeat, Heartbeats
from horovod_megdet.cluster.watchdog.watchdog import Watchdog
from horovod_megdet.errors import EXIT_STALLED, UserError
from horovod_megdet.progress import progress


def beat(rank: int, *, waiting_for: str | None = "losses", doing: str | None = None, **others: object) -> Heartbeat:
    values = {"size": 4, "host": f"node{rank // 2}", "pid": 1, "step": 17, "idle": 30.0, "interval": 5.0, **others}
    doing = doing or f"waits for tensor {waiting_for}"
    return Heartbeat(rank=rank, waiting_for=waiting_for, doing=doing, **values)  # type: ignore[arg-type]


def test_a_silent_rank_is_named_before_those_that_wait_for_it() -> None:
    sentence = diagnose([beat(0), beat(1), beat(2, doing="computes", waiting_for=None, age=31.0), beat(3)])
    assert sentence == (
        "A rank does not run any more: rank 2 on node1: silent for 31 s (stopped, or the host hangs; last seen: "
        "computes); ranks 0-1 on node0, 3 on node1: waits for tensor losses for 30 s."
    )


def test_a_rank_in_its_loader_is_named() -> None:
    sentence = diagnose([beat(0), beat(1, doing="waits for the data loader", waiting_for=None), beat(2), beat(3)])
    assert sentence.startswith("A rank is stuck: rank 1 on node0: waits for the data loader for 30 s; ranks 0 on node0")


def test_a_deadlock_names_both_collectives() -> None:
    sentence = diagnose([beat(0), beat(1), beat(2, waiting_for="gradients"), beat(3)])
    assert sentence.startswith("A deadlock: the ranks wait in different collectives: ")
    assert "rank 2 on node1: waits for tensor gradients" in sentence
    assert "waits for tensor losses" in sentence


def test_all_in_the_same_collective_points_at_the_network() -> None:
    assert "whose messages do not arrive" in diagnose([beat(rank) for rank in range(4)])


def test_lost_ranks_are_those_without_last_words() -> None:
    sentence = describe_lost_ranks(
        [
            beat(0, ended="waited for tensor losses"),
            beat(1, ended="waited for tensor losses", step=18),
            beat(2, doing="computes"),
            beat(3, ended="crashed"),
        ]
    )
    assert sentence == (
        "rank 2 on node1 lost at step 18 (last seen: computes); rank 3 on node1 crashed at step 18; ranks 0-1 on node0 "
        "waited for tensor losses."
    )


def test_ranks_that_never_wrote_are_missed() -> None:
    sentence = describe_lost_ranks([beat(rank, ended="lost contact", step=0) for rank in (0, 1, 3)])
    assert sentence is not None
    assert sentence.startswith("no sign of rank 2;")


def test_ranks_that_are_all_there_point_at_the_network() -> None:
    sentence = describe_lost_ranks([beat(rank, ended="lost contact") for rank in range(4)])
    assert sentence == (
        "all ranks still ran at step 17, but could not reach each other: ranks 0-1 on node0, 2-3 on node1."
    )


def test_a_rank_that_was_told_to_end_and_still_computes_is_not_lost() -> None:
    beats = [beat(rank, ended="waited for tensor losses", received_sigterm=True) for rank in range(3)]
    assert describe_lost_ranks([*beats, beat(3, doing="computes", received_sigterm=True)]) is None
    assert describe_lost_ranks([*beats, beat(3, doing="computes")]) is not None


def test_nothing_is_said_when_nobody_was_lost() -> None:
    assert describe_lost_ranks([beat(rank, ended="waited for tensor losses") for rank in range(4)]) is None
    assert describe_lost_ranks([]) is None


def test_ranks_are_named_briefly() -> None:
    assert name_ranks([beat(3)]) == "rank 3 on node1"
    assert name_ranks([beat(rank, host="a") for rank in range(8)] + [beat(9, host="b")]) == "ranks 0-7 on a, 9 on b"


def test_heartbeats_are_read_with_the_file_servers_clock(tmp_path: Path) -> None:
    beats = Heartbeats(tmp_path / "run")
    for rank in range(3):
        beats.write(beat(rank, size=2))
    os.utime(beats.folder / "rank_00000.json", (1000, 1000))
    os.utime(beats.folder / "rank_00001.json", (1020, 1020))
    os.utime(beats.folder / "rank_00002.json", (900, 900))
    found = beats.read()
    assert [one.rank for one in found] == [0, 1], "the third is from a job of more ranks"
    assert [one.age for one in found] == [20, 0]
    assert found[0].silent
    assert not found[1].silent


def test_a_heartbeat_is_replaced_in_one_step_and_goes_in_the_end(tmp_path: Path) -> None:
    beats = Heartbeats(tmp_path / "run")
    beats.write(beat(0))
    beats.write(beat(0, step=18))
    assert [path.name for path in beats.folder.iterdir()] == ["rank_00000.json"]
    assert json.loads((beats.folder / "rank_00000.json").read_text())["step"] == 18
    later = Heartbeats(tmp_path / "run")  # of a rank that starts when the folder is there already
    later.write(beat(1))
    beats.remove(0)
    assert beats.folder.exists()
    later.remove(1)
    assert not (tmp_path / "run").exists(), "a start that failed leaves nothing behind"


def test_the_folder_of_a_run_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    beats = Heartbeats(tmp_path)
    beats.write(beat(0))
    beats.remove(0)
    assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"]


def test_only_one_rank_reports(tmp_path: Path) -> None:
    beats = Heartbeats(tmp_path)
    beats.write(beat(0))
    assert [beats.claim_report("rank 1 lost") for _ in range(3)] == [True, False, False]
    assert [beats.claim_report("rank 1 lost", "node1") for _ in range(2)] == [True, False]
    assert beats.take_report() == "rank 1 lost"
    assert beats.take_report() == ""
    assert beats.claim_report("rank 2 lost")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which the watchdog wanted to end the job."""
    codes: list[int] = []
    monkeypatch.setattr(watchdog, "_end_job", codes.append)
    monkeypatch.setattr(watchdog, "STACKS", 0.0)
    return codes


def stalled(run_dir: Path | None) -> Watchdog:
    dog = Watchdog(run_dir, stall_timeout=20.0)
    dog._progress_at -= 30
    return dog


def test_a_stalled_job_ends_with_a_sentence_and_stacks(
    tmp_path: Path, ended: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    progress.wait_for("layer1.bn")
    dog = stalled(tmp_path)
    dog._seen = progress.notes
    dog._look()
    progress.finished_waiting()
    assert ended == [EXIT_STALLED]
    printed = capfd.readouterr().err
    assert re.search(r"no rank has got on for 20 s .*rank 0 on \S+: waits for tensor layer1.bn for 30 s", printed)
    assert "test_a_stalled_job_ends" in printed, "the stack shows where"
    next_start = Watchdog(tmp_path, stall_timeout=0.0)
    next_start.start()
    next_start.stop()
    assert "The job before ended with: no rank has got on for 20 s" in capfd.readouterr().err


def test_a_rank_that_is_told_to_end_and_waits_only_later_says_who_is_lost(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As when the other rank is lost while this one writes a checkpoint."""
    dog = Watchdog(tmp_path, stall_timeout=20.0)
    dog.size = 2
    assert dog.heartbeats
    dog.heartbeats.write(beat(1, size=2, waiting_for=None, doing="computes"))
    still_to_do = threading.Timer(1.5 * watchdog.LAST_WORDS / 4, progress.wait_for, ["losses"])
    still_to_do.start()
    dog._terminated()
    still_to_do.join()
    progress.finished_waiting()
    assert "rank 1 on node0 lost at step 17" in capfd.readouterr().err


def test_progress_keeps_the_watchdog_still(tmp_path: Path, ended: list[int]) -> None:
    dog = stalled(tmp_path)
    progress.advance()
    dog._look()
    assert not ended


def test_a_rank_that_waits_for_a_busy_one_is_not_stalled(tmp_path: Path, ended: list[int]) -> None:
    dog = stalled(tmp_path)
    assert dog.heartbeats
    dog.heartbeats.write(beat(1, size=2, doing="evaluates", waiting_for=None, idle=0.5))
    dog.size = 2
    dog._look()
    assert not ended


def test_a_process_that_was_stopped_as_a_whole_is_not_stalled(tmp_path: Path, ended: list[int]) -> None:
    dog = stalled(tmp_path)
    dog._looked_at -= 3600
    dog._look()
    assert not ended


def test_no_timeout_waits_for_ever(tmp_path: Path, ended: list[int]) -> None:
    dog = Watchdog(tmp_path, stall_timeout=0.0)
    dog._progress_at -= 1e6
    dog._look()
    assert not ended


def test_a_full_disk_is_a_warning_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "heartbeats").write_text("in the way")
    dog = Watchdog(tmp_path, stall_timeout=20.0)
    dog._beat()
    dog._beat()
    assert capfd.readouterr().err.count("warning: no heartbeats") == 1


def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    rank = textwrap.dedent("""\
        import os, sys, time
        from horovod_megdet.cluster.watchdog import watchdog
        watchdog.LOOK_EVERY = 0.1
        watchdog.Watchdog(None, 0).start()
        os.write(1, b"%d " % os.getpid())
        time.sleep(60)
    """)
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    environment = os.environ | {"OMPI_COMM_WORLD_RANK": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", launcher], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stderr
    pid = _first_word(process)
    process.kill()
    # The rank holds the other end of this pipe until it ends.
    assert "ends, because" in process.stderr.read()
    process.wait()
    with pytest.raises(ProcessLookupError):
        _wait_until_gone(pid)


def _first_word(process: subprocess.Popen[str]) -> int:
    assert process.stdout
    word = ""
    while not word.endswith(" "):
        word += process.stdout.read(1)
    return int(word)


def _wait_until_gone(pid: int) -> None:
    for _ in range(50):
        os.kill(pid, 0)
        time.sleep(0.1)


def test_srun_without_pmi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in launched.PLACE_VARIABLES:
        monkeypatch.delenv(names[0], raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    launched.check()  # python in a batch script
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match="srun started 4 processes that do not know of each other"):
        launched.check()
    monkeypatch.setenv("PMIX_RANK", "2")
    launched.check()
    assert (launched.rank(), launched.size()) == (2, 4)
