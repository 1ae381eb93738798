"""Hosts on one machine: each a process tree with its own network, name, mounts and process ids, and a real sshd.

    with Hosts(2, folder) as hosts:                        # hostA at 10.77.0.1 and hostB at 10.77.0.2 on one switch
        hosts[0].run(["ssh", "hostB", "hostname"])         # -> CompletedProcess, stdout "hostB\n"
        hosts[1].unplug()                                  # no packets any more
        hosts[1].kill()                                    # gone at once, with everything that ran on it

A host has its own /tmp, /run and /dev/shm; everything else is the machine's file system, and so the cluster's shared
disk. Its first process dies with the process that made it, and all others die with that one: nothing is left behind
however a test ends. Needs root, and Debian's iproute2 and openssh-server.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

PROGRAMS = ("ip", "tc", "unshare", "nsenter", "setpriv", "sshd", "ssh-keygen")
SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
VENV_BIN = Path(sys.executable).parent
PROJECT = Path(__file__).resolve().parents[2]
SSH_PORT = 22

# As the first process of a host. $1 name, $2 its files, $3... folders below /tmp that all hosts share.
START_HOST = r"""
set -eu
name=$1 files=$2; shift 2
hostname "$name"
mount -t tmpfs tmpfs /run; mkdir /run/sshd /run/shared
number=0
for folder; do number=$((number + 1)); mkdir "/run/shared/$number"; mount --rbind "$folder" "/run/shared/$number"; done
mount -t tmpfs tmpfs /tmp; chmod 1777 /tmp
mount -t tmpfs tmpfs /dev/shm; chmod 1777 /dev/shm
number=0
for folder; do number=$((number + 1)); mkdir -p "$folder"; mount --rbind "/run/shared/$number" "$folder"; done
for file in "$files"/etc/*; do mount --bind "$file" "/etc/$(basename "$file" | tr : /)"; done
exec "$(command -v sshd)" -D -e -f "$files/sshd_config"
"""


class Unavailable(Exception):
    """Hosts cannot be made here; the message says why."""


@dataclass(frozen=True)
class Process:
    """A process as the machine sees it."""

    pid: int
    arguments: list[str]

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal; the process may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def variable(self, name: str) -> str | None:
        """Value of an environment variable that it was started with."""
        pairs = Path(f"/proc/{self.pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return next((pair.partition("=")[2] for pair in pairs if pair.startswith(f"{name}=")), None)

    @property
    def script(self) -> str:
        """File name of the program, or of the script if that is a Python interpreter."""
        names = [Path(argument).name for argument in self.arguments[:2]]
        return names[1] if len(names) == 2 and names[0].startswith("python") else names[0].strip(": ")


def environment(**more: str) -> dict[str, str]:
    """What a user has after logging in: the Python environment first in PATH. The tests add tests/quick_start."""
    return {
        "PATH": f"{VENV_BIN}:{SEARCH}",
        "VIRTUAL_ENV": str(VENV_BIN.parent),
        "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests' / 'quick_start'}",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_btl": "^ofi",  # sleeps for a second in MPI_Finalize, and is for one-sided messages only
        **more,
    }


class Host:
    """One host; made by :class:`Hosts`."""

    def __init__(self, name: str, address: str, files: Path, switch: int) -> None:
        self.name, self.address, self.files = name, address, files
        self.port = f"port-{name}"
        self._switch = switch
        self._holder: subprocess.Popen[bytes] | None = None
        self._init = 0

    def boot(self) -> None:
        """Starts it and waits for its sshd."""
        shared = [str(path) for path in _shared_below_tmp(self.files)]
        with (self.files / "sshd.log").open("w") as log:
            # setpriv: what unshare holds dies with the process that called boot().
            argv = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--mount", "--ipc", "--pid"]
            argv += ["--fork", "--kill-child", "--mount-proc"]
            argv += ["bash", "-c", START_HOST, "host", self.name, str(self.files), *shared]
            self._holder = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": SEARCH},
            )
        wait_for(lambda: self._find_init(), f"{self.name} to start", self._log)
        # The same hardware address after every boot, or the others keep sending to the old one for a while.
        hardware = "02:00:" + ":".join(f"{int(part):02x}" for part in self.address.split("."))
        peer = ["type", "veth", "peer", "name", "eth0", "address", hardware, "netns", str(self._init)]
        nsenter(self._switch, ["ip", "link", "add", self.port, *peer])
        nsenter(self._switch, ["ip", "link", "set", self.port, "master", "switch", "up"])
        for words in (f"addr add {self.address}/24 dev eth0", "link set lo up", "link set eth0 up"):
            nsenter(self._init, ["ip", *words.split()])
        wait_for(self._answers, f"the sshd of {self.name}", self._log)

    def _find_init(self) -> bool:
        """Whether the host has mounted everything, known by its sshd being started."""
        assert self._holder
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self._init = int(children[0]) if children else 0
        return bool(children) and b"sshd" in Path(f"/proc/{self._init}/cmdline").read_bytes().split(b"\0")[0]

    def _answers(self) -> bool:
        probe = f"exec 3<>/dev/tcp/{self.address}/{SSH_PORT}"
        return self.run(["bash", "-c", probe], check=False).returncode == 0

    def _log(self) -> str:
        return (self.files / "sshd.log").read_text()

    def command(self, arguments: list[str]) -> list[str]:
        """The command line that runs ``arguments`` on this host."""
        return ["nsenter", "-t", str(self._init), "--net", "--uts", "--mount", "--ipc", "--pid", "--", *arguments]

    def run(
        self,
        arguments: list[str],
        *,
        timeout: float = 60,
        check: bool = True,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end; output and errors are in ``stdout``. ``check``: it must not fail."""
        done = subprocess.run(
            self.command(_in(cwd, arguments)),
            env={**environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0 or not check, (
            f"{arguments} on {self.name}: exit code {done.returncode}\n{done.stdout}"
        )
        return done

    def start(
        self, arguments: list[str], log: Path, *, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a command whose output goes to ``log``."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self.command(_in(cwd, arguments)),
                env={**environment(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self, script: str | None = None) -> list[Process]:
        """Its running processes, or those of a program or script: ``host.processes("train.py")``."""
        try:
            namespace = Path(f"/proc/{self._init}/ns/pid").readlink()
        except FileNotFoundError:
            return []
        found = [process for pid in _pids() if (process := _process(pid, namespace))]
        return [process for process in found if script is None or process.script == script]

    def path(self, path: Path) -> Path:
        """Where the machine sees a path of this host, with the host's mounts."""
        return Path(f"/proc/{self._init}/root") / path.relative_to("/")

    def kill(self) -> None:
        """As when the power fails, except that the kernel still closes its connections."""
        assert self._holder
        os.kill(self._init, signal.SIGKILL)
        self._holder.wait()
        # The cable goes with the host, but by itself only after a while; a host that boots needs a new one.
        nsenter(self._switch, ["ip", "link", "del", self.port], check=False)

    def unplug(self) -> None:
        """No packet leaves or reaches it any more."""
        nsenter(self._switch, ["ip", "link", "set", self.port, "down"])

    def plug_in(self) -> None:
        """Undoes :meth:`unplug`."""
        nsenter(self._switch, ["ip", "link", "set", self.port, "up"])

    def limit_rate(self, rate: str | None) -> None:
        """Limits what it sends, as in ``1gbit``; None lifts that."""
        nsenter(self._init, ["tc", "qdisc", "del", "dev", "eth0", "root"], check=False)
        if rate:
            nsenter(self._init, f"tc qdisc add dev eth0 root tbf rate {rate} burst 256kb latency 50ms".split())


class Hosts:
    """Some hosts on one switch; a context manager, and a sequence of :class:`Host`.

    ``etc`` maps more files or folders, by their names in /etc, to what the hosts see there.
    """

    NAMES = tuple(f"host{letter}" for letter in "ABCDEFGH")

    def __init__(self, count: int, folder: Path, etc: Mapping[str, Path] | None = None) -> None:
        self.folder = folder
        self.names = self.NAMES[:count]
        self._etc = dict(etc or {})
        self._hosts: list[Host] = []
        self._switch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Hosts":
        check_available()
        self._switch = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env={"PATH": SEARCH}
        )
        switch = self._switch.pid
        wait_for(lambda: Path(f"/proc/{switch}/comm").read_text().strip() == "cat", "the switch")
        for words in ("link set lo up", "link add switch type bridge", "link set switch up"):
            nsenter(switch, ["ip", *words.split()])
        self._write_keys()
        for number, name in enumerate(self.names, start=1):
            host = Host(name, f"10.77.0.{number}", self._write_files(name), switch)
            self._hosts.append(host)
            host.boot()
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._hosts:
            with contextlib.suppress(ProcessLookupError):
                host.kill()
        if self._switch:
            self._switch.kill()
            self._switch.wait()

    @overload
    def __getitem__(self, index: int) -> Host: ...
    @overload
    def __getitem__(self, index: slice) -> list[Host]: ...
    def __getitem__(self, index: int | slice) -> Host | list[Host]:
        return self._hosts[index]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)

    def processes(self, script: str) -> list[Process]:
        """The processes of a program or script on all hosts."""
        return [process for host in self for process in host.processes(script)]

    def hostfile(self, ranks_per_host: int, hosts: Iterable[Host] | None = None) -> Path:
        """Writes a host file; all hosts, unless some are given."""
        path = self.folder / "hostfile"
        path.write_text("".join(f"{host.name} slots={ranks_per_host}\n" for host in hosts or self))
        return path

    def _write_keys(self) -> None:
        for name in ("user_key", "host_key"):
            if not (self.folder / name).exists():
                subprocess.run(
                    ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)],
                    check=True,
                    env={"PATH": SEARCH},
                )

    def _write_files(self, name: str) -> Path:
        """What is different in /etc on a host, and the configuration of its sshd."""
        files = self.folder / name
        etc = files / "etc"
        etc.mkdir(parents=True)
        addresses = [f"10.77.0.{number} {other}" for number, other in enumerate(self.names, start=1)]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *addresses, ""]))
        host_key = (self.folder / "host_key.pub").read_text().split()[:2]
        known = self.folder / "known_hosts"
        known.write_text(" ".join([f"{','.join(self.names)},10.77.0.*", *host_key]) + "\n")
        (etc / "ssh:ssh_config").write_text(
            f"IdentityFile {self.folder}/user_key\nIdentitiesOnly yes\nStrictHostKeyChecking yes\n"
            f"UserKnownHostsFile /dev/null\nGlobalKnownHostsFile {known}\nBatchMode yes\nConnectTimeout 5\n"
        )
        for place, source in self._etc.items():
            (etc / place.replace("/", ":")).symlink_to(source)
        (files / "sshd_config").write_text(
            f"Port {SSH_PORT}\nHostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/user_key.pub\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "UsePAM no\nStrictModes no\nUseDNS no\nPrintMotd no\nPidFile none\nMaxStartups 100\n"
        )
        return files


def check_available() -> None:
    """Raises :class:`Unavailable` where hosts cannot be made."""
    if os.geteuid() != 0:
        raise Unavailable("not root, which network namespaces and sshd need")
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=SEARCH)]:
        raise Unavailable(f"no {', '.join(missing)}: install iproute2, util-linux and openssh-server")
    trial = "ip link add p0 type veth peer name p1 && mount -t tmpfs tmpfs /run"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc", "sh", "-c", trial],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": SEARCH},
    )
    if tried.returncode:
        raise Unavailable(f"namespaces, veth or mounts are not permitted: {tried.stderr.strip()}")


def wait_for(condition: Callable[[], Any], what: str, log: Callable[[], str] = str, timeout: float = 20) -> None:
    """Polls until ``condition()`` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s in vain for {what}\n{log()}"
        time.sleep(0.05)


def nsenter(pid: int, arguments: list[str], check: bool = True) -> int:
    """Runs a command of the network in the network namespace of a process; returns its exit code."""
    done = subprocess.run(
        ["nsenter", "-t", str(pid), "--net", "--", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": SEARCH},
    )
    assert done.returncode == 0 or not check, f"{arguments}: {done.stderr}"
    return done.returncode


def _in(cwd: Path | None, arguments: list[str]) -> list[str]:
    return ["env", "-C", str(cwd or PROJECT), *arguments]


def _shared_below_tmp(folder: Path) -> list[Path]:
    """What lies below /tmp and is needed on all hosts, where each has a /tmp of its own."""
    needed = {PROJECT, VENV_BIN.parent, Path(sys.base_prefix), folder.parent.parent}
    return sorted(path for path in needed if path.is_relative_to("/tmp"))


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _process(pid: int, namespace: Path) -> Process | None:
    """A process that runs in a namespace of process ids; None for others and for zombies."""
    try:
        if Path(f"/proc/{pid}/ns/pid").readlink() != namespace:
            return None
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return Process(pid, [argument.decode(errors="replace") for argument in arguments]) if arguments else None
