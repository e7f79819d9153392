"""Getting objects ready while a download runs: chunk lists, and what is here already.

A download of 100,000 tensors need not wait until all of them can be asked for. The planner
says what is due next (`swarm.readiness`); here the chunk lists of that are found, and what
the store has of it already is looked up, in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import trio

from tensorswarm.store.digest import DIGEST_SIZE, chunk_count
from tensorswarm.store.errors import NoRoom
from tensorswarm.store.store import Store
from tensorswarm.store.wanted import Wanted

from .chunk_lists import ChunkLists
from .download import Download
from .swarm.readiness import PORTION_OBJECTS

MAX_SPARE_BYTES = 16 << 20
"""Most room left free on the disk, for the index and for everybody else."""

LARGEST_OBJECTS = 64
"""Objects of a portion under whose digests more peers are looked for, largest first."""


class Preparation:
    """Prepares the objects of one fetch.

    Parameters
    ----------
    store : Store
        Where they go.
    wanted : Wanted
        The objects.
    lists : ChunkLists
        Finds their chunk lists.
    others : mapping of bytes to int
        Digests and sizes of further lists that are welcome.
    key : bytes
        The model's digest: where to look for those who hold it.
    """

    def __init__(
        self,
        store: Store,
        wanted: Wanted,
        lists: ChunkLists,
        others: Mapping[bytes, int],
        key: bytes,
    ) -> None:
        self._store = store
        self._wanted = wanted
        self._lists = lists
        self._welcome = dict(islice(others.items(), PORTION_OBJECTS))
        self._key = key

    async def take_up_what_is_here(self) -> None:
        """Go on with what an earlier download left, and see that there is room for the rest.

        Raises
        ------
        NoRoom
            The disk would become full.
        NotFound, NoSource, Refused
            Nobody has a chunk list that is needed.
        """
        begun = await trio.to_thread.run_sync(self._wanted.begun)
        for start in range(0, len(begun), PORTION_OBJECTS):
            await self._prepare(begun[start : start + PORTION_OBJECTS])
        missing = await trio.to_thread.run_sync(self._wanted.all_missing_bytes)
        free = self._store.place.free_bytes()
        if free < missing + min(MAX_SPARE_BYTES, missing // 8):
            raise NoRoom(
                f"no room on disk: {missing} bytes to fetch, {free} bytes free in "
                f"{self._store.root}"
            )

    async def begin(self, download: Download) -> None:
        """Prepare as much as is needed to begin."""
        await self._next_portion(download)

    async def keep_ahead(self, download: Download) -> None:
        """Prepare the rest as it is due, until all is ready."""
        while download.is_unready:
            await download.wait_portion_due()
            await self._next_portion(download)

    async def _next_portion(self, download: Download) -> None:
        portion = download.next_portion()
        if portion:
            download.make_ready(portion, await self._prepare(portion))

    async def _prepare(self, indices: Sequence[int]) -> dict[int, bytes]:
        refs = self._wanted.refs(indices)
        needed = {
            ref.chunk_list: DIGEST_SIZE * chunk_count(ref.size_bytes)
            for ref in refs
            if ref.chunk_list
        }
        largest = sorted((ref for ref in refs if ref.chunk_list), key=lambda r: -r.size_bytes)
        keys = [self._key, *(ref.digest for ref in largest[:LARGEST_OBJECTS])]
        found = await self._lists.find(needed, self._welcome, keys)
        self._welcome = {}
        return await trio.to_thread.run_sync(self._wanted.prepare, indices, found)
