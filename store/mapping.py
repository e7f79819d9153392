"""Files mapped into memory, one file descriptor less each.

Python's own ``mmap`` keeps a duplicate of the descriptor for as long as the map lives
(until 3.13, which has ``trackfd=False``). A model has thousands of tensors in a file
each, and a process may commonly have 1,024 files open. So the map is made here, by
the C library's ``mmap``, which needs no descriptor once it is made (POSIX, *mmap*).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,  # off_t; always 0 here
)
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

_MAP_FAILED = ctypes.c_void_p(-1).value


class Mapping:
    """A file's first bytes in memory, until nothing refers to them any more.

    ``numpy.asarray`` takes it for an array of uint8. It is read-only, or for the writer
    alone: what is written to a page gives this process a copy of that page, and the file
    stays as it is (``MAP_PRIVATE``).

    Parameters
    ----------
    descriptor : int
        The open file; it may be closed afterwards.
    size_bytes : int
        How many bytes, at least 1. Reading beyond the file's end kills the process.
    writable : bool
        Whether the process may write to its own view of them.

    Raises
    ------
    OSError
        The file cannot be mapped; ENOMEM if the process has too many maps.
    """

    _address: int | None = None

    def __init__(self, descriptor: int, size_bytes: int, *, writable: bool = False) -> None:
        self.size_bytes = size_bytes
        self._writable = writable
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        sharing = mmap.MAP_PRIVATE if writable else mmap.MAP_SHARED
        address = _libc.mmap(None, size_bytes, protection, sharing, descriptor, 0)
        if address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._address = address

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """What numpy makes an array of (its documentation, "The array interface protocol")."""
        return {
            "version": 3,
            "shape": (self.size_bytes,),
            "typestr": "|u1",
            "data": (self._address, not self._writable),
        }

    def __del__(self) -> None:
        if self._address is not None:
            _libc.munmap(self._address, self.size_bytes)
