"""One download: the shell that drives the planner with real sources.

The planner decides; the workers move bytes in threads; this loop carries events to
the one and actions to the other. Sources join when a neighbour says what it holds,
and when an origin is given. A source that failed for a passing reason is tried
again after a while; a liar never.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

import trio

from tensorswarm.store import bitmap
from tensorswarm.store.digest import chunk_count
from tensorswarm.store.wanted import Wanted

from . import claims
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
from .control import wire
from .control.holdings import Holdings, set_bits
from .control.neighbours import Neighbours
from .download_sources import KnownSource, OriginSpec, given_up, reports_of, why_stuck
from .limits.rates import RateLimiter
from .news import TELL_CROWD_INTERVAL_S, TELL_INTERVAL_S, News
from .origins.origin import Place, runs_of
from .origins.source import OriginSource
from .results import SourceReport
from .roster import Roster
from .routes import Distance, Routes, Via
from .swarm.planner import Ask, Cancel, Drop, PassOn, Planner, PlannerLimits, SourceKind
from .swarm.source import Failure, Outcome, SmallBatch
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
        self._routes = routes
        self._origins = origins
        self._on_progress = on_progress
        self._limiter = limiter
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
        self._sources: dict[str, KnownSource] = {}
        self._refused: dict[str, int] = {}
        self._news = News(wanted)
        self._swarm_key = swarm_key
        self._roster = Roster()
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
        self._neighbours.have_listeners.append(self._on_have)
        self._neighbours.have_model_listeners.append(self._on_have_model)
        self._neighbours.offer_listeners.append(self._on_offer)
        self._routes.changed.append(self._on_route)
        for origin in self._origins:
            self._start_origin(origin)

    def close(self) -> None:
        """Let go of every source."""
        if self._on_have in self._neighbours.have_listeners:
            self._neighbours.have_listeners.remove(self._on_have)
            self._neighbours.have_model_listeners.remove(self._on_have_model)
            self._neighbours.offer_listeners.remove(self._on_offer)
            self._routes.changed.remove(self._on_route)
            if self._uploads is not None:
                self._uploads.leave(self._swarm_key)
        for source in self._sources.values():
            if source.worker is not None:
                source.worker.close()
                source.worker = None

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
            self._retry_sources(now)
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
        failed = given_up(self._sources)
        self._roster.update(now, self._neighbours.wanting(self._swarm_key), failed)
        members = self._roster.members
        if self._companions is not None:
            members |= self._companions.unmet(now) - failed
        if members != self._members:
            self._members = members
            self._planner.set_members(now, self._swarm_key, self._neighbours.me, members)
        if self._roster.members and self._uploads is not None and not self._offers_uploads:
            self._offers_uploads = True
            known = {name: dict(each.holds.items()) for name, each in self._sources.items()}
            self._uploads.open(self._swarm_key, self._wanted, known)

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
                self._planner.remove_source(now, source)
                if failure is not Failure.UNREACHABLE or not self._fall_back(now, source):
                    self._give_up(now, source, failure, detail)
            case SourceFailed(source, int(request_id), failure, detail):
                self._request_failed(now, source, request_id, failure, detail)

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
            giver = self._sources.get(source)
            if giver is not None:
                giver.came_back()
                self._neighbours.has_given(source)
            self._on_progress(byte_count)
        elif outcome is Outcome.DUPLICATE:
            self._planner.chunk_duplicate(now, source, index, chunk, byte_count)
            self._planner.chunk_proved(now, None, index, chunk, 0)
        else:
            self._planner.chunk_refused(now, source, index, chunk)
            self._refused[source] = index

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
        for index in batch.proved:
            self._offer(index, 0)
        self._news.note(batch.proved)
        giver = self._sources.get(source)
        if giver is not None:
            giver.came_back()
        self._on_progress(batch.proved_bytes)

    def _act(self, now: float, action: object) -> None:
        match action:
            case Ask(request=request):
                source = self._sources.get(request.source)
                if source is not None and source.worker is not None:
                    source.worker.submit(request)
            case Cancel(source=name, request_id=request_id):
                source = self._sources.get(name)
                if source is not None and source.worker is not None:
                    source.worker.cancel(request_id)
            case Drop(source=name, failure=failure, detail=detail):
                self._give_up(now, name, failure, detail)
            case PassOn(source=name, object_index=index):
                self._pass_on(name, index)

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

    # ---- sources

    def _start_origin(self, origin: OriginSpec) -> None:
        now = trio.current_time()
        source = KnownSource(SourceKind.ORIGIN, holds=self._holds(self._places(origin)))
        self._sources[origin.url] = source
        self._restart(now, origin.url, source)

    def _places(self, origin: OriginSpec) -> dict[int, Place]:
        """Return where the wanted objects lie at an origin, by object index."""
        return {
            index: place
            for digest, place in origin.places.items()
            if (index := self._wanted.find(digest)) >= 0
        }

    def _holds(self, whole: Iterable[int] = ()) -> Holdings:
        return Holdings(len(self._wanted), whole)

    def _restart(self, now: float, name: str, source: KnownSource) -> None:
        """Begin with a source: connect, and tell the planner what it holds."""
        source.retry_at = None
        if source.kind is SourceKind.ORIGIN:
            origin = next(origin for origin in self._origins if origin.url == name)
            source.worker = OriginSource(
                name,
                self._places(origin),
                origin.urls,
                self._sink,
                self._events,
                limiter=self._limiter,
            )
        else:
            source.via, source.worker = self._routes.start(now, name, self._sink, self._events)
        distance = self._distance(name, source)
        self._planner.add_source(now, name, source.kind, distance=distance)
        whole = [range(*run) for run in source.holds.runs()]
        self._tell_planner(now, name, source, whole, source.holds.parts.items())

    def _distance(self, name: str, source: KnownSource) -> Distance:
        if source.kind is SourceKind.ORIGIN:
            return Distance.ORIGIN
        return self._routes.distance(name)

    def _fall_back(self, now: float, name: str) -> bool:
        """Ask a peer over a stream whose bulk plane cannot be reached; False if it has none."""
        source = self._sources.get(name)
        if source is None or source.worker is None or source.via is not Via.BULK:
            return False
        self._routes.bulk_failed(now, name)
        source.worker.close()
        self._restart(now, name, source)
        return True

    def _on_have(self, peer_id: str, entries: Sequence[wire.HaveEntry]) -> None:
        """Hear what a neighbour holds (answers and news alike)."""
        self._hear(peer_id, claims.by_digests(self._wanted, entries))

    def _on_have_model(self, peer_id: str, message: wire.HaveModel) -> None:
        """Hear the same of a model's objects, told by its manifest."""
        if message.model == self._swarm_key:
            self._hear(peer_id, claims.by_manifest(self._wanted, message))

    def _hear(self, peer_id: str, said: claims.Claims) -> None:
        now = trio.current_time()
        source = self._sources.get(peer_id)
        fresh = source is None
        if source is None:
            source = KnownSource(SourceKind.PEER, holds=self._holds())
        holds = source.holds
        for index in said.useless:
            if index in holds:  # what is said replaces what was said before
                holds.discard(index)
                self._planner.source_lacks(now, peer_id, index)
        is_news = [holds.add(index, proved) for index, proved in said.parts]
        is_news += [holds.add_run(run.start, run.stop) for run in said.whole]
        if any(is_news):
            self._roster.heard(now, peer_id)
        if source.worker is not None:
            self._tell_planner(now, peer_id, source, said.whole, said.parts)
        if not is_news or source.banned:
            return
        self._sources[peer_id] = source
        if fresh and (held_until := self._routes.held_until(peer_id)) > now:
            source.retry_at = held_until  # or sooner, see `_on_route`
        elif fresh:
            self._restart(now, peer_id, source)
        self._events.wake()

    def _tell_planner(
        self,
        now: float,
        name: str,
        source: KnownSource,
        whole: Iterable[range],
        parts: Iterable[tuple[int, bytes]],
    ) -> None:
        """Tell the planner what a source holds besides what it knows of."""
        if source.holds.whole_count == len(self._wanted):
            self._planner.source_holds_all(now, name)
            return
        for run in whole:
            self._planner.source_holds_whole(now, name, run)
        for index, proved in parts:
            self._planner.source_holds(now, name, index, proved)

    def _on_route(self, peer_id: str) -> None:
        """Hear that a peer behind a relay can be reached directly now, or will not be."""
        now, source = trio.current_time(), self._sources.get(peer_id)
        if source is None or source.dropped:
            return
        if source.worker is not None and self._routes.without_bulk(peer_id) is Via.RELAY:
            return
        if source.worker is not None:
            source.worker.close()
            self._planner.remove_source(now, peer_id)
        self._restart(now, peer_id, source)
        self._events.wake()

    def _on_offer(self, peer_id: str, message: wire.Offer | wire.Pass) -> None:
        """Hear that a neighbour has an upload to spare; who offers a chunk has it."""
        if not isinstance(message, wire.Offer):
            return  # for our own uploads
        index, source = self._wanted.find(message.digest), self._sources.get(peer_id)
        count = chunk_count(self._wanted.size_bytes(index)) if index >= 0 else 0
        if message.chunk >= count:
            return
        # It may overtake the news of the chunk; of several chunks, these tell by which list.
        if source is None or source.worker is None or count > 1 and index not in source.holds:
            self._pass_on(peer_id, index)
            return
        now = trio.current_time()
        bits = bytearray(message.chunk // 8 + 1)
        bitmap.set_bit(bits, message.chunk)
        self._planner.source_holds(now, peer_id, index, bytes(bits))
        self._planner.source_offers(now, peer_id, index, message.chunk)
        self._events.wake()

    def _pass_on(self, peer_id: str, index: int) -> None:
        neighbour = self._neighbours.get(peer_id)
        if neighbour is not None:
            neighbour.notify(wire.Pass(self._wanted.digest(index)))

    def _request_failed(
        self, now: float, name: str, request_id: int, failure: Failure, detail: str
    ) -> None:
        source = self._sources.get(name)
        if source is not None:
            source.failure = failure
            source.reason = detail
        self._note_proved_elsewhere(now, name, request_id)
        self._planner.request_failed(now, name, request_id, failure, detail)
        is_origin = source is not None and source.kind is SourceKind.ORIGIN
        if source is not None and is_origin and failure is Failure.BAD_BYTES:
            self._give_up_file(now, name, source, detail)

    def _give_up_file(self, now: float, name: str, source: KnownSource, detail: str) -> None:
        """Take nothing more of a file that an origin has with other bytes in it."""
        origin = next(origin for origin in self._origins if origin.url == name)
        places = self._places(origin)
        bad = places.get(self._refused.get(name, -1))
        bad_paths = set() if bad is None else {run.path for run in runs_of(bad)}
        for index, place in places.items():
            lies_there = any(run.path in bad_paths for run in runs_of(place))
            if lies_there and index in source.holds:
                source.holds.discard(index)
                self._planner.source_lacks(now, name, index)
        if not source.holds:
            self._planner.remove_source(now, name)
            self._give_up(now, name, Failure.BAD_BYTES, detail)

    def _give_up(self, now: float, name: str, failure: Failure, detail: str) -> None:
        source = self._sources.get(name)
        if source is None or source.worker is None:
            return
        source.worker.close()
        source.worker = None
        source.give_up(now, failure, detail)

    def _retry_sources(self, now: float) -> None:
        for name, source in self._sources.items():
            if source.retry_at is None or source.retry_at > now:
                continue
            if source.kind is SourceKind.PEER and not self._neighbours.is_neighbour(name):
                source.retry_at = None
                continue
            self._restart(now, name, source)

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
            if any(s.worker is not None for s in self._sources.values()) and not self.lacking():
                return
        has_looked = bool(self._neighbours.all()) and self.search_is_over
        raise why_stuck(self._sources, self._planner.missing_bytes, waited, has_looked=has_looked)

    def _has_work(self, now: float) -> bool:
        """Tell whether something is in flight or a source will be tried again."""
        if self._planner.next_deadline(now) is not None:
            return True
        return any(source.is_hoped_for for source in self._sources.values())

    # ---- news for others, and the account

    async def _tell_news(self) -> None:
        while True:
            in_crowd = bool(self._roster.members)
            await trio.sleep(TELL_CROWD_INTERVAL_S if in_crowd else TELL_INTERVAL_S)
            if not self._neighbours.somebody_listens():
                self._news.skip()
            elif entries := self._news.take():
                self._neighbours.tell(entries)

    def reports(self) -> tuple[list[SourceReport], int]:
        """Return what each source gave, and the bytes received in vain."""
        statistics = self._planner.statistics()
        wasted_bytes = statistics.duplicate_bytes + statistics.refused_bytes
        return reports_of(statistics.sources, self._sources), wasted_bytes
