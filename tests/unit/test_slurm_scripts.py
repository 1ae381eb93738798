"""The batch scripts, with stand-ins for mpirun, srun and scontrol that record how they are called."""

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from horovod_megdet.errors import EXIT_STALLED

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["megdet.sbatch", "megdet_srun.sbatch", "megdet_elastic.sbatch"]

# Records its arguments, one per line, between markers. The training is what starts train.py; srun runs anything else.
STAND_IN = r"""#!/bin/bash
{ echo "<$(basename "$0")>"; printf '%s\n' "$@"; echo "</>"; } >> "$CALLS"
for argument in "$@"; do [[ $argument != train.py ]] || training=1; done
if [[ ${training:-} ]]; then
    trap 'echo USR1 >> "$CALLS"; exit "${STOP_EXIT:-85}"' USR1
    [[ ! ${TRAIN_SLEEP:-} ]] || { touch "$CALLS.started"; for _ in $(seq "$TRAIN_SLEEP"); do sleep 0.1; done; }
    exit "${TRAIN_EXIT:-0}"
fi
if [[ $(basename "$0") == srun ]]; then
    while [[ ${1:-} == --* ]]; do shift; done
    "$@"
fi
"""


@dataclass
class Slurm:
    """A folder that stands in for the cluster."""

    folder: Path
    script: str = "megdet.sbatch"
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        programs = self.folder / "venv" / "bin"
        programs.mkdir(parents=True)
        for name in ("mpirun", "srun", "scontrol", "megdet", "sinfo"):
            (programs / name).write_text(STAND_IN)
            (programs / name).chmod(0o755)
        (self.folder / "home").mkdir()
        shutil.copytree(ROOT / "slurm", self.folder / "home" / "slurm")

    def have_nodes_answer(self, *names: str) -> None:
        """What Slurm says of the job's nodes: the job has two."""
        for program, answer in {"sinfo": names, "squeue": ["node[01-02]"]}.items():
            path = self.folder / "venv" / "bin" / program
            path.write_text(f'#!/bin/bash\necho "$*" >> "$CALLS"\nprintf \'%s\\n\' {" ".join(answer)}\n')
            path.chmod(0o755)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run dir"

    @property
    def calls_file(self) -> Path:
        return self.folder / "calls"

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "CALLS": str(self.calls_file),
            "MEGDET_VENV": str(self.folder / "venv"),
            "MEGDET_RUN_DIR": str(self.run_dir),
            "SLURM_SUBMIT_DIR": str(self.folder / "home"),
            "SLURM_JOB_ID": "42",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS_PER_NODE": "4",
            "SLURM_JOB_NODELIST": "node[01-02]",
        }
        self.calls_file.unlink(missing_ok=True)
        # A copy elsewhere is what Slurm runs.
        copy = shutil.copy(ROOT / "slurm" / self.script, self.folder / "slurm_script")
        return subprocess.Popen(
            ["bash", copy, *arguments],
            env=environment | self.variables | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        process = self.start(*arguments, **variables)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of each call of a program."""
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        blocks = [block.partition("</>")[0].splitlines() for block in text.split("<") if block.startswith(program)]
        return [block[1:] for block in blocks]

    def training(self) -> list[str]:
        """The whole command that starts the ranks."""
        (call,) = [
            call for name in ("mpirun", "srun", "megdet") for call in self.calls(f"{name}>") if "train.py" in call
        ]
        return call


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


@pytest.fixture(params=SCRIPTS)
def each_slurm(request: pytest.FixtureRequest, tmp_path: Path) -> Slurm:
    return Slurm(tmp_path, request.param)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize("name", [*SCRIPTS, "job.bash", "stage.bash", "nodes_of_job"])
def test_syntax(name: str) -> None:
    subprocess.run(["bash", "-n", ROOT / "slurm" / name], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    files = sorted((ROOT / "slurm").iterdir())
    done = subprocess.run(["shellcheck", "-x", "-P", ROOT, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_arguments_reach_train_py(each_slurm: Slurm) -> None:
    code, output = each_slurm.run("--config", "my config.yaml", "--set", "data.root=/a b/$HOME;'x'")
    assert code == 0, output
    training = each_slurm.training()
    after = training[training.index("train.py") :]
    given = ["--config", "my config.yaml", "--set", "data.root=/a b/$HOME;'x'"]
    assert after[3:] == [*given, "--run-dir", str(each_slurm.run_dir)]
    assert after[1] == "--config"  # the default, which the later one overrides
    assert each_slurm.calls("scontrol>") == []
    assert "job 42, start 1, 2 nodes node[01-02], 8 ranks" in output


def test_mpirun_gets_all_ranks_host_by_host(slurm: Slurm) -> None:
    slurm.run(MEGDET_RANKS_PER_NODE="3", MEGDET_INTERFACE="ib0", NCCL_DEBUG="INFO")
    training = " ".join(slurm.training())
    assert training.startswith("-np 6 --map-by ppr:3:node --bind-to none ")
    assert "--mca oob_tcp_keepalive_time 3" in training
    assert "--mca btl_tcp_if_include ib0 --mca oob_tcp_if_include ib0" in training
    assert "-x NCCL_DEBUG" in training
    assert "-x PATH" in training


def test_srun_starts_all_ranks_through_pmix(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "megdet_srun.sbatch")
    slurm.run()
    training = slurm.training()
    assert {"--mpi=pmix", "--nodes=2", "--ntasks-per-node=4", "--ntasks=8"} <= set(training)
    assert slurm.calls("mpirun>") == []


def test_an_elastic_job_runs_on_the_nodes_that_answer(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "megdet_elastic.sbatch", {"SLURM_NNODES": "5"})
    slurm.run(MEGDET_RANKS_PER_NODE="2", MEGDET_INTERFACE="ib0")
    discover = str(tmp_path / "home" / "slurm" / "nodes_of_job")
    training = slurm.training()
    assert training[: training.index("--")] == [
        *["launch", "--min-ranks", "6", "--max-ranks", "10", "--discover", discover, "--interface", "ib0"]
    ]
    slurm.have_nodes_answer("node02", "node01", "node02")
    environment = {"PATH": f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}", "CALLS": str(slurm.calls_file)}
    environment |= {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[01-03]"}  # one has left the job
    environment |= {"MEGDET_RUN_DIR": str(slurm.run_dir), "MEGDET_RANKS_PER_NODE": "2"}
    slurm.calls_file.unlink()
    for _ in range(2):
        assert subprocess.check_output([discover], env=environment, text=True) == "node01:2\nnode02:2\n"
    _, asked = slurm.calls_file.read_text().splitlines()
    assert "--nodes=node[01-02]" in asked


def test_an_elastic_job_with_too_few_nodes_is_requeued(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "megdet_elastic.sbatch", {"SLURM_NNODES": "4", "TRAIN_EXIT": "1"})
    slurm.have_nodes_answer("node01", "node02")
    code, output = slurm.run()
    assert (code, slurm.calls("scontrol>")) == (1, []), output
    slurm.have_nodes_answer("node01")
    (slurm.run_dir / "nodes-42").unlink()
    code, output = slurm.run()
    assert (code, slurm.calls("scontrol>")) == (205, [["requeue", "42"]]), output
    assert "exit code 1, with fewer than 2 nodes left" in output
    code, output = slurm.run(MEGDET_MIN_NODES="5")
    assert (code, slurm.calls("scontrol>")) == (1, []), "a mistake of the user"


def test_a_job_that_stopped_with_a_checkpoint_is_requeued(each_slurm: Slurm) -> None:
    for restart in range(3):  # more often than MEGDET_MAX_REQUEUES
        code, output = each_slurm.run(TRAIN_EXIT="85", SLURM_RESTART_COUNT=str(restart), MEGDET_MAX_REQUEUES="1")
        assert each_slurm.calls("scontrol>") == [["requeue", "42"]]
        assert (code, f"start {restart + 1}," in output) == (85, True)


@pytest.mark.parametrize("exit_code", [1, 2, 3, 4, 137])
def test_a_crash_ends_the_job_with_its_code(each_slurm: Slurm, exit_code: int) -> None:
    each_slurm.have_nodes_answer("node01", "node02")
    code, output = each_slurm.run(TRAIN_EXIT=str(exit_code))
    assert code == exit_code
    assert each_slurm.calls("scontrol>") == []
    assert f"failed with exit code {exit_code}" in output


@pytest.mark.parametrize("exit_code", [205, EXIT_STALLED])
def test_lost_nodes_and_stalls_are_counted_up_to_the_limit(slurm: Slurm, exit_code: int) -> None:
    for _ in range(2):
        code, _ = slurm.run(TRAIN_EXIT=str(exit_code), MEGDET_MAX_REQUEUES="2")
        assert (code, slurm.calls("scontrol>")) == (exit_code, [["requeue", "42"]])
    code, output = slurm.run(TRAIN_EXIT=str(exit_code), MEGDET_MAX_REQUEUES="2")
    assert (code, slurm.calls("scontrol>")) == (exit_code, [])
    assert "giving up" in output


def test_a_start_that_was_cut_off_counts_as_a_lost_node(slurm: Slurm) -> None:
    def cut_off() -> None:
        (slurm.folder / "calls.started").unlink(missing_ok=True)
        process = slurm.start(TRAIN_SLEEP="30", MEGDET_MAX_REQUEUES="1")
        wait_for(slurm.folder / "calls.started")
        process.kill()
        process.wait()

    cut_off()
    code, output = slurm.run(MEGDET_MAX_REQUEUES="1", TRAIN_EXIT="1")
    assert "failure 1, at most 1 are tolerated" in output
    assert code == 1
    cut_off()
    code, output = slurm.run(MEGDET_MAX_REQUEUES="1")
    assert (code, slurm.calls("mpirun>"), slurm.calls("scontrol>")) == (205, [], [])
    assert "giving up" in output


def test_resumes_when_there_is_a_run(each_slurm: Slurm) -> None:
    each_slurm.run()
    assert "--resume" not in each_slurm.training()
    each_slurm.run_dir.mkdir(exist_ok=True)
    (each_slurm.run_dir / "config.yaml").touch()
    each_slurm.run()
    assert "--resume" in each_slurm.training()


def test_the_run_directory_may_be_an_argument(slurm: Slurm) -> None:
    other = slurm.folder / "other"
    other.mkdir()
    (other / "config.yaml").touch()
    slurm.run(f"--run-dir={other}")
    assert slurm.training()[-3:] == ["--resume", "--run-dir", str(other)]


def test_usr1_before_the_time_limit_stops_and_requeues(each_slurm: Slurm) -> None:
    process = each_slurm.start(TRAIN_SLEEP="200")
    wait_for(each_slurm.folder / "calls.started")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 85, output
    assert "USR1" in each_slurm.calls_file.read_text()
    assert each_slurm.calls("scontrol>") == [["requeue", "42"]]


@pytest.mark.parametrize("exit_code", [85, 205, EXIT_STALLED])
def test_scancel_stops_and_does_not_requeue(slurm: Slurm, exit_code: int) -> None:
    """Also not where a node is lost, or the ranks hang, at the same time."""
    process = slurm.start(TRAIN_SLEEP="200", STOP_EXIT=str(exit_code))
    wait_for(slurm.folder / "calls.started")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == exit_code, output
    assert slurm.calls("scontrol>") == []
    assert "canceled" in output


def test_staging_copies_checks_and_cleans_up(slurm: Slurm) -> None:
    data, local = slurm.folder / "the data", slurm.folder / "local disk"
    (data / "images").mkdir(parents=True)
    (data / "images" / "a b.jpg").write_bytes(b"x" * 1000)
    (data / "train.json").write_text("{}")
    code, output = slurm.run(MEGDET_STAGE_FROM=str(data), MEGDET_STAGE_TO=str(local))
    assert code == 0, output
    copying, removing = slurm.calls("srun>")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(copying)
    assert removing[-2:] == ["--", str(local / "megdet-42")]
    assert f"data.root={local / 'megdet-42'}" in slurm.training()
    assert list(local.iterdir()) == []
    assert (slurm.run_dir / "manifest-42").read_text() == "1000 images/a b.jpg\n2 train.json\n"


def test_an_incomplete_copy_is_noticed(tmp_path: Path) -> None:
    data, manifest = tmp_path / "data", tmp_path / "manifest"
    data.mkdir()
    (data / "a").write_text("12345")
    manifest.write_text("6 a\n")
    stage = ["bash", ROOT / "slurm" / "stage.bash", data, tmp_path / "copy", manifest]
    done = subprocess.run(stage, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is not complete" in done.stderr
    assert not (tmp_path / "copy").exists()


def test_a_copy_starts_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """Also where an earlier start of the job was cut off, or somebody else has made the folder."""
    data, manifest, copy = tmp_path / "data", tmp_path / "manifest", tmp_path / "local" / "copy"
    data.mkdir()
    (data / "a").write_text("12345")
    manifest.write_text("5 a\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    copy.mkdir(parents=True)
    (copy / "cache").write_text("of an earlier start")
    (copy / "a").symlink_to(elsewhere)
    for _ in range(2):
        subprocess.run(["bash", ROOT / "slurm" / "stage.bash", data, copy, manifest], check=True)
        assert [path.name for path in copy.iterdir()] == ["a"]
        assert copy.stat().st_mode & 0o777 == 0o700
    assert elsewhere.read_text() == "mine"


def test_staging_that_fails_ends_the_job(slurm: Slurm) -> None:
    code, output = slurm.run(MEGDET_STAGE_FROM=str(slurm.folder / "missing"))
    assert code == 2
    assert "cannot be read" in output
    assert slurm.calls("mpirun>") == []


def test_a_script_that_is_not_submitted_from_the_checkout_says_so(each_slurm: Slurm) -> None:
    code, output = each_slurm.run(SLURM_SUBMIT_DIR="/")
    assert code == 2
    assert "submit from there" in output
