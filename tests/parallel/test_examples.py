"""The examples run as their docstrings document."""

from collections.abc import Callable
from subprocess import CompletedProcess

from launching import PROJECT


def test_classifier(run_ranks: Callable[..., CompletedProcess[str]]) -> None:
    output = run_ranks(str(PROJECT / "examples" / "classifier.py"), 2).stdout
    assert "epoch 1: loss" in output
