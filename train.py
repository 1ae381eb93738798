"""Trains an FPN detector on one or many nodes. What users launch:

python train.py                                        one process
horovodrun -np 2 python train.py                       two ranks on this machine
mpirun -np 128 --hostfile hosts python train.py --config configs/coco/megdet_r50_fpn_256.yaml
"""

import argparse
import sys

from horovod_megdet.arguments import add_config_arguments


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 done, 1 crashed, 2 bad input, 3 loss not finite, 4 checkpoint not written, 5 no rank "
        "made progress for runtime.stall_timeout seconds, 85 stopped by SIGUSR1, SIGTERM or Ctrl-C after writing a "
        "checkpoint. After any of these but 2, start again with --resume.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest whole checkpoint of the run directory"
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="only evaluate; needs --checkpoint, or takes the newest"
    )
    parser.add_argument("--checkpoint", metavar="PATH", help="checkpoint folder for --eval-only")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    # Loads Horovod. Loader workers import this file again, and must not.
    from horovod_megdet import run

    return run.train(arguments)


if __name__ == "__main__":
    sys.exit(main())
