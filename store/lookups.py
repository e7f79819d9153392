"""Reading the rows of many digests from the index.

To look for each of 20,000 digests takes SQLite 1.5 µs each; to read all rows from one digest
to another takes a third of that. Digests are spread evenly over all numbers, so the first eight
bytes of two of them tell about how many rows lie between.

What is returned may hold rows of other digests as well: whoever asks picks out his own.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Any

from .index import Index

RANGE_LEAST = 32
"""Digests from which on it is worth a look how close they lie."""

RANGE_PART = 2.0
"""Rows that may lie among those looked for, as a part of these, to be read as well."""

FAR = 16.0
"""Times the usual distance of two rows from which on two digests are not neighbours: of
neighbours, one in nine million is so far from the next."""


def rows_of(index: Index, columns: str, digests: Sequence[bytes]) -> list[tuple[Any, ...]]:
    """Return the rows of many digests, and perhaps some of others.

    Parameters
    ----------
    index : Index
        The index.
    columns : str
        A statement up to its condition.
    digests : sequence of bytes
        What is looked for.
    """
    rows: list[tuple[Any, ...]] = []
    single = digests
    if len(digests) >= RANGE_LEAST:
        ranges, single = _ranges(index, sorted(digests))
        for first, last in ranges:
            rows += index.query(columns + "WHERE digest BETWEEN ? AND ?", (first, last))
    if single:
        rows += index.query_keys(columns + "WHERE digest IN ({keys})", single)
    return rows


def _ranges(
    index: Index, digests: Sequence[bytes]
) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """Return the first and last of digests that are worth reading together, and the others."""
    ((row_count,),) = index.query("SELECT MAX(rowid) FROM objects")
    if not row_count:
        return [], []
    usual = 2**64 / row_count
    keys = array("Q", b"".join([digest[:8] for digest in digests]))
    if sys.byteorder == "little":
        keys.byteswap()
    far = usual * FAR
    cuts = [i for i in range(1, len(keys)) if keys[i] - keys[i - 1] > far]
    ranges: list[tuple[bytes, bytes]] = []
    single: list[bytes] = []
    for start, stop in zip([0, *cuts], [*cuts, len(keys)], strict=True):
        between = (keys[stop - 1] - keys[start]) / usual
        if stop - start >= RANGE_LEAST and between <= RANGE_PART * (stop - start):
            ranges.append((digests[start], digests[stop - 1]))
        else:
            single += digests[start:stop]
    return ranges, single
