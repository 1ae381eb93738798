"""Host files: which machines take part in a run, and how many ranks each takes.

One host per line, or several that differ in a number:

    # name          ranks it takes    ranks it may take at most
    node[01-16]     slots=8           max_slots=8
    10.0.0.7        slots=4

The ranges are those of Slurm and ClusterShell; launchers do not understand them, see :func:`write_hostfile`. They are
expanded here and not by ClusterShell's ``NodeSet``, which is a set: it sorts the hosts, so that rank 0 may not be on
the first one listed, silently merges a host that is listed twice, and expands the typo ``node[1-16000000]`` before
anyone can count.
"""

import difflib
import ipaddress
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from horovod_megdet.errors import UserError
from horovod_megdet.files import atomic_write

MAX_HOSTS = 10_000
"""More than this in one file is a typo, such as node[1-16000000]."""

MAX_MISTAKES = 10
"""Mistakes that are listed; a file that is no host file has one in each line."""

KEYS = ("slots", "max_slots")

# What DNS allows and nothing else: names are passed to ssh, and by some launchers through the shell of another host.
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_HINTS = {
    "@": "write the host name only, and set the user in ~/.ssh/config (User ...)",
    "{": "write a range as node[01-16]",
    ",": "write one host per line, or a range such as node[01-03,07]",
}
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


@dataclass(frozen=True)
class Host:
    """One machine."""

    name: str
    """Host name, or IPv4 or IPv6 address."""
    slots: int
    """Ranks that it takes: its number of GPUs."""
    max_slots: int
    """Ranks that it takes at most, when a job has more ranks than there are slots."""


def parse_hostfile(path: str | Path) -> list[Host]:
    """Reads a host file; the order of the hosts is the order of their ranks.

    Raises :class:`UserError` with a line for each mistake, which names file, line and text, and says what to do.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such host file.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
    hosts: dict[str, tuple[Host, int]] = {}
    mistakes = []
    for number, line in enumerate(lines, 1):
        try:
            _add_line(line.partition("#")[0], number, hosts)
        except UserError as error:
            mistakes.append(f"{path}, line {number}: {error}")
    if len(mistakes) > MAX_MISTAKES:
        mistakes[MAX_MISTAKES:] = [f"{path}: and {len(mistakes) - MAX_MISTAKES} more lines with mistakes."]
    if mistakes:
        raise UserError("\n".join(mistakes))
    if not hosts:
        raise UserError(f"{path}: it lists no host; write one per line, such as `node01 slots=8`.")
    return [host for host, _ in hosts.values()]


def write_hostfile(hosts: list[Host], path: str | Path) -> None:
    """Writes one host per line, without ranges, as mpirun and horovodrun read them; raises :class:`UserError`."""
    with atomic_write(path) as file:
        for host in hosts:
            # horovodrun takes all that follows the first `=` for the number, so max_slots is there only if it matters.
            limit = f" max_slots={host.max_slots}" if host.max_slots > host.slots else ""
            file.write(f"{host.name} slots={host.slots}{limit}\n".encode())


def _add_line(line: str, number: int, hosts: dict[str, tuple[Host, int]]) -> None:
    words = line.split()
    if not words:
        return
    names = list(itertools.islice(_expand(words[0]), MAX_HOSTS + 1))
    slots, max_slots = _parse_keys(words[1:])
    if len(hosts) + len(names) > MAX_HOSTS:
        raise UserError(f"{words[0]!r}: more than {MAX_HOSTS} hosts; check its range.")
    for name in names:
        key = name.lower()
        if key in hosts:
            raise UserError(f"{name!r} is already in line {hosts[key][1]}; list each host once.")
        hosts[key] = Host(name, slots, max_slots), number


def _parse_keys(words: list[str]) -> tuple[int, int]:
    values: dict[str, int] = {}
    for word in words:
        key, _, text = word.partition("=")
        if key not in KEYS:
            raise UserError(f"{word!r}: {_unknown(key)}")
        if key in values:
            raise UserError(f"{word!r}: {key} is given twice.")
        if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) == 0:
            raise UserError(f"{word!r}: {key} needs a whole number, 1 or more, without spaces: {key}=8.")
        values[key] = int(text)
    if "slots" not in values:
        raise UserError("slots is missing; say how many ranks (GPUs) the host takes, such as slots=8.")
    slots = values["slots"]
    max_slots = values.get("max_slots", slots)
    if slots > max_slots:
        raise UserError(f"slots={slots} is more than max_slots={max_slots}; raise max_slots or omit it.")
    return slots, max_slots


def _unknown(key: str) -> str:
    if key.isdigit():
        return f"the number needs a name: slots={key}."
    close = difflib.get_close_matches(key.lower().replace("-", "_"), KEYS, n=1)
    remedy = (
        f"did you mean {close[0]}=?" if close else "write `host slots=8` or `host slots=8 max_slots=8`, one per line."
    )
    return f"unknown key; {remedy}"


def _expand(text: str) -> Iterator[str]:
    """Yields the host names that one word stands for."""
    if ":" in text:
        yield _ipv6(text)
        return
    parts = re.split(r"\[([^][]*)\]", text)
    if any(bracket in part for part in parts for bracket in "[]"):
        raise UserError(f"{text!r}: write a range as [01-16] or [01-03,07]; one of its brackets is missing.")
    choices = [_range(part, text) if odd else [part] for part, odd in zip(parts, itertools.cycle((False, True)))]
    for combination in itertools.product(*choices):
        name = "".join(combination)
        _check_name(name)
        yield name


def _range(text: str, word: str) -> list[str]:
    """The numbers of ``01-03,07``, with their leading zeros."""
    numbers: list[str] = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item)
        if not match:
            raise UserError(f"{word!r}: bad range [{text}]; write [01-16] or [01-03,07].")
        first, last = match[1], match[2] or match[1]
        if int(first) > int(last):
            raise UserError(f"{word!r}: bad range [{text}]; {first} is more than {last}.")
        if int(last) - int(first) >= MAX_HOSTS:
            raise UserError(f"{word!r}: more than {MAX_HOSTS} hosts; check its range.")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def _check_name(name: str) -> None:
    if re.fullmatch(r"[0-9.]+", name):
        try:
            ipaddress.IPv4Address(name)
        except ValueError:
            raise UserError(f"{name!r} is neither a host name nor an IPv4 address.") from None
        return
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        for character, remedy in _HINTS.items():
            if character in name:
                raise UserError(f"{name!r} is not a host name: {remedy}.")
        raise UserError(
            f"{name!r} is not a host name: only letters, digits, hyphens and dots are allowed, "
            "and each part between dots begins and ends with a letter or digit."
        )


def _ipv6(text: str) -> str:
    try:
        if "%" in text:
            raise ValueError
        return str(ipaddress.IPv6Address(text))
    except ValueError:
        raise UserError(
            f"{text!r} is not an IPv6 address; write the number of ranks on a host as `host slots=8`, not host:8."
        ) from None
