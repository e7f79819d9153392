"""Reading an object's bytes, wherever the store has them.

A reader never gives a byte that was not proved: `covers` tells which ranges may
be read, and `read_into` refuses the others. Readers are cheap, hold at most one
file descriptor, and may be used by one thread at a time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from . import bitmap
from .digest import CHUNK_SIZE
from .place import read_exactly


class ObjectReader(Protocol):
    """Bytes of one object. Close it when done."""

    size_bytes: int

    def covers(self, offset: int, length: int) -> bool:
        """Tell whether all these bytes are proved and present."""
        ...

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `offset`.

        Raises
        ------
        OSError
            The range is not covered, or the disk failed.
        """
        ...

    def close(self) -> None:
        """Give back the file descriptor."""
        ...


class InlineReader:
    """An object whose bytes are in memory, as small ones from the index are."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size_bytes = len(data)

    def covers(self, offset: int, length: int) -> bool:
        """Tell whether the range lies inside the object."""
        return offset >= 0 and length >= 0 and offset + length <= self.size_bytes

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from memory."""
        if not self.covers(offset, len(view)):
            raise OSError(errno.EINVAL, "range outside the object")
        view[:] = self.data[offset : offset + len(view)]

    def close(self) -> None:
        """Nothing to give back."""


class FileReader:
    """An object that is a byte range of a file: its own, or an adopted one.

    Parameters
    ----------
    path : Path
        The file.
    start : int
        Offset of the object's first byte in the file.
    size_bytes : int
        The object's size.
    proved : bytes or None
        Bitmap of the proved chunks; None when all of it is proved.
    is_unchanged : callable or None
        Tells from the file's status whether it is still the one that was hashed. Asked
        when the file is opened and after every read; None for files of the store.

    Attributes
    ----------
    descriptor : int
        The open file, negative once closed.

    Raises
    ------
    OSError
        The file cannot be opened, or is not the one that was hashed (ESTALE).
    """

    descriptor = -1

    def __init__(
        self,
        path: Path,
        start: int,
        size_bytes: int,
        proved: bytes | None = None,
        is_unchanged: Callable[[os.stat_result], bool] | None = None,
    ) -> None:
        self.path = path
        self.start = start
        self.size_bytes = size_bytes
        self._proved = proved
        self._is_unchanged = is_unchanged
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.confirm()
        except OSError:
            self.close()
            raise

    @property
    def is_adopted(self) -> bool:
        """Whether the file is the user's own."""
        return self._is_unchanged is not None

    def confirm(self) -> None:
        """Return if what was read or mapped so far is what was once hashed.

        Raises
        ------
        OSError
            ESTALE: the file was changed since.
        """
        if self._is_unchanged is not None and not self._is_unchanged(os.fstat(self.descriptor)):
            raise OSError(errno.ESTALE, "the file was changed since it was added")

    def covers(self, offset: int, length: int) -> bool:
        """Tell whether every chunk that the range touches is proved."""
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            return False
        if self._proved is None or length == 0:
            return True
        last = (offset + length - 1) // CHUNK_SIZE
        return all(bitmap.is_set(self._proved, i) for i in range(offset // CHUNK_SIZE, last + 1))

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from the file."""
        if not self.covers(offset, len(view)):
            raise OSError(errno.EINVAL, "range not proved")
        read_exactly(self.descriptor, self.start + offset, view)
        self.confirm()

    def close(self) -> None:
        """Close the file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()


def read_all(reader: ObjectReader) -> bytearray:
    """Return the whole of a reader's object."""
    data = bytearray(reader.size_bytes)
    reader.read_into(0, memoryview(data))
    return data
