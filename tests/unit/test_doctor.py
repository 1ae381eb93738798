"""``megdet doctor``: healthy machines have no findings, and each planted fault has its own."""

import argparse
import dataclasses
import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from horovod_megdet.cluster.doctor import command, inputs, measurements, probes, report
from horovod_megdet.cluster.doctor.checks import CHECKS, examine
from horovod_megdet.cluster.doctor.examination import Examination, Finding
from horovod_megdet.cluster.doctor.facts import (
    Build,
    ConfigSummary,
    Disk,
    Facts,
    InputSummary,
    Interface,
    Limits,
    Machine,
    Memory,
    Network,
    Place,
    Processor,
    Software,
)
from horovod_megdet.cluster.doctor.measurements import Clock, Timing
from horovod_megdet.cluster.doctor.naming import where
from horovod_megdet.cluster.doctor.run_directory import RunDirectory, try_run_directory
from horovod_megdet.config import DEMO, Config
from horovod_megdet.errors import UserError
from horovod_megdet.launched import PLACE_VARIABLES
from horovod_megdet.versions import MISSING
from horovod_megdet.wording import seconds, size, some

GIB = 2**30
PER_HOST = 2
LOOPBACK = Interface("lo", ["127.0.0.1"], up=True, loopback=True, speed=0)


def healthy_rank(rank: int, hosts: int = 2) -> Facts:
    """One of ``hosts`` hosts with two ranks, two GPUs and 16 cores each."""
    number, local_rank = divmod(rank, PER_HOST)
    address = f"10.0.0.{number + 1}"
    known = {f"node{index}": [f"10.0.0.{index + 1}"] for index in range(hosts)}
    summary = InputSummary("f" * 64, "1000 images, 5 classes")
    return Facts(
        place=Place(rank, hosts * PER_HOST, local_rank, PER_HOST, f"node{number}"),
        launched_ranks=hosts * PER_HOST,
        software=Software({"Python": "3.11.7", "numpy": "2.0"}, "a" * 64, "/data/megdet/horovod_megdet"),
        build=Build("mpi", "Open MPI v4.1.8", dict.fromkeys(("mpi", "gloo", "nccl", "cuda"), True)),
        machine=Machine(f"boot{number}", [address]),
        processor=Processor(16, list(range(16)), None),
        gpus=["A100", "A100"],
        network=Network([LOOPBACK, Interface("eth0", [address], up=True, loopback=False, speed=25000)], {}),
        run_disk=Disk("/shared", 1000 * GIB, 500 * GIB, 10**6),
        temporary_disk=Disk("/tmp", 100 * GIB, 50 * GIB, 10**6),
        memory=Memory(128 * GIB, 100 * GIB),
        limits=Limits(65536, -1, infiniband=True),
        config=ConfigSummary("c" * 64, "auto", 4, 3, 20 * 2**20),
        threads=8,
        resolved=known if local_rank == 0 else None,
        data={"training set": summary, "validation set": summary} if local_rank == 0 else None,
    )


def healthy(hosts: int = 2) -> Examination:
    ranks = [healthy_rank(rank, hosts) for rank in range(hosts * PER_HOST)]
    return Examination(
        ranks,
        clocks=[Clock(facts.place.rank, facts.place.host, 1e-4, 2e-4) for facts in ranks],
        run_directory=[RunDirectory(host * PER_HOST, f"node{host}", "/shared/run") for host in range(hosts)],
        timings=[Timing(4096, 2e-4, 2e-5), Timing(2**26, 0.05, 0.04)],
        gradient_bytes=160 * 10**6,
        checkpoint_bytes=320 * 10**6,
    )


def with_fault(rank: int, hosts: int = 2, **changes: Any) -> Examination:
    """Healthy hosts, but for one rank."""
    examination = healthy(hosts)
    ranks = list(examination.ranks)
    ranks[rank] = replace(ranks[rank], **changes)
    return replace(examination, ranks=ranks)


def with_faults(**changes: Any) -> Examination:
    """Hosts that all have the same fault."""
    examination = healthy()
    return replace(examination, ranks=[replace(facts, **changes) for facts in examination.ranks])


def with_view(view: RunDirectory) -> Examination:
    """Healthy hosts, one of which sees the run directory in its own way."""
    examination = healthy()
    return replace(examination, run_directory=[*examination.run_directory, view])


