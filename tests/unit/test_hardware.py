"""Cores are divided among the ranks that share them, and nobody else's are taken; memory is kept for the next step."""

import os
import subprocess
import sys

import pytest
import torch

from horovod_megdet import comm
from horovod_megdet.config import RuntimeConfig
from horovod_megdet.engine import hardware, precision
from horovod_megdet.errors import UserError
from horovod_megdet.layers.float32_products import use_float32_products


@pytest.fixture(autouse=True)
def _two_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose core numbers alternate between two sockets, and begin again for the second hardware threads."""
    monkeypatch.setattr(hardware, "_place_of_core", lambda core: (core % 2, core % 8, core))


def test_unbound_ranks_get_neighboring_cores() -> None:
    masks = [("node01", list(range(16)))] * 4 + [("node02", list(range(16)))] * 2
    assert [hardware.own_cores(masks, rank) for rank in range(4)] == [
        {0, 8, 2, 10},
        {4, 12, 6, 14},
        {1, 9, 3, 11},
        {5, 13, 7, 15},
    ]
    assert hardware.own_cores(masks, 4) == set(range(0, 16, 2)), "each host is divided on its own"


def test_ranks_of_a_socket_divide_it() -> None:
    masks = [("node01", [0, 2, 4, 6])] * 2 + [("node01", [1, 3, 5, 7])] * 2
    assert [hardware.own_cores(masks, rank) for rank in range(4)] == [{0, 2}, {4, 6}, {1, 3}, {5, 7}]


@pytest.mark.parametrize(
    "masks",
    [
        pytest.param([("node01", [0]), ("node01", [1])], id="bound by the launcher"),
        pytest.param([("node01", [0, 1])] * 3, id="more ranks than cores"),
        pytest.param([("node01", [0, 1])], id="alone"),
    ],
)
def test_cores_are_kept(masks: list[tuple[str, list[int]]]) -> None:
    assert [hardware.own_cores(masks, rank) for rank in range(len(masks))] == [set(cores) for _, cores in masks]


def test_cores_that_do_not_divide_evenly_are_all_used() -> None:
    masks = [("node01", [0, 2, 4, 6, 8])] * 2
    assert [len(hardware.own_cores(masks, rank)) for rank in range(2)] == [2, 3]


@pytest.mark.parametrize(
    ("masks", "threads"),
    [
        pytest.param([("node01", list(range(16)))] * 4, 4, id="all share the host"),
        pytest.param([("node01", [0, 1])] * 4, 1, id="more ranks than cores, in a part of a large host"),
        pytest.param([("node01", list(range(8)))] * 2, 4, id="two share a part of a large host"),
        pytest.param([("node01", [0, 1]), ("node01", [2, 3])], 2, id="bound by the launcher"),
        pytest.param([("node01", [0, 1]), ("node02", [0, 1])], 2, id="one on each host"),
        pytest.param([("node01", [0, 1, 2, 3, 4])] * 2, 2, id="as many for each"),
    ],
)
def test_a_rank_has_a_thread_for_each_core_of_its_own(masks: list[tuple[str, list[int]]], threads: int) -> None:
    assert [hardware.threads_per_rank(masks, rank) for rank in range(len(masks))] == [threads] * len(masks)


def test_alone_nothing_changes() -> None:
    before = os.sched_getaffinity(0)
    hardware.bind_to_cores(hardware.core_masks())
    assert os.sched_getaffinity(0) == before


def test_a_rank_without_a_gpu_is_an_error_unless_tests_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "local_rank", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    runtime = RuntimeConfig(device="cuda", bind_cores=False, threads_per_rank=torch.get_num_threads())
    with pytest.raises(UserError, match="Local rank 1 has no GPU"):
        hardware.set_up_process(runtime)
    monkeypatch.setenv("HOROVOD_MEGDET_SHARE_GPU", "1")
    assert hardware.set_up_process(runtime) == torch.device("cuda", 0)


@pytest.mark.parametrize(("flags", "replaced"), [("avx2", 1), ("avx512_bf16 amx_bf16", 0)])
def test_processors_without_amx_multiply_in_float32(monkeypatch: pytest.MonkeyPatch, flags: str, replaced: int) -> None:
    monkeypatch.setattr(precision, "processor_flags", lambda: set(flags.split()))
    monkeypatch.setattr(hardware, "keep_freed_memory", lambda: None)
    use_float32_products.cache_clear()
    hardware.prepare_cpu()
    assert use_float32_products.cache_info().currsize == replaced
    use_float32_products.cache_clear()


PAGE_FAULTS = """
import ctypes, resource, sys
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE: of huge pages there would be hardly a fault
import torch
from horovod_megdet.engine import hardware, precision
if sys.argv[1] == "keep":
    hardware.keep_freed_memory()
def step():
    tensors = [torch.ones(12 << 20) for _ in range(2)]  # 48 MiB each: more than glibc ever keeps by itself
for _ in range(10):  # aligned blocks leave gaps between them: it takes up to four steps until all find a place
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(
    ("argument", "variables", "kept"),
    [("keep", {}, True), ("leave", {}, False), ("keep", {"MALLOC_TRIM_THRESHOLD_": "131072"}, False)],
)
def test_freed_memory_is_used_again_unless_the_environment_has_settings(
    argument: str, variables: dict[str, str], kept: bool
) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment = own | {"OMP_NUM_THREADS": "1"} | variables

    program = [sys.executable, "-c", PAGE_FAULTS, argument]
    page_faults = int(subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout)
    assert (page_faults < 1000) == kept, f"{page_faults} page faults; the two tensors have 24576 pages"
