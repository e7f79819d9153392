"""Memory that is really there, so that a virtual machine's host does not decide the result.

Purpose: many hosts take a guest's free memory back ("free page reporting", every two
seconds in Linux guests). The next touch of such a page faults into the host, which costs
1 to 2.6 s per GiB here, more than all the work that is measured, and at times of its own
choosing. `warm_memory` gives every program in a benchmark memory that the host has not
taken back, and keeps the host from taking it until the end.

How: a process of its own allocates huge pages (2 MiB), touches them, and gives all of each
back but its first 4 KiB. What it gives back is free memory in pieces of at most 1 MiB, and
Linux reports free pieces of 2 MiB and more only (``page_reporting_order``, 9 by default).
The allocator takes the smallest piece that fits, so it uses these before any other. The
price is 0.2 % of the memory. No setting of the kernel is changed.

What it does not do: pieces of 2 MiB and more, which a program gets that writes 2 MiB or
more to a file in one call, come from elsewhere. On a machine that is not virtual, or whose
host takes nothing back, it changes nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .processes import Server, python

HUGE_BYTES = 2 << 20
SURPLUS = 3
"""Times the memory wanted: half of it comes back in pieces of 1 MiB, of which some
programs' file writes take one each, and what is freed between two runs is late at times."""

LARGEST_SHARE = 3
"""At most this part of the memory that is available: one in three."""


@contextmanager
def warm_memory(size_bytes: int) -> Iterator[int]:
    """Keep memory warm for files of `size_bytes` in all; gives the bytes made warm."""
    available = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    made = min(SURPLUS * size_bytes, available // LARGEST_SHARE)
    holder = Server(python("benchmarks.warm_memory", str(made)))
    try:
        yield made
    finally:
        holder.stop()


def hold(size_bytes: int) -> None:
    """Make memory warm, say so, and keep it so until terminated."""
    memory = mmap.mmap(-1, size_bytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    first = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_BYTES
    starts = range(first, first + size_bytes // HUGE_BYTES * HUGE_BYTES, HUGE_BYTES)
    for start in starts:
        for offset in range(start, start + HUGE_BYTES, mmap.PAGESIZE):
            memory[offset] = 1
    # Or the kernel would put a huge page back where only one small one is left (khugepaged).
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for start in starts:
        # Giving back a part of a huge page frees nothing until it is split. MADV_FREE
        # splits it, so that the rest of it can then be given back page by page.
        memory.madvise(mmap.MADV_FREE, start + mmap.PAGESIZE, mmap.PAGESIZE)
        memory.madvise(mmap.MADV_DONTNEED, start + mmap.PAGESIZE, HUGE_BYTES - mmap.PAGESIZE)
    print("ready", flush=True)
    signal.pause()


if __name__ == "__main__":
    hold(int(sys.argv[1]))
