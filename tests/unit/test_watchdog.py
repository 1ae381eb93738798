"""The watchdog: what it makes of heartbeats, when it ends a job, and when it keeps waiting."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from programs import has_ended, wait_until

from horovod_megdet import launched
from horovod_megdet.cluster.watchdog import watchdog
from horovod_megdet.cluster.watchdog.diagnosis import Stall, StallTimer, find_lost_ranks, find_stall, name_ranks
from horovod_megdet.cluster.watchdog.heartbeats import Heartbeat, Heartbeats, LastWords
from horovod_megdet.cluster.watchdog.watchdog import Watchdog, beat_interval
from horovod_megdet.errors import EXIT_STALLED, UserError
from horovod_megdet.progress import progress


def beat(rank: int, *, waiting_for: str | None = "losses", doing: str | None = None, **others: object) -> Heartbeat:
    values = {"size": 4, "host": f"node{rank // 2}", "pid": 1, "step": 17, "idle": 30.0, "interval": 5.0, **others}
    if doing:
        waiting_for = None
    doing = doing or f"waiting for tensor {waiting_for}"
    return Heartbeat(rank=rank, waiting_for=waiting_for, doing=doing, **values)  # type: ignore[arg-type]


def stall(beats: list[Heartbeat]) -> str:
    """The sentence about a job that made no progress for 20 s."""
    found = find_stall(beats, timeout=20.0)
    assert found is not None
    preface = "no rank has made progress for 20 s (runtime.stall_timeout). "
    assert found.sentence.startswith(preface)
    return found.sentence.removeprefix(preface)


def loss(beats: list[Heartbeat]) -> str:
    """The sentence about lost ranks."""
    found = find_lost_ranks(beats)
    assert found is not None
    return found.sentence


def test_a_silent_rank_is_named_before_those_that_wait_for_it() -> None:
    assert stall([beat(0), beat(1), beat(2, doing="computing", age=31.0), beat(3)]) == (
        "A rank no longer runs: rank 2 on node1: silent for 31 s (stopped, or the host hangs; last seen: "
        "computing); ranks 0-1 on node0, 3 on node1: waiting for tensor losses for 30 s."
    )


def test_how_long_each_rank_has_made_no_progress_is_told_apart() -> None:
    found = find_stall([beat(0, idle=12.0), beat(1, idle=21.0)], timeout=20.0)
    assert found is not None
    assert found.sentence.startswith("no rank has made progress for 12 s, and one for 20 s (runtime.stall_timeout). ")


def test_a_rank_in_its_loader_is_named() -> None:
    sentence = stall([beat(0), beat(1, doing="waiting for the data loader"), beat(2), beat(3)])
    assert sentence.startswith("A rank is stuck: rank 1 on node0: waiting for the data loader for 30 s; ranks 0 on ")


def test_a_deadlock_names_both_collectives() -> None:
    sentence = stall([beat(0), beat(1), beat(2, waiting_for="gradients"), beat(3)])
    assert sentence.startswith("A deadlock, in which ranks wait in different collectives: ")
    assert "rank 2 on node1: waiting for tensor gradients" in sentence
    assert "waiting for tensor losses" in sentence


def test_all_in_the_same_collective_points_at_the_network() -> None:
    assert "whose messages do not arrive" in stall([beat(rank) for rank in range(4)])


def test_one_rank_of_each_group_is_a_witness() -> None:
    found = find_stall([beat(1), beat(0), beat(2, doing="computing"), beat(3)], timeout=20.0)
    assert found is not None
    assert found.witnesses == {0, 2}


def test_a_job_with_one_busy_rank_is_not_stalled() -> None:
    busy = beat(1, doing="evaluating", idle=0.5)
    assert find_stall([beat(0), busy, beat(2), beat(3)], timeout=20.0) is None


def test_progress_restarts_the_stall_timer() -> None:
    timer = StallTimer(20.0, longest_pause=15.0, notes=7, now=100.0)
    timer.update(7, 110.0)
    timer.update(7, 120.0)
    assert not timer.expired(120.0)
    timer.update(7, 121.0)
    assert timer.expired(121.0)
    timer.update(8, 122.0)
    assert not timer.expired(140.0)
    assert timer.idle(140.0) == 18.0


def test_a_process_that_was_stopped_as_a_whole_is_not_stalled() -> None:
    timer = StallTimer(20.0, longest_pause=15.0, notes=7, now=100.0)
    timer.update(7, 3700.0)
    assert not timer.expired(3701.0)


def test_no_timeout_waits_forever() -> None:
    timer = StallTimer(0.0, longest_pause=15.0, notes=7, now=0.0)
    assert not timer.expired(1e6)


def test_lost_ranks_are_those_without_last_words() -> None:
    sentence = loss(
        [
            beat(0, last_words=LastWords.WAITED),
            beat(1, last_words=LastWords.WAITED, step=18),
            beat(2, doing="computing"),
            beat(3, last_words=LastWords.CRASHED),
        ]
    )
    assert sentence == (
        "rank 2 on node1 lost at step 18 (last seen: computing); rank 3 on node1 crashed at step 18; "
        "ranks 0-1 on node0 waited for tensor losses."
    )


def test_survivors_are_those_that_were_heard_of_after_the_loss() -> None:
    beats = [beat(0, last_words=LastWords.WAITED), beat(1, doing="saving", received_sigterm=True), beat(2), beat(3)]
    found = find_lost_ranks(beats)
    assert found is not None
    assert found.survivors == {0, 1}


def test_ranks_that_never_wrote_are_missed() -> None:
    sentence = loss([beat(rank, last_words=LastWords.LOST_CONTACT, step=0) for rank in (0, 1, 3)])
    assert sentence.startswith("rank 2 never wrote a heartbeat; ranks 0-1 on node0, 3 on node1 lost contact")


def test_ranks_that_are_all_there_point_at_the_network() -> None:
    assert loss([beat(rank, last_words=LastWords.LOST_CONTACT) for rank in range(4)]) == (
        "all ranks were still running at step 17, but could not reach each other: ranks 0-1 on node0, 2-3 on node1."
    )


def test_a_rank_that_received_sigterm_and_still_computes_is_not_lost() -> None:
    beats = [beat(rank, last_words=LastWords.WAITED, received_sigterm=True) for rank in range(3)]
    assert find_lost_ranks([*beats, beat(3, doing="computing", received_sigterm=True)]) is None
    assert find_lost_ranks([*beats, beat(3, doing="computing")]) is not None


def test_nothing_is_reported_when_no_rank_was_lost() -> None:
    assert find_lost_ranks([beat(rank, last_words=LastWords.WAITED) for rank in range(4)]) is None
    assert find_lost_ranks([]) is None


def test_ranks_are_named_briefly() -> None:
    assert name_ranks([beat(3)]) == "rank 3 on node1"
    assert name_ranks([beat(rank, host="a") for rank in range(8)] + [beat(9, host="b")]) == "ranks 0-7 on a, 9 on b"


def test_all_ranks_together_write_at_most_ten_heartbeats_a_second() -> None:
    assert [beat_interval(ranks, 600) for ranks in (1, 50, 128, 2000)] == [5, 5, 12.8, 150]
    assert beat_interval(2000, 0) == 200
    assert beat_interval(8, 4) == 1


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
    later.write(beat(2))  # lost by an elastic job, which has gone on with two ranks
    beats.remove(0, size=2)
    assert [path.name for path in beats.folder.iterdir()] == ["rank_00001.json"]
    later.remove(1, size=2)
    assert not (tmp_path / "run").exists(), "a start that failed leaves nothing behind"


def test_the_folder_of_a_run_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    beats = Heartbeats(tmp_path)
    beats.write(beat(0))
    beats.remove(0, size=1)
    assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"]


def test_only_one_rank_reports(tmp_path: Path) -> None:
    beats = Heartbeats(tmp_path)
    beats.write(beat(0))
    assert [beats.claim_report() for _ in range(3)] == [True, False, False]
    assert [beats.claim_report("node1") for _ in range(2)] == [True, False]
    assert not beats.is_reported()
    beats.drop_claim()
    assert beats.claim_report()
    beats.report("rank 1 lost")
    assert beats.is_reported()
    assert not beats.is_reported("node1")
    assert beats.take_report() == "rank 1 lost"
    assert beats.take_report() == ""
    assert beats.claim_report()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which the watchdog wanted to end the job."""
    codes: list[int] = []
    monkeypatch.setattr(watchdog, "end_job", codes.append)
    monkeypatch.setattr(watchdog, "TIME_FOR_STACKS", 0.0)
    monkeypatch.setattr(watchdog, "CHECK_EVERY", 0.05)
    return codes


