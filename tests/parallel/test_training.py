"""The main job under every launcher."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import launching
import pytest
from PIL import Image

from horovod_megdet import launched
from horovod_megdet.config import load_config
from horovod_megdet.engine import checkpoint
from horovod_megdet.evaluation.metrics import percent
from horovod_megdet.report.rows import read_metrics
from horovod_megdet.wording import count


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """Finished runs of the same configuration: one process, and two ranks under each launcher."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for launcher, ranks in [("python", 1), ("mpirun", 2), ("horovodrun", 2), ("gloo", 2)]:
        found[launcher] = folder / launcher / "run"
        # one mini-batch for all: the single process makes it in two passes
        arguments = launching.tiny(found[launcher], "solver.mini_batch=4", data=data)
        code, output = launching.run(launcher, ranks, arguments, folder / launcher, environment=launching.ENVIRONMENT)
        assert code == 0, output
        assert "Traceback" not in output
        assert f"4 images = {count(ranks, 'rank')} x 2 images x {count(2 // ranks, 'pass')}" in output
    return found


@pytest.mark.parametrize("launcher", ["python", "mpirun", "horovodrun", "gloo"])
def test_the_run_directory_holds_everything(runs: dict[str, Path], launcher: str) -> None:
    run_dir = runs[launcher]
    expected = ["config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "evaluation", "curves.png"]
    expected += ["validation.html", "summary.json"]
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(expected)
    rows = read_metrics(run_dir / "metrics.jsonl")
    training = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["epoch"] for row in evaluations] == pytest.approx([1.0, 2.0], abs=0.2)
    assert {"loss", "loss_classifier", "lr", "images_per_second", "data_seconds", "memory_mb"} <= training[-1].keys()
    assert 0 < training[-1]["work_seconds_min"] <= training[-1]["work_seconds_max"] < 1.2 * training[-1]["step_seconds"]
    assert training[-1]["ranks"] == (1 if launcher == "python" else 2)
    newest = checkpoint.newest(run_dir, report=pytest.fail)
    assert newest.images_seen == training[-1]["images_seen"] >= 2 * 24 - 4
    detections = json.loads((run_dir / "evaluation" / f"{newest.path.name}.json").read_text())
    assert all(len(detection["bbox"]) == 4 for detection in detections)
    assert list((run_dir / "tensorboard").iterdir())
    assert load_config(run_dir / "config.yaml") == newest.config, "the resolved configuration can be run again"


def test_the_launchers_agree_bit_for_bit(runs: dict[str, Path]) -> None:
    """Two ranks add two numbers, whose order does not matter, so MPI and Gloo must give the same bits."""
    hashes = [launching.final_hashes(runs[launcher]) for launcher in ("mpirun", "horovodrun", "gloo")]
    assert hashes[0] == hashes[1] == hashes[2]


TRAIN, MEGDET = launching.PROJECT / "train.py", launching.BIN / "megdet"
EVALUATIONS = {
    "megdet evaluate": ("python", MEGDET, ["evaluate", "{run}"]),
    "--eval-only": ("mpirun", TRAIN, ["--config", "{run}/config.yaml", "--run-dir", "{run}", "--eval-only"]),
    "--checkpoint": (
        "python",
        TRAIN,
        ["--config", "{run}/config.yaml", "--run-dir", "other", "--eval-only", "--checkpoint", "{checkpoint}"],
    ),
}


@pytest.mark.parametrize(("launcher", "script", "arguments"), EVALUATIONS.values(), ids=EVALUATIONS)
def test_evaluation_of_a_checkpoint_gives_the_metrics_of_the_run(
    runs: dict[str, Path], tmp_path: Path, launcher: str, script: Path, arguments: list[str]
) -> None:
    """On two ranks what was evaluated on two, and on one process as well: shards are exact."""
    run_dir = runs["mpirun"]
    recorded = read_metrics(run_dir / "metrics.jsonl")[-1]
    assert recorded["kind"] == "evaluation"
    newest = checkpoint.newest(run_dir, report=pytest.fail).path
    detections = newest / "detections.json"
    detections.unlink(missing_ok=True)
    words = [word.format(run=run_dir, checkpoint=newest) for word in arguments]
    job = launching.Job(launcher, 1 if launcher == "python" else 2, words, tmp_path, script)
    assert job.wait() == 0, job.output
    printed = dict(re.findall(r"^\W*(AP|AP50|AP75)\s.*\s([\d.]+)\W*$", job.output, re.MULTILINE))
    assert printed == {name: percent(recorded[name]) for name in ("AP", "AP50", "AP75")}
    in_run = json.loads((run_dir / "evaluation" / f"{newest.name}.json").read_text())
    assert json.loads(detections.read_text()) == in_run
    assert not (tmp_path / "other").exists(), "an evaluation is no run"


