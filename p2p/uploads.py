"""Uploads offered to those who fetch the same as we do: the shell round `UploadSlots`.

A node that shares an origin with others offers each of them, in turn, a chunk that the
swarm lacks, and serves a few requests at a time: see `swarm.upload_slots` for why. It goes
on after its own download has ended, for as long as a member still wants the same.

Rules
- Offers go to neighbours that subscribed to the same model and say in their hello that
  they know what an offer is. Everybody else asks when it likes, as before; what it asks
  counts as an upload like any other.
- A request that finds all slots taken waits for one, `MAX_SLOT_WAIT_S` at most: nobody
  is refused, or waits so long that it takes us for dead.
- How many offers are open besides follows from what was measured: as many as are
  answered too late to keep the line busy otherwise.
- Small objects that are asked for together wait for nobody, and answer an offer all the
  same: else it would keep its place until it lapses, and the line idle.
- What a member does not want, or may not have, is not offered to it.
- All tables are bounded: by the neighbours, `MAX_SWARMS` and `MAX_CHUNKS`.

The bulk server's threads call `ask`, `gave` and `end`, the index's calls `_on_whole`; all else
happens on trio's thread. The clock is the caller's, for tests.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from tensorswarm.store.digest import CHUNK_SIZE, chunk_count
from tensorswarm.store.runs import runs_in
from tensorswarm.store.wanted import Wanted

from . import claims
from .control import wire
from .control.neighbours import Neighbours
from .control.object_set import ObjectSet
from .swarm.upload_slots import UploadSlots

OFFERS = "offers"
"""Name of the feature in a hello: the node takes offers, or passes on them."""

MAX_SWARMS = 8
"""Models that uploads are offered of at a time; for more, who asks first is served."""

MAX_CHUNKS = 1 << 17
"""Chunks of a model that uploads are offered of: 128 GiB. What a neighbour has is kept as
a bit of each, and looked at for every offer."""

SLOTS = 1
"""Requests served at a time: whole chunks can be passed on, and halves cannot."""

MAX_AHEAD = 16
"""Offers open besides: 16 MiB on the way to a line of 100 MB/s with 150 ms of delay."""

MAX_SLOT_WAIT_S = 1.0
"""Longest wait for a slot: a third of the silence for which a source is dropped."""

LOOK_S = 0.25
"""How often it is looked who is a member, while nothing happens."""

GAIN = 0.2
"""Weight of the latest measurement in an average."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Upload:
    """A request that is served, or waits for a slot."""

    swarm: _Swarm
    peer_id: str
    ticket: int
    has_begun: threading.Event = field(default_factory=threading.Event)
    begun_at: float | None = None


class _Swarm:
    """What we offer of one model, and to whom."""

    def __init__(self, key: bytes, wanted: Wanted, rng: random.Random) -> None:
        self.key = key
        self.wanted = wanted
        self.slots = UploadSlots(SLOTS, 1, rng)
        self.members: dict[str, int] = {}
        """For each member, how many digests it subscribes to: the rest it does not want."""
        self.has: dict[str, int] = {}
        self.offered_at: dict[str, float] = {}
        self.uploads: dict[tuple[str, int], Upload] = {}
        self.has_left = False
        self._starts = [0, *itertools.accumulate(map(chunk_count, wanted.sizes()))]
        self._answer_s: float | None = None
        self._upload_s: float | None = None

    @property
    def chunk_count(self) -> int:
        return self._starts[-1]

    def position(self, index: int, chunk: int) -> int:
        """Return the position of a chunk among those of all objects."""
        return self._starts[index] + chunk

    def place(self, position: int) -> tuple[int, int]:
        """Return the object and the chunk of it at a position."""
        index = bisect.bisect_right(self._starts, position) - 1
        return index, position - self._starts[index]

    def mask(self, index: int, bits: bytes | None) -> int:
        """Return the positions of some chunks of an object; all for None."""
        count = self._starts[index + 1] - self._starts[index]
        everything = (1 << count) - 1
        part = everything if bits is None else int.from_bytes(bits, "little") & everything
        return part << self._starts[index]

    def mask_of_run(self, start: int, stop: int) -> int:
        """Return the positions of all chunks of a run of objects."""
        count = self._starts[stop] - self._starts[start]
        return (1 << count) - 1 << self._starts[start]

    def note_answer(self, seconds: float) -> None:
        """Note how long a member took to ask for what it was offered."""
        self._answer_s = _average(self._answer_s, seconds)
        self._set_ahead()

    def note_upload(self, seconds: float) -> None:
        """Note how long a request was served."""
        self._upload_s = _average(self._upload_s, seconds)
        self._set_ahead()

    def _set_ahead(self) -> None:
        if self._answer_s is not None and self._upload_s:
            ahead = math.ceil(self._answer_s / self._upload_s)
            self.slots.ahead = max(1, min(ahead, MAX_AHEAD))