@pytest.fixture
def waiting() -> Iterator[None]:
    """The main thread waits in a collective."""
    progress.wait_for("layer1.bn")
    yield
    progress.finished_waiting()


def test_a_stalled_job_ends_with_a_sentence_and_stacks(
    tmp_path: Path, ended: list[int], waiting: None, capfd: pytest.CaptureFixture[str]
) -> None:
    dog = Watchdog(tmp_path, stall_timeout=1.0)
    dog.start()
    wait_until(lambda: ended)
    dog.stop()
    assert ended[0] == EXIT_STALLED
    printed = capfd.readouterr().err
    assert re.search(
        r"no rank has made progress for 1 s .*rank 0 on \S+: waiting for tensor layer1.bn for 1 s", printed
    )
    assert "test_a_stalled_job_ends" in printed, "the stack shows where"


def test_the_next_start_says_how_the_job_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    heartbeats = Heartbeats(tmp_path)
    heartbeats.write(beat(0))
    heartbeats.report("rank 1 lost.")
    for _ in range(2):
        dog = Watchdog(tmp_path, stall_timeout=0.0)
        dog.start()
        dog.stop()
    assert capfd.readouterr().err.count("The previous job ended with: rank 1 lost.") == 1


@pytest.fixture
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is rank 0 of two, as horovodrun tells it."""
    for names in launched.PLACE_VARIABLES:
        monkeypatch.delenv(names[0], raising=False)
    monkeypatch.setenv("HOROVOD_RANK", "0")
    monkeypatch.setenv("HOROVOD_SIZE", "2")


def test_a_rank_waits_for_a_busy_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: list[int], waiting: None, first_of_two: None
) -> None:
    """Its own timer expires, but the other rank's heartbeats tell of progress."""
    verdicts: list[Stall | None] = []

    def note(beats: list[Heartbeat], timeout: float) -> Stall | None:
        verdicts.append(find_stall(beats, timeout))
        return verdicts[-1]

    monkeypatch.setattr(watchdog, "find_stall", note)
    Heartbeats(tmp_path).write(beat(1, size=2, doing="evaluating", idle=0.0))
    later = time.time() + 1000  # the newest of all, as if the rank wrote all the time
    os.utime(tmp_path / "heartbeats" / "rank_00001.json", (later, later))
    dog = Watchdog(tmp_path, stall_timeout=0.5)
    dog.start()
    wait_until(lambda: len(verdicts) >= 3)
    dog.stop()
    assert set(verdicts) == {None}
    assert not ended


