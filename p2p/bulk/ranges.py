"""A planner's request as range requests: which bytes are asked for together.

Purpose: turn runs of chunks into ranges of bytes just before they are asked for, so that
chunks which somebody else has brought meanwhile are left out; and which small objects are asked
for together. No I/O; the sink is asked
what is still missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import compress
from typing import NamedTuple

from tensorswarm.store.digest import CHUNK_SIZE

from ..swarm.source import Request, Sink, WantedObject
from .http1 import RangeRequest
from .http1_small import MAX_ANSWER_BYTES, MAX_SMALL_BYTES, MAX_SMALL_OBJECTS, SmallRequest

MAX_RANGE_CHUNKS = 16
"""Chunks in one range request: larger ones save nothing, smaller ones can be cancelled."""


class Range(NamedTuple):
    """Consecutive chunks of one object that are asked for together."""

    object_index: int
    object_size: int
    first_chunk: int
    chunks: int
    asked: RangeRequest

    @property
    def weight(self) -> int:
        """It counts as one range request on the wire."""
        return 1


class Together(NamedTuple):
    """Whole small objects that are asked for in one request."""

    object_indices: list[int]
    asked: SmallRequest

    @property
    def weight(self) -> int:
        """As many range requests are as long as this one."""
        return 1 + len(self.object_indices) // 5


def _most_chunks() -> int:
    return MAX_RANGE_CHUNKS


def ranges_of(
    request: Request, sink: Sink, most: Callable[[], int] = _most_chunks
) -> Iterator[Range]:
    """Yield what a request still asks for, as of the moment it is looked at.

    `most` tells how many chunks a range may have at that moment.
    """
    for index, first, count in request.spans:
        digest, size = sink.wanted(index)
        chunk, end = first, first + count
        while chunk < end:
            run, stop = 0, min(end, chunk + most())
            while chunk + run < stop and sink.is_missing(index, chunk + run):
                run += 1
            if run:
                offset = chunk * CHUNK_SIZE
                length = min(size, offset + run * CHUNK_SIZE) - offset
                yield Range(index, size, chunk, run, RangeRequest(digest, offset, length))
            chunk += max(run, 1)


def asks_of(
    request: Request, sink: Sink, most: Callable[[], int] = _most_chunks
) -> Iterator[Range | Together]:
    """Yield what a request still asks for: ranges, and small objects together."""
    for start in range(0, len(request.spans), MAX_SMALL_OBJECTS):
        spans = request.spans[start : start + MAX_SMALL_OBJECTS]
        indices = [span.object_index for span in spans]
        found = sink.many_wanted(indices)
        sizes = [size_bytes for _, size_bytes in found]
        if max(sizes) > MAX_SMALL_BYTES or sum(sizes) > MAX_ANSWER_BYTES:
            part = Request(request.source, request.request_id, spans)
            yield from _asks_of_mixed(part, sink, most)
            continue
        missing = sink.are_missing(indices)
        if not all(missing):
            indices, found = list(compress(indices, missing)), list(compress(found, missing))
            sizes = list(compress(sizes, missing))
        if indices:
            yield _together(indices, found, sum(sizes))


def _asks_of_mixed(
    request: Request, sink: Sink, most: Callable[[], int]
) -> Iterator[Range | Together]:
    """Yield what a request for objects of all sizes asks for, one after the other."""
    indices: list[int] = []
    objects: list[WantedObject] = []
    length = 0
    for span in request.spans:
        wanted = sink.wanted(span.object_index)
        size = wanted.size_bytes
        if size > MAX_SMALL_BYTES:
            if indices:  # what was asked first comes first
                yield _together(indices, objects, length)
                indices, objects, length = [], [], 0
            part = Request(request.source, request.request_id, (span,))
            yield from ranges_of(part, sink, most)
            continue
        if not sink.is_missing(span.object_index, 0):
            continue
        if len(indices) == MAX_SMALL_OBJECTS or length + size > MAX_ANSWER_BYTES:
            yield _together(indices, objects, length)
            indices, objects, length = [], [], 0
        indices.append(span.object_index)
        objects.append(wanted)
        length += size
    if indices:
        yield _together(indices, objects, length)


def _together(indices: list[int], objects: list[WantedObject], length: int) -> Range | Together:
    """Return what asks for small objects; one alone is a range like any other."""
    if len(indices) == 1:
        return Range(indices[0], length, 0, 1, RangeRequest(objects[0].digest, 0, length))
    return Together(indices, SmallRequest(objects, length))
