"""Files in and out of the page cache, so that cold and warm starts can be told apart.

Only the files named are touched, and no right is needed but reading them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 1 << 20
MOST_LEFT = 0.02
"""Share of a file's pages that may stay behind in a cold start: those of its ends, which
the programs themselves read when they open it."""


def files(path: Path) -> Iterator[Path]:
    """Yield a file, or all files of a folder."""
    if path.is_dir():
        yield from (found for found in path.rglob("*") if found.is_file())
    else:
        yield path


def warm(path: Path) -> None:
    """Read a file, or a folder's files, into the page cache."""
    block = bytearray(BLOCK_BYTES)
    for each in files(path):
        with each.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def evict(path: Path) -> None:
    """Take a file, or a folder's files, out of the page cache.

    Raises
    ------
    RuntimeError
        Pages stayed behind: the kernel keeps what another process has mapped or not yet
        written to the disk.
    """
    total = left = 0.0
    for each in files(path):
        with each.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(file.fileno()).st_size
            total += size
            left += size * resident(file.fileno(), size)
    if left > MOST_LEFT * total:
        raise RuntimeError(f"{left / total:.0%} of {path} stayed in the page cache")


def resident(descriptor: int, size_bytes: int) -> float:
    """Return the share of a file's pages that are in the page cache (``mincore(2)``)."""
    if not size_bytes:
        return 0.0
    with mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_PRIVATE, prot=_PROTECTION) as mapped:
        pages = -(-size_bytes // mmap.PAGESIZE)
        seen = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(mapped)
        try:
            if _libc.mincore(ctypes.byref(start), ctypes.c_size_t(size_bytes), seen):
                raise OSError(ctypes.get_errno(), "mincore failed")
        finally:
            del start  # or the mapping could not be closed
        return sum(page & 1 for page in seen) / pages


_libc = ctypes.CDLL(None, use_errno=True)
_PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE  # ctypes takes the address of nothing read-only
