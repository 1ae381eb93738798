"""Prints whether a large message was summed in the order of a ring, and what would be another order.

The ring begins the sum of piece b at rank b: ((x[b] + x[b+1]) + x[b+2]) + x[b+3] for four ranks.
"""

import torch

from horovod_megdet import comm
from horovod_megdet.printing import say

LENGTH = 1 << 20  # float32: 4 MiB

comm.init()
ranks = comm.size()
values = [torch.randn(LENGTH, generator=torch.Generator().manual_seed(rank)) for rank in range(ranks)]
total = comm.sum_(values[comm.rank()].clone(), "large")
pieces = []
for first in range(ranks):
    one_by_one = [values[(first + place) % ranks].chunk(ranks)[first] for place in range(ranks)]
    pieces.append(sum(one_by_one[1:], one_by_one[0]))
if comm.is_main():
    in_rank_order = sum(values[1:], values[0])
    say(f"ring: {torch.equal(total, torch.cat(pieces))}, in rank order: {torch.equal(total, in_rank_order)}")
comm.shutdown()