def bad(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity != "ok"]


def rank(number: int) -> Facts:
    return healthy_rank(number)


@pytest.mark.parametrize("hosts", [1, 2, 16])
def test_healthy_machines(hosts: int) -> None:
    findings = examine(healthy(hosts))
    assert bad(findings) == []
    # With one host there is nobody to know it by name.
    assert {finding.check for finding in findings} == CHECKS.keys() - ({"names"} if hosts == 1 else set())
    assert not report.would_fail(findings)


def test_gloo_without_mpi4py_is_healthy() -> None:
    software = part(0, "software", versions={"Python": "3.11.7", "mpi4py": "missing", "pytorch-optimizer": "missing"})
    build = {"build": Build("gloo", "", GLOO_ONLY)}
    assert bad(examine(with_faults(**software, **build))) == []


def part(number: int, name: str, **changes: Any) -> dict[str, Any]:
    """A part of a rank's facts with changes."""
    return {name: replace(getattr(rank(number), name), **changes)}


UNREADABLE = InputSummary("", "", "train.json: image 7 (7.jpg): there is no such file")
DOCKER = Interface("docker0", ["172.17.0.1"], up=True, loopback=False, speed=0)
GLOO_ONLY = {"mpi": False, "gloo": True, "nccl": True, "cuda": True}
IPOIB_DOWN = Interface("ib0", ["10.1.0.1"], up=False, loopback=False, speed=0)

