"""Files at a web server, read by range: headers and sidecars, before anything is fetched.

It stands on `OriginClient`, so the same deadlines and checks hold as for a download. How
many bytes came is counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx

from tensorswarm.store.errors import NoSource, NotFound, Refused

from ..swarm.source import Failure
from .body import Limits
from .failure import OriginFailure
from .guard import Guard
from .http import OriginClient
from .origin import FileRange, display_url

STALL_TIMEOUT_S = 10.0
"""Longest wait for any bytes: a server that was just asked for the first time may be slow."""

PROGRESS_TIMEOUT_S = 30.0
"""Longest wait for an answer's headers."""

BLOCK_BYTES = 1 << 20
"""Bytes taken from a body at a time."""


class RemoteFiles:
    """Reads files of one web server. Belongs to one thread; close it when done.

    Attributes
    ----------
    received_bytes : int
        Bytes of bodies that came.
    """

    def __init__(self) -> None:
        self.received_bytes = 0
        self._guard = Guard()
        self._client = OriginClient(
            self._guard,
            Limits(STALL_TIMEOUT_S, PROGRESS_TIMEOUT_S),
            httpx.create_ssl_context(),
            {},
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        self._guard.close()

    def size_of(self, url: str) -> tuple[int, bool]:
        """Return a file's size, and whether the server gives ranges of it.

        Raises
        ------
        NotFound
            There is no such file.
        NoSource, Refused
            The server does not answer, or not to us.
        """
        with translated(url):
            size, ranged, received = self._client.probe(url)
        self.received_bytes += received
        return size, ranged

    def reader(self, url: str, size_bytes: int) -> Callable[[int, int], bytes]:
        """Return a way to read a file by range."""
        return functools.partial(self._read, url, FileRange(display_url(url), size_bytes, 0))

    def _read(self, url: str, place: FileRange, offset: int, length: int) -> bytes:
        if not length:
            return b""
        data = bytearray(length)
        stop = offset + length
        with (
            translated(url),
            self._client.open(url, place, offset, stop, self._count) as answer,
        ):
            if answer.is_whole_file:
                answer.body.skip(offset)
            answer.body.read_into(memoryview(data))
        return bytes(data)

    def whole(self, url: str, size_bytes: int) -> Iterator[memoryview]:
        """Yield all of a file, in blocks that share a buffer.

        Raises
        ------
        NotFound, NoSource, Refused
            As for `size_of`.
        """
        buffer = memoryview(bytearray(min(BLOCK_BYTES, max(1, size_bytes))))
        place = FileRange(display_url(url), size_bytes, 0)
        with (
            translated(url),
            self._client.open(url, place, 0, size_bytes, self._count, ranged=False) as answer,
        ):
            for start in range(0, size_bytes, len(buffer)):
                view = buffer[: min(len(buffer), size_bytes - start)]
                answer.body.read_into(view)
                yield view

    def _count(self, byte_count: int) -> None:
        self.received_bytes += byte_count


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn an exchange's failure into an error for whoever asked for the file."""
    try:
        yield
    except OriginFailure as failure:
        text = f"{display_url(url)}: {failure.detail}"
        if failure.failure is Failure.LACKS:
            raise NotFound(text) from failure
        if failure.failure is Failure.REFUSED_ACCESS:
            raise Refused(text) from failure
        raise NoSource(text) from failure
