"""Host files: what is read, and the messages about mistakes."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_megdet.cluster.launch.hostfile import MAX_HOSTS, Host, parse_hostfile, write_hostfile
from horovod_megdet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hosts_of(tmp_path: Path):
    def read(text: str) -> list[Host]:
        path = tmp_path / "hosts"
        path.write_text(text)
        return parse_hostfile(path)

    return read


def names(hosts: list[Host]) -> list[str]:
    return [host.name for host in hosts]


def test_hosts_in_their_order(hosts_of) -> None:
    text = "# two kinds\n\nbig.example.org slots=8 max_slots=16  # new\n  10.0.0.7\tslots=4\n"
    assert hosts_of(text) == [Host("big.example.org", 8, 16), Host("10.0.0.7", 4, 4)]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[08-11]", ["node08", "node09", "node10", "node11"]),
        ("node[01-02,07].ib", ["node01.ib", "node02.ib", "node07.ib"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("2001:DB8:0::1", ["2001:db8::1"]),
        ("::1", ["::1"]),
    ],
)
def test_names(hosts_of, word: str, expected: list[str]) -> None:
    assert names(hosts_of(f"{word} slots=1")) == expected


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("node01 slot=8", 1, ["'slot=8'", "did you mean slots=?"]),
        ("node01 max-slots=8", 1, ["did you mean max_slots=?"]),
        ("node01 gpus=8", 1, ["unknown key", "write `host slots=8`"]),
        ("node01 8", 1, ["the number needs a name: slots=8"]),
        ("node01 slots=8 node02 slots=8", 1, ["'node02': unknown key", "one per line"]),
        ("me@node01 slots=8", 1, ["is not a host name", "~/.ssh/config"]),
        ("node{01..16} slots=8", 1, ["is not a host name", "node[01-16]"]),
        ("node01, slots=8", 1, ["is not a host name", "one host per line"]),
        ("node01 slots", 1, ["slots needs a whole number"]),
        ("node01 slots = 8", 1, ["slots needs a whole number", "without spaces"]),
        ("node01 slots=0", 1, ["1 or more"]),
        ("node01 slots=-1", 1, ["1 or more"]),
        ("node01 slots=eight", 1, ["'slots=eight'"]),
        ("node01 slots=1 slots=2", 1, ["slots is given twice"]),
        ("\n# x\nnode01", 3, ["slots is missing"]),
        ("node01 slots=8 max_slots=4", 1, ["slots=8 is more than max_slots=4"]),
        ("a slots=1\nA slots=1", 2, ["'A' is already in line 1"]),
        ("node[01-04] slots=1\nnode03 slots=1", 2, ["'node03' is already in line 1"]),
        ("node[1-2,2] slots=1", 1, ["'node2' is already in line 1"]),
        ("node[3-1] slots=1", 1, ["bad range [3-1]", "3 is more than 1"]),
        ("node[a-b] slots=1", 1, ["bad range [a-b]"]),
        ("node[] slots=1", 1, ["bad range []"]),
        ("node[1-2 slots=1", 1, ["one of its brackets is missing"]),
        ("node1-2] slots=1", 1, ["one of its brackets is missing"]),
        ("node[1-99999999] slots=1", 1, [f"more than {MAX_HOSTS} hosts"]),
        ("n[1-9999]m[1-9999] slots=1", 1, [f"more than {MAX_HOSTS} hosts"]),
        ("node01:8", 1, ["not an IPv6 address", "not host:8"]),
        ("fe80::1%eth0 slots=1", 1, ["not an IPv6 address"]),
        ("10.0.0.300 slots=1", 1, ["neither a host name nor an IPv4 address"]),
        ("-oProxyCommand=x slots=1", 1, ["is not a host name"]),
        ("node_1 slots=1", 1, ["is not a host name"]),
        ("no..de slots=1", 1, ["is not a host name"]),
        ("nöde slots=1", 1, ["is not a host name"]),
        (f"{'a' * 64} slots=1", 1, ["is not a host name"]),
        *((f"node{character}x slots=1", 1, ["is not a host name"]) for character in ";|&$`'\"\\<>(){}*?!~"),
    ],
)
def test_mistakes(hosts_of, text: str, line: int, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        hosts_of(text)
    message = str(caught.value)
    assert f"hosts, line {line}: " in message
    for part in said:
        assert part in message


def test_all_mistakes_are_listed_at_once(hosts_of) -> None:
    with pytest.raises(UserError) as caught:
        hosts_of("node01 slots=8\nnode[02 slots=8\nnode03 slot=8\nnode04 slots=8\nNODE01 slots=4")
    lines = str(caught.value).splitlines()
    assert [re.search(r"hosts, line (\d): ", line)[1] for line in lines] == ["2", "3", "5"]


def test_of_a_file_that_is_no_host_file_the_first_mistakes_are_listed(hosts_of) -> None:
    with pytest.raises(UserError) as caught:
        hosts_of("import horovod\n" * 1000)
    assert len(str(caught.value).splitlines()) == 11
    assert "and 990 more lines" in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n"])
def test_no_hosts(hosts_of, text: str) -> None:
    with pytest.raises(UserError, match="it lists no host"):
        hosts_of(text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such host file"):
        parse_hostfile(tmp_path / "missing")
    with pytest.raises(UserError, match="cannot be read"):
        parse_hostfile(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        parse_hostfile(tmp_path / "binary")


def test_written_without_ranges(hosts_of, tmp_path: Path) -> None:
    write_hostfile(hosts_of("node[01-02] slots=8 max_slots=8\nb slots=1 max_slots=2"), tmp_path / "plain")
    assert (tmp_path / "plain").read_text() == "node01 slots=8\nnode02 slots=8\nb slots=1 max_slots=2\n"


@settings(deadline=None, max_examples=15)
@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True), st.tuples(*[st.integers(1, 99)] * 2)))
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, tuple[int, int]]
) -> None:
    hosts = [Host(name, min(slots), max(slots)) for name, slots in {"first": (1, 1), **sizes}.items()]
    path = tmp_path_factory.mktemp("hosts") / "hosts"
    write_hostfile(hosts, path)
    assert parse_hostfile(path) == hosts


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_read_or_explained(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("hosts") / "hosts"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        hosts = parse_hostfile(path)
    except UserError as error:
        message = str(error)
    else:
        assert hosts
        return
    assert str(path) in message


@pytest.mark.parametrize(("name", "count", "ranks"), [("localhost", 1, 2), ("2x8", 2, 16), ("16x8", 16, 128)])
def test_the_host_files_of_the_project(name: str, count: int, ranks: int) -> None:
    hosts = parse_hostfile(ROOT / "hostfiles" / name)
    assert (len(hosts), sum(host.slots for host in hosts)) == (count, ranks)
