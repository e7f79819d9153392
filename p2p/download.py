"""One download: the shell that drives the planner with real sources.

The planner decides; the workers move bytes in threads; this loop carries events to
the one and actions to the other. Who the sources are, and what becomes of those that
fail, is `download_sources`'s affair.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import trio

from tensorswarm.store.wanted import Wanted

from .bulk.sink import (
    ChunkCame,
    EventQueue,
    Progressed,
    RequestDone,
    SmallCame,
    SourceFailed,
    StoreSink,
)
from .companions import Companions
from .control.holdings import set_bits
from .control.neighbours import Neighbours
from .download_sources import DownloadSources
from .known_source import OriginSpec
from .limits.rates import RateLimiter
from .news import TELL_CROWD_INTERVAL_S, TELL_INTERVAL_S, News
from .results import SourceReport
from .roster import Roster
from .routes import Routes
from .swarm.planner import Ask, Cancel, Drop, PassOn, Planner, PlannerLimits
from .swarm.source import Outcome, SmallBatch
from .uploads import Uploads

LAST_NEWS_S = 1.0
"""Time for the last news of a download, in which everybody has seen the earlier ones."""

ROSTER_INTERVAL_S = 0.1
"""How often it is looked who else fetches the same, at most."""

PORTION_INTERVAL_S = 0.02
"""How often it is looked whether more should be made ready, at most."""

TICK_S = 1.0
"""Longest sleep of the loop, so that the time-outs that concern the whole are noticed."""

MOVED_BYTES = 16 << 10
"""Bytes after which a download counts as moving, though no chunk is complete: a chunk
takes a minute at the lowest rate that can be set. A byte a second never gets there."""


class Download:
    """Bring a list of objects into the store.

    Parameters
    ----------
    wanted : Wanted
        The objects, each partly proved perhaps; positions are the object indices.
    neighbours : Neighbours
        The peers, and where they say what they hold.
    routes : Routes
        The ways to a peer's bytes.
    origins : sequence of OriginSpec
        Origins to use at once.
    rng : random.Random
        Source of the planner's ties.
    on_progress : callable
        Called with verified bytes as they come.
    urgency : mapping of bytes to int
        Objects that matter more or less than others, by digest; a lower number comes
        first, 0 is normal.
    limiter : RateLimiter, optional
        Holds what is received below a rate.
    swarm_key : bytes, optional
        What others subscribe to who fetch the same: the model's digest. With them it
        shares the origins' bytes; without a key or an origin it shares with nobody.
    near_first : bool, optional
        Whether the origins are spared for the sake of peers, and far peers for near ones.
    uploads : Uploads, optional
        Offers what we have to those with whom we share.
    companions : Companions, optional
        Knows those of them whom we have not met.
    """

    def __init__(
        self,
        wanted: Wanted,
        *,
        neighbours: Neighbours,
        routes: Routes,
        origins: Sequence[OriginSpec],
        rng: random.Random,
        on_progress: Callable[[int], None],
        urgency: Mapping[bytes, int],
        limiter: RateLimiter | None = None,
        swarm_key: bytes = b"",
        near_first: bool = False,
        uploads: Uploads | None = None,
        companions: Companions | None = None,
    ) -> None:
        self._uploads = uploads
        self._companions = companions
        self._wanted = wanted
        self._neighbours = neighbours
        self._origins = origins
        self._on_progress = on_progress
        self._events = EventQueue()
        self._sink = StoreSink(wanted)
        limits = PlannerLimits(near_first=near_first)
        self._planner = Planner(
            wanted.sizes(),
            rng=rng,
            proved=wanted.begun_bitmaps(),
            priorities={
                i: level for digest, level in urgency.items() if (i := wanted.find(digest)) >= 0
            },
            limits=limits if limiter is None else limits.slowed_to(limiter.bytes_per_s),
            keys=wanted.digests,
            unready=wanted.unready(),
        )
        self._news = News(wanted)
        self._swarm_key = swarm_key
        self._roster = Roster()
        self._sources = DownloadSources(
            wanted,
            self._planner,
            self._sink,
            self._events,
            neighbours=neighbours,
            routes=routes,
            origins=origins,
            limiter=limiter,
            swarm_key=swarm_key,
            on_news=self._roster.heard,
        )
        self._roster_at = 0.0
        self._members: frozenset[str] = frozenset()
        self._offers_uploads = False
        self._portion_due = trio.Event()
        self._portion_at = 0.0
        self._moved_at = trio.current_time()
        self._came_bytes = 0  # since it moved
        self.search_is_over = False
        """Set by whoever looks for sources, once nobody is left to ask for now."""

    # ---- the loop

    def open(self) -> None:
        """Begin to listen to neighbours and to connect to sources; nothing is asked yet."""
        self._sources.open()

    def close(self) -> None:
        """Let go of every source."""
        self._sources.close()
        if self._offers_uploads and self._uploads is not None:
            self._offers_uploads = False
            self._uploads.leave(self._swarm_key)

    async def run(self, timeout_s: float) -> None:
        """Work until everything is proved and in the store.

        Parameters
        ----------
        timeout_s : float
            How long nothing may arrive before the download is given up.

        Raises
        ------
        NoRoom, LocalError
            Our own disk failed.
        HashMismatch, Refused, NotFound, NoSource
            Something is missing and no source is left that could give it.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_news)
                await self._loop(timeout_s)
                nursery.cancel_scope.cancel()
            await self._settle()
            if self._roster.members:  # the last chunks, or others go to the origin for them
                self._neighbours.tell(self._news.take())
                with trio.move_on_after(LAST_NEWS_S):
                    await self._neighbours.wait_told()
        finally:
            self.close()

    async def _loop(self, timeout_s: float) -> None:
        latest = self._moved_at = trio.current_time()
        while not self._planner.is_done():
            for at, event in self._events.take():
                latest = max(latest, at)
                self._take_event(latest, event)
            now = latest = max(latest, trio.current_time())
            if self._sink.error is not None:
                raise self._sink.error
            if self._planner.is_done():
                return
            self._sources.retry(now)
            self._look_who_is_here(now)
            for action in self._planner.actions(now):
                self._act(now, action)
            self._see_to_portions(now)
            self._check_stuck(now, timeout_s)
            deadline = self._planner.next_deadline(now)
            with trio.move_on_at(min(deadline or now + TICK_S, now + TICK_S)):
                await self._events.wait()

    def _look_who_is_here(self, now: float) -> None:
        """Tell the planner who else fetches the same, when that has changed."""
        if not (self._origins and self._swarm_key) or now < self._roster_at:
            return
        self._roster_at = now + ROSTER_INTERVAL_S
        failed = self._sources.given_up()
        self._roster.update(now, self._neighbours.wanting(self._swarm_key), failed)
        members = self._roster.members
        if self._companions is not None:
            members |= self._companions.unmet(now) - failed
        if members != self._members:
            self._members = members
            self._planner.set_members(now, self._swarm_key, self._neighbours.me, members)
        if self._roster.members and self._uploads is not None and not self._offers_uploads:
            self._offers_uploads = True
            self._uploads.open(self._swarm_key, self._wanted, self._sources.holdings())

    async def _settle(self) -> None:
        """Wait until the whole objects are verified and in the index."""
        await trio.to_thread.run_sync(self._wanted.wait_ended)

    def _take_event(self, now: float, event: object) -> None:
        match event:
            case Progressed(source, request_id, byte_count):
                self._came_bytes += byte_count
                if self._came_bytes >= MOVED_BYTES:
                    self._came_bytes = 0
                    self._moved_at = now
                self._planner.progress(now, source, request_id, byte_count)
            case ChunkCame(source, _, index, chunk, outcome, byte_count):
                self._take_chunk(now, source, index, chunk, outcome, byte_count)
            case SmallCame(source, _, batch):
                self._take_small(now, source, batch)
            case RequestDone(source, request_id):
                self._note_proved_elsewhere(now, source, request_id)
                self._planner.request_done(now, source, request_id)
            case SourceFailed(source, None, failure, detail):
                self._sources.failed(now, source, failure, detail)
            case SourceFailed(source, int(request_id), failure, detail):
                self._note_proved_elsewhere(now, source, request_id)
                self._sources.request_failed(now, source, request_id, failure, detail)

    def _note_proved_elsewhere(self, now: float, source: str, request_id: int) -> None:
        """Tell the planner of chunks of a request that another download has brought.

        Downloads of one node that want the same object share it in the store, and a
        worker does not ask for a chunk that is there already.
        """
        for index, chunk in self._planner.unanswered(source, request_id):
            if not self._wanted.is_missing(index, chunk):
                self._planner.chunk_proved(now, None, index, chunk, 0)

    def _take_chunk(
        self, now: float, source: str, index: int, chunk: int, outcome: Outcome, byte_count: int
    ) -> None:
        if outcome is Outcome.PROVED:
            self._moved_at = now
            self._planner.chunk_proved(now, source, index, chunk, byte_count)
            self._roster.proved()
            self._offer(index, chunk)
            self._news.note([index])
            self._sources.gave(source)
            self._on_progress(byte_count)
        elif outcome is Outcome.DUPLICATE:
            self._planner.chunk_duplicate(now, source, index, chunk, byte_count)
            self._planner.chunk_proved(now, None, index, chunk, 0)
        else:
            self._planner.chunk_refused(now, source, index, chunk)
            self._sources.refused(source, index)

    def _offer(self, index: int, chunk: int) -> None:
        """Let others have what has just been proved."""
        if self._offers_uploads and self._uploads is not None:
            self._uploads.proved(self._swarm_key, index, chunk)

    def _take_small(self, now: float, source: str, batch: SmallBatch) -> None:
        for index, outcome, byte_count in batch.others:
            self._take_chunk(now, source, index, 0, outcome, byte_count)
        if not batch.proved:
            return
        self._moved_at = now
        self._planner.small_proved(now, source, batch.proved)
        self._roster.proved()  # one answer, however many there are in it
        for index in batch.proved if self._offers_uploads else ():
            self._offer(index, 0)
        self._news.note(batch.proved)
        self._sources.gave(source)
        self._on_progress(batch.proved_bytes)

    def _act(self, now: float, action: object) -> None:
        match action:
            case Ask(request=request):
                self._sources.ask(request)
            case Cancel(source=name, request_id=request_id):
                self._sources.cancel(name, request_id)
            case Drop(source=name, failure=failure, detail=detail):
                self._sources.give_up(now, name, failure, detail)
            case PassOn(source=name, object_index=index):
                self._sources.pass_on(name, index)

    # ---- getting ready

    @property
    def is_unready(self) -> bool:
        """Whether anything cannot be asked for yet."""
        return self._planner.readiness.is_unready

    def next_portion(self) -> list[int]:
        """Return the objects that should be prepared next."""
        return self._planner.readiness.next_portion()

    def make_ready(self, indices: Sequence[int], proved: Mapping[int, bytes]) -> None:
        """Note objects that are prepared, and what was here of them."""
        now = trio.current_time()
        for index, bits in proved.items():
            before_bytes = self._planner.missing_bytes
            for chunk in set_bits(bits):
                self._planner.chunk_proved(now, None, index, chunk, 0)
            self._on_progress(before_bytes - self._planner.missing_bytes)
            self._news.note([index])
        self._planner.make_ready(now, indices)
        self._moved_at = now
        self._events.wake()

    async def wait_portion_due(self) -> None:
        """Wait until another portion should be prepared."""
        self._portion_due = trio.Event()
        if not self._origins:  # one that ignores ranges sends what cannot be taken yet
            self._events.wake()
            await self._portion_due.wait()

    def _see_to_portions(self, now: float) -> None:
        if now >= self._portion_at and not self._portion_due.is_set():
            self._portion_at = now + PORTION_INTERVAL_S
            if self._planner.readiness.is_due():
                self._portion_due.set()

    # ---- when nothing moves

    def lacking(self) -> list[int]:
        """Return the objects of which no present source has what is missing."""
        return self._planner.unobtainable()

    def missing_bytes_of(self, index: int) -> int:
        """Return how many bytes of an object are still missing."""
        return self._wanted.missing_bytes(index)

    def _check_stuck(self, now: float, timeout_s: float) -> None:
        waited = now - self._moved_at
        if waited < timeout_s:
            if not self.search_is_over or self._has_work(now) or self.is_unready:
                return
            if self._sources.has_any() and not self.lacking():
                return
        has_looked = bool(self._neighbours.all()) and self.search_is_over
        raise self._sources.why_stuck(waited, has_looked=has_looked)

    def _has_work(self, now: float) -> bool:
        """Tell whether something is in flight or a source will be tried again."""
        if self._planner.next_deadline(now) is not None:
            return True
        return self._sources.has_hope()

    # ---- news for others, and the account

    async def _tell_news(self) -> None:
        while True:
            await self._news.wait()
            await trio.sleep(TELL_CROWD_INTERVAL_S if self._roster.members else TELL_INTERVAL_S)
            if not self._neighbours.somebody_listens():
                self._news.skip()
            elif entries := self._news.take():
                self._neighbours.tell(entries)

    def reports(self) -> tuple[list[SourceReport], int]:
        """Return what each source gave, and the bytes received in vain."""
        statistics = self._planner.statistics()
        wasted_bytes = statistics.duplicate_bytes + statistics.refused_bytes
        return self._sources.reports(statistics.sources), wasted_bytes
