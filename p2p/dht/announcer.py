"""What a node announces, and when: the bridge from the store to the DHT.

Announced are model ids and tensors of 1 MiB and more. Smaller tensors travel with
a model that names them; a record for each would cost more than its bytes. Looks at
the store again whenever any process has changed it.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from tensorswarm.store.errors import TensorswarmError
from tensorswarm.store.store import Store

from ..control import wire
from ..control.access import Access
from ..control.neighbours import Neighbours
from .discovery import Discovery

ANNOUNCE_MIN_BYTES = 1 << 20
"""Smallest tensor that is announced by itself, in bytes."""

WATCH_INTERVAL_S = 1.0
"""How often the store is looked at for changes made by other processes."""

SYNC_INTERVAL_S = 5.0
"""How often a node puts what it verified onto stable storage."""


def announceable(store: Store, access: Access) -> dict[bytes, int]:
    """Return what a store should announce: digests and sizes, models first.

    Nothing of what only private models contain is announced. Blocks on the disk: call it
    in a worker thread.
    """
    found: dict[bytes, int] = {}
    tensors: dict[bytes, int] = {}
    for model in store.models():
        if not access.is_announced(model.digest):
            continue
        manifest = store.manifest(model.digest)
        if manifest is None:
            continue
        found[model.digest] = 0
        for index in manifest.tensor_indices:
            ref = manifest.objects[index]
            if ref.size_bytes >= ANNOUNCE_MIN_BYTES:
                tensors[ref.digest] = ref.size_bytes
    for digest in store.records(list(tensors)):
        found[digest] = tensors[digest]
    return found


class Announcer:
    """Keeps the DHT and the neighbours up to date about the store.

    Parameters
    ----------
    store : Store
        What is watched.
    discovery : Discovery
        Where it is announced.
    neighbours : Neighbours
        Who hears of news.
    access : Access
        What is for whom; kept up to date here.
    log : callable
        Takes one line for people.
    """

    def __init__(
        self,
        store: Store,
        discovery: Discovery,
        neighbours: Neighbours,
        access: Access,
        log: Callable[[str], None],
    ) -> None:
        self._store = store
        self._access = access
        self._discovery = discovery
        self._neighbours = neighbours
        self._log = log
        self._known: dict[bytes, int] = {}

    async def run(self) -> None:
        """Watch and announce until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sync_regularly)
            seen: tuple[int, int] | None = None
            while True:
                try:
                    version = await trio.to_thread.run_sync(self._store.change_count)
                    if await trio.to_thread.run_sync(self._access.refresh):
                        seen = None
                    if version != seen:
                        seen = version
                        await self._announce_new()
                except TensorswarmError as error:
                    self._log(f"cannot look at the store: {error}")
                await trio.sleep(WATCH_INTERVAL_S)

    async def _announce_new(self) -> None:
        present = await trio.to_thread.run_sync(announceable, self._store, self._access)
        new = {digest: size for digest, size in present.items() if digest not in self._known}
        gone = [digest for digest in self._known if digest not in present]
        self._discovery.withdraw(gone)
        self._known = present
        if not new:
            return
        self._neighbours.tell(
            [wire.HaveEntry(digest, size, None, b"") for digest, size in new.items() if size]
        )
        announced = await self._discovery.announce(list(new))
        if announced.confirmed:
            self._log(f"announced {len(announced.confirmed)} of {len(new)} keys")
        else:
            # The DHT's own task repeats it as soon as another node is there.
            self._log(f"{len(new)} keys to announce, once there is another DHT node")

    async def _sync_regularly(self) -> None:
        while True:
            await trio.sleep(SYNC_INTERVAL_S)
            try:
                await trio.to_thread.run_sync(self._store.sync)
            except TensorswarmError as error:
                self._log(f"cannot sync the store: {error}")
