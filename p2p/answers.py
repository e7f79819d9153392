"""What a neighbour may learn from our store: holdings, blobs, chunk lists.

Every method blocks on the disk and is meant to run in a worker thread. Nothing
here is believed of the asker; what is given is what the store has verified.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tensorswarm.store.manifest import MAX_MANIFEST_BYTES
from tensorswarm.store.store import Store

from . import wire, wire_limits

MAX_BLOB_BYTES = MAX_MANIFEST_BYTES
"""Largest blob given on the control stream. Anything larger belongs on the bulk plane,
where it does not keep other messages waiting."""


class Answers:
    """Answers from one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def holdings(self, digests: Sequence[bytes]) -> list[wire.HaveEntry]:
        """Return what the store has of each digest, whole or in part."""
        held = self._store.holdings(digests)
        return [
            wire.HaveEntry(digest, holding.size_bytes, holding.proved, holding.chunk_list)
            for digest, holding in held.items()
        ]

    def blob_frames(self, request: wire.GetBlobs) -> Iterator[wire.Blobs]:
        """Yield the frames that answer a request for blobs, read as they are sent."""
        return wire.fit_blobs(request.request_id, self._pieces(request.items))

    def _pieces(self, items: Iterable[wire.BlobItem]) -> Iterator[wire.BlobPiece]:
        for digest, offset in items:
            reader = self._store.open_whole(digest)  # a part may match a false list only
            if reader is None:
                continue
            try:
                size = reader.size_bytes
                if size > MAX_BLOB_BYTES or offset > size:
                    continue
                if offset == size:
                    yield wire.BlobPiece(digest, size, offset, b"")
                step = wire_limits.MAX_BLOB_DATA_PER_FRAME
                for start in range(offset, size, step):
                    data = bytearray(min(step, size - start))
                    reader.read_into(start, memoryview(data))
                    yield wire.BlobPiece(digest, size, start, bytes(data))
            except OSError:
                continue  # the object went away while it was read: to the asker, not held
            finally:
                reader.close()

    def chunk_list(self, request: wire.GetChunkList) -> wire.ChunkListIs:
        """Return an object's size and its chunk list's digest, as far as we know them."""
        record = self._store.records([request.digest]).get(request.digest)
        if record is None:
            return wire.ChunkListIs(request.request_id, request.digest, -1, b"")
        return wire.ChunkListIs(
            request.request_id, request.digest, record.size_bytes, record.chunk_list
        )
