"""Arrays in a safetensors file that processes map instead of reading: all processes of a host share its memory."""

import hashlib
import json
import mmap
import os
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import context, reduction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from horovod_megdet.files import atomic_write

DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I32": np.int32,
    "U32": np.uint32,
    "I64": np.int64,
    "F64": np.float64,
}
"""The types that we write, by their names in safetensors."""

DIGEST = "sha256"
"""Key of the metadata that holds :func:`digest_of` the arrays."""


class DamagedFileError(Exception):
    """A file that :func:`write_arrays` did not write, or not to its end."""


class MappedArrays:
    """The arrays of a safetensors file, read-only and mapped, and its metadata.

    Replacing or deleting the file does not change a mapping of it. Where a process is started with this object among
    its arguments, it inherits the open file and maps it as well.

    Raises ``OSError`` or :class:`DamagedFileError`.
    """

    def __init__(self, file: int) -> None:
        try:
            size = os.fstat(file).st_size
            if size < 8:
                raise DamagedFileError("it is too short")
            self._mapping = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
            self.arrays, self.metadata = _parse(self._mapping)
        except BaseException:
            os.close(file)
            raise
        self._file = file
        """A file descriptor, kept open for processes that are started later."""
        weakref.finalize(self, os.close, file)

    @classmethod
    def open(cls, path: Path) -> "MappedArrays":
        """Maps the file at ``path``."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    @property
    def digest(self) -> str:
        """What :func:`digest_of` the arrays was when they were written."""
        return self.metadata.get(DIGEST, "")

    @property
    def owner(self) -> int:
        """User id of the file's owner."""
        return os.fstat(self._file).st_uid

    def intact(self) -> bool:
        """Whether the arrays are those that were written; reads all of them."""
        return self.digest == digest_of(self.arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        assert context.get_spawning_popen() is not None, "only a process that is being started can inherit the file"
        return _inherit, (reduction.DupFd(self._file),)


def _inherit(file: Any) -> MappedArrays:
    return MappedArrays(file.detach())


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> str:
    """Writes the file in one step and returns the digest of its arrays.

    Raises :class:`~horovod_megdet.errors.UserError` if the file system refuses.
    """
    digest = digest_of(arrays)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with atomic_write(path) as file:
        file.write(save(contiguous, dict(metadata) | {DIGEST: digest}))
    return digest


def names_to_numbers(names: Sequence[str] | NDArray[np.str_]) -> NDArray[np.uint32]:
    """(n, longest name) code points, padded with 0: safetensors has no strings."""
    array = np.ascontiguousarray(names, np.str_)
    return array.view(np.uint32).reshape(len(array), array.dtype.itemsize // 4)


def numbers_to_names(numbers: NDArray[np.uint32]) -> NDArray[np.str_]:
    """The inverse of :func:`names_to_numbers`, without a copy."""
    return numbers.view(f"U{numbers.shape[1]}").reshape(-1)


def digest_of(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _parse(content: mmap.mmap) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Header and arrays: a length as 8 bytes, little-endian, that much JSON, and the arrays at the offsets in it."""
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:start])
        metadata = header.pop("__metadata__", {})
        arrays = {name: _array(content, start, **entry) for name, entry in header.items()}
        end = max(entry["data_offsets"][1] for entry in header.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedFileError(f"its header is damaged: {error}") from None
    if start + end != len(content):
        raise DamagedFileError(f"it has {len(content)} bytes instead of {start + end}")
    return arrays, metadata


def _array(content: mmap.mmap, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> NDArray[Any]:
    kind = np.dtype(DTYPES[dtype])
    first, end = data_offsets
    count = (end - first) // kind.itemsize
    if not count:
        return np.zeros(shape, kind)
    return np.frombuffer(content, kind, count, start + first).reshape(shape)
