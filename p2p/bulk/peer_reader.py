"""What one peer is given to read: its one open reader, and small objects together.

Purpose: the part of answering requests that is the same over TLS and over libp2p streams.

Rules
- What the peer may not have is answered as if it were not there.
- One reader stays open at a time. It knows what was proved when it was opened, so one that
  does not cover a range is opened again: the rest may have come since.

Called by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tensorswarm.store.reader import ObjectReader

from .gate import Gate
from .http1 import RangeRequest
from .small_objects import SmallObjects


@dataclass(slots=True)
class PeerReader:
    """Reads for one peer; its owner closes it.

    Attributes
    ----------
    peer_id : str
        Who asks; set before anything is read.
    open_reader : callable
        From a digest to a reader, or None when there is no such object.
    read_small : callable
        Reads many small objects at once.
    may_have : callable
        Tells whether a peer may have an object.
    gate : Gate or None
        Hears what is given together.
    """

    peer_id: str
    open_reader: Callable[[bytes], ObjectReader | None]
    read_small: SmallObjects
    may_have: Callable[[str, bytes], bool]
    gate: Gate | None
    _kept: tuple[bytes, ObjectReader] | None = None

    def reader_for(self, request: RangeRequest) -> ObjectReader | None:
        """Return a reader of the object asked for, None when there is none for this peer.

        Raises
        ------
        LocalError
            The store cannot be read.
        """
        if not self.may_have(self.peer_id, request.digest):
            return None
        if self._kept is not None:
            digest, reader = self._kept
            if digest == request.digest and reader.covers(request.offset, request.length):
                return reader
            self.close()
        opened = self.open_reader(request.digest)
        if opened is not None:
            self._kept = (request.digest, opened)
        return opened

    def small(self, objects: Sequence[tuple[bytes, int]]) -> list[bytes | None]:
        """Return small objects by digest and size, None for each that is not to be had.

        Raises
        ------
        LocalError
            One is held and cannot be read.
        """
        found = [
            data if self.may_have(self.peer_id, digest) else None
            for (digest, _), data in zip(objects, self.read_small(objects), strict=True)
        ]
        if self.gate is not None:
            given = [
                digest for (digest, _), data in zip(objects, found, strict=True) if data is not None
            ]
            self.gate.gave(self.peer_id, given)
        return found

    def close(self) -> None:
        """Close the reader that is open, if any."""
        if self._kept is not None:
            self._kept[1].close()
            self._kept = None
