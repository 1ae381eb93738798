"""The package away from its checkout: a wheel, installed where the checkout cannot be imported."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import launching
import pytest

from horovod_megdet.engine import checkpoint

SOURCES = ("horovod_megdet", "setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because a build leaves files in the sources, and takes old ones from there."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source = launching.PROJECT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, folder)
    pip("wheel", str(folder), "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder / "wheels"))
    [path] = (folder / "wheels").iterdir()
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of another environment with the wheel, and with the packages of this one, but not its checkout."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # A folder in a .pth file is searched, but its own .pth files, the editable install's among them, are not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=True)


def environment() -> Mapping[str, str]:
    return {name: value for name, value in launching.ENVIRONMENT.items() if name != "PYTHONPATH"}


def output_of(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_what_the_package_needs(wheel: Path) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-{tag}-{tag}-{platform}.whl"), "it has a compiled library"
    files = set(zipfile.ZipFile(wheel).namelist())
    package = launching.PROJECT / "horovod_megdet"
    needed = {path for pattern in ("*.py", "py.typed", "demo.yaml") for path in package.rglob(pattern)}
    needed |= set((package / "report" / "templates").iterdir())
    assert {str(path.relative_to(launching.PROJECT)) for path in needed} <= files
    assert f"horovod_megdet/layers/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}" in files
    assert not [name for name in files if name.startswith(("tests", "scripts", "experiments"))]


def test_the_command_and_the_demo(python: Path, tmp_path: Path) -> None:
    where = "import horovod_megdet.layers.c_library as c; print(c.__file__, c.library()._name)"
    module, library = output_of([str(python), "-c", where], tmp_path).split()
    assert Path(module).is_relative_to(python.parent.parent)
    assert Path(library).parent == Path(module).parent
    demo = [str(python.parent / "megdet"), "demo", "--run-dir", "run"]
    for setting in (
        *("data.synthetic_train_images=16", "data.synthetic_val_images=4", "output.pictures=2"),
        *("model.fpn_channels=16", "model.box_head_channels=32", "data.shorter_side_train=[64]"),
        *("solver.epochs=1", "solver.milestones=[]", "solver.gammas=[]"),
    ):
        demo += ["--set", setting]
    output = output_of([*launching.LAUNCHERS["mpirun"], "2", *demo], tmp_path)
    assert "2 ranks x 4 images" in output
    assert checkpoint.newest(tmp_path / "run", report=pytest.fail).images_seen == 16
    assert {"validation.html", "curves.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_cross_gpu_bn_for_other_programs(python: Path, tmp_path: Path) -> None:
    shutil.copy(launching.PROJECT / "examples" / "classifier.py", tmp_path)
    output = output_of([*launching.LAUNCHERS["mpirun"], "2", str(python), "classifier.py"], tmp_path)
    assert "epoch 1: loss" in output