def test_a_rank_that_knows_nothing_of_others_waits_for_them(
    ended: list[int], monkeypatch: pytest.MonkeyPatch, waiting: None, first_of_two: None
) -> None:
    """As in an evaluation, which keeps no heartbeats."""
    dog = Watchdog(None, stall_timeout=0.5)
    dog.start()
    time.sleep(1.5)
    dog.stop()
    assert ended == []


def test_progress_keeps_a_job_going(tmp_path: Path, ended: list[int]) -> None:
    dog = Watchdog(tmp_path, stall_timeout=0.5)
    dog.start()
    for _ in range(15):
        progress.advance()
        time.sleep(0.1)
    dog.stop()
    assert not ended


@pytest.fixture
def sigterm_is_harmless() -> Iterator[None]:
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, previous)


def test_a_rank_that_receives_sigterm_and_waits_only_later_says_who_is_lost(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    first_of_two: None,
    sigterm_is_harmless: None,
) -> None:
    """As when the other rank is lost while this one writes a checkpoint: that is, between the first two looks."""
    waits_for, looked, waits = Watchdog._waits_for, threading.Event(), threading.Event()

    def look(seconds: float) -> bool:
        found = waits_for(seconds)
        looked.set()
        assert waits.wait(30)
        return found

    monkeypatch.setattr(Watchdog, "_waits_for", staticmethod(look))
    Heartbeats(tmp_path).write(beat(1, size=2, doing="computing"))
    dog = Watchdog(tmp_path, stall_timeout=20.0)
    dog.start()
    os.kill(os.getpid(), signal.SIGTERM)
    assert looked.wait(30)
    progress.wait_for("losses")
    waits.set()
    wait_until((tmp_path / "heartbeats" / "reported-").exists)
    progress.finished_waiting()
    dog.stop()
    assert "rank 1 on node0 lost at step 17 (last seen: computing); rank 0" in capfd.readouterr().err


