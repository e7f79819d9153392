"""Bitmaps of proved chunks: bit ``i`` of byte ``i // 8``, least significant first."""

from __future__ import annotations

import re
from collections.abc import Iterator

_ONES = re.compile("1+")


def empty(count: int) -> bytearray:
    """Return a bitmap of `count` chunks, none set."""
    return bytearray((count + 7) // 8)


def full(count: int) -> bytearray:
    """Return a bitmap of `count` chunks, all set; spare bits stay zero."""
    bitmap = bytearray(b"\xff") * (count // 8)
    if count % 8:
        bitmap.append((1 << (count % 8)) - 1)
    return bitmap


def is_set(bitmap: bytes | bytearray, index: int) -> bool:
    """Tell whether chunk `index` is set."""
    return bool(bitmap[index >> 3] >> (index & 7) & 1)


def set_bit(bitmap: bytearray, index: int) -> None:
    """Set chunk `index`."""
    bitmap[index >> 3] |= 1 << (index & 7)


def clear_bit(bitmap: bytearray, index: int) -> None:
    """Clear chunk `index`."""
    bitmap[index >> 3] &= ~(1 << (index & 7)) & 0xFF


def count_set(bitmap: bytes | bytearray) -> int:
    """Return how many chunks are set."""
    return int.from_bytes(bitmap, "little").bit_count()


def set_range(bitmap: bytearray, start: int, stop: int) -> None:
    """Set the chunks from `start` to before `stop`."""
    first, last = (start + 7) >> 3, stop >> 3
    if first > last:  # both ends inside one byte
        bitmap[last] |= (1 << (stop & 7)) - (1 << (start & 7))
        return
    bitmap[first:last] = b"\xff" * (last - first)
    if start & 7:
        bitmap[first - 1] |= 0x100 - (1 << (start & 7))
    if stop & 7:
        bitmap[last] |= (1 << (stop & 7)) - 1


def runs_of_set(bitmap: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Yield the first chunk of each run of set ones, and the one after its last."""
    ones = f"{int.from_bytes(bitmap, 'little'):b}"[::-1]  # one step of C for all of it
    return (match.span() for match in _ONES.finditer(ones))


def union(first: bytes | bytearray, second: bytes | bytearray) -> bytes:
    """Return the chunks set in either of two bitmaps of the same length."""
    merged = int.from_bytes(first, "little") | int.from_bytes(second, "little")
    return merged.to_bytes(max(len(first), len(second)), "little")


def clear_indices(bitmap: bytes | bytearray, count: int) -> Iterator[int]:
    """Yield the chunks that are not set, in order."""
    for start in range(0, count, 8):
        byte = bitmap[start >> 3]
        if byte == 0xFF:
            continue
        for index in range(start, min(start + 8, count)):
            if not byte >> (index & 7) & 1:
                yield index
