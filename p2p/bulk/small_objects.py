"""How a server reads many small objects for one answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tensorswarm.store.errors import LocalError
from tensorswarm.store.reader import ObjectReader, read_all

SmallObjects = Callable[[Sequence[tuple[bytes, int]]], Sequence[bytes | None]]
"""From digests and sizes to the bytes of those objects that are held whole."""


def read_each(
    open_reader: Callable[[bytes], ObjectReader | None], wanted: Sequence[tuple[bytes, int]]
) -> list[bytes | None]:
    """Read small objects one after the other, for a store that has no better way.

    Raises
    ------
    LocalError
        One is held and cannot be read.
    """
    found: list[bytes | None] = []
    for digest, size_bytes in wanted:
        reader = open_reader(digest)
        data = None
        if reader is not None:
            try:
                if reader.size_bytes == size_bytes and reader.covers(0, size_bytes):
                    data = bytes(read_all(reader))
            except OSError as error:
                raise LocalError(f"cannot read an object that it asked for: {error}") from error
            finally:
                reader.close()
        found.append(data)
    return found
