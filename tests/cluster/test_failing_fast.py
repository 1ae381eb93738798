"""Whatever happens to a job, it ends soon and says why, and --resume continues to the same bits.

The events hit one run in turn: each start resumes what the one before left. The last test compares its end with a run
that nothing disturbs. measure.py does the same with four ranks, for docs/reliability.md.
"""

from pathlib import Path
from typing import Any

import pytest
from disk import failing_disk
from events import EVENTS, Event, happen
from hosts import Hosts
from jobs import Training


@pytest.fixture(scope="module")
def training(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory, data: Path) -> Training:
    """The run that all events hit: two ranks on two hosts."""
    return Training(hosts, tmp_path_factory.mktemp("disturbed") / "run", data)


@pytest.mark.parametrize(
    "event", [event for event in EVENTS if not event.only_measured], ids=lambda event: f"{event.name}, {event.launcher}"
)
def test_event(training: Training, event: Event) -> None:
    happen(event, training)


def test_the_end_on_a_failing_disk_is_that_of_an_undisturbed_run(
    training: Training, undisturbed: dict[str, Any]
) -> None:
    assert failing_disk(training) == undisturbed