FAULTS: list[tuple[str, str, Examination, list[str]]] = [
    (
        "another version of a package on one rank",
        "error",
        with_fault(3, **part(3, "software", versions={"Python": "3.11.7", "numpy": "1.26"})),
        ["versions", "numpy differs: 2.0 on node0, rank 2 on node1; 1.26 on rank 3 on node1"],
    ),
    (
        "a package that is missing on a host",
        "error",
        with_fault(3, **part(3, "software", versions={"Python": "3.11.7"})),
        ["numpy differs", "missing on rank 3 on node1"],
    ),
    (
        "a package that is missing everywhere",
        "error",
        with_faults(**part(0, "software", versions={"Python": "3.11.7", "numpy": "missing"})),
        ["versions", "numpy is not installed"],
    ),
    (
        "Horovod with MPI, but no mpi4py",
        "error",
        with_faults(**part(0, "software", versions={"Python": "3.11.7", "mpi4py": "missing"})),
        ["versions", "mpi4py is not installed"],
    ),
    (
        "mpirun, and Horovod without MPI",
        "error",
        Examination(
            [replace(healthy_rank(0), place=Place(0, 1, 0, 1, "node0"), **part(0, "build", features=GLOO_ONLY))]
        ),
        ["the launcher started 4 processes", "Horovod was built without MPI", "--controller gloo"],
    ),
    (
        "another commit on one host",
        "error",
        with_fault(2, **part(2, "software", digest="b" * 64)),
        ["the code of horovod_megdet differs", "bbbbbbbbbbbb (/data/megdet/horovod_megdet) on rank 2 on node1"],
    ),
    (
        "another MPI on one host",
        "error",
        with_fault(2, **part(2, "build", mpi_library="MPICH 4.3")),
        ["the MPI library differs", "MPICH 4.3 on rank 2 on node1"],
    ),
    (
        "Horovod for CPUs on a host with GPUs",
        "error",
        with_faults(**part(0, "build", features={"mpi": True, "gloo": True, "cuda": False, "nccl": False})),
        ["Horovod was built without CUDA on all hosts"],
    ),
    (
        "mpirun of another MPI",
        "error",
        Examination([replace(healthy_rank(0), place=Place(0, 1, 0, 1, "node0"), launched_ranks=4)]),
        ["the launcher started 4 processes", "each believes it is one of 1", "megdet launch"],
    ),
    (
        "two hosts with one name",
        "error",
        Examination(
            [
                replace(rank(index), threads=4, place=Place(index, 4, index % 2, 2, "node0"))
                for index in range(2 * PER_HOST)
            ]
        ),
        ["2 hosts have the name node0: 10.0.0.1, 10.0.0.2"],
    ),
    (
        "unequal ranks per host",
        "warning",
        replace(healthy(), ranks=healthy().ranks[:3]),
        ["unequal numbers of ranks: 2 on node0, 1 on node1"],
    ),
    (
        "a configuration that cannot be read on one host",
        "error",
        with_fault(2, config=None, config_error="mine.yaml: no such configuration file."),
        ["configuration", "mine.yaml: no such configuration file. (rank 2 on node1)"],
    ),
    (
        "another configuration on one host",
        "error",
        with_fault(2, **part(2, "config", fingerprint="d" * 64)),
        ["the configuration differs", "dddddddddddd on rank 2 on node1"],
    ),
    ("a host without GPU", "error", with_fault(2, gpus=[]), ["there is no GPU on rank 2 on node1, while"]),
    ("fewer GPUs than ranks", "error", with_fault(3, gpus=["A100"]), ["none is left for rank 3 on node1"]),
    (
        "GPUs of two kinds",
        "warning",
        with_fault(3, gpus=["V100", "V100"]),
        ["the GPUs differ: A100 on node0, rank 2 on node1; V100 on rank 3 on node1"],
    ),
    (
        "a GPU that another process holds",
        "error",
        with_fault(3, gpu_failure="RuntimeError: CUDA error: device is busy"),
        ["the GPU cannot be used on rank 3 on node1: RuntimeError: CUDA error: device is busy"],
    ),
    (
        "no GPU where one is asked for",
        "error",
        with_faults(gpus=[], **part(0, "config", device="cuda")),
        ["there is no GPU on all hosts, but runtime.device is cuda"],
    ),
    ("too many threads", "warning", with_faults(threads=12), ["24 threads of 2 ranks share 16 cores on all hosts"]),
    (
        "a container with less time than cores",
        "warning",
        with_faults(**part(0, "processor", quota=4.0)),
        ["16 threads of 2 ranks share 4 cores"],
    ),
    (
        "a rank bound to one core",
        "warning",
        with_fault(1, threads=1, **part(1, "processor", usable=[1])),
        ["rank 1 on node0 may use only one core", "--bind-to none"],
    ),
    (
        "little memory",
        "warning",
        with_fault(2, **part(2, "memory", available=GIB)),
        ["only 512 MiB of memory per rank is available on rank 2 on node1, and 2.08 GiB are needed"],
    ),
    (
        "few open files",
        "warning",
        with_faults(**part(0, "limits", open_files=256)),
        ["all hosts may open only 256 files"],
    ),
    (
        "memory that cannot be locked",
        "warning",
        with_fault(2, **part(2, "limits", locked_memory=65536)),
        ["locked memory is limited on rank 2 on node1"],
    ),
    (
        "an interface that one host does not have",
        "error",
        with_fault(2, network=Network(rank(2).network.interfaces, {"OMPI_MCA_btl_tcp_if_include": "ib0"})),  # type: ignore[union-attr]
        ["OMPI_MCA_btl_tcp_if_include is ib0 on node1: there is no such interface (interfaces: lo, eth0)"],
    ),
    (
        "an interface that is down",
        "error",
        with_fault(0, network=Network([LOOPBACK, IPOIB_DOWN], {"HOROVOD_GLOO_IFACE": "ib0"})),
        ["HOROVOD_GLOO_IFACE is ib0 on node0: it is down"],
    ),
    (
        "loopback for several hosts",
        "error",
        with_faults(network=Network([LOOPBACK], {"HOROVOD_GLOO_IFACE": "lo"})),
        ["HOROVOD_GLOO_IFACE is lo on all hosts: it does not lead to other hosts"],
    ),
    (
        "docker0 on all hosts",
        "warning",
        with_faults(network=Network([LOOPBACK, DOCKER], {})),
        ["MPI may try docker0 (172.17.0.1) on all hosts", "--interface"],
    ),
    (
        "one address on two hosts",
        "warning",
        with_faults(network=rank(0).network),
        ["all hosts have the same address 10.0.0.1 (eth0)"],
    ),
    (
        "a name that one host does not know",
        "error",
        with_fault(2, resolved={"node0": [], "node1": ["10.0.0.2"]}),
        ["the name node0 does not resolve on node1"],
    ),
    (
        "a name that leads to another host",
        "error",
        with_fault(2, resolved={"node0": ["10.9.9.9"], "node1": ["10.0.0.2"]}),
        ["node0 resolves to 10.9.9.9 on node1, but its address is 10.0.0.1"],
    ),
    (
        "a host that knows itself as 127.0.1.1",
        "warning",
        with_fault(2, resolved={"node0": ["10.0.0.1"], "node1": ["127.0.1.1"]}),
        ["on node1, the host's own name resolves to a loopback address", "/etc/hosts"],
    ),
    (
        "a clock that is ahead",
        "warning",
        replace(healthy(), clocks=[Clock(0, "node0", 0.0, 0.0), Clock(2, "node1", 42.0, 0.1)]),
        ["the clock of node1 is 42 s ahead of that of rank 0"],
    ),
    (
        "an image that is missing on one host",
        "error",
        with_fault(2, data={"training set": UNREADABLE, "validation set": InputSummary("f" * 64, "")}),
        ["the training set cannot be used on node1: train.json: image 7 (7.jpg): there is no such file"],
    ),
    (
        "other annotations on one host",
        "error",
        with_fault(2, data={"training set": InputSummary("e" * 64, ""), "validation set": InputSummary("f" * 64, "")}),
        ["the hosts do not have the same training set: ffffffffffff on node0; eeeeeeeeeeee on node1"],
    ),
    (
        "starting weights that one host lacks",
        "error",
        with_fault(2, weights=InputSummary("", "", "w.pth: cannot be read: No such file or directory.")),
        ["the starting weights cannot be used on", "w.pth", "Correct model.weights"],
    ),
    (
        "a run directory that is not shared",
        "error",
        with_view(RunDirectory(2, "node1", "/r", unseen="there is no such folder")),
        ["node1 does not see what rank 0 writes to /r: there is no such folder"],
    ),
    (
        "a run directory that rank 0 cannot write",
        "error",
        with_view(RunDirectory(0, "node0", "/r", unwritable="Read-only file system")),
        ["node0 cannot write to /r: Read-only file system"],
    ),
    (
        "a run directory that another host cannot write",
        "warning",
        with_view(RunDirectory(2, "node1", "/r", unwritable="Permission denied")),
        ["node1 cannot write to /r: Permission denied"],
    ),
    (
        "a run directory of that name on each host",
        "error",
        with_view(RunDirectory(2, "node1", "/r", arrived=False)),
        ["rank 0 does not see what node1 writes to /r"],
    ),
    (
        "a full disk",
        "error",
        with_fault(0, **part(0, "run_disk", free=2**20)),
        ["disks", "/shared, is full: 1 MiB are free", "--run-dir"],
    ),
    (
        "a disk without room for another file",
        "error",
        with_fault(0, **part(0, "run_disk", free_inodes=3)),
        ["is full: it has room for only 3 more files"],
    ),
    (
        "a disk that will be full",
        "warning",
        with_fault(0, **part(0, "run_disk", free=GIB)),
        ["has 1 GiB free; the 5 checkpoints that a run keeps take about 1.49 GiB"],
    ),
    (
        "a full /tmp",
        "warning",
        with_fault(2, **part(2, "temporary_disk", free=1000)),
        ["/tmp has only 1000 B free on node1"],
    ),
    (
        "slow small messages",
        "warning",
        replace(healthy(), timings=[Timing(4096, 0.08, 1e-5), Timing(2**26, 0.05, 0.04)]),
        ["an allreduce of 4 KiB takes 80 ms, with bare MPI 10 us", "mpi_yield_when_idle"],
    ),
    (
        "a slow network",
        "warning",
        replace(healthy(), timings=[Timing(4096, 2e-4, 2e-5), Timing(2**26, 1.0, 1.0)]),
        ["only 0.81 Gbit/s between the ranks", "the gradients of a step take 2.38 s"],
    ),
    (
        "something that could not be determined",
        "warning",
        with_fault(2, memory=None, failures={"memory": "OSError: no /proc"}),
        ["could not determine memory: OSError: no /proc (rank 2 on node1)"],
    ),
]


