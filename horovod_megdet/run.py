"""Runs a program on every rank, from the configuration to the exit code; training and evaluation are such programs.

Importing this module loads Horovod, so ``train.py`` and the ``megdet`` command import it only when ranks start: loader
workers import their main script again and must not.
"""

import argparse
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from horovod_megdet import comm, launched
from horovod_megdet.arguments import config_of
from horovod_megdet.cluster.watchdog.heartbeats import LastWords
from horovod_megdet.cluster.watchdog.watchdog import Watchdog
from horovod_megdet.config import Config, override
from horovod_megdet.engine import checkpoint
from horovod_megdet.engine.elastic import ElasticRun
from horovod_megdet.engine.signals import StopRequest
from horovod_megdet.engine.startup import build_for_evaluation, build_trainer, start_horovod
from horovod_megdet.engine.validation import evaluate_detector
from horovod_megdet.errors import EXIT_CRASHED, EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from horovod_megdet.evaluation.table import loss_in_words, render
from horovod_megdet.printing import say, warn
from horovod_megdet.progress import progress
from horovod_megdet.report.tables import console


def train(arguments: argparse.Namespace) -> int:
    """What ``train.py`` and ``megdet train`` do; returns the exit code."""

    if arguments.eval_only:
        return run_ranks(
            lambda: config_of(arguments),
            lambda config: evaluate(config, Path(arguments.checkpoint or config.output.run_dir)),
        )
    stop_request = StopRequest()

    def program(config: Config) -> int:
        if launched.elastic():
            exit_code = ElasticRun(config, arguments.resume, stop_request).train()
        else:
            exit_code = build_trainer(config, arguments.resume, stop_request).train()
        if exit_code == EXIT_STOPPED and launched.rank() == 0:  # Horovod may have ended
            say("Stopped by a signal; the checkpoint is written. Start again with --resume.")
        return exit_code

    return run_ranks(lambda: config_of(arguments), program, stop_request)


def evaluate_checkpoint(path: str, overrides: list[str]) -> int:
    """What ``megdet evaluate`` does: evaluates with the configuration in the checkpoint; returns the exit code."""
    return run_ranks(
        # What is wrong with newer checkpoints is said when the one to evaluate is chosen.
        lambda: override(checkpoint.read(path, report=lambda _: None).config, overrides),
        lambda config: evaluate(config, Path(path)),
    )


def evaluate(config: Config, path: Path) -> int:
    """Evaluates a checkpoint on the validation set of ``config``, prints the table and writes the detections."""
    built = build_for_evaluation(config, path)
    evaluation = evaluate_detector(built.config, built.detector, built.val_set, built.device)
    if comm.is_main():
        console().print(render(evaluation, multi_scale=config.evaluation != config.evaluation.one_view))
        if evaluation.losses:
            console().print(f"Validation {loss_in_words(evaluation.row())}")
    with comm.agreement("detections"):
        if comm.is_main():
            detections = built.checkpoint / "detections.json"
            evaluation.write_detections(detections)
            console().print(f"Detections: {detections}")
    return 0


def run_ranks(
    get_config: Callable[[], Config], program: Callable[[Config], int], stop_request: StopRequest | None = None
) -> int:
    """Runs ``program`` with the configuration on every rank and returns the exit code.

    A watchdog ends a job in which no rank makes progress. In a training, which has a ``stop_request``, every rank notes
    what it is doing in a file of the run directory, so that the watchdog knows who is stuck; otherwise a rank that
    waits for others goes on waiting.

    A :class:`UserError` that all ranks agreed on is printed once, by rank 0, and all end with its exit code. Any other
    exception ends this rank, and with it the job, at once.
    """
    job = _Job(stop_request)
    threading.excepthook = _report_thread
    try:
        launched.check_srun()
        exit_code = program(job.start(get_config))
    except BaseException as error:
        exit_code = job.end(error)
    comm.shutdown()
    if job.watchdog:
        job.watchdog.stop()
    return exit_code


def _report_thread(failure: threading.ExceptHookArgs) -> None:
    """Says in a sentence why a library's thread could not write or read, such as TensorBoard's on a full disk."""
    if isinstance(failure.exc_value, OSError):
        warn(f"a thread of this process has ended: {failure.exc_value}.")
    else:
        threading.__excepthook__(failure)


class _Job:
    """This rank's part of a job: how it starts, and how an error ends it."""

    def __init__(self, stop_request: StopRequest | None) -> None:
        self.stop_request = stop_request
        self.watchdog: Watchdog | None = None

    def start(self, get_config: Callable[[], Config]) -> Config:
        """Reads the configuration and starts the watchdog and Horovod. An error of one rank becomes one of all.

        Not in an elastic job: there the others may be in the middle of training when this rank starts.
        """

        def watched() -> Config:
            config = get_config()
            self._watch(config)
            return config

        if not launched.elastic():
            return start_horovod(watched)
        config = watched()
        comm.join(config.runtime.deterministic, lambda: self.stop_request)
        return config

    def _watch(self, config: Config) -> None:
        run_dir = Path(config.output.run_dir) if self.stop_request is not None else None
        self.watchdog = Watchdog(run_dir, config.runtime.stall_timeout)
        self.watchdog.start()

    def end(self, error: BaseException) -> int:
        """Reports an error and returns the exit code, if all ranks raise it; otherwise ends this rank, and so the job.

        Called while the error is handled.
        """
        rank = f"rank {comm.rank()} on {launched.host()}"
        at_step = f", at step {progress.step}," if progress.step else ""
        match error:
            case comm.RemovedError():
                say(f"A rank on {launched.host()} leaves the job: its host was removed, or a rank there failed.")
                # At once: the driver may soon give its slot to a new process, and take this one's end for that one's.
                comm.abort(0)
            case comm.StoppedError():
                say(f"A rank on {launched.host()} does not start: the job is to stop.")
                comm.abort(EXIT_STOPPED)
            case UserError(on_all_ranks=True):
                if comm.is_main():
                    say(f"error: {error}")
                return error.exit_code
            case UserError():
                self._leave(f"{rank}: {error}", LastWords.HAD_AN_ERROR)
                comm.abort(error.exit_code)
            case comm.LostRankError():
                self._leave(f"{rank}{at_step} lost contact with another rank: {error}", LastWords.LOST_CONTACT)
                if self.watchdog:
                    self.watchdog.report_lost_ranks(on_each_host=True)
                comm.abort(EXIT_CRASHED)
            case KeyboardInterrupt():
                self._leave(f"{rank}{at_step} was interrupted.", LastWords.INTERRUPTED)
                comm.abort(EXIT_INTERRUPTED)
            case _:
                self._leave(f"{rank}{at_step} crashed:\n{traceback.format_exc()}", LastWords.CRASHED)
                comm.abort(EXIT_CRASHED)

    def _leave(self, sentence: str, last_words: LastWords) -> None:
        say(f"error: {sentence}")
        if self.watchdog:
            self.watchdog.last_words(last_words)
