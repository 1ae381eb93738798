"""Parts of elastic jobs that need no ranks; tests/parallel/test_elastic.py runs some."""

import json
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from horovod.runner.elastic import discovery, driver
from horovod.runner.elastic.discovery import FixedHosts, HostDiscoveryScript
from horovod.runner.elastic.driver import ElasticDriver
from horovod.runner.http import http_client
from horovod.runner.http.http_server import RendezvousServer

from horovod_megdet import comm, launched
from horovod_megdet.comm import elastic, start
from horovod_megdet.config import Config, load_config
from horovod_megdet.engine.elastic import check_elastic
from horovod_megdet.engine.metrics import MetricsLog, describe_change
from horovod_megdet.errors import UserError
from horovod_megdet.report.curves import write_curves
from horovod_megdet.report.rows import read_metrics
from horovod_megdet.solver.schedule import make_schedule

PROJECT = Path(__file__).resolve().parents[2]

CHANGE = {
    "step": 7,
    "images_seen": 160,
    "epoch": 3.2,
    "ranks_before": 12,
    "ranks": 8,
    "mini_batch_before": 24,
    "mini_batch": 16,
    "lr_before": 0.03,
    "lr": 0.02,
    "hosts_lost": {"node03": 6},
    "hosts_joined": {"node07": 2},
}


def test_a_change_of_ranks_is_a_sentence() -> None:
    assert describe_change(CHANGE) == (
        "12 -> 8 ranks at epoch 3.20 (lost: 6 on node03; joined: 2 on node07): mini-batch 24 -> 16, "
        "learning rate 0.03 -> 0.02"
    )
    gone = CHANGE | {"hosts_lost": {}, "hosts_joined": {}}
    assert describe_change(gone).startswith("12 -> 8 ranks at epoch 3.20: mini-batch")


def test_a_change_of_ranks_is_a_row(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, total_images=200, images_seen=0, step=0)
    log.change({"kind": "ranks", **CHANGE})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "ranks", **CHANGE}]
    assert write_curves(tmp_path).exists()


def test_an_evaluation_that_is_done_again_leaves_one_row(tmp_path: Path) -> None:
    """The rows of training at the same step stay: they are not written again."""
    rows = [{"kind": kind, "step": step, "epoch": step / 10} for step in (6, 7) for kind in ("train", "evaluation")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    MetricsLog(tmp_path, total_images=200, images_seen=160, step=7).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == rows
    MetricsLog(tmp_path, total_images=200, images_seen=160, step=7, repeats=True).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == rows[:-1]


def test_bn_groups_that_horovod_would_not_survive_are_refused() -> None:
    for size in ("world", 2):
        check_elastic(Config.model_validate({"batch_norm": {"bn_size": size}, "data": {"images_per_rank": 2}}))
    with pytest.raises(UserError, match="bn_size: 4 does not work in an elastic job"):
        check_elastic(Config.model_validate({"batch_norm": {"bn_size": 4}, "data": {"images_per_rank": 2}}))


def test_the_batch_script_starts_with_a_configuration_for_any_number_of_ranks() -> None:
    (path,) = re.findall(r"MEGDET_CONFIG:-(\S+)}", (PROJECT / "slurm/megdet_elastic.sbatch").read_text())
    config = load_config(PROJECT / path)
    check_elastic(config)
    for ranks in (128, 120, 7):
        schedule = make_schedule(config.solver, 117266, ranks, config.data.images_per_rank)
        assert schedule.mini_batch == 2 * ranks


def test_a_process_moves_to_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"HOROVOD_RANK": "5", "HOROVOD_SIZE": "12", "HOROVOD_ELASTIC": "1"})
    assert launched.elastic()
    launched.set_place(3, 8, 1, 2, 0, 4)
    assert (launched.rank(), launched.size()) == (3, 8)
    assert os.environ["HOROVOD_CROSS_SIZE"] == "4"


class Listed(FixedHosts):  # type: ignore[misc]
    """The answer of a discovery program, which may hang."""

    def __init__(self, hosts: dict[str, int]) -> None:
        super().__init__(hosts)
        self.answers, self.asked = threading.Event(), threading.Event()
        self.answers.set()

    def find_available_hosts_and_slots(self) -> dict[str, int]:
        self.asked.set()
        self.answers.wait()
        return super().find_available_hosts_and_slots()  # type: ignore[no-any-return]


class Driver(ElasticDriver):  # type: ignore[misc]
    """Horovod's driver, with ranks that run until the ``with`` block ends."""

    def __init__(self, *hosts: str) -> None:
        self.ends = threading.Event()
        self.listed = Listed(dict.fromkeys(hosts, 1))
        super().__init__(Mock(), self.listed, 1, 2)
        self.wait_for_available_slots(len(hosts))
        self.start(len(hosts), lambda *_: (int(not self.ends.wait()), 0.0))

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self.ends.set()
        self.listed.answers.set()
        self.stop()

    def gives_places(self) -> bool:
        """Whether somebody who asks for a place gets one within 10 s."""
        asks = threading.Thread(target=self.wait_for_available_slots, args=(1,), daemon=True)
        asks.start()
        asks.join(10)
        return not asks.is_alive()

    def connect_rank_0(self, monkeypatch: pytest.MonkeyPatch, hears: Callable[..., object]) -> str:
        """What happens when rank 0 has started; returns its host."""
        monkeypatch.setattr(driver, "WorkerNotificationClient", lambda *_: Mock(notify_hosts_updated=hears))
        host = str(self.get_coordinator_info().hostname)
        self.register_worker_server(host, 0, {}, b"")
        return host