@pytest.mark.parametrize(
    ("severity", "examination", "said"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS]
)
def test_planted_fault(severity: str, examination: Examination, said: list[str]) -> None:
    findings = bad(examine(examination))
    assert [finding.severity for finding in findings] == [severity], findings
    text = f"{findings[0].check}: {findings[0].sentence} {findings[0].remedy}"
    assert findings[0].remedy
    for words in said:
        assert words in text
    assert report.would_fail(findings) == (severity == "error")


def test_a_check_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(examination: Examination) -> list[Finding]:
        raise ZeroDivisionError("planted")

    monkeypatch.setitem(CHECKS, "memory", broken)
    findings = examine(with_fault(2, gpus=[]))
    assert {finding.check for finding in bad(findings)} == {"memory", "GPUs"}
    assert "ZeroDivisionError: planted" in next(f.sentence for f in findings if f.check == "memory")
    assert len(findings) == len(CHECKS)


@pytest.mark.parametrize(
    "field", [field for field in dataclasses.fields(Facts) if field.name != "place"], ids=lambda field: field.name
)
def test_what_is_not_known_is_passed_over(field: dataclasses.Field[Any]) -> None:
    """No check may take for granted that a part of the facts is there."""
    unknown = {} if field.default is dataclasses.MISSING else field.default
    assert bad(examine(with_faults(**{field.name: unknown}))) == []


