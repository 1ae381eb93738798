"""Every mistake ends all ranks within seconds, with a sentence and an exit code, and without a stack trace."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
import torchvision
from launching import Job, run
from PIL import Image

from horovod_megdet import launched
from horovod_megdet.engine import checkpoint
from horovod_megdet.errors import EXIT_CRASHED, EXIT_NOT_FINITE, EXIT_NOT_SAVED, EXIT_USER_ERROR

LIMIT = 60.0
"""Seconds within which all ranks have to end; on an idle machine they need a third of it."""

# These jobs compare no numbers.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    code, output = run("mpirun", 2, launching.tiny(folder / "run", "solver.epochs=1", data=data), folder)
    assert code == 0, output
    return folder / "run"


def expect(code: int, *sentences: str, arguments: list[str], folder: Path, launcher: str = "mpirun") -> str:
    """Runs train.py on two ranks and checks exit code and sentences; the first sentence is printed once."""
    actual, output = run(launcher, 1 if launcher == "python" else 2, arguments, folder, LIMIT)
    assert actual == code, output
    for sentence in sentences:
        assert sentence in output, output
    assert output.count(sentences[0]) == 1, output
    assert "Traceback" not in output, output
    return output


def changed(folder: Path, change: str) -> Path:
    """A script that does what train.py does, after a change to its process."""
    script = folder / "changed.py"
    script.write_text(
        "import runpy, sys\n"
        f"sys.argv[0] = {str(launching.PROJECT / 'train.py')!r}\n"
        f"sys.path.insert(0, {str(launching.PROJECT)!r})\n"
        "from horovod_megdet import launched\n"
        f"{textwrap.dedent(change)}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return script


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"base: {launching.TINY}\nsolver:\n  base_rl: 0.1\n")
    expect(
        EXIT_USER_ERROR,
        f"{config}: unknown key `solver.base_rl`; did you mean `solver.base_lr`?",
        arguments=["--config", str(config)],
        folder=tmp_path,
    )


def test_wrong_type(data: Path, tmp_path: Path) -> None:
    expect(
        EXIT_USER_ERROR,
        "--set solver.epochs=many: `solver.epochs`: input should be a valid number",
        arguments=launching.tiny(tmp_path / "run", "solver.epochs=many", data=data),
        folder=tmp_path,
    )


def test_impossible_mini_batch(data: Path, tmp_path: Path) -> None:
    expect(
        EXIT_USER_ERROR,
        "solver.mini_batch = 6 is not a multiple of 4",
        "Use 1, 3 ranks",
        arguments=launching.tiny(tmp_path / "run", "solver.mini_batch=6", data=data),
        folder=tmp_path,
    )


def test_impossible_bn_size(data: Path, tmp_path: Path) -> None:
    expect(
        EXIT_USER_ERROR,
        "batch_norm.bn_size: 3 does not work with 2 ranks of 2 images; possible are 2, 4",
        arguments=launching.tiny(tmp_path / "run", "batch_norm.bn_size=3", data=data),
        folder=tmp_path,
    )
    assert not (tmp_path / "run").exists(), "a start that failed leaves no run behind"


def test_missing_data_folder(tmp_path: Path) -> None:
    settings = ["data.train_annotations=nowhere/train.json", "data.train_images=nowhere"]
    expect(
        EXIT_USER_ERROR,
        "nowhere/train.json",
        arguments=launching.tiny(tmp_path / "run", *settings, data=tmp_path / "synthetic"),
        folder=tmp_path,
    )


def generated(data: Path) -> dict[str, Any]:
    """The annotations of the generated training set."""
    subprocess.run(
        [launching.BIN / "megdet", "synth", str(data), "--train", "24", "--val", "5"], check=True, capture_output=True
    )
    content: dict[str, Any] = json.loads((data / "annotations" / "train.json").read_text())
    return content


def broken_annotations(change: Callable[[dict[str, Any], Path], None], data: Path, tmp_path: Path) -> list[str]:
    """Arguments that train on a changed copy of the generated training set."""
    content, copy = generated(data), tmp_path / "images"
    shutil.copytree(data / "images" / "train", copy)
    change(content, copy)
    (tmp_path / "broken.json").write_text(json.dumps(content))
    settings = [f"data.train_annotations={tmp_path / 'broken.json'}", f"data.train_images={copy}"]
    return launching.tiny(tmp_path / "run", *settings, data=data)


def _remove_file(content: dict[str, Any], images: Path) -> None:
    (images / content["images"][3]["file_name"]).unlink()


def _truncate_header(content: dict[str, Any], images: Path) -> None:
    (images / content["images"][3]["file_name"]).write_bytes(b"\xff\xd8")


def _zero_size(content: dict[str, Any], images: Path) -> None:
    content["annotations"][2]["bbox"][2] = 0


def _outside(content: dict[str, Any], images: Path) -> None:
    content["annotations"][2]["bbox"][0] = 10_000


def _nan(content: dict[str, Any], images: Path) -> None:
    content["annotations"][2]["bbox"][1] = float("nan")


def _unknown_category(content: dict[str, Any], images: Path) -> None:
    content["annotations"][2]["category_id"] = 999


def _duplicate_image(content: dict[str, Any], images: Path) -> None:
    content["images"].append(content["images"][0])


def _duplicate_annotation(content: dict[str, Any], images: Path) -> None:
    content["annotations"].append(content["annotations"][0])


def _without_image(content: dict[str, Any], images: Path) -> None:
    content["annotations"][2]["image_id"] = 999_999


def _empty(content: dict[str, Any], images: Path) -> None:
    content["images"] = content["annotations"] = []


BAD_DATA = [
    _remove_file,
    _truncate_header,
    _zero_size,
    _outside,
    _nan,
    _unknown_category,
    _duplicate_image,
    _duplicate_annotation,
    _without_image,
    _empty,
]


@pytest.mark.parametrize("change", BAD_DATA, ids=lambda change: change.__name__.strip("_"))
def test_bad_data(change: Callable[[dict[str, Any], Path], None], data: Path, tmp_path: Path) -> None:
    arguments = broken_annotations(change, data, tmp_path)
    launcher = "mpirun" if change is _remove_file else "python"
    sentence = f"error: {tmp_path / 'broken.json'}: "
    output = expect(EXIT_USER_ERROR, sentence, arguments=arguments, folder=tmp_path, launcher=launcher)
    assert change is _empty or "megdet check-data" in output


def test_bad_data_can_be_skipped(data: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any], images: Path) -> None:
        _remove_file(content, images)
        _zero_size(content, images)

    arguments = broken_annotations(change, data, tmp_path)
    code, output = run("python", 1, [*arguments, "--set", "data.bad_annotations=skip"], tmp_path)
    assert code == 0, output
    assert "2 bad annotations or images are skipped" in output


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_an_image_that_cannot_be_decoded_is_found_by_all_ranks(data: Path, tmp_path: Path, policy: str) -> None:
    """Its header is good, so that the check at the start lets it pass."""

    def change(content: dict[str, Any], images: Path) -> None:
        path = images / content["images"][3]["file_name"]
        with Image.open(path) as image:
            image.save(path.with_suffix(".png"))
        png = path.with_suffix(".png")
        png.write_bytes(png.read_bytes()[:400])
        content["images"][3]["file_name"] = png.name
        # no two images may have the same file
        path.unlink()

    arguments = [*broken_annotations(change, data, tmp_path), "--set", f"data.bad_annotations={policy}"]
    code, output = run("mpirun", 2, arguments, tmp_path, LIMIT * 2)
    name = json.loads((tmp_path / "broken.json").read_text())["images"][3]["file_name"]
    assert name in output
    assert code == (EXIT_USER_ERROR if policy == "error" else 0), output
    assert "Traceback" not in output


def test_resume_with_nothing_there(data: Path, tmp_path: Path) -> None:
    expect(
        EXIT_USER_ERROR,
        "there is no whole checkpoint. Start without --resume, or check output.run_dir.",
        arguments=[*launching.tiny(tmp_path / "run", data=data), "--resume"],
        folder=tmp_path,
    )


def test_a_run_directory_that_holds_another_run(finished: Path, data: Path, tmp_path: Path) -> None:
    before = sorted(path.read_bytes() for path in finished.rglob("*") if path.is_file())
    expect(
        EXIT_USER_ERROR,
        f"{finished}: this folder already holds a run. Add --resume",
        arguments=launching.tiny(finished, data=data),
        folder=tmp_path,
    )
    assert sorted(path.read_bytes() for path in finished.rglob("*") if path.is_file()) == before


def test_a_run_directory_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    expect(
        EXIT_USER_ERROR,
        "Choose another run directory with --run-dir",
        arguments=launching.tiny(tmp_path / "file" / "run", data=data),
        folder=tmp_path,
    )


def test_a_truncated_checkpoint(finished: Path, data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for path in checkpoint.folder(run_dir).glob("*/state.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    expect(
        EXIT_USER_ERROR,
        "there is no whole checkpoint. Start without --resume, or check output.run_dir.",
        "the checkpoint is damaged: its SHA-256 is not the one recorded",
        arguments=[*launching.tiny(run_dir, data=data), "--resume"],
        folder=tmp_path,
    )


def test_a_checkpoint_of_another_model(finished: Path, data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    expect(
        EXIT_USER_ERROR,
        "belongs to another detector",
        arguments=[*launching.tiny(run_dir, "model.fpn_channels=24", data=data), "--resume"],
        folder=tmp_path,
    )


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("solver.base_lr=0.5", "configuration differs"),
        ("batch_norm.bn_size=2", "configuration differs"),  # which Horovod starts another way for
        ("solver.base_lr=high", "solver.base_lr"),
    ],
)
def test_a_host_that_differs(data: Path, tmp_path: Path, setting: str, sentence: str, launcher: str) -> None:
    """One rank with another configuration: the message names rank, host and what differs."""
    script = changed(tmp_path, f"if launched.rank() == 1: sys.argv += ['--set', {setting!r}]")
    groups = [] if "bn_size" in setting else ["batch_norm.bn_size=2"]  # for the other ranks
    job = Job(launcher, 2, launching.tiny(tmp_path / "run", *groups, data=data), tmp_path, script)
    assert job.wait(LIMIT) == EXIT_USER_ERROR, job.output
    assert sentence in job.output
    assert "rank 1 " in job.output
    assert os.uname().nodename in job.output
    assert "Traceback" not in job.output


def test_a_checkpoint_of_other_classes_is_not_evaluated(finished: Path, data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "annotations" / "val.json").read_text())
    content["categories"][0]["name"] = "renamed"
    (tmp_path / "val.json").write_text(json.dumps(content))
    settings = [f"data.val_annotations={tmp_path / 'val.json'}", f"data.val_images={data / 'images' / 'val'}"]
    expect(
        EXIT_USER_ERROR,
        "the checkpoint knows the classes ['",
        "the validation set has ['renamed', ",
        arguments=[*launching.tiny(finished, *settings, data=data), "--eval-only"],
        folder=tmp_path,
    )


def test_a_host_that_does_not_see_the_checkpoint(finished: Path, data: Path, tmp_path: Path) -> None:
    """The run directory is not on a disk that all hosts share: rank 1 says so, and nobody waits for it."""
    script = changed(
        tmp_path,
        """\
        from horovod_megdet.engine import checkpoint
        from horovod_megdet.errors import UserError
        def read(path):
            raise UserError(f"{path}: there is no such checkpoint.")
        if launched.rank() == 1:
            checkpoint.read = read
        """,
    )
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    job = Job("mpirun", 2, [*launching.tiny(run_dir, data=data), "--resume"], tmp_path, script)
    assert job.wait(LIMIT) == EXIT_USER_ERROR, job.output
    assert f"there is no such checkpoint. (rank 1 on {os.uname().nodename})" in job.output
    assert "Traceback" not in job.output


@pytest.mark.parametrize("differing", ["training data", "starting weights"])
def test_a_host_with_other_files(data: Path, tmp_path: Path, differing: str) -> None:
    """The same relative paths lead to another width of a box, or to another weight, on the second host."""
    content, network, elsewhere = generated(data), torchvision.models.resnet18(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (tmp_path, elsewhere):
        (folder / "train.json").write_text(json.dumps(content))
        torch.save(network.state_dict(), folder / "weights.pth")
        if differing == "training data":
            content["annotations"][2]["bbox"][2] /= 2
        else:
            network.conv1.weight.data[0, 0, 0, 0] += 1e-3
    settings = ["data.train_annotations=train.json", f"data.train_images={data / 'images' / 'train'}"]
    arguments = launching.tiny(tmp_path / "run", *settings, "model.weights=weights.pth", data=data)
    script = changed(tmp_path, f"import os\nif launched.rank() == 1: os.chdir({str(elsewhere)!r})")
    job = Job("two_hosts", 2, arguments, tmp_path, script)
    assert job.wait(LIMIT) == EXIT_USER_ERROR, job.output
    host = re.escape(launched.host())
    sentence = rf"{differing} differs: (\w+) on rank 1 \({host}\), (\w+) on rank 0 \({host}\)"
    (differ,) = re.findall(sentence, " ".join(job.output.split()))
    assert differ[0] != differ[1]
    assert "Traceback" not in job.output


IN_STEP_3_OF_RANK_1 = """\
from horovod_megdet.models.detector import Detector
original, calls = Detector.forward_losses, []
def forward_losses(self, images, targets):
    losses = original(self, images, targets)
    calls.append(1)
    if launched.rank() == 1 and len(calls) == 3:
        HERE
    return losses