@pytest.mark.parametrize("is_lost", [True, False])
def test_one_rank_reads_the_heartbeats_of_all_and_reports(
    is_lost: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str], first_of_two: None
) -> None:
    """If it finds nothing, the next one looks: the last words of some may still have been missing."""
    for rank in range(2):
        Heartbeats(tmp_path).write(beat(rank, size=3, last_words=LastWords.WAITED))
    Heartbeats(tmp_path).write(beat(2, size=3, received_sigterm=not is_lost))
    dogs = [Watchdog(tmp_path, stall_timeout=20.0) for _ in range(3)]
    read = mock.patch.object(Heartbeats, "read", autospec=True, side_effect=Heartbeats.read)
    with read as reads, ThreadPoolExecutor() as threads:
        survived = list(threads.map(Watchdog.report_lost_ranks, dogs))
    assert survived == [is_lost] * 3
    assert reads.call_count == (1 if is_lost else 3)
    assert capfd.readouterr().err.count("rank 2 on node1 lost") == is_lost
    assert Heartbeats(tmp_path).is_reported() == is_lost


def test_an_old_report_of_an_elastic_job_does_not_end_a_rank_that_is_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_of_two: None
) -> None:
    """An elastic job goes on after it has lost a rank."""
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    heartbeats = Heartbeats(tmp_path)
    heartbeats.write(beat(0, size=2, last_words=LastWords.WAITED))
    heartbeats.write(beat(1, size=2, received_sigterm=True))
    assert heartbeats.claim_report()
    heartbeats.report("rank 1 on node0 lost at step 3.")
    assert not Watchdog(tmp_path, stall_timeout=20.0).report_lost_ranks()


def test_a_full_disk_is_a_warning_once(tmp_path: Path, capfd: pytest.CaptureFixture[str], ended: list[int]) -> None:
    (tmp_path / "heartbeats").write_text("in the way")
    dog = Watchdog(tmp_path, stall_timeout=1.0)
    dog.start()
    for reason in LastWords:
        dog.last_words(reason)
    dog.stop()
    assert capfd.readouterr().err.count("warning: heartbeats cannot be written") == 1
    assert not ended


def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    rank = textwrap.dedent("""\
        import os, sys, time
        from horovod_megdet.cluster.watchdog import watchdog
        watchdog.CHECK_EVERY = 0.1
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
    assert "ends because" in process.stderr.read()
    process.wait()
    wait_until(lambda: has_ended(pid))


def _first_word(process: subprocess.Popen[str]) -> int:
    assert process.stdout
    word = ""
    while not word.endswith(" "):
        word += process.stdout.read(1)
    return int(word)


def test_srun_without_pmi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in launched.PLACE_VARIABLES:
        monkeypatch.delenv(names[0], raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    launched.check_srun()  # python in a batch script
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match="srun started 4 processes that do not know about each other"):
        launched.check_srun()
    monkeypatch.setenv("PMIX_RANK", "2")
    launched.check_srun()
    assert (launched.rank(), launched.size()) == (2, 4)
