"""Reading a file's header in order, through a window, skipping what is not needed."""

from __future__ import annotations

from ..errors import BadInput
from .layout import ReadAt, read_exactly

MIN_WINDOW_BYTES = 512
"""Bytes read after a jump. It is little, because between large tensors a file has only some
hundred bytes of its own, and reading may mean asking a web server."""

MAX_WINDOW_BYTES = 256 << 10
"""Most bytes read at a time: windows grow while reading goes on without a jump."""


class Cursor:
    """A place in a file.

    Parameters
    ----------
    stop : int
        Nothing is read from this byte on.
    read_at : ReadAt
        Reads bytes of the file.
    """

    def __init__(self, stop: int, read_at: ReadAt) -> None:
        self.position = 0
        self._stop = stop
        self._read_at = read_at
        self._window = b""
        self._window_start = 0
        self._window_bytes = MIN_WINDOW_BYTES

    def take(self, length: int) -> bytes:
        """Return the next bytes."""
        start = self.position
        self.skip(length)
        at = start - self._window_start
        if not 0 <= at <= at + length <= len(self._window):
            goes_on = 0 <= at <= len(self._window)
            grown = min(2 * self._window_bytes, MAX_WINDOW_BYTES)
            self._window_bytes = grown if goes_on else MIN_WINDOW_BYTES
            wanted = min(max(length, self._window_bytes), self._stop - start)
            self._window = read_exactly(self._read_at, start, wanted)
            self._window_start = start
            at = 0
        return self._window[at : at + length]

    def unsigned(self, length: int) -> int:
        """Return the next number, little-endian."""
        return int.from_bytes(self.take(length), "little")

    def skip(self, length: int) -> None:
        """Go on without reading.

        Raises
        ------
        BadInput
            The file, or what may be read of it, ends before.
        """
        if length < 0 or self.position + length > self._stop:
            raise BadInput(f"the header ends after byte {self._stop}")
        self.position += length
