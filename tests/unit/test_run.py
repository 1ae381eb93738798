"""What a rank does about errors that no caller sees."""

import threading

import pytest

from horovod_megdet import run


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
