"""What a node announces, and when: the bridge from the store to the DHT.

Announced are model ids and tensors of 1 MiB and more. Smaller tensors travel with
a model that names them; a record for each would cost more than its bytes. Looks at
the store again whenever any process has changed it.

What is new is announced at once. While more keeps coming it is gathered: an announcement of
one key opens as many streams as one of a thousand, and those streams cost a node that fetches
more than all its other messages together. While it is known that more is coming, as in a
download, what came is announced every `GATHER_LONGEST_S`: the model's own key, announced as
the download began, leads others here.
"""

from __future__ import annotations

import math
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

GATHER_FIRST_S = 2.0
"""Pause between two announcements when the second follows closely."""

GATHER_GROWTH = 3.0
"""So many times as long with each that follows closely."""

GATHER_LONGEST_S = 30.0
"""Longest such pause: the model's own key has led others here from the first on."""

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


class Gathering:
    """When to announce what is new: at once, and together what follows closely.

    Does no I/O; `now` is in seconds of a clock that never goes back.
    """

    def __init__(self) -> None:
        self._pause_s = GATHER_FIRST_S
        self._announced_at = -math.inf

    def is_due(self, now: float, *, more_is_coming: bool = False) -> bool:
        """Tell whether something new is to be announced now."""
        return now >= self._announced_at + (GATHER_LONGEST_S if more_is_coming else self._pause_s)

    def announced(self, now: float) -> None:
        """Note an announcement."""
        is_close = now < self._announced_at + 2 * self._pause_s
        self._pause_s = (
            min(self._pause_s * GATHER_GROWTH, GATHER_LONGEST_S) if is_close else GATHER_FIRST_S
        )
        self._announced_at = now


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
    more_is_coming : callable, optional
        Tells whether a download is under way, ours or of those who share it with us.
    """

    def __init__(
        self,
        store: Store,
        discovery: Discovery,
        neighbours: Neighbours,
        access: Access,
        log: Callable[[str], None],
        more_is_coming: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._access = access
        self._discovery = discovery
        self._neighbours = neighbours
        self._log = log
        self._more_is_coming = more_is_coming
        self._told: dict[bytes, int] = {}
        self._announced: set[bytes] = set()
        self._gathering = Gathering()

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
                        await self._look()
                    await self._announce(trio.current_time())
                except TensorswarmError as error:
                    self._log(f"cannot look at the store: {error}")
                await trio.sleep(WATCH_INTERVAL_S)

    async def _look(self) -> None:
        """Find out what the store holds now; tell the neighbours what is news to them."""
        present = await trio.to_thread.run_sync(announceable, self._store, self._access)
        gone = [digest for digest in self._told if digest not in present]
        self._discovery.withdraw(gone)
        self._announced.difference_update(gone)
        by_downloads = self._neighbours.take_told_whole()
        self._neighbours.tell(
            [
                wire.HaveEntry(digest, size, None, b"")
                for digest, size in present.items()
                if size and digest not in self._told and digest not in by_downloads
            ]
        )
        self._told = present

    async def _announce(self, now: float) -> None:
        """Announce on the DHT what has not been announced yet, when that is due."""
        if not self._gathering.is_due(now, more_is_coming=self._more_is_coming()):
            return
        new = [digest for digest in self._told if digest not in self._announced]
        if not new:
            return
        self._gathering.announced(now)
        self._announced.update(new)
        announced = await self._discovery.announce(new)
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
