"""Rows, configuration, pictures and checkpoints in TensorBoard, MLflow and W&B; the last two run where installed."""

import json
import sqlite3
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from horovod_megdet.config import Config, by_dotted_key, load_config
from horovod_megdet.engine import loggers
from horovod_megdet.engine.loggers import Logger, Loggers
from horovod_megdet.errors import UserError

TRAIN = {"kind": "train", "step": 3, "images_seen": 12, "epoch": 0.5, "loss": 1.25, "lr": 0.01}
EVALUATION = {"kind": "evaluation", "step": 4, "images_seen": 16, "epoch": 0.7, "AP": 0.5, "AP_small": None}
EVALUATION |= {"per_class": {"a": 0.5}}
NUMBERS = {"train/epoch": 0.5, "train/loss": 1.25, "train/lr": 0.01, "evaluation/epoch": 0.7, "evaluation/AP": 0.5}


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test must not fail because the machine is slow."""
    monkeypatch.setattr(loggers, "PATIENCE", 300.0)


def config(run_dir: Path, *names: str) -> Config:
    return Config.model_validate({"output": {"run_dir": str(run_dir), "loggers": names}, "solver": {"base_lr": 0.125}})


def log(run_dir: Path, *names: str) -> None:
    """What a short run sends."""
    run_dir.mkdir(exist_ok=True)
    sent = Loggers(config(run_dir, *names), step=0)
    sent.call("row", TRAIN)
    sent.call("row", EVALUATION)
    sent.call("checkpoint", "/there/step_00000004")
    sent.call("pictures", {"cells/1.jpg": Image.new("RGB", (20, 10), "red"), "2.jpg": Image.new("RGB", (8, 8))}, 4)
    sent.close(finished=True)


def events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()


def test_tensorboard(tmp_path: Path) -> None:
    log(tmp_path, "tensorboard")
    found = events(tmp_path)
    values = {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}
    assert {tag: value.value for tag, [value] in values.items()} == pytest.approx(NUMBERS)
    assert {tag: value.step for tag, [value] in values.items()} == {
        tag: 3 if tag.startswith("train") else 4 for tag in NUMBERS
    }
    assert set(found.Tags()["images"]) == {"validation/cells/1.jpg", "validation/2.jpg"}
    texts = [
        found.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0] for tag in ("config.yaml", "checkpoint")
    ]
    assert b"base_lr: 0.125" in texts[0]
    assert b"/there/step_00000004" in texts[1]


def test_steps_that_a_resumed_run_makes_again_replace_the_old_ones_in_tensorboard(tmp_path: Path) -> None:
    log(tmp_path, "tensorboard")
    again = Loggers(config(tmp_path, "tensorboard"), step=2)
    again.call("row", TRAIN | {"loss": 7.0})
    again.close(finished=False)
    assert [value.value for value in events(tmp_path).Scalars("train/loss")] == [7.0]


def test_mlflow_with_its_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'horovod-megdet[mlflow]'")
    pytest.importorskip("sqlalchemy", reason="MLflow's local store needs it: pip install 'horovod-megdet[mlflow]'")
    from mlflow.tracking import MlflowClient

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    run_dir = tmp_path / "cells"
    log(run_dir, "mlflow")
    client = MlflowClient(f"sqlite:///{run_dir / 'mlflow' / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("megdet").experiment_id])
    assert (run.info.run_name, run.info.status) == ("cells", "FINISHED")
    assert run.data.metrics == pytest.approx(NUMBERS)
    assert [point.step for point in client.get_metric_history(run.info.run_id, "evaluation/AP")] == [4]
    assert run.data.params["solver.base_lr"] == "0.125"
    assert len(run.data.params) == len(by_dotted_key(config(run_dir, "mlflow").model_dump()))
    assert run.data.tags["checkpoint"] == "/there/step_00000004"
    pictures = {file.path for file in client.list_artifacts(run.info.run_id, "validation")}
    assert pictures == {"validation/1_1.png", "validation/2_2.png"}
    assert not list(tmp_path.glob("mlruns")), "nothing lies where the program was started"

    resumed = Loggers(config(run_dir, "mlflow").model_copy(update={"solver": Config().solver}), step=4)
    resumed.call("row", TRAIN | {"step": 5, "loss": 0.5})
    resumed.close(finished=False)
    [run] = client.search_runs([run.info.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(3, 1.25), (5, 0.5)], "the same run goes on"
    assert run.info.status == "KILLED"
    path = Path(client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path)))
    assert load_config(path).solver == Config().solver, "the configuration is that of the newest start"

    with sqlite3.connect(run_dir / "mlflow" / "mlflow.db") as database:
        database.execute("PRAGMA foreign_keys = OFF")
        for table in ("tags", "params", "metrics", "latest_metrics", "runs"):
            database.execute(f"DELETE FROM {table}")
    log(run_dir, "mlflow")
    [new] = client.search_runs([run.info.experiment_id])
    assert new.info.run_id != run.info.run_id, "a run that the store has lost begins anew"


def offline_runs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))


def records(path: Path) -> list[Any]:
    """All records of an offline run of W&B: protocol buffers in LevelDB's log format, after 7 bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, parts, found = path.read_bytes(), 7, b"", []
    while offset < len(data):
        left_in_block = 32768 - offset % 32768
        if left_in_block < 7:
            offset += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", data, offset + 4)
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def complete(path: Path) -> list[Any]:
    """The records, once W&B's own process has written the last one."""
    deadline = time.monotonic() + 60
    while not (found := records(path)) or not any(record.HasField("exit") for record in found):
        assert time.monotonic() < deadline, f"{path}: {len(found)} records"
        time.sleep(0.05)
    return found


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'horovod-megdet[wandb]'")
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    run_dir = tmp_path / "cells"
    log(run_dir, "wandb")
    [path] = offline_runs(run_dir)
    found = complete(path)
    [run] = [record.run for record in found if record.HasField("run")]
    assert (run.display_name, run.project) == ("cells", "megdet")
    values = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert values["solver"]["base_lr"] == 0.125
    history: dict[int, dict[tuple[str, ...], Any]] = {}
    for record in found:
        if record.HasField("history"):
            items = {tuple(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history[record.history.step.num] = items
    values = {key: history[4 if key.startswith("evaluation") else 3][(key,)] for key in NUMBERS}
    assert values == pytest.approx(NUMBERS)
    assert history[4]["validation/cells/1.jpg", "width"] == 20
    assert len(list(path.parent.glob("files/media/images/**/*.png"))) == 2
    summary = [update for record in found for update in record.summary.update]
    assert '"/there/step_00000004"' in [update.value_json for update in summary if update.key == "checkpoint"]

    time.sleep(1.1)  # W&B names its folders by the second
    log(run_dir, "wandb")
    first, second = ([each.run for each in complete(path) if each.HasField("run")] for path in offline_runs(run_dir))
    assert first[0].run_id == second[0].run_id, "a resumed run has the id of the first"


class Recorded(Logger):
    """Keeps what it is given; as a test wants it, it raises, or waits."""

    def __init__(self, config: Config, step: int) -> None:
        self.calls.append(("open", step))

    calls: list[tuple[Any, ...]] = []  # noqa: RUF012

    def row(self, row: dict[str, Any]) -> None:
        self.calls.append(("row", row["step"]))

    def close(self, finished: bool) -> None:
        self.calls.append(("close", finished))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls that the logger gets which stands in for W&B."""
    monkeypatch.setattr(Recorded, "calls", [])
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Recorded)
    return Recorded.calls


def test_a_logger_that_raises_is_one_warning_and_the_others_go_on(
    tmp_path: Path,
    recorded: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def full(self: Recorded, row: dict[str, Any]) -> None:
        raise RuntimeError("https://me:secret@host says no.\nand much more")

    monkeypatch.setattr(Recorded, "row", full)
    sent = Loggers(config(tmp_path, "wandb", "tensorboard"), step=0)
    for step in range(1, 4):
        sent.call("row", TRAIN | {"step": step})
    sent.close(finished=True)
    assert recorded == [("open", 0)]
    assert capfd.readouterr().err == (
        "warning: output.loggers: wandb fails: https://***@host says no. Training goes on without it.\n"
    )
    assert [value.step for value in events(tmp_path).Scalars("train/loss")] == [1, 2, 3]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_logger_that_is_not_installed_is_one_warning(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for module in [name, *(module for module in sys.modules if module.startswith(f"{name}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    log(tmp_path, name)
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: output.loggers: {name} cannot be imported: ")
    assert line.endswith(f"pip install 'horovod-megdet[{name}]'. Training goes on without it.")


@pytest.mark.parametrize("method", ["__init__", "row", "close"])
def test_a_logger_that_hangs_holds_up_nothing(
    tmp_path: Path,
    method: str,
    recorded: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    release = threading.Event()

    def hang(*arguments: Any) -> None:
        assert release.wait(60)

    monkeypatch.setattr(Recorded, method, hang)
    monkeypatch.setattr(loggers, "PATIENCE", 0.2)
    started = time.monotonic()
    sent = Loggers(config(tmp_path, "wandb"), step=0)
    sent.call("row", TRAIN)
    sent.close(finished=True)
    assert time.monotonic() - started < 20
    assert "wandb has not written everything within 0.2 s. Training goes on" in capfd.readouterr().err
    release.set()


def test_a_logger_that_does_not_keep_up_is_given_up(
    tmp_path: Path,
    recorded: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    release = threading.Event()
    monkeypatch.setattr(Recorded, "row", lambda self, row: release.wait(60))
    monkeypatch.setattr(loggers, "LONGEST_QUEUE", 5)
    sent = Loggers(config(tmp_path, "wandb"), step=0)
    for _ in range(10):
        sent.call("row", TRAIN)
    release.set()
    sent.close(finished=True)
    warning = "warning: output.loggers: wandb does not keep up: 5 entries wait for it. Training goes on without it.\n"
    assert capfd.readouterr().err == warning


def test_a_logger_named_twice_is_one(tmp_path: Path, recorded: list[tuple[Any, ...]]) -> None:
    sent = Loggers(config(tmp_path, "wandb", "wandb"), step=6)
    sent.call("row", TRAIN)
    sent.close(finished=False)
    assert recorded == [("open", 6), ("row", 3), ("close", False)]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("[tensorboard, wandbb]", "not 'wandbb'; did you mean `wandb`?"),
        ("[ml_flow]", "not 'ml_flow'; did you mean `mlflow`?"),
        ("[comet]", "input should be 'tensorboard', 'mlflow' or 'wandb', not 'comet'."),
        ("mlflow", "`output.loggers`: should be a list"),
    ],
)
def test_an_unknown_name(tmp_path: Path, value: str, sentence: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"output:\n  loggers: {value}\n")
    with pytest.raises(UserError) as raised:
        load_config(tmp_path / "mine.yaml")
    assert str(raised.value).startswith(str(tmp_path / "mine.yaml"))
    assert sentence in str(raised.value)