def test_an_optimizer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    arguments = argparse.Namespace(config=str(DEMO), overrides=["solver.optimizer=lars"], run_dir=None)
    config, config_error = command.read_config(arguments)
    assert config
    assert config.solver.optimizer == "lars"
    findings = examine(with_faults(config_error=config_error))
    assert [finding.severity for finding in bad(findings)] == ["error"]
    assert "lars needs the package pytorch_optimizer" in bad(findings)[0].sentence


def test_facts_of_this_process(tmp_path: Path) -> None:
    config = Config.model_validate({"output": {"run_dir": str(tmp_path / "not" / "yet")}})
    mine = probes.probe_process(config, "")
    assert mine.failures == {}
    assert mine.software
    assert mine.software.versions["torch"] != MISSING
    assert (Path(mine.software.folder) / "files.py").exists(), "all of the project counts, not the doctor alone"
    assert mine.run_disk
    assert mine.run_disk.folder == str(tmp_path)
    assert mine.network
    assert any(interface.loopback and interface.up for interface in mine.network.interfaces)
    assert mine.processor
    assert set(mine.processor.usable) == os.sched_getaffinity(0)
    assert mine.config
    assert mine.config.fingerprint == config.fingerprint()


def test_a_part_that_cannot_be_determined(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Memory:
        raise PermissionError("planted")

    monkeypatch.setattr(probes, "memory", broken)
    mine = probes.probe_process(None, "no such file")
    assert mine.memory is None
    assert mine.limits is not None
    assert mine.failures == {"memory": "PermissionError: planted"}


@pytest.mark.parametrize(
    ("variables", "place", "launched"),
    [
        ({}, (0, 1, 0, 1), None),
        (
            {
                "OMPI_COMM_WORLD_RANK": "5",
                "OMPI_COMM_WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
            },
            (5, 8, 1, 4),
            8,
        ),
        (
            {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "2"},
            (3, 4, 0, 2),
            4,
        ),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, (2, 4, 0, 1), 4),
        ({"PMIX_RANK": "2", "SLURM_LOCALID": "2"}, (2, 1, 2, 1), None),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, (3, 4, 1, 1), 4),
    ],
)
def test_places_by_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], place: tuple[int, ...], launched: int | None
) -> None:
    for names in (*PLACE_VARIABLES, probes.SRUN_VARIABLES):
        for name in names:
            monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert probes.place_by_launcher() == Place(*place, socket.gethostname())  # type: ignore[misc]
    assert probes.launched_ranks() == launched


@pytest.mark.parametrize(
    ("rank_variable", "expected"), [("PMI_RANK", "OMPI_MCA_btl_tcp_if_include"), ("HOROVOD_RANK", "HOROVOD_GLOO_IFACE")]
)
def test_interfaces_of_the_other_controller_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, rank_variable: str, expected: str
) -> None:
    for name in (*(names[0] for names in PLACE_VARIABLES), *probes.INTERFACE_VARIABLES, "HOROVOD_CONTROLLER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(rank_variable, "0")
    monkeypatch.setenv("OMPI_MCA_btl_tcp_if_include", "eth0")
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "eth0")
    assert probes.network().selected == {expected: "eth0"}


def test_bare_mpi_is_left_out_without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.delenv("HOROVOD_CONTROLLER", raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert measurements.time_bare_mpi() == {}


def test_limits_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"cpu.max": "250000 100000", "memory.max": str(4 * GIB), "memory.current": str(GIB)}
    monkeypatch.setattr(probes, "cgroup_setting", settings.__getitem__)
    assert probes.processor().quota == 2.5
    assert probes.memory().total == 4 * GIB
    assert probes.memory().available <= 3 * GIB
    settings |= {"cpu.max": "max 100000", "memory.max": "max"}
    assert probes.processor().quota is None
    assert probes.memory().total != 4 * GIB


