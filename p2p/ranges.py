"""A planner's request as range requests: which bytes are asked for together.

Purpose: turn runs of chunks into ranges of bytes just before they are asked for, so that
chunks which somebody else has brought meanwhile are left out. No I/O; the sink is asked
what is still missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tensorswarm.store.digest import CHUNK_SIZE

from .http1 import RangeRequest
from .source import Request, Sink

MAX_RANGE_CHUNKS = 16
"""Chunks in one range request: larger ones save nothing, smaller ones can be cancelled."""


class Range(NamedTuple):
    """Consecutive chunks of one object that are asked for together."""

    object_index: int
    object_size: int
    first_chunk: int
    chunks: int
    asked: RangeRequest


def ranges_of(request: Request, sink: Sink) -> Iterator[Range]:
    """Yield what a request still asks for, as of the moment it is looked at."""
    for index, first, count in request.spans:
        digest, size = sink.wanted(index)
        chunk, end = first, first + count
        while chunk < end:
            run = 0
            while (
                chunk + run < end and run < MAX_RANGE_CHUNKS and sink.is_missing(index, chunk + run)
            ):
                run += 1
            if run:
                offset = chunk * CHUNK_SIZE
                length = min(size, offset + run * CHUNK_SIZE) - offset
                yield Range(index, size, chunk, run, RangeRequest(digest, offset, length))
            chunk += max(run, 1)
