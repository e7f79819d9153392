"""What a neighbour says it holds, as places in a download.

A part counts only if it was proved against our chunk list: a false list fools honest peers,
what they hold by it would not match ours, and taking them for liars would cost us good
sources. What is told by the model's manifest is a part by the manifest's list, which is ours.

No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tensorswarm.store.runs import runs_in
from tensorswarm.store.wanted import Wanted

from .control import wire


class Claims(NamedTuple):
    """What somebody holds of the objects of a download, by their position.

    Attributes
    ----------
    whole : list of range
        Runs of objects held whole, in order.
    parts : list of (int, bytes)
        Objects held in part, with the bitmap of chunks.
    useless : list of int
        Objects of which something is held that cannot be what is wanted.
    """

    whole: list[range]
    parts: list[tuple[int, bytes]]
    useless: list[int]


def by_digests(wanted: Wanted, entries: Iterable[wire.HaveEntry]) -> Claims:
    """Return what was told by digests."""
    whole: list[int] = []
    claims = Claims([], [], [])
    for digest, size_bytes, proved, chunk_list in entries:
        index = wanted.find(digest)
        if index < 0:
            continue
        if size_bytes != wanted.size_bytes(index):
            claims.useless.append(index)
        elif proved is None:
            whole.append(index)
        elif chunk_list == wanted.chunk_list_digest(index):
            claims.parts.append((index, proved))
        else:
            claims.useless.append(index)
    claims.whole.extend(_runs(whole))
    return claims


def by_manifest(wanted: Wanted, message: wire.HaveModel) -> Claims:
    """Return what was told by the manifest whose objects are wanted."""
    runs = [wanted.positions(start, stop) for start, stop in message.runs()]
    parts = [
        (position, proved)
        for index, proved in message.parts
        for position in wanted.positions(index, index + 1)
    ]
    return Claims([run for run in runs if run], parts, [])


def _runs(indices: list[int]) -> list[range]:
    indices.sort()
    return [range(indices[start], indices[stop - 1] + 1) for start, stop in runs_in(indices)]
