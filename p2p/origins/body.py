"""The bytes of an origin's answer, in order, in the portions the caller wants.

Each portion, and each `MIN_PROGRESS_BYTES` of it, has a deadline: a server that sends a byte
now and then is cut. Waiting for our own limit does not count. Bytes are never unpacked, and
hashes are the caller's work.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tensorswarm.store.digest import CHUNK_SIZE

from ..swarm.source import Failure
from .failure import HTTPX_ERRORS, OriginFailure, translate
from .guard import Watch

PROGRESS_BYTES = 64 << 10
"""Bytes between two notes of progress: about 1 ms at 64 MB/s."""

MIN_PROGRESS_BYTES = 4 << 10
"""Fewest bytes that count as progress; less is a stall, as with a peer."""

PROGRESS_INTERVAL_S = 0.25
"""Seconds after which fewer than `PROGRESS_BYTES` are noted."""


class Limits(NamedTuple):
    """Deadlines of an exchange, in seconds.

    Attributes
    ----------
    stall_timeout_s : float
        Longest wait for any bytes.
    progress_timeout_s : float
        Longest wait for `MIN_PROGRESS_BYTES`, and for the headers with all redirects.
    """

    stall_timeout_s: float
    progress_timeout_s: float


class Body:
    """The bytes of one answer, in order, in the portions the caller wants.

    Parameters
    ----------
    pieces : Iterator[bytes]
        The raw body.
    watch : Watch
        Keeps the deadlines.
    limits : Limits
        The deadlines.
    note_progress : Callable[[int], None]
        Hears of bytes received.
    take : Callable[[int], int]
        Waits for our own limit; returns how many of so many bytes may be taken.
    """

    def __init__(
        self,
        pieces: Iterator[bytes],
        watch: Watch,
        limits: Limits,
        note_progress: Callable[[int], None],
        take: Callable[[int], int],
    ) -> None:
        self._pieces = pieces
        self._watch = watch
        self._limits = limits
        self._note_progress = note_progress
        self._wait_for_limit = take
        self._reported_at = 0.0
        self._rest = memoryview(b"")
        self._unreported = 0

    def read_into(self, view: memoryview) -> None:
        """Fill `view`.

        Raises
        ------
        OriginFailure
            CLOSED: the body ended before; STALLED: it did not come in time.
        """
        size = len(view)
        filled = 0
        with self._portion():
            while filled < size:
                taken = self._take(size - filled)
                view[filled : filled + len(taken)] = taken
                filled += len(taken)

    def skip(self, byte_count: int) -> None:
        """Read bytes that nobody wants; raises as `read_into` does."""
        while byte_count > 0:
            portion = min(byte_count, CHUNK_SIZE)
            byte_count -= portion
            with self._portion():
                while portion > 0:
                    portion -= len(self._take(portion))

    def expect_end(self) -> None:
        """Check that nothing follows, which leaves the connection fit for reuse.

        Raises
        ------
        OriginFailure
            PROTOCOL: more bytes came than were asked for.
        """
        with self._portion():
            if self._rest or self._next_piece():
                raise OriginFailure(Failure.PROTOCOL, "sent more bytes than were asked for")

    def _take(self, limit: int) -> memoryview:
        while not self._rest:
            piece = self._next_piece()
            if piece is None:
                raise OriginFailure(Failure.CLOSED, "the answer ended too early")
            self._rest = memoryview(piece)
        room = self._wait_for_limit(min(limit, len(self._rest)))
        taken, self._rest = self._rest[:room], self._rest[room:]
        self._unreported += len(taken)
        waited_s = time.monotonic() - self._reported_at
        if self._unreported >= PROGRESS_BYTES or (
            waited_s >= PROGRESS_INTERVAL_S and self._unreported >= MIN_PROGRESS_BYTES
        ):
            self._report()
            self._watch.extend(self._limits.progress_timeout_s)
        return taken

    def _next_piece(self) -> bytes | None:
        try:
            return next(self._pieces, None)
        except HTTPX_ERRORS as error:
            raise failure_of(error, self._watch, self._limits) from error

    @contextlib.contextmanager
    def _portion(self) -> Iterator[None]:
        with self._watch.deadline(self._limits.progress_timeout_s):
            try:
                yield
            finally:
                self._report()

    def _report(self) -> None:
        self._reported_at = time.monotonic()
        if self._unreported:
            self._note_progress(self._unreported)
            self._unreported = 0


def failure_of(error: Exception, watch: Watch, limits: Limits) -> OriginFailure:
    """Return what an httpx error means; after a cut, a missed deadline."""
    if watch.is_cut:
        detail = (
            f"too slow: took over {limits.progress_timeout_s:g} s for "
            f"{MIN_PROGRESS_BYTES} bytes or the headers"
        )
        return OriginFailure(Failure.STALLED, detail)
    return translate(error)
