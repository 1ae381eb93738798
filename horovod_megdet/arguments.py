"""The arguments that ``train.py`` and the ``megdet`` commands share. Imports nothing that starts Horovod."""

import argparse
import json
import math
from pathlib import Path

from horovod_megdet.config import DEMO, Config, load_config

EXIT_CODES = (
    "Exit codes: 0 done, 1 crashed, 2 bad input, 3 loss, weights or gradients not finite, 4 checkpoint not written, "
    "5 no rank made progress for runtime.stall_timeout seconds, 85 stopped by SIGUSR1, SIGTERM or Ctrl-C after writing "
    "a checkpoint, 130 stopped at once by a second Ctrl-C. --resume goes on from the newest checkpoint; after 3, lower "
    "the learning rate first."
)
"""The end of the help about training."""


def positive(text: str) -> int:
    """The type of an argument that is a whole number, 1 or more."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def positive_number(text: str) -> float:
    """The type of an argument that is a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def picture(text: str) -> Path:
    """The type of an argument that is a picture to write."""
    if Path(text).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, .pdf or .svg")
    return Path(text)


def fractions(text: str) -> tuple[float, ...]:
    """The type of ``--split``: one to three numbers above 0 whose sum is 1."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not 1 <= len(numbers) <= 3 or not all(number > 0 for number in numbers) or abs(sum(numbers) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"{text!r} is not one to three numbers above 0 with a sum of 1, like 0.8,0.2")
    return numbers


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--config`` and ``--set``; :func:`config_of` reads them."""
    parser.add_argument(
        "--config", metavar="FILE", default=str(DEMO), help="YAML configuration (default: that of the demo)"
    )
    add_set_argument(parser)
    parser.set_defaults(run_dir=None)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``train.py`` and ``megdet train`` take."""
    add_config_arguments(parser)
    add_run_dir_argument(parser)
    _add_resume_argument(parser)
    parser.add_argument(
        "--eval-only", action="store_true", help="only evaluate --checkpoint, or the newest one of the run directory"
    )
    parser.add_argument("--checkpoint", metavar="PATH", help="checkpoint folder for --eval-only")


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``megdet demo`` takes: it trains with the configuration of the demo."""
    add_set_argument(parser)
    add_run_dir_argument(parser)
    _add_resume_argument(parser)
    parser.set_defaults(config=str(DEMO), eval_only=False)


def add_run_dir_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--run-dir``, which :func:`config_of` reads."""
    parser.add_argument("--run-dir", metavar="DIR", help="short for --set output.run_dir=DIR")


def _add_resume_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest whole checkpoint of the run directory"
    )


def add_set_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--set``, as ``overrides``."""
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override a value, for example --set solver.base_lr=0.01; may be repeated",
    )


def config_of(arguments: argparse.Namespace) -> Config:
    """Loads the configuration that the arguments name; raises :class:`UserError`."""
    overrides = list(arguments.overrides)
    if arguments.run_dir:
        overrides.append(f"output.run_dir={json.dumps(arguments.run_dir)}")
    return load_config(arguments.config, overrides)
