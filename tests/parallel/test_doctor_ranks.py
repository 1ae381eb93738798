"""``megdet doctor`` on two ranks of real launchers, with faults that only one of them has."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import launching
import pytest
from launching import TINY, Job

from horovod_megdet.errors import EXIT_CRASHED

LIMIT = 90.0

DOCTOR = """
import os, sys
number = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["HOROVOD_RANK"])
folder = {folder!r}
{plant}
sys.argv[0] = "megdet"
sys.path.insert(1, {project!r})
from horovod_megdet.cli import main
sys.exit(main())
"""


def doctor(launcher: str, plant: str, folder: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """Runs the doctor on two ranks, after the lines ``plant`` on each; returns exit code, output and JSON."""
    script = folder / "doctor.py"
    script.write_text(DOCTOR.format(folder=str(folder), plant=plant, project=str(launching.PROJECT)))
    result = folder / "doctor.json"
    words = ["doctor", "--config", str(TINY), "--json", str(result), *arguments]
    job = Job(launcher, 2, words, folder, script)
    code = job.wait(LIMIT)
    assert "Traceback" not in job.output, job.output
    return code, job.output, json.loads(result.read_text()) if result.exists() else {}


def found(data: dict[str, Any]) -> dict[str, str]:
    """Severity of the worst finding of each check, and the sentences of those that are bad."""
    return {entry["sentence"]: entry["severity"] for entry in data["findings"] if entry["severity"] != "ok"}


def expect(data: dict[str, Any], severity: str, *words: str) -> None:
    sentences = [sentence for sentence, its in found(data).items() if its == severity]
    assert any(all(word in sentence for word in words) for sentence in sentences), (words, found(data))


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_a_healthy_machine(launcher: str, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    code, output, data = doctor(launcher, "", tmp_path, "--run-dir", str(tmp_path / "run"), "--plot", str(plot))
    assert code == 0, output
    assert "Training can start: 0 errors" in output
    assert output.count("Training can start") == 1
    assert plot.stat().st_size > 5000
    assert not (tmp_path / "run").exists()
    assert [facts["place"]["rank"] for facts in data["ranks"]] == [0, 1]
    assert data["failures"] == {}
    assert all(facts["failures"] == {} for facts in data["ranks"])
    assert len(data["timings"]) > 5
    assert all((entry["mpi"] is None) == (launcher == "gloo") for entry in data["timings"])
    assert data["ranks"][0]["build"]["controller"] == ("gloo" if launcher == "gloo" else "mpi")
    assert abs(data["clocks"][1]["offset"]) <= data["clocks"][1]["uncertainty"] + 1e-3, "it is the same clock"
    assert data["checkpoint_bytes"] > 10**7


def test_a_rank_without_a_configuration_is_named_at_once(tmp_path: Path) -> None:
    plant = "if number == 1: sys.argv[sys.argv.index('--config') + 1] = 'missing.yaml'"
    code, output, data = doctor("mpirun", plant, tmp_path, "--run-dir", str(tmp_path / "run"), "--no-data")
    assert code == EXIT_CRASHED, output
    assert "missing.yaml" in output
    expect(data, "error", "missing.yaml")


ONE_RANK_DIFFERS = """
os.environ["OMPI_MCA_btl_tcp_if_include"] = "nope0"
if number == 1:
    import time
    from pathlib import Path
    info = Path(folder, "planted", "numpy-0.0.1.dist-info")
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: numpy\\nVersion: 0.0.1\\n")
    sys.path.insert(1, str(info.parent))
    sys.argv += ["--set", "solver.base_lr=0.5"]
    true_time = time.time
    time.time = lambda: true_time() + 100
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
"""


def test_one_rank_differs(tmp_path: Path) -> None:
    words = ["--run-dir", str(tmp_path / "run"), "--set", "data.workers=1"]
    code, output, data = doctor("mpirun", ONE_RANK_DIFFERS, tmp_path, *words)
    assert code == 1, output
    host = os.uname().nodename
    expect(data, "error", "the configuration differs", f"on rank 1 on {host}")
    expect(data, "error", "numpy differs", f"0.0.1 on rank 1 on {host}")
    expect(data, "error", "OMPI_MCA_btl_tcp_if_include is nope0 on ")
    expect(data, "warning", "the clock of", "100 s ahead of that of rank 0")
    if os.cpu_count() != 1:
        expect(data, "warning", f"rank 1 on {host} may use only one core")
    assert "Training would fail: 3 errors" in output


GLOO_ONLY = """
from importlib import metadata
import horovod.torch
sys.modules["mpi4py"] = None
horovod.torch.mpi_built = lambda: False
version = metadata.version
metadata.version = lambda name: version("no-such-package" if name == "mpi4py" else name)
"""


def test_an_environment_without_mpi(tmp_path: Path) -> None:
    """Horovod built for Gloo only, and no mpi4py: nothing is wrong with that under horovodrun."""
    words = ["--run-dir", str(tmp_path / "run"), "--no-data"]
    code, output, data = doctor("gloo", GLOO_ONLY, tmp_path, *words)
    assert code == 0, output
    assert data["ranks"][1]["software"]["versions"]["mpi4py"] == "missing"
    assert data["ranks"][1]["failures"] == {}


TWO_HOSTS = """
import socket
from pathlib import Path
socket.gethostname = lambda: f"host{number}"
os.chdir(Path(folder, f"host{number}"))
"""


def test_two_hosts_that_share_nothing(tmp_path: Path) -> None:
    """Each rank in a folder of its own, as if it were another host: with an image that one of them lacks."""
    for host in ("host0", "host1"):
        (tmp_path / host).mkdir()
    subprocess.run(
        [launching.BIN / "megdet", "synth", "data", "--train", "24", "--val", "5"],
        cwd=tmp_path / "host0",
        check=True,
        capture_output=True,
    )
    shutil.copytree(tmp_path / "host0" / "data", tmp_path / "host1" / "data")
    missing = min((tmp_path / "host1" / "data" / "images" / "val").iterdir())
    missing.unlink()
    words = ["--run-dir", "run", "--set", "data.synthetic_root=data", "--set", "model.weights=weights.pth"]
    (tmp_path / "host0" / "weights.pth").write_bytes(b"weights")
    code, output, data = doctor("two_hosts", TWO_HOSTS, tmp_path, *words)
    assert code == 1, output
    expect(data, "error", "the validation set cannot be used on host1", missing.name)
    expect(data, "error", "the starting weights cannot be used on host1", "weights.pth")
    expect(data, "error", "host1 does not see what rank 0 writes", "there is no such folder")
    expect(data, "error", "the name host1 does not resolve on all hosts")
    assert sorted(path.name for path in (tmp_path / "host0").iterdir()) == ["data", "weights.pth"]


def test_a_rank_that_never_starts(tmp_path: Path) -> None:
    """No rank waits forever, and what is known without the others is reported."""
    plant = "import time\nif number == 1:\n    time.sleep(600)"
    code, output, data = doctor("mpirun", plant, tmp_path, "--timeout", "3", "--set", "solver.base_rl=1")
    assert code == 1
    assert "the ranks did not find each other within 3 s" in output
    assert "did you mean `solver.base_lr`?" in output
    assert data == {}


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """The only user error that sets the exit code; all others are findings."""
    target = tmp_path / "file" / "doctor.json"
    target.parent.write_text("not a folder")
    command = [str(launching.BIN / "megdet"), "doctor", "--config", str(TINY), "--json", str(target)]
    job = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    assert job.returncode == 2
    assert job.stderr == f"error: {target}: cannot be written: File exists.\n"
