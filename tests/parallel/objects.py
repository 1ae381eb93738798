"""Sends Python objects of many kinds and sizes between ranks; every rank says what it found."""

from typing import Any
from unittest import mock

import horovod.torch as hvd
import numpy as np
import torch

from horovod_megdet import comm
from horovod_megdet.printing import say


def of_rank(rank: int) -> Any:
    """Nothing on rank 0, and more on every rank after it."""
    weights = torch.arange(rank * 1_000_000, dtype=torch.bfloat16)
    return {"names": ["é.jpg"] * rank, "boxes": np.full((rank, 4), 0.5), "weights": weights} if rank else None


def same(found: Any, expected: Any) -> bool:
    """Whether the bits are the same."""
    if expected is None:
        return found is None
    return (
        found["names"] == expected["names"]
        and found["boxes"].dtype == expected["boxes"].dtype
        and np.array_equal(found["boxes"], expected["boxes"])
        and torch.equal(found["weights"], expected["weights"])
    )


comm.init()
ranks = range(comm.size())
mine = of_rank(comm.rank())
with mock.patch.object(hvd, "allgather", wraps=hvd.allgather) as allgather:
    gathered = comm.gather_objects(mine, "gathered")
right = len(gathered) == comm.size() and all(same(gathered[rank], of_rank(rank)) for rank in ranks)
for root in (*ranks, *reversed(ranks)):  # longer, then shorter ones under the same name
    right = right and same(comm.broadcast_object(mine if comm.rank() == root else None, "sent", root), of_rank(root))
sent = comm.exchange_objects([(comm.rank(), of_rank(rank)) for rank in ranks], "exchanged")
right = right and [sender for sender, _ in sent] == list(ranks) and all(same(each, mine) for _, each in sent)
say(f"rank {comm.rank()}: right: {right}, gathered in {allgather.call_count} message")
comm.shutdown()
