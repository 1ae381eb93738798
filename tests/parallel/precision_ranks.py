"""train.py on ranks that claim other processors: ``precision_ranks.py FLAG_OF_RANK_0,FLAG_OF_RANK_1 ARGUMENTS``.

Their products in bfloat16 are those of processors without AMX, whatever they claim, so that bits can be compared.
"""

import sys
from pathlib import Path

from horovod_megdet import launched
from horovod_megdet.engine import precision
from horovod_megdet.layers.float32_products import use_float32_products

if __name__ == "__main__":
    flags = sys.argv.pop(1).split(",")
    precision.processor_flags = lambda: {flags[launched.rank()]}
    use_float32_products()
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import train

    sys.exit(train.main())