def test_a_checkpoint_folder_says_what_it_is(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """README.md of the best and the last checkpoint: figures of the run, and code that runs as it stands."""
    run_dir = runs["mpirun"]
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "evaluation"]
    best = max(rows, key=lambda row: row["AP"])
    cards = {path.parent.name: path.read_text() for path in run_dir.glob("checkpoints/*/README.md")}
    assert cards.keys() == {checkpoint.name(row["step"]) for row in (best, rows[-1])}
    coco = json.loads((data / "annotations" / "train.json").read_text())
    for row in (best, rows[-1]):
        folder = run_dir / "checkpoints" / checkpoint.name(row["step"])
        saved = checkpoint.read(folder)  # the sums still fit
        card = cards[folder.name]
        assert f"| AP50 | IoU 0.50 | {100 * row['AP50']:.1f} |" in card
        assert ("(the best of the training)" in card) == (row is best)
        for category in coco["categories"]:
            boxes = sum(each["category_id"] == category["id"] for each in coco["annotations"])
            assert f"| {category['name']} | {category['id']} | {boxes} | " in card
        assert f"| training | `synthetic:train` | 24 | {len(coco['annotations'])} |" in card
        assert "4 images = 2 ranks x 2 images x 1 pass" in card
        assert f"| so far | {row['step']} steps, {row['images_seen']} images |" in card
        assert f"torch {saved.run.versions['torch']}," in card
        assert saved.run.training_data in card
        with Image.open(folder / "curves.png") as curves:
            curves.load()
    program = card.split("```python\n")[1].split("```")[0]
    Image.new("RGB", (80, 60), "gray").save(tmp_path / "photo.jpg")
    (tmp_path / folder.name).symlink_to(folder)
    environment = launching.ENVIRONMENT | {"PYTHONPATH": str(launching.PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


SLOW_DISK = f"""
import runpy, sys, time
sys.argv[0] = {str(launching.PROJECT / "train.py")!r}
sys.path.insert(0, {str(launching.PROJECT)!r})
from horovod_megdet.evaluation.coco import Evaluation
from horovod_megdet.printing import say
from horovod_megdet.progress import progress
write = Evaluation.write_detections
def write_slowly(self, path):
    step = int(path.stem.removeprefix("step_"))
    deadline = time.monotonic() + 10
    while progress.step < step + 2 and time.monotonic() < deadline:  # at the end of the run there is no further step
        time.sleep(0.01)
    write(self, path)
    say(f"detections of step {{step}} written in step {{progress.step}}")
Evaluation.write_detections = write_slowly
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_all_ranks_train_on_while_rank_0_writes_detections(tmp_path: Path, data: Path) -> None:
    """The detections of the first evaluation take until two steps later, the run's last are waited for."""
    script = tmp_path / "slow_disk.py"
    script.write_text(SLOW_DISK)
    job = launching.Job("mpirun", 2, launching.tiny(tmp_path / "run", data=data), tmp_path, script)
    assert job.wait() == 0, job.output
    lines = [line.split() for line in job.output.splitlines() if line.startswith("detections of step")]
    steps = [(int(line[3]), int(line[-1])) for line in lines]
    assert len(steps) == 2, job.output
    assert steps[0][1] >= steps[0][0] + 2
    assert steps[1][1] == steps[1][0]
    for step, _ in steps:
        assert isinstance(json.loads((tmp_path / "run" / "evaluation" / f"step_{step:08d}.json").read_text()), list)


def test_the_log_names_the_rank_that_the_others_wait_for(tmp_path: Path, data: Path) -> None:
    script = Path(__file__).with_name("slow_train.py")
    arguments = launching.tiny(tmp_path / "run", "solver.epochs=4", "output.evaluate_every_epochs=4", data=data)
    job = launching.Job("mpirun", 2, arguments, tmp_path, script)
    assert job.wait() == 0, job.output
    said = re.findall(
        r"warning: rank (\d) on (\S+) is [\d.]+ times slower than the others, which wait for it", job.output
    )
    assert said == [("1", launched.host())]
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    differences = [row["work_seconds_max"] - row["work_seconds_min"] for row in rows]
    assert statistics.median(differences) > 0.25, "it sleeps for 0.5 s of a step"
