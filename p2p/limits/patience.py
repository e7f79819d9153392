"""What a server bears of a slow reader. No I/O, no clock."""

from __future__ import annotations

MIN_READ_BYTES_PER_S = 4 << 10
"""Rate that a reader must keep up: less does not bring a chunk in four minutes, and costs
a thread as much as any."""

READ_PATIENCE_S = 20.0
"""Seconds by which a reader may be behind that: the kernel tells us of 64 KiB taken at
once, which the slowest reader needs 16 s for."""


class Patience:
    """How long a reader may still keep us waiting.

    It has `spare_s` seconds, gets more with the bytes that it takes, at the least rate,
    and never has more than it began with.
    """

    def __init__(self, spare_s: float, min_bytes_per_s: float) -> None:
        self._most_s = self.left_s = spare_s
        self._s_per_byte = 1 / min_bytes_per_s

    def note(self, byte_count: int, waited_s: float) -> None:
        """Count bytes that the reader took, and the time that it let us wait."""
        left_s = self.left_s + byte_count * self._s_per_byte - waited_s
        self.left_s = min(self._most_s, left_s)
