"""Trains an FPN detector on one or many nodes. What users launch:

python train.py                                        one process
horovodrun -np 2 python train.py                       two ranks on this machine
mpirun -np 128 --hostfile hosts python train.py --config configs/coco/megdet_r50_fpn_256.yaml
"""

import argparse
import sys

from horovod_megdet.arguments import EXIT_CODES, add_training_arguments


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXIT_CODES,
    )
    add_training_arguments(parser)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    # Loads Horovod. Loader workers import this file again, and must not.
    from horovod_megdet import run

    return run.train(arguments)


if __name__ == "__main__":
    sys.exit(main())
