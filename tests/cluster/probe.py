"""One JSON line per rank: its host, controller and batch norm group, and how long a large message takes."""

import json
import time

import torch

from horovod_megdet import comm, launched
from horovod_megdet.config import BatchNormConfig
from horovod_megdet.models.norms import bn_group
from horovod_megdet.printing import say

IMAGES_PER_RANK = 2
MESSAGE = 8 * 2**20  # float32 values: 32 MiB

comm.init(groups=True)
rank = comm.rank()
bn_size = IMAGES_PER_RANK * comm.local_size() if comm.local_size() > 1 else "world"
group = bn_group(BatchNormConfig(bn_size=bn_size), IMAGES_PER_RANK)
total = comm.sum_(torch.tensor([10.0**rank]), "who is in my group", group)
message = torch.ones(MESSAGE)
comm.sum_(message, "warm-up")
comm.barrier()
started = time.perf_counter()
comm.sum_(message, "message")
seconds = time.perf_counter() - started
said = {"rank": rank, "host": launched.host(), "controller": comm.controller(), "group": group.ranks}
say(json.dumps(said | {"sum": total.item(), "seconds": seconds}))
comm.shutdown()