def test_a_lost_rank_0_that_does_not_answer_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host is not listed any more, of which the driver wants to tell rank 0. The kernel tries that for minutes."""
    asked = threading.Event()
    with Driver("hostA", "hostB") as running:
        lost = running.connect_rank_0(monkeypatch, lambda *_: (asked.set(), running.ends.wait()))
        running.listed.set({host: 1 for host in ("hostA", "hostB") if host != lost})
        assert asked.wait(10)
        assert running.gives_places()


def test_a_discovery_program_that_hangs_holds_up_nobody() -> None:
    with Driver("hostA", "hostB") as running:
        running.listed.answers.clear()
        running.listed.asked.clear()
        assert running.listed.asked.wait(10)
        assert running.gives_places()


def test_a_discovery_program_that_hangs_is_ended_with_all_that_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "hosts"
    program.write_text("#!/bin/sh\nsleep 600 &\nsleep 600\n")  # both hold the output, whose end is waited for
    program.chmod(0o700)
    monkeypatch.setattr(discovery, "DISCOVERY_TIMEOUT_SECS", 1)
    with pytest.raises(RuntimeError, match=f"has not answered for 1 s: {program}"):
        HostDiscoveryScript(str(program), 1).find_available_hosts_and_slots()


def test_rank_0_hears_of_hosts_that_came_before_it_had_started(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = threading.Event()
    with Driver("hostA") as running:
        running.listed.set({"hostA": 1, "hostB": 1})
        running.wait_for_available_slots(2)
        running.connect_rank_0(monkeypatch, lambda *_: heard.set())
        assert heard.wait(10)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Takes the place of a rank beside the launcher's store. Ranks do not wait for each other."""
    store = RendezvousServer()
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(store.start()))
    monkeypatch.setattr(start.time, "sleep", lambda _: None)
    yield lambda rank: monkeypatch.setenv("HOROVOD_RANK", str(rank))
    store.stop()


def test_many_ranks_have_longer_to_find_each_other() -> None:
    assert [start.gloo_timeout(ranks) for ranks in (2, 40, 128)] == [10, 10, 32]


def test_what_is_in_the_store_is_never_unpickled(place: Callable[[int], None]) -> None:
    """Whoever reaches the launcher's port can write to the store."""
    place(0)
    store = start.RendezvousStore()
    for value in (True, None, 7, "complete"):
        store.write("key", value)
        assert store.read("key") == value
    http_client.put_data_into_kvstore(*store._url.split("/")[2].split(":"), "megdet_start", "key", Path("/tmp"))
    assert store.read("key") is None
    assert store.read("another key") is None


@pytest.fixture
def closed_port() -> int:
    """Nobody listens there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture
def answer(place: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``answer("1,2,0,1,1,2")``: what the launcher answers when this process, on hostA, asks for its place."""
    place(0)
    monkeypatch.setenv("HOROVOD_HOSTNAME", "hostA")
    monkeypatch.setenv("HOROVOD_LOCAL_RANK", "0")
    server = f"127.0.0.1:{os.environ['HOROVOD_GLOO_RENDEZVOUS_PORT']}"
    url = f"http://{server}/rank_and_size/hostA:0"
    return lambda text: start.ask_launcher(urllib.request.Request(url, data=text.encode(), method="PUT"), timeout=10)


def test_a_process_that_the_launcher_has_no_place_for_leaves_the_job(answer: Callable[[str], None]) -> None:
    answer("-1,-1,-1,-1,-1,-1")
    with pytest.raises(comm.RemovedError):
        elastic._take_new_place(stopping=lambda: False, unsaved=None)


def test_a_proxy_of_the_environment_is_not_asked_for_a_place(
    answer: Callable[[str], None], closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it has the proxies of when it was first used
    answer("1,2,0,1,1,2")
    assert elastic._wait_for_place(stopping=lambda: False, unsaved=None) == [1, 2, 0, 1, 1, 2]


@pytest.mark.parametrize("ended", [True, False])
def test_a_launcher_that_gives_no_place_ends_the_job(
    answer: Callable[[str], None], closed_port: int, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    if ended:
        monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(closed_port))
    reason = "Connection refused" if ended else "404"
    with pytest.raises(UserError, match=rf"did not assign this process a rank: .*{reason}.* again with --resume\."):
        elastic._take_new_place(stopping=lambda: False, unsaved=None)


def test_one_of_the_ranks_with_the_same_state_saves_it(place: Callable[[int], None]) -> None:
    saved: list[str] = []

    def saving(step: int, name: str, works: bool = True) -> elastic._Saving:
        return elastic._Saving(comm.Unsaved(step, lambda: works and not saved.append(name)))

    place(1)
    assert saving(5, "on a full disk", works=False).attempt() is False
    assert saving(5, "rank 1").attempt() is True, "it tries again"
    place(2)
    assert saving(5, "rank 2").attempt() is True
    assert saving(6, "rank 2, a step ahead").attempt() is True
    assert elastic._Saving(None).finish() is True, "a new rank has nothing to save"
    assert saved == ["rank 1", "rank 2, a step ahead"]


def test_a_rank_saves_if_the_one_that_is_to_do_so_does_not(
    place: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    place(0)
    assert start.RendezvousStore().claim("saving.7"), "and is lost"
    place(1)
    saves = [False, True]
    saving = elastic._Saving(comm.Unsaved(7, saves.pop))
    assert saving.attempt() is None
    monkeypatch.setattr(elastic, "LONGEST_SAVING", 0.1)
    assert saving.finish() is True
    assert saving.finish() is False