class Uploads:
    """All uploads that a node offers.

    Parameters
    ----------
    neighbours : Neighbours
        Who can be offered something.
    may_have : callable
        From a peer id and a digest to whether the peer may have the object.
    rng : random.Random
        Breaks ties.
    clock : callable, optional
        Gives seconds, never going back.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        may_have: Callable[[str, bytes], bool],
        rng: random.Random,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._neighbours = neighbours
        self._may_have = may_have
        self._rng = rng
        self._clock = clock
        self._lock = threading.RLock()
        self._swarms: dict[bytes, _Swarm] = {}
        self._tickets = itertools.count()
        self._wake: Callable[[], None] = lambda: None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Make offers until cancelled."""
        changed = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def set_changed() -> None:
            changed.set()

        self._wake = lambda: token.run_sync_soon(set_changed, idempotent=True)
        self._neighbours.have_listeners.append(self._on_have)
        self._neighbours.have_model_listeners.append(self._on_have_model)
        self._neighbours.offer_listeners.append(self._on_offer)
        self._neighbours.left.append(self._on_left)
        task_status.started()
        try:
            while True:
                wait_s = self.look()
                with trio.move_on_after(wait_s):
                    await changed.wait()
                changed = trio.Event()
        finally:
            self._wake = lambda: None

    # ---- what we have

    def open(
        self, key: bytes, wanted: Wanted, known: Mapping[str, Mapping[int, bytes | None]]
    ) -> None:
        """Begin to offer what we have of a model, and are about to get.

        Parameters
        ----------
        key : bytes
            What the members subscribe to.
        wanted : Wanted
            The objects.
        known : mapping of str to mapping of int to bytes or None
            What neighbours were heard to hold: bitmaps by object, None for all of it.
        """
        with self._lock:
            swarm = _Swarm(key, wanted, self._rng)
            if swarm.chunk_count > MAX_CHUNKS:
                return
            for old in list(self._swarms)[: max(0, len(self._swarms) + 1 - MAX_SWARMS)]:
                del self._swarms[old]
            self._swarms[key] = swarm
            # First, so that what becomes whole meanwhile is not missed.
            wanted.whole_listeners.append(partial(self._on_whole, swarm))
            for index in range(len(wanted)):
                held = wanted.holding(index)
                if held is not None:
                    swarm.slots.held |= swarm.mask(index, held[1])
            for peer_id, holds in known.items():
                for index, bits in holds.items():
                    swarm.has[peer_id] = swarm.has.get(peer_id, 0) | swarm.mask(index, bits)
        self._wake()

    def is_open(self, key: bytes) -> bool:
        """Tell whether uploads of a model are offered."""
        return key in self._swarms

    def is_any_open(self) -> bool:
        """Tell whether anything is being fetched, by us or by those who share it with us."""
        return bool(self._swarms)

    def proved(self, key: bytes, index: int, chunk: int) -> None:
        """Note a chunk that we have now.

        Of an object on its way into the index nothing can be given for that moment; it is
        offered when it is there (`_on_whole`).
        """
        with self._lock:
            swarm = self._swarms.get(key)
            if swarm is None or swarm.wanted.holding(index) is None:
                return
            swarm.slots.held |= 1 << swarm.position(index, chunk)
        self._wake()

    def _on_whole(self, swarm: _Swarm, indices: Sequence[int]) -> None:
        """Note objects that are in the index now; called from its thread."""
        with self._lock:
            for start, stop in runs_in(indices):
                swarm.slots.held |= swarm.mask_of_run(indices[start], indices[stop - 1] + 1)
        self._wake()

    def leave(self, key: bytes) -> None:
        """Note that our own download has ended: offers go on while somebody wants them."""
        with self._lock:
            swarm = self._swarms.get(key)
            if swarm is not None:
                swarm.has_left = True

    # ---- what others have and say

    def _on_have(self, peer_id: str, entries: Sequence[wire.HaveEntry]) -> None:
        with self._lock:
            for swarm in self._swarms.values():
                self._note_held(swarm, peer_id, claims.by_digests(swarm.wanted, entries))

    def _on_have_model(self, peer_id: str, message: wire.HaveModel) -> None:
        with self._lock:
            swarm = self._swarms.get(message.model)
            if swarm is not None:
                self._note_held(swarm, peer_id, claims.by_manifest(swarm.wanted, message))

    def _note_held(self, swarm: _Swarm, peer_id: str, said: claims.Claims) -> None:
        mask = 0
        for run in said.whole:
            mask |= swarm.mask_of_run(run.start, run.stop)
        for index, proved in said.parts:
            mask |= swarm.mask(index, proved)
        if mask:
            swarm.has[peer_id] = swarm.has.get(peer_id, 0) | mask
            if peer_id in swarm.members:
                swarm.slots.peer_has(peer_id, mask)

    def _on_offer(self, peer_id: str, message: wire.Offer | wire.Pass) -> None:
        if not isinstance(message, wire.Pass):
            return  # for the download that it concerns
        with self._lock:
            for swarm in self._swarms.values():
                if swarm.wanted.find(message.digest) >= 0:
                    swarm.slots.passed(self._clock(), peer_id)
                    swarm.offered_at.pop(peer_id, None)
        self._wake()

    def _on_left(self, peer_id: str) -> None:
        with self._lock:
            for swarm in self._swarms.values():
                self._forget(swarm, peer_id)
                swarm.has.pop(peer_id, None)
        self._wake()

    def _forget(self, swarm: _Swarm, peer_id: str) -> None:
        swarm.members.pop(peer_id, None)
        swarm.offered_at.pop(peer_id, None)
        swarm.slots.forget(peer_id)
        for key in [key for key in swarm.uploads if key[0] == peer_id]:
            swarm.uploads.pop(key).has_begun.set()
        self._begin(swarm)

    # ---- offers

    def look(self) -> float:
        """Make the offers that are due; return after how many seconds to look again."""
        now, deadline = self._clock(), math.inf
        made: list[tuple[str, wire.Offer]] = []
        with self._lock:
            for key, swarm in list(self._swarms.items()):
                self._look_who_is_here(swarm)
                if swarm.has_left and not swarm.members:
                    del self._swarms[key]
                    continue
                for peer_id, position in swarm.slots.offers(now):
                    index, chunk = swarm.place(position)
                    made.append((peer_id, wire.Offer(swarm.wanted.digest(index), chunk)))
                    swarm.offered_at[peer_id] = now
                deadline = min(deadline, now + LOOK_S, swarm.slots.next_deadline(now))
        for peer_id, offer in made:
            neighbour = self._neighbours.get(peer_id)
            if neighbour is not None:
                neighbour.notify(offer)
        return max(0.0, deadline - now)

    def _look_who_is_here(self, swarm: _Swarm) -> None:
        here = {
            peer_id: len(neighbour.interests)
            for peer_id in self._neighbours.wanting(swarm.key)
            if (neighbour := self._neighbours.get(peer_id)) is not None
            and OFFERS in neighbour.hello.features
        }
        for peer_id in [peer_id for peer_id in swarm.members if peer_id not in here]:
            self._forget(swarm, peer_id)
        for peer_id, count in here.items():
            if swarm.members.get(peer_id) != count:
                swarm.members[peer_id] = count
                unwanted = self._unwanted(swarm, peer_id)
                swarm.slots.set_peer(peer_id, swarm.has.get(peer_id, 0) | unwanted)

    def _unwanted(self, swarm: _Swarm, peer_id: str) -> int:
        """Return what a member did not subscribe to, or may not have."""
        neighbour = self._neighbours.get(peer_id)
        interests = neighbour.interests if neighbour is not None else ObjectSet()
        chosen = interests.of_model(swarm.key)
        wanted, mask = swarm.wanted, 0
        for index, digest in enumerate(wanted.digests):
            is_chosen = chosen is not None and wanted.place(index) in chosen
            if not is_chosen and digest not in interests or not self._may_have(peer_id, digest):
                mask |= swarm.mask(index, None)
        return mask

    # ---- requests, in the server's threads

    def concerns(self, peer_id: str, digest: bytes) -> bool:
        """Tell whether an object is part of a swarm of which a peer is a member."""
        with self._lock:
            return self._find(peer_id, digest) is not None

    def ask(self, peer_id: str, digest: bytes, offset: int) -> Upload | None:
        """Wait for a slot for a request, no longer than `MAX_SLOT_WAIT_S`.

        Returns
        -------
        Upload or None
            To be given to `end`; None for what is no part of a swarm.
        """
        with self._lock:
            found = self._find(peer_id, digest)
            if found is None:
                return None
            swarm, index = found
            now = self._clock()
            offered_at = swarm.offered_at.pop(peer_id, None)
            if offered_at is not None:
                swarm.note_answer(now - offered_at)
            upload = Upload(swarm, peer_id, next(self._tickets))
            chunk = min(offset // CHUNK_SIZE, chunk_count(swarm.wanted.size_bytes(index)) - 1)
            if not swarm.slots.ask(peer_id, upload.ticket, swarm.position(index, chunk)):
                return None
            swarm.uploads[peer_id, upload.ticket] = upload
            self._begin(swarm)
        self._wake()
        upload.has_begun.wait(MAX_SLOT_WAIT_S)
        return upload

    def end(self, upload: Upload | None) -> None:
        """Note that a request was answered, or given up."""
        if upload is None:
            return
        swarm, key = upload.swarm, (upload.peer_id, upload.ticket)
        with self._lock:
            if swarm.uploads.pop(key, None) is None:
                return
            if upload.begun_at is not None:
                swarm.note_upload(self._clock() - upload.begun_at)
            if not swarm.slots.withdraw(*key):
                swarm.slots.end(*key)
            self._begin(swarm)
        self._wake()

    def gave(self, peer_id: str, digests: Sequence[bytes]) -> None:
        """Note small objects that a member got together: no slot is taken, an offer is."""
        with self._lock:
            for swarm in self._swarms.values():
                if peer_id not in swarm.members:
                    continue
                mask = 0
                for digest in digests:
                    if (index := swarm.wanted.find(digest)) >= 0:
                        mask |= swarm.mask(index, None)
                if mask:
                    swarm.offered_at.pop(peer_id, None)
                    swarm.slots.gave(peer_id, mask)
        self._wake()

    def _find(self, peer_id: str, digest: bytes) -> tuple[_Swarm, int] | None:
        for swarm in self._swarms.values():
            if peer_id in swarm.members and (index := swarm.wanted.find(digest)) >= 0:
                return swarm, index
        return None

    def _begin(self, swarm: _Swarm) -> None:
        for waiting in swarm.slots.begin():
            upload = swarm.uploads.get((waiting.peer, waiting.ticket))
            if upload is not None:
                upload.begun_at = self._clock()
                upload.has_begun.set()


def _average(before: float | None, latest: float) -> float:
    return latest if before is None else before + GAIN * (latest - before)
