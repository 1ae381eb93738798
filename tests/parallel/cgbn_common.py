"""What the ranks of the CGBN scripts share: counting messages, comparing with one process, reporting."""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from horovod_megdet import comm
from horovod_megdet.printing import say


@contextlib.contextmanager
def messages() -> Iterator[list[str]]:
    """The names of the sums that this rank takes part in, in order."""
    names: list[str] = []
    original = comm.sum_

    def counted(tensor: Tensor, name: str, group: comm.Group | None = None) -> Tensor:
        names.append(name)
        return original(tensor, name, group)

    with mock.patch.object(comm, "sum_", counted):
        yield names


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value; 0 for empty tensors."""
    if reference.numel() == 0:
        return 0.0
    value, reference = (each.detach().double().cpu() for each in (value, reference))
    difference = (value - reference).abs().max()
    # max() over ranks would lose a NaN, which has to fail the test
    return float((difference / reference.abs().max().clamp_min(1e-30)).nan_to_num(nan=1e30))


def summed(tensor: Tensor, group: comm.Group | None = None) -> Tensor:
    """The sum over the group's ranks, in float64."""
    return comm.sum_(tensor.detach().double().clone(), f"test.{tuple(tensor.shape)}", group)


def worst(values: dict[str, float]) -> dict[str, float]:
    """The largest value over all ranks, for each key."""
    ranks = comm.gather_objects(values, "test.worst")
    return {key: max(rank[key] for rank in ranks) for key in values}


def main(measure: Callable[[], dict[str, Any]]) -> None:
    """Runs ``measure`` on all ranks; rank 0 writes its result to the JSON file named on the command line."""
    comm.init(groups=True)
    torch.set_num_threads(1)
    try:
        result = measure()
    except Exception:
        say(f"rank {comm.rank()}:\n{traceback.format_exc()}")
        comm.abort(1)
    if comm.is_main():
        Path(sys.argv[1]).write_text(json.dumps(result))
    comm.barrier()
    comm.shutdown()
