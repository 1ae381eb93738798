"""The set-up: what is due, and what an interruption leaves, without network and without building anything."""

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pip
import pytest
from programs import executable, has_ended, wait_until

import setup_env
from environment import horovod_wheel, machine
from environment.commands import SetupError
from setup_env import RUNNING, Setup

SCRIPTS = Path(setup_env.__file__).parent
ALL = ["venv", "packages", "horovod", "project"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "check out"
    folder.mkdir()
    lock = "# comment\nmpi4py==4.1.2\nopenmpi==4.1.8\nsympy==1.14.0\ntorch==2.14.1\ntorchvision==0.29.1\n"
    (folder / "requirements.lock").write_text(lock, encoding="utf-8")
    (folder / "requirements-dev.lock").write_text("pytest==9.2.0\n", encoding="utf-8")
    (folder / "setup.cfg").write_text("[metadata]\n", encoding="utf-8")
    return folder


@pytest.fixture
def complete(checkout: Path) -> Path:
    """A checkout whose .venv looks as a finished set-up leaves it. Its Python does nothing."""
    executable(checkout / ".venv" / "bin" / "python", "exit 0")
    compiled = checkout / "horovod_megdet" / "layers" / "_cpu.so"
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    setup = Setup({}, checkout)
    setup.folder.mkdir()
    setup.record(options=setup.options, version=RUNNING, **setup.stamps())
    return checkout


def python_of(checkout: Path, script: str) -> None:
    """Let the venv's Python, which runs pip, do this."""
    executable(checkout / ".venv" / "bin" / "python", script)


class TestDue:
    def test_a_complete_environment_has_nothing_to_do_and_says_nothing(self, complete, capsys):
        assert Setup({}, complete).due() == []
        setup_env.set_up({}, complete)
        assert capsys.readouterr().out == ""

    def test_everything_at_first(self, checkout):
        assert Setup({}, checkout).due() == ALL

    @pytest.mark.parametrize("text", ["", '{"venv"', "[1]", "null"])
    def test_everything_without_a_readable_state(self, complete, text):
        (complete / ".venv" / ".setup" / "state.json").write_text(text, encoding="utf-8")
        assert Setup({}, complete).due() == ALL

    @pytest.mark.parametrize(
        ("environ", "due"),
        [
            ({"MPI": "none"}, ALL),
            ({"TORCH": "installed"}, ALL),
            ({"TORCH": "2.13.0", "TORCHVISION": "0.28.0"}, ALL[1:]),
            ({"OFFLINE": "/"}, ALL[1:]),
            ({"GPU": "1", "HOROVOD_CUDA_HOME": "/opt/cuda"}, ALL[2:]),
            ({"CXX": "g++-13"}, ALL[2:]),
            ({"HOROVOD_CYCLE_TIME": "0.1", "PIP_INDEX_URL": "https://mirror"}, []),
        ],
    )
    def test_other_options(self, complete, environ, due):
        assert Setup(environ, complete).due() == due

    @pytest.mark.parametrize(
        ("file", "due"),
        [
            ("requirements.lock", ALL[1:]),
            ("requirements-dev.lock", ALL[1:]),
            ("setup.cfg", ALL[3:]),
            ("horovod_megdet/layers/batch_norm_cpu.c", ALL[3:]),
            ("horovod_megdet/layers/numbers_cpu.h", ALL[3:]),
        ],
    )
    def test_a_changed_file(self, complete, file, due):
        with (complete / file).open("a", encoding="utf-8") as text:
            text.write("more==1.0\n")
        assert Setup({}, complete).due() == due

    def test_another_patch_of_horovod(self, complete, tmp_path, monkeypatch):
        monkeypatch.setattr(horovod_wheel, "PATCH", tmp_path / "horovod.patch")
        horovod_wheel.PATCH.write_text("another", encoding="utf-8")
        assert Setup({}, complete).due() == ALL[2:]

    @pytest.mark.parametrize(("file", "due"), [("horovod_megdet/layers/_cpu.so", ALL[3:]), (".venv/bin/python", ALL)])
    def test_a_removed_file(self, complete, file, due):
        (complete / file).unlink()
        assert Setup({}, complete).due() == due

    def test_an_environment_that_another_checkout_used_last(self, complete, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        for name in ("requirements.lock", "requirements-dev.lock", "setup.cfg"):
            (other / name).write_bytes((complete / name).read_bytes())
        (other / "horovod_megdet").symlink_to(complete / "horovod_megdet")
        assert Setup({"VENV": str(complete / ".venv")}, other).due() == ALL[3:]

    def test_an_environment_that_was_moved(self, complete, tmp_path):
        moved = complete.rename(tmp_path / "moved")
        assert Setup({}, moved).due() == ALL

    def test_the_python_of_the_environment_goes_on(self, complete, tmp_path, monkeypatch):
        started = []
        monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
        other = tmp_path / "python3.12"
        executable(other, "exit 0")
        setup = Setup({}, complete)
        setup.record(base=str(other))
        setup_env.go_on_with_python_of(setup, {"MPI": "none"})
        [(program, words, environ)] = started
        assert (program, words[0], environ) == (str(other), str(other), {"MPI": "none", "PYTHON": str(other)})
        setup_env.go_on_with_python_of(setup, environ)
        assert len(started) == 1, "it goes on once"
        other.unlink()
        with pytest.raises(SetupError, match=r"is gone: name another Python with PYTHON="):
            setup_env.go_on_with_python_of(setup, {})

    def test_a_toolkit_that_was_found_is_looked_for_again(self, complete, tmp_path):
        for name in ("12.8", "13.0"):
            toolkit = tmp_path / name
            executable(toolkit / "bin" / "nvcc", "exit 0")
            setup = Setup({"GPU": "1", "CUDA_HOME": str(toolkit)}, complete)
            setup.record(options=setup.options)
            assert setup.build_variables()["HOROVOD_CUDA_HOME"] == str(toolkit)
        assert "HOROVOD_CUDA_HOME" not in Setup({"GPU": "0"}, complete).build_variables()

    def test_another_python_only_if_it_is_asked_for(self, complete):
        setup = Setup({}, complete)
        setup.version = "3.99"
        setup.record(version="3.99", **setup.stamps())
        assert Setup({}, complete).due() == []
        assert Setup({"PYTHON": "python3"}, complete).due() == ALL

    def test_a_folder_with_other_contents_is_left_alone(self, checkout):
        (checkout / "data").mkdir()
        (checkout / "data" / "precious").touch()
        with pytest.raises(SetupError, match=r"VENV=.*data holds something that the set-up has not made"):
            setup_env.set_up({"VENV": "data"}, checkout)
        assert [path.name for path in (checkout / "data").iterdir()] == ["precious"]


class TestSteps:
    """The steps, with a Python that only pretends: what they record, and what is due after they were stopped."""

    def test_options_are_remembered_as_soon_as_the_work_starts(self, complete):
        python_of(complete, "exit 1")
        with pytest.raises(SetupError, match=r"installing the packages of the lock files .* failed"):
            setup_env.set_up({"TORCH": "2.13.0", "TORCHVISION": "0.28.0"}, complete)
        assert Setup({}, complete).options["TORCH"] == "2.13.0"

    def test_pip_that_fails_before_it_writes_keeps_the_venv(self, complete):
        python_of(complete, "echo 'ERROR: No matching distribution found for nothing'; exit 1")
        with pytest.raises(SetupError, match=r"packages\.log, and this may tell why:\s+ERROR: No matching"):
            Setup({}, complete).install_packages()
        assert Setup({}, complete).due() == []

    def test_pip_that_fails_while_it_writes_does_not(self, complete):
        python_of(complete, "echo 'Installing collected packages: torch'; exit 1")
        with pytest.raises(SetupError, match=r"installing .* as an editable package failed"):
            Setup({}, complete).install_project()
        assert Setup({}, complete).due() == ALL

    def test_a_set_up_that_is_killed_while_pip_writes(self, complete):
        python_of(complete, "kill -KILL $PPID")
        program = "import sys, pathlib, setup_env; setup_env.Setup({}, pathlib.Path(sys.argv[1])).install_project()"
        killed = subprocess.run([sys.executable, "-c", program, complete], cwd=SCRIPTS, timeout=30)
        assert killed.returncode == -signal.SIGKILL
        assert Setup({}, complete).due() == ALL

    def test_a_signal_ends_the_set_up_and_what_it_started(self, complete):
        python_of(complete, f"sleep 60 & echo $! > '{complete}/pid'; wait")
        (complete / "setup.cfg").write_text("changed", encoding="utf-8")
        shutil.copytree(SCRIPTS, complete / "scripts")  # a whole run, for the checkout that the script is in
        environ = {"PATH": "/usr/bin:/bin", "HOME": str(complete)}
        command = [sys.executable, complete / "scripts" / "setup_env.py"]
        process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE)
        pid = complete / "pid"
        wait_until(lambda: pid.exists() and pid.read_text(encoding="utf-8"))
        process.terminate()
        _, error = process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGTERM
        assert error == b"setup: stopped; the next run goes on from here.\n"
        wait_until(lambda: has_ended(int(pid.read_text(encoding="utf-8"))))

    def test_a_second_set_up_waits_and_finds_nothing_to_do(self, complete):
        # pip works until the second set-up waits for it, or for 30 s
        wait = "for _ in $(seq 1500); do test -e go && exit 0; sleep 0.02; done; exit 1"
        python_of(complete, f"cd '{complete}'; touch started; {wait}")
        (complete / "setup.cfg").write_text("changed", encoding="utf-8")
        program = "import sys, pathlib, setup_env; setup_env.set_up({}, pathlib.Path(sys.argv[1]))"
        command = [sys.executable, "-c", program, complete]
        first = subprocess.Popen(command, cwd=SCRIPTS, stdout=subprocess.PIPE, text=True)
        wait_until((complete / "started").exists)
        second = subprocess.Popen(command, cwd=SCRIPTS, stdout=subprocess.PIPE, text=True)
        assert second.stdout
        assert "another set-up is working on" in second.stdout.readline()
        (complete / "go").touch()
        assert "as an editable package" in first.communicate(timeout=30)[0]
        assert "as an editable package" not in second.communicate(timeout=30)[0]
        assert (first.returncode, second.returncode) == (0, 0)

    def test_torch_without_cuda(self, complete):
        python_of(complete, """echo '["2.14.1+cpu", null, "/torch", "cpython-311", "", "/cmake"]'""")
        with pytest.raises(SetupError, match=r"GPU=1 needs a torch with CUDA, and torch 2.14.1\+cpu has none"):
            Setup({"GPU": "1", "HOROVOD_CUDA_HOME": "/opt/cuda"}, complete).install_horovod()

    def test_a_cached_wheel_is_installed_and_imported(self, complete, tmp_path):
        log = tmp_path / "commands"
        facts = '["2.14.1+cu130", "13.0", "/torch", "cpython-311", "4.1.8", "/cmake"]'
        python_of(complete, f"""echo "$*" >> '{log}'; test "$1" != -I || echo '{facts}'""")
        setup = Setup({"XDG_CACHE_HOME": str(tmp_path)}, complete)
        key = horovod_wheel.wheel_key("2.14.1+cu130", "cpython-311", "4.1.8", setup.build_variables())
        wheel = tmp_path / "horovod_megdet" / "wheels" / key / "horovod-0.28.1-x.whl"
        wheel.parent.mkdir(parents=True)
        wheel.touch()
        setup.install_horovod()
        commands = log.read_text(encoding="utf-8")
        (install,) = (line for line in commands.splitlines() if line.startswith("-m pip install"))
        assert install.endswith(f"--force-reinstall {wheel}")
        assert commands.index("hvd.mpi_built()") > commands.index(install)


def wheel(folder: Path, name: str, version: str = "1.0") -> None:
    """A wheel with nothing in it."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


class TestOffline:
    @pytest.fixture
    def setup(self, checkout: Path, tmp_path: Path) -> Setup:
        """A set-up from a folder that has a project's package, Horovod and one tool, with a real pip."""
        folder = tmp_path / "folder"
        folder.mkdir()
        for name, version in (("megdet-a", "1.0"), ("horovod", "0.28.1"), ("megdet-tool", "2.0")):
            wheel(folder, name.replace("-", "_"), version)
        (checkout / ".venv" / "bin").mkdir(parents=True)
        (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
        return Setup({"OFFLINE": str(folder)}, checkout)

    def test_what_a_folder_lacks(self, setup):
        names = ["megdet-a", "megdet-b", "horovod==0.28.1", "megdet-tool", "megdet-lint", "pytest"]
        assert setup.folder_lacks(names) == {"megdet-b", "megdet-lint"}

    @pytest.mark.parametrize(("lacking", "installed"), [("cc", "aa bb"), ("aa cc", "")])
    def test_tools_may_be_missing(self, setup, checkout, monkeypatch, capsys, lacking, installed):
        """With a pip that fails as long as it has to install something that is missing."""
        (checkout / "requirements.lock").write_text("aa==1\n", encoding="utf-8")
        (checkout / "requirements-dev.lock").write_text("bb==1\ncc==1\n", encoding="utf-8")
        setup.python.unlink()
        python_of(checkout, f'for name in {lacking}; do case "$*" in *$name*) exit 1;; esac; done')
        monkeypatch.setattr(machine, "check_compilers", lambda environ: None)
        setup.folder.mkdir()
        if installed:
            setup.install_packages()
            assert (
                f"has nothing that fits Python {RUNNING} for cc: tests or 'make lint' will miss"
                in capsys.readouterr().out
            )
            log = (setup.folder / "logs" / "packages.log").read_text(encoding="utf-8")
            assert log.splitlines()[0].endswith(f"--no-compile {installed}")
        else:
            with pytest.raises(SetupError, match=r"has nothing that fits Python \S+ for aa, cc: add it"):
                setup.install_packages()

    def test_pip_comes_from_the_folder_where_python_has_no_ensurepip(self, setup, monkeypatch):
        """The wheel of pip is run, and installs itself; Python's venv is asked for no pip."""
        files = [path for path in Path(pip.__file__).parent.rglob("*") if path.suffix != ".pyc"]
        folder = Path(setup.options["OFFLINE"])
        wheel(folder, "pip", pip.__version__)
        with zipfile.ZipFile(folder / f"pip-{pip.__version__}-py3-none-any.whl", "a") as file:
            for path in files:
                file.write(path, path.relative_to(Path(pip.__file__).parent.parent))
        without_ensurepip = folder / "python"
        executable(
            without_ensurepip, f"""case "$*" in *--without-pip*) exec '{sys.executable}' "$@";; *) exit 1;; esac"""
        )
        monkeypatch.setattr(sys, "_base_executable", str(without_ensurepip))
        monkeypatch.setattr(machine, "check_disk", lambda folder: None)
        setup.folder.mkdir()
        setup.make_venv()
        command = [setup.python, "-I", "-c", "import pip; print(pip.__file__)"]
        assert subprocess.check_output(command, text=True).startswith(str(setup.venv))

    def test_horovod_may_come_as_a_wheel(self, setup, tmp_path):
        found = horovod_wheel.get_sources(setup.runner, Path(sys.executable), tmp_path / "work")
        assert found == tmp_path / "work" / "horovod-0.28.1-py3-none-any.whl"


class TestMain:
    def test_a_mistake_is_one_sentence_and_code_2(self, capsys, monkeypatch):
        monkeypatch.setenv("MPI", "mpich")
        monkeypatch.setattr("signal.signal", lambda signum, handler: None)
        assert setup_env.main([]) == 2
        assert capsys.readouterr().err == ("setup: MPI=mpich is not known: use MPI=wheel or MPI=system or MPI=none.\n")

    def test_help_names_every_option(self, capsys):
        with pytest.raises(SystemExit) as caught:
            setup_env.main(["--help"])
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        names = ("VENV", "PYTHON", "MPI", "GPU", "TORCH", "TORCHVISION", "OFFLINE")
        assert all(f"{name}=" in printed for name in names)