def test_unknown_names_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, port: None, type: int) -> list[Any]:
        if host != "node0":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, type, 6, "", (address, 0)) for address in ("10.0.0.2", "10.0.0.1", "10.0.0.2")]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert probes.resolve(["node0", "node1"]) == {"node0": ["10.0.0.1", "10.0.0.2"], "node1": []}


def test_data_is_read_and_not_generated(tmp_path: Path) -> None:
    config = Config.model_validate({"data": {"synthetic_root": str(tmp_path / "synthetic")}})
    assert {found.fingerprint for found in inputs.data_sets(config).values()} == {"generated"}
    assert not (tmp_path / "synthetic").exists()
    real = Config.model_validate({"data": {"root": str(tmp_path), "train_annotations": "a.json", "train_images": "i"}})
    assert "a.json" in inputs.data_sets(real)["training set"].error


def test_weights_are_told_apart_by_content(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    config = Config.model_validate({"model": {"weights": str(path)}})
    missing = inputs.starting_weights(config)
    assert missing
    assert str(path) in missing.error
    fingerprints = set()
    for content in (b"a" * 3_000_000, b"a" * 2_999_999 + b"b", b"a" * 3_000_001):
        path.write_bytes(content)
        found = inputs.starting_weights(config)
        assert found
        fingerprints.add(found.fingerprint)
    assert len(fingerprints) == 3
    assert inputs.starting_weights(Config.model_validate({"model": {"weights": "none"}})) is None


def test_the_run_directory_is_left_as_it_was(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    assert try_run_directory(run_dir) == [RunDirectory(0, socket.gethostname(), str(run_dir))]
    assert list(tmp_path.iterdir()) == []
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("keep")
    try_run_directory(run_dir)
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]


def test_a_run_directory_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = try_run_directory(tmp_path / "file" / "run")
    assert found[0].unwritable == "Not a directory"


def test_json_holds_everything() -> None:
    examination = with_fault(2, gpus=[])
    data = json.loads(json.dumps(report.as_json(examination, examine(examination))))
    assert data["training_would_fail"] is True
    assert data["ranks"][2]["place"]["host"] == "node1"
    assert data["timings"][0]["gbit_per_second"] > 0
    assert {"check", "severity", "sentence", "remedy"} == data["findings"][0].keys()


def test_the_worst_stands_last() -> None:
    examination = replace(with_fault(2, gpus=[]), timings=[Timing(4096, 0.08, None)])
    findings = examine(examination)
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    report.print_report(examination, findings, console)
    text = console.export_text()
    assert text.index("ok      ranks") < text.index("warning allreduce") < text.index("error   GPUs")
    assert text.rstrip().endswith("Training would fail: 1 error, 2 warnings.")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plot.{suffix}"
    report.write_plot(healthy().timings, 4, "title", path)
    assert path.stat().st_size > 5000
    with pytest.raises(UserError, match="cannot be written"):
        report.write_plot(healthy().timings, 4, "title", path / "below" / "plot.png")


def test_bandwidth_counts_what_is_sent() -> None:
    assert Timing(10**9, 1.0, None).bandwidth(2) == pytest.approx(8.0)
    assert Timing(10**9, 1.0, None).bandwidth(4) == pytest.approx(12.0)


def test_wording() -> None:
    ranks = healthy().ranks
    assert where(ranks, ranks) == "all hosts"
    assert where(ranks[:2], ranks) == "node0"
    assert where(ranks[:3], ranks) == "node0, rank 2 on node1"
    assert where([ranks[2]], [ranks[0], ranks[2]]) == "node1"
    assert some(str(number) for number in range(8)) == "0, 1, 2, 3, 4, 5 and 2 more"
    assert [size(value) for value in (5, 2048, 3 * GIB, 2**41)] == ["5 B", "2 KiB", "3 GiB", "2 TiB"]
    assert [seconds(value) for value in (3600, 2.5, 0.0025, 2.5e-6)] == ["3600 s", "2.5 s", "2.5 ms", "2.5 us"]
