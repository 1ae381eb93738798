"""Tries the other hosts before the launcher does, whose own messages about a host that it cannot use are cryptic."""

import shlex
import socket
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from horovod_megdet.errors import UserError
from horovod_megdet.wording import SHOWN, some

T = TypeVar("T")

Need = tuple[str, str]
"""Something that a host needs: a test for the shell there, and a sentence for when it fails."""

CONNECT_TIMEOUT = 10
"""Seconds within which a host has to answer."""

AT_ONCE = 32
"""Hosts that are tried at a time."""

_SSH_FAILED = 255

_MARK, _DONE = "megdet: ", "done"
"""Begin the lines of the check, and end it."""

_REMEDIES = {
    "Permission denied": "copy your public key there: ssh-copy-id {host}",
    "Host key verification failed": "accept its key once: ssh {host} true",
    "Connection refused": "no ssh server listens there; if it uses another port, give it with --ssh-port",
}
"""What ssh says, and what to do."""


def check_names(hosts: Sequence[str], where: str) -> None:
    """Raises :class:`UserError` for host names that this machine cannot resolve; ``where`` says where they are from."""
    unknown = [host for host, fault in zip(hosts, _each(hosts, _unknown), strict=True) if fault]
    if unknown:
        raise UserError(
            f"{where}: this machine cannot resolve {some(unknown)}. Write the names of your machines into a host file "
            "of your own (hostfiles/README.md), or add these to /etc/hosts."
        )


def folder(path: Path) -> Need:
    """The folder in which the ranks start."""
    return f"test -d {shlex.quote(str(path))}", f"no folder {path}: every host needs the checkout at the same path"


def program(path: Path) -> Need:
    """A program to run there."""
    return f"test -x {shlex.quote(str(path))}", f"no program {path}: every host needs the environment at the same path"


def interface(name: str) -> Need:
    """A network interface to use there."""
    return (
        f"grep -q {shlex.quote(f'^ *{name}:')} /proc/net/dev",
        f"no network interface {name}: name one that all hosts have (ip -br addr), or omit --interface",
    )


def check_hosts(hosts: Sequence[str], ssh_options: Sequence[str], needs: Sequence[Need]) -> None:
    """Logs in to each host as the launcher will, and checks what the ranks need there.

    Raises :class:`UserError` with a line for each host that fails.
    """
    tests = [f"{test} || echo {shlex.quote(_MARK + sentence)}" for test, sentence in needs]
    script = "; ".join([*tests, f"echo {shlex.quote(_MARK + _DONE)}"])
    faults = _each(hosts, lambda host: _fault(host, ssh_options, script))
    bad = [f"  {host}: {fault}" for host, fault in zip(hosts, faults, strict=True) if fault]
    if bad:
        more = [f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        first = f"{len(bad)} of the {len(hosts)} other hosts cannot be used (--no-check starts anyway):"
        raise UserError("\n".join([first, *bad[:SHOWN], *more]))


def _fault(host: str, ssh_options: Sequence[str], script: str) -> str:
    """What is wrong with a host; empty if nothing is."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_TIMEOUT}", *ssh_options]
    try:
        answer = subprocess.run(
            ["ssh", *options, host, script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=3 * CONNECT_TIMEOUT,
        )
    except FileNotFoundError:
        return "ssh is not installed here (Debian: apt install openssh-client)"
    except subprocess.TimeoutExpired:
        return f"no answer within {3 * CONNECT_TIMEOUT} s; is it up, and does its firewall allow ssh?"
    if answer.returncode == _SSH_FAILED:
        said = (answer.stderr.strip().splitlines() or ["ssh failed without a message"])[-1]
        remedy = next((text for words, text in _REMEDIES.items() if words in said), "try: ssh {host} true")
        return f"{said}; {remedy.format(host=host)}"
    # The shell there may greet whoever comes.
    lines = [line.removeprefix(_MARK) for line in answer.stdout.splitlines() if line.startswith(_MARK)]
    if _DONE not in lines:
        said = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        return f"its shell did not finish the check (exit code {answer.returncode}): {said}; try: ssh {host} true"
    return "; ".join(line for line in lines if line != _DONE)


def _unknown(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return True
    return False


def _each(hosts: Sequence[str], function: Callable[[str], T]) -> list[T]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(function, hosts))
