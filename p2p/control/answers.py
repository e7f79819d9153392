"""What a neighbour may learn from our store: holdings, blobs, chunk lists.

Every method blocks on the disk and is meant to run in a worker thread. Nothing
here is believed of the asker; what is given is what the store has verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensorswarm.store.errors import LocalError
from tensorswarm.store.manifest import MAX_MANIFEST_BYTES
from tensorswarm.store.store import INLINE_LIMIT, Store

from . import wire, wire_limits
from .access import Access

MAX_BLOB_BYTES = MAX_MANIFEST_BYTES
"""Largest blob given on the control stream. Anything larger belongs on the bulk plane,
where it does not keep other messages waiting."""


SMALL_BATCH = 64
"""Small blobs read together, at most 4 MiB: a model of 100,000 tensors has as many lists."""


class Answers:
    """Answers from one store, to one peer.

    Parameters
    ----------
    store : Store
        What is told of.
    access : Access, optional
        Who may have what; without it, everybody everything.
    peer_id : str
        Who asks.
    """

    def __init__(self, store: Store, access: Access | None = None, peer_id: str = "") -> None:
        self._store = store
        self._access = access
        self._peer_id = peer_id

    def to(self, peer_id: str) -> Answers:
        """Return the answers that are for a certain peer."""
        return Answers(self._store, self._access, peer_id)

    def may_have(self, digest: bytes) -> bool:
        """Tell whether the peer may have an object, or know that it is here."""
        return self._access is None or self._access.may_have(self._peer_id, digest)

    def refuses(self, digests: Sequence[bytes]) -> bool:
        """Tell whether to refuse a request: nothing of it is here that the peer may have.

        A node without lists never refuses: it says that it does not hold it.
        """
        if self._access is None or not self._access.is_guarded:
            return False
        here = self._store.records(list(digests))
        return not any(self.may_have(digest) for digest in here)

    def holdings(self, digests: Sequence[bytes]) -> list[wire.HaveEntry]:
        """Return what the store has of each digest, whole or in part."""
        held = self._store.holdings(digests)
        return [
            wire.HaveEntry(digest, *holding)
            for digest, holding in held.items()
            if self.may_have(digest)
        ]

    def blob_frames(self, request: wire.GetBlobs) -> Iterator[wire.Blobs]:
        """Yield the frames that answer a request for blobs, read as they are sent."""
        return wire.fit_blobs(request.request_id, self._pieces(request.items))

    def _pieces(self, items: Sequence[wire.BlobItem]) -> Iterator[wire.BlobPiece]:
        for start in range(0, len(items), SMALL_BATCH):
            batch = items[start : start + SMALL_BATCH]
            small = self._small([item.digest for item in batch])
            for item in batch:
                data = small.get(item.digest)
                if data is None:
                    yield from self._pieces_of(item)
                elif item.offset <= len(data):
                    yield wire.BlobPiece(item.digest, len(data), item.offset, data[item.offset :])

    def _small(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return the small blobs among `digests` that the peer may have, read together."""
        wanted = [
            (digest, size)
            for digest, size in self._store.sizes(digests).items()
            if 0 < size <= INLINE_LIMIT and self.may_have(digest)
        ]
        try:
            found = list(zip(wanted, self._store.read_small(wanted), strict=True))
        except LocalError:
            return {}  # one of them cannot be read now: each is tried alone
        return {digest: data for (digest, _), data in found if data is not None}

    def _pieces_of(self, item: wire.BlobItem) -> Iterator[wire.BlobPiece]:
        digest, offset = item
        reader = self._store.open_whole(digest)  # a part may match a false list only
        if reader is None:
            return
        try:
            size = reader.size_bytes
            if not self.may_have(digest) or size > MAX_BLOB_BYTES or offset > size:
                return
            if offset == size:
                yield wire.BlobPiece(digest, size, offset, b"")
            step = wire_limits.MAX_BLOB_DATA_PER_FRAME
            for start in range(offset, size, step):
                data = bytearray(min(step, size - start))
                reader.read_into(start, memoryview(data))
                yield wire.BlobPiece(digest, size, start, bytes(data))
        except OSError:
            return  # the object went away while it was read: to the asker, not held
        finally:
            reader.close()

    def chunk_list(self, request: wire.GetChunkList) -> wire.ChunkListIs:
        """Return an object's size and its chunk list's digest, as far as we know them."""
        record = self._store.records([request.digest]).get(request.digest)
        if record is None or not self.may_have(request.digest):
            return wire.ChunkListIs(request.request_id, request.digest, -1, b"")
        return wire.ChunkListIs(
            request.request_id, request.digest, record.size_bytes, record.chunk_list
        )
