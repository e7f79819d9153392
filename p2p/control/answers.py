"""What a neighbour may learn from our store: holdings, blobs, chunk lists.

Every method blocks on the disk and is meant to run in a worker thread. Nothing
here is believed of the asker; what is given is what the store has verified.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.errors import BadInput, LocalError
from tensorswarm.store.manifest import MAX_MANIFEST_BYTES
from tensorswarm.store.object_table import ObjectTable
from tensorswarm.store.store import INLINE_LIMIT, Store

from . import wire, wire_limits
from .access import Access
from .holdings import Holdings

MAX_BLOB_BYTES = MAX_MANIFEST_BYTES
"""Largest blob given on the control stream. Anything larger belongs on the bulk plane,
where it does not keep other messages waiting."""


LOOK_UP_AT_ONCE = 8192
"""Objects of a model looked up in one go: their digests are objects of Python each."""

SMALL_BATCH = 64
"""Small blobs read together, at most 4 MiB: a model of 100,000 tensors has as many lists."""


def held_part(
    table: ObjectTable, index: int, size_bytes: int, proved: bytes | None, chunk_list: bytes
) -> bytes | None:
    """Return the bitmap of a part that can be told by the manifest; None if it cannot."""
    is_the_same = size_bytes == table.sizes[index] and chunk_list == table.chunk_list(index)
    return proved if is_the_same and size_bytes > CHUNK_SIZE else None


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

    def objects_of(self, model: bytes) -> ObjectTable | None:
        """Return the objects of a model whose manifest is here and may be known to the peer."""
        try:
            manifest = self._store.manifest(model) if self.may_have(model) else None
        except BadInput:
            return None  # what this digest names is no manifest
        return None if manifest is None else manifest.table

    def model_holdings(self, table: ObjectTable, runs: Iterable[tuple[int, int]]) -> Holdings:
        """Return what the store has of some objects of a model, by their index.

        Chunks proved against another list than the manifest's are left out.
        """
        found = Holdings(len(table))
        for start, stop in runs:
            for first in range(start, stop, LOOK_UP_AT_ONCE):
                self._look_up(table, first, min(stop, first + LOOK_UP_AT_ONCE), found)
        return found

    def _look_up(self, table: ObjectTable, start: int, stop: int, found: Holdings) -> None:
        digests = table.digests(start, stop)
        is_for_all = self._access is None or not self._access.is_guarded
        if is_for_all and self._store.are_whole(digests, table.sizes[start:stop]):
            found.add_run(start, stop)  # the usual case: a model was added, or fetched
            return
        here = self._store.holdings(digests)
        run = start  # where the run begins that is whole up to here
        for index, digest in enumerate(digests, start):
            held = here.get(digest)
            if held is not None and held.proved is None and held.size_bytes == table.sizes[index]:
                if self._access is None or self.may_have(digest):
                    continue
            elif held is not None and self.may_have(digest):
                part = held_part(table, index, held.size_bytes, held.proved, held.chunk_list)
                if part is not None:
                    found.add(index, part)
            if run < index:
                found.add_run(run, index)
            run = index + 1
        if run < stop:
            found.add_run(run, stop)

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