Detector.forward_losses = forward_losses
"""
"""A change to the process of a rank, whose third step has something else in the place of HERE."""


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_one_rank_raising_ends_all(data: Path, tmp_path: Path, launcher: str) -> None:
    script = changed(tmp_path, IN_STEP_3_OF_RANK_1.replace("HERE", "raise ZeroDivisionError('planted')"))
    job = Job(launcher, 2, launching.tiny(tmp_path / "run", data=data), tmp_path, script)
    assert job.wait(LIMIT) == EXIT_CRASHED, job.output
    assert f"error: rank 1 on {os.uname().nodename} crashed" in job.output
    assert "ZeroDivisionError: planted" in job.output


def test_a_loss_that_is_not_finite(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = launching.tiny(run_dir, "solver.base_lr=1e18", "solver.warmup_epochs=0", data=data)
    output = expect(EXIT_NOT_FINITE, "The loss is not finite at step", arguments=arguments, folder=tmp_path)
    assert f"on {os.uname().nodename}, images [" in output
    assert "Lower solver.base_lr" in output
    for path in checkpoint.folder(run_dir).glob("step_*"):
        checkpoint.read(path)


def test_weights_that_are_not_finite_are_not_saved(data: Path, tmp_path: Path) -> None:
    """An update makes them so, after a loss that was finite."""
    change = "losses.values['loss_classifier'].register_hook(lambda gradient: gradient * float('inf'))"
    script = changed(tmp_path, IN_STEP_3_OF_RANK_1.replace("HERE", change))
    run_dir = tmp_path / "run"
    arguments = launching.tiny(run_dir, "output.checkpoint_every_epochs=0.1", data=data)
    job = Job("mpirun", 2, arguments, tmp_path, script)
    assert job.wait(LIMIT) == EXIT_NOT_FINITE, job.output
    assert "The weights are not finite after step 3. The last good checkpoint is kept. Lower" in job.output
    assert {path.name for path in checkpoint.folder(run_dir).iterdir()} == {"step_00000001", "step_00000002"}


def test_a_loss_that_is_not_finite_on_one_rank_names_it_alone(data: Path, tmp_path: Path) -> None:
    script = changed(tmp_path, IN_STEP_3_OF_RANK_1.replace("HERE", "losses.values['loss_classifier'] *= float('nan')"))
    job = Job("mpirun", 2, launching.tiny(tmp_path / "run", data=data), tmp_path, script)
    assert job.wait(LIMIT) == EXIT_NOT_FINITE, job.output
    (named,) = re.findall(r"The loss is not finite at step 3: (.*?)\. The last good", job.output)
    assert re.fullmatch(rf"rank 1 on {re.escape(launched.host())}, images \[\d+, \d+\]", named), job.output
    assert "Traceback" not in job.output


# too small for a checkpoint of 90 MB
@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_a_full_disk(small_disk: Path, data: Path, tmp_path: Path) -> None:
    """Training goes on to the end with a warning at each checkpoint; only the last one that fails is an error."""
    arguments = launching.tiny(small_disk / "run", data=data)
    code, output = run("mpirun", 2, arguments, tmp_path, LIMIT * 2)
    assert code == EXIT_NOT_SAVED, output
    assert "Training goes on and tries again" in output
    assert "No space left on device" in output
    assert "Traceback" not in output
    assert not list(checkpoint.folder(small_disk / "run").glob("*"))


def test_help_teaches() -> None:
    text = subprocess.run(
        [sys.executable, str(launching.PROJECT / "train.py"), "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert "horovodrun -np 2 python train.py" in text
    assert "Exit codes" in text
