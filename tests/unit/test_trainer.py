"""Parts of the trainer that need neither ranks nor a detector."""

import contextlib
import math
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from horovod_megdet.engine import trainer
from horovod_megdet.engine.checkpoint import NotSavedError, Position
from horovod_megdet.engine.trainer import Trainer
from horovod_megdet.errors import NotFiniteError, UserError


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """A trainer whose only real parts are its position, and the methods that are called on it."""
    monkeypatch.setattr(trainer, "comm", MagicMock(agreement=lambda name: contextlib.nullcontext()))
    monkeypatch.setattr(trainer, "average_running_statistics", MagicMock())
    return MagicMock(position=Position(), stopping=False, done=False, best_saved=Position().best)


def test_the_best_checkpoint_is_one_that_was_written(training: MagicMock) -> None:
    """With a full disk at step 200, the checkpoint of step 100 stays the best, and is kept."""
    training.position.best = (0.30, "step_00000100")
    Trainer.save(training)
    training.position.best = (0.35, "step_00000200")
    training.write_checkpoint.side_effect = NotSavedError("No space left on device.")
    Trainer.save(training)
    assert training.unsaved
    assert training.position.best == (0.30, "step_00000100")
    training.write_checkpoint.side_effect = None
    training.position.best = (0.33, "step_00000300")
    Trainer.save(training)
    assert not training.unsaved
    assert training.best_saved == (0.33, "step_00000300")


def test_float16_may_skip_steps_but_not_all(training: MagicMock) -> None:
    training.scaler = torch.amp.GradScaler("cpu")
    training.scaler.scale(torch.ones(()))
    weight = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    training.skipped_steps = 0

    def step(gradient: float) -> None:
        weight.grad = torch.tensor(gradient)
        training.scaler.step(optimizer)
        Trainer.update_loss_scale(training)

    for _ in range(trainer.SKIPPED_STEPS):
        step(math.inf)
    assert weight == 1
    step(0.0)
    for _ in range(trainer.SKIPPED_STEPS):
        step(math.inf)
    with pytest.raises(NotFiniteError, match=rf"in {trainer.SKIPPED_STEPS + 1} steps in a row"):
        step(math.inf)


@pytest.mark.parametrize("agreed", [True, False])
def test_loggers_are_closed_only_where_all_ranks_end_in_good_order(training: MagicMock, agreed: bool) -> None:
    error = UserError("The loss is not finite.")
    error.on_all_ranks = agreed
    training.train_steps.side_effect = error
    with pytest.raises(UserError, match="not finite"):
        Trainer.train(training)
    assert training.run_folder.close.called == agreed
