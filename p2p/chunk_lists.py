"""The chunk lists of what is fetched: from the store, from neighbours, and kept.

A list is asked of the neighbour that gave the last ones; only if it lacks some are all asked,
and more neighbours looked for. What comes was verified by its digest, and is put into the
store at once: whoever asks us for the model later needs it, and so does the next start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import trio

from tensorswarm.store.digest import digest_of
from tensorswarm.store.errors import BadInput, RemoteError
from tensorswarm.store.store import Store

from .control.answers import MAX_BLOB_BYTES
from .control.neighbour import Neighbour
from .inquiry import Inquiry


class ChunkLists:
    """Finds chunk lists for one fetch.

    Parameters
    ----------
    store : Store
        Where they may be already, and where they go.
    inquiry : Inquiry
        Asks the network.
    overhead : Counter
        Bytes that came by neighbour; what comes is added.

    Attributes
    ----------
    along_bytes : int
        Bytes of lists that came and were only welcome.
    """

    def __init__(self, store: Store, inquiry: Inquiry, overhead: Counter[str]) -> None:
        self._store = store
        self._inquiry = inquiry
        self._overhead = overhead
        self._giver: Neighbour | None = None
        self.along_bytes = 0

    async def find(
        self, needed: Mapping[bytes, int], welcome: Mapping[bytes, int], keys: Sequence[bytes]
    ) -> dict[bytes, bytes]:
        """Return chunk lists, verified and on their way into the store.

        Parameters
        ----------
        needed : mapping of bytes to int
            Digests and sizes of the lists.
        welcome : mapping of bytes to int
            Others that are taken if they can be had along with them.
        keys : sequence of bytes
            Where to look for more peers; see `Inquiry.until_found`.

        Raises
        ------
        BadInput
            A list is longer than what is given on the control stream.
        NotFound, NoSource, Refused
            Nobody has one that is needed.
        """
        if any(size > MAX_BLOB_BYTES for size in needed.values()):
            raise BadInput(f"a tensor is too large: its chunk list is over {MAX_BLOB_BYTES} bytes")
        found, missing = await trio.to_thread.run_sync(self._look_here, {**welcome, **needed})
        came: list[bytes] = []

        async def ask(neighbour: Neighbour) -> bool | None:
            for digest, data in (await neighbour.get_blobs(dict(missing))).items():
                if missing.pop(digest, None) is None:
                    continue  # another one was faster
                found[digest] = data
                came.append(data)
                self._overhead[neighbour.peer_id] += len(data)
                if digest not in needed:
                    self.along_bytes += len(data)
                self._giver = neighbour
            return None if needed.keys() & missing.keys() else True

        if needed.keys() & missing.keys() and self._giver is not None:
            try:
                await ask(self._giver)
            except RemoteError:
                self._giver = None  # the others are asked
        if needed.keys() & missing.keys():
            await self._inquiry.until_found(keys, ask, "a list of chunks")
        await trio.to_thread.run_sync(self._store.note_chunk_lists, came)
        return found

    def _look_here(
        self, wanted: Mapping[bytes, int]
    ) -> tuple[dict[bytes, bytes], dict[bytes, int]]:
        """Return what the store has of some lists, and the others' sizes."""
        found = {
            digest: data
            for digest, data in self._store.get_blobs(list(wanted.items())).items()
            if digest_of(data) == digest
        }
        return found, {digest: size for digest, size in wanted.items() if digest not in found}
