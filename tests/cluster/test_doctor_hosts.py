"""``megdet doctor`` on real hosts with planted faults, all of which it has to find in one run."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import PROJECT, VENV_BIN, Host, Hosts, Unavailable

TINY = PROJECT / "tests" / "parallel" / "tiny.yaml"
MEGDET = str(VENV_BIN / "megdet")

DOCTOR = """
import functools, socket, sys, time
from horovod_megdet.cli import main
from horovod_megdet.cluster.doctor import command
# A file of these hosts appears on the others at once.
command.try_run_directory = functools.partial(command.try_run_directory, delay=2.0)
true_time = time.time
if socket.gethostname() == "hostC":
    time.time = lambda: true_time() - 30  # the kernel has one clock for all hosts of a machine
sys.argv[0] = "megdet"
sys.exit(main())
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    try:
        with Hosts(3, tmp_path_factory.mktemp("doctor")) as hosts:
            yield hosts
    except Unavailable as reason:
        pytest.skip(str(reason))


def instead(host: Host, place: Path, substitute: Path) -> None:
    """On this host, ``substitute`` is what is seen at ``place``."""
    host.run(["mount", "--bind", str(substitute), str(place)])


def plant_faults(hosts: Hosts, folder: Path, config: Path, data: Path) -> None:
    """Many faults at a time: of hostB in software, of hostC in data, disks, names and clock."""
    _, other, third = hosts
    (folder / "other.yaml").write_text(config.read_text().replace("base_lr: 0.01", "base_lr: 0.02"))
    instead(other, config, folder / "other.yaml")
    (metadata,) = VENV_BIN.parent.glob("lib/python3*/site-packages/numpy-*.dist-info/METADATA")
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    instead(other, metadata, folder / "METADATA")
    source = PROJECT / "horovod_megdet" / "files.py"
    (folder / "files.py").write_text(source.read_text() + "# of another commit\n")
    instead(other, source, folder / "files.py")
    other.run(["prlimit", "--pid", "1", "--nofile=512:512"])

    shutil.copytree(data / "images", folder / "images")
    (folder / "images" / "val" / "000001.jpg").unlink()
    instead(third, data / "images", folder / "images")
    third.run(["bash", "-c", "echo '10.77.0.1 hostA\n10.77.0.3 hostC' > /etc/hosts"])


def test_planted_faults(hosts: Hosts, tmp_path: Path) -> None:
    folder = hosts.folder
    config, data = folder / "mine.yaml", folder / "data"
    shutil.copy(TINY, config)
    hosts[0].run([MEGDET, "synth", str(data), "--train", "24", "--val", "5"])
    plant_faults(hosts, folder, config, data)
    (folder / "unequal").write_text("hostA slots=1\nhostB slots=1\nhostC slots=2\n")
    (folder / "doctor.py").write_text(DOCTOR)
    launch = [MEGDET, "launch", "--hostfile", str(folder / "unequal"), "--interface", "eth0", "--"]
    doctor = ["python", str(folder / "doctor.py"), "doctor", "--config", str(config), "--json", str(folder / "d.json")]
    settings = ["runtime.threads_per_rank=40", f"data.synthetic_root={data}"]
    words = [word for setting in settings for word in ("--set", setting)]
    done = hosts[0].run([*launch, *doctor, *words, "--run-dir", "/tmp/run"], timeout=150, check=False)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout
    assert (folder / "d.json").exists(), done.stdout
    examination = json.loads((folder / "d.json").read_text())
    for severity, *said in (
        ("error", "the configuration differs", "on hostB"),
        ("error", "numpy differs", "1.0 on hostB"),
        ("error", "the code of horovod_megdet differs", "on hostB"),
        ("error", "the validation set cannot be used on hostC", "000001.jpg"),
        ("error", "the name hostB does not resolve on hostC"),
        ("error", "hostB does not see what rank 0 writes to /tmp/run"),
        ("error", "hostC does not see what rank 0 writes to /tmp/run"),
        ("warning", "unequal numbers of ranks", "2 on hostC"),
        ("warning", "40 threads of 1 rank share", "on hostA, hostB"),
        ("warning", "the clock of hostC is 30 s behind"),
        ("warning", "hostB may open only 512 files at a time"),
    ):
        assert any(of(finding, severity, said) for finding in examination["findings"]), (severity, said, done.stdout)
    assert examination["failures"] == {}
    assert all(facts["failures"] == {} for facts in examination["ranks"])


def of(finding: dict[str, Any], severity: str, said: list[str]) -> bool:
    return finding["severity"] == severity and all(words in finding["sentence"] for words in said)


def test_an_interface_with_another_name(hosts: Hosts) -> None:
    """The launch says so itself, and the doctor does where it is started by other means."""
    for words in ("set eth0 down", "set eth0 name ib0", "set ib0 up"):
        hosts[1].run(["ip", "link", *words.split()])
    launch = [MEGDET, "launch", "--hostfile", str(hosts.hostfile(1, [hosts[0], hosts[1]]))]
    doctor = ["--", "megdet", "doctor", "--no-data", "--timeout", "20", "--run-dir", str(hosts.folder / "run")]
    done = hosts[0].run([*launch, "--interface", "eth0", *doctor], check=False)
    assert done.returncode == 2
    assert "hostB: no network interface eth0: name one that all hosts have" in done.stdout
    done = hosts[0].run([*launch, "--launcher-args", "--mca btl_tcp_if_include eth0", *doctor], check=False)
    assert done.returncode != 0
    assert "OMPI_MCA_btl_tcp_if_include is eth0 on hostB: there is no such interface" in done.stdout
