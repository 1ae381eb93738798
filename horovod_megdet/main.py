"""The frame around a distributed run: arguments, configuration, errors and exit codes.

Loader processes import the main script again, and with it this module: so what starts Horovod is imported in functions.
"""

import argparse
import json
import traceback
from collections.abc import Callable
from pathlib import Path

from horovod_megdet import launched
from horovod_megdet.config import Config, load_config, override
from horovod_megdet.errors import EXIT_CRASHED, EXIT_STOPPED, UserError

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"


def positive(text: str) -> int:
    """The type of an argument that is a whole number, 1 or more."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--config``, ``--set`` and ``--run-dir``."""
    parser.add_argument(
        "--config", metavar="FILE", default=str(DEFAULT_CONFIG), help="YAML configuration (default: configs/demo.yaml)"
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override a value, for example --set solver.base_lr=0.01; may be repeated",
    )
    parser.add_argument("--run-dir", metavar="DIR", help="short for --set output.run_dir=DIR")


def config_of(arguments: argparse.Namespace) -> Config:
    """Loads the configuration that the arguments name; raises :class:`UserError`."""
    overrides = list(arguments.overrides)
    if arguments.run_dir:
        overrides.append(f"output.run_dir={json.dumps(arguments.run_dir)}")
    return load_config(arguments.config, overrides)


def run_ranks(get_config: Callable[[], Config], program: Callable[[Config], int], heartbeats: bool = False) -> int:
    """Runs ``program`` with the configuration on every rank and returns the exit code.

    A watchdog ends a job that gets nowhere. With ``heartbeats`` every rank says in a file of the run directory what it
    does, so that the watchdog knows who is stuck.

    A :class:`UserError` that all ranks agreed on is printed once, by rank 0, and they all end with its exit code. Any
    other exception ends this rank, and with it the job, at once.
    """
    from horovod_megdet import comm
    from horovod_megdet.engine.heartbeats import LOST_CONTACT
    from horovod_megdet.engine.watchdog import Watchdog

    config: Config | None = None
    watchdog: Watchdog | None = None
    config_error: UserError | None = None
    try:
        config = get_config()
    except UserError as error:
        config_error = error
    try:
        launched.check()
        if config:
            run_dir = Path(config.output.run_dir) if heartbeats else None
            watchdog = Watchdog(run_dir, config.runtime.stall_timeout)
            watchdog.start()
        comm.init(
            deterministic=config is not None and config.runtime.deterministic,
            groups=config is not None and config.batch_norm.bn_size != "world",
        )
        with comm.agreement("configuration"):
            if config_error:
                raise config_error
        assert config is not None
        exit_code = program(config)
    except UserError as error:
        if not error.on_all_ranks:
            comm.say(f"error: rank {comm.rank()} on {comm.host()}: {error}")
            if watchdog:
                watchdog.last_words("had an error")
            comm.abort(error.exit_code)
        if comm.is_main():
            comm.say(f"error: {error}")
        exit_code = error.exit_code
    except comm.LostRankError as error:
        comm.say(f"error: {_this_rank()} lost contact with another one: {error}")
        if watchdog:
            watchdog.last_words(LOST_CONTACT)
            watchdog.sum_up_losses(on_each_host=True)
        comm.abort(EXIT_CRASHED)
    except BaseException:
        comm.say(f"error: {_this_rank()} crashed:\n{traceback.format_exc()}")
        if watchdog:
            watchdog.last_words("crashed")
        comm.abort(EXIT_CRASHED)
    comm.shutdown()
    if watchdog:
        watchdog.stop()
    return exit_code


def _this_rank() -> str:
    from horovod_megdet import activity, comm

    step = activity.current.step
    return f"rank {comm.rank()} on {comm.host()}" + (f", at step {step}," if step else "")


def train(arguments: argparse.Namespace) -> int:
    """What ``train.py`` does; returns the exit code."""
    from horovod_megdet import comm
    from horovod_megdet.engine.startup import build_trainer

    def program(config: Config) -> int:
        if arguments.eval_only:
            return evaluate(config, Path(arguments.checkpoint or config.output.run_dir))
        trainer = build_trainer(config, arguments.resume)
        exit_code = trainer.train()
        if exit_code == EXIT_STOPPED and comm.is_main():
            comm.say("Stopped by a signal; the checkpoint is written. Start again with --resume.")
        return exit_code

    return run_ranks(lambda: config_of(arguments), program, heartbeats=not arguments.eval_only)


def evaluate(config: Config, path: Path) -> int:
    """Evaluates a checkpoint on the validation set of ``config``, prints the table and writes the detections."""
    from horovod_megdet import comm
    from horovod_megdet.engine.startup import build_for_evaluation
    from horovod_megdet.engine.trainer import evaluate_detector
    from horovod_megdet.evaluation.table import render
    from horovod_megdet.report.tables import console

    detector, dataset, device, checkpoint = build_for_evaluation(config, path)
    evaluation = evaluate_detector(config, detector, dataset, device)
    if comm.is_main():
        console().print(render(evaluation))
        detections = checkpoint.path / "detections.json"
        evaluation.write_detections(detections)
        console().print(f"Detections: {detections}")
    return 0


def evaluate_checkpoint(path: str, overrides: list[str]) -> int:
    """What ``megdet evaluate`` does: evaluates with the configuration in the checkpoint."""
    from horovod_megdet.engine import checkpoint

    return run_ranks(
        lambda: override(checkpoint.read(path).config, overrides), lambda config: evaluate(config, Path(path))
    )
