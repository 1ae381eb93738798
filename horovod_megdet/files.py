"""Writing files so that a reader never sees half of one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from horovod_megdet.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Gives a binary file to write into; it becomes ``path``, in one step, when the block ends without an exception.

    Missing folders are made. Until the end, and after a crash, ``path`` holds what it held before. Raises
    :class:`UserError` where the file system refuses.
    """
    path = Path(path)
    # Beside the target, because only within one file system is a rename atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
