"""What a rank does about errors that no caller sees, and about signals."""

import subprocess
import sys
import threading

import pytest

from horovod_megdet import run
from horovod_megdet.errors import EXIT_INTERRUPTED


@pytest.mark.parametrize(
    ("error", "traced"), [(OSError(28, "No space left on device"), False), (ValueError("a mistake"), True)]
)
def test_a_thread_that_cannot_write_says_so_in_a_sentence(
    error: Exception, traced: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(threading, "excepthook", run._report_thread)
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    printed = capfd.readouterr().err
    assert str(error) in printed
    assert ("Traceback" in printed) == traced


def test_a_second_ctrl_c_stops_at_once_whatever_came_in_between() -> None:
    program = (
        "import os, signal\n"
        "from horovod_megdet.engine.signals import StopRequest\n"
        "request = StopRequest()\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    os.kill(os.getpid(), number)\n"
        "assert request\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == EXIT_INTERRUPTED, done.stderr
    assert "Interrupted twice" in done.stderr
