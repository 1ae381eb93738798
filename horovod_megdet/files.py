"""Writing files so that no reader ever sees an incomplete one, and their hashes."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from horovod_megdet.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a binary file for writing that replaces ``path``, in one step, if the block ends without an exception.

    Missing folders are created. Until then, and after a crash, ``path`` holds what it held before. Raises
    :class:`UserError` if the file system refuses.
    """
    path = Path(path)
    # In the same folder, because a rename is atomic only within a file system; random, because processes of several
    # hosts may write the same file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
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


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal digits; it is not held in memory as a whole."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
