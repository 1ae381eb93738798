"""Loads a data set on all ranks together; a JSON line per rank says what it got: reading.py JSON IMAGES."""

import json
import sys

from horovod_megdet import comm, launched
from horovod_megdet.data.coco import load_dataset
from horovod_megdet.printing import say

comm.init()
dataset = load_dataset(sys.argv[1], sys.argv[2], training=False, ranks=comm)
said = {"rank": comm.rank(), "host": launched.host(), "fingerprint": dataset.fingerprint}
say(json.dumps(said | {"mapped": dataset.ground_truth.mapping is not None}))
comm.shutdown()
