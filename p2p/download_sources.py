"""The sources of one download: who they are, what they hold, and what becomes of them.

Rules
-----
- Sources join when a neighbour says what it holds, and when an origin is given.
- What is said of the objects wanted is told to the planner; a neighbour's word replaces its
  earlier word. Who offers a chunk has it.
- A source that failed for a passing reason is tried again after a while; a liar never.
- A peer whose bulk plane cannot be reached is asked over a stream. While it is tried to
  reach a peer behind a relay directly, it has to wait, though not for long.
- An origin that has other bytes in a file gives nothing more of that file.

All on trio's thread. The table is bounded by the neighbours that have been, and the origins.

Not here: what is asked of whom (`swarm.planner`), and moving bytes (the workers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import trio

from tensorswarm.store import bitmap
from tensorswarm.store.digest import chunk_count
from tensorswarm.store.errors import (
    HashMismatch,
    NoSource,
    NotFound,
    Refused,
    TensorswarmError,
)
from tensorswarm.store.wanted import Wanted

from . import claims
from .bulk.sink import EventQueue, StoreSink
from .control import wire
from .control.holdings import Holdings
from .control.neighbours import Neighbours
from .known_source import KnownSource, OriginSpec
from .limits.rates import RateLimiter
from .origins.origin import Place, display_url, runs_of
from .origins.source import OriginSource
from .results import SourceReport
from .routes import Distance, Routes, Via
from .swarm.planner import Planner, SourceKind
from .swarm.source import Failure, Request
from .swarm.types import SourceStatistics


class DownloadSources:
    """The sources of one download.

    Parameters
    ----------
    wanted : Wanted
        What is downloaded; positions in it are the object indices.
    planner : Planner
        Decides what is asked of whom.
    sink, events : StoreSink, EventQueue
        What workers give bytes and events to.
    neighbours : Neighbours
        The peers, and where they say what they hold.
    routes : Routes
        The ways to a peer's bytes.
    origins : sequence of OriginSpec
        Origins to use at once.
    limiter : RateLimiter or None
        Holds what is received below a rate.
    swarm_key : bytes
        The model's digest, for what is told by its manifest.
    on_news : callable
        Hears when, and who, told of something that is news.
    """

    def __init__(
        self,
        wanted: Wanted,
        planner: Planner,
        sink: StoreSink,
        events: EventQueue,
        *,
        neighbours: Neighbours,
        routes: Routes,
        origins: Sequence[OriginSpec],
        limiter: RateLimiter | None,
        swarm_key: bytes,
        on_news: Callable[[float, str], None],
    ) -> None:
        self._wanted = wanted
        self._planner = planner
        self._sink = sink
        self._events = events
        self._neighbours = neighbours
        self._routes = routes
        self._origins = origins
        self._limiter = limiter
        self._swarm_key = swarm_key
        self._on_news = on_news
        self._sources: dict[str, KnownSource] = {}
        self._refused: dict[str, int] = {}

    def open(self) -> None:
        """Begin to listen to neighbours and to connect to origins; nothing is asked yet."""
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
        for source in self._sources.values():
            if source.worker is not None:
                source.worker.close()
                source.worker = None

    # ---- what is asked, and what comes of it

    def ask(self, request: Request) -> None:
        """Have a source's worker fetch something."""
        source = self._sources.get(request.source)
        if source is not None and source.worker is not None:
            source.worker.submit(request)

    def cancel(self, name: str, request_id: int) -> None:
        """Have a source's worker leave a request."""
        source = self._sources.get(name)
        if source is not None and source.worker is not None:
            source.worker.cancel(request_id)

    def gave(self, name: str) -> None:
        """Note that a source gave something that was proved."""
        source = self._sources.get(name)
        if source is not None:
            source.came_back()
            self._neighbours.has_given(name)

    def refused(self, name: str, index: int) -> None:
        """Note that what a source gave of an object was false."""
        self._refused[name] = index

    def request_failed(
        self, now: float, name: str, request_id: int, failure: Failure, detail: str
    ) -> None:
        """Note that a source did not answer a request as it should."""
        source = self._sources.get(name)
        if source is not None:
            source.failure = failure
            source.reason = detail
        self._planner.request_failed(now, name, request_id, failure, detail)
        is_origin = source is not None and source.kind is SourceKind.ORIGIN
        if source is not None and is_origin and failure is Failure.BAD_BYTES:
            self._give_up_file(now, name, source, detail)

    def failed(self, now: float, name: str, failure: Failure, detail: str) -> None:
        """Note that a source cannot be asked at all."""
        self._planner.remove_source(now, name)
        if failure is not Failure.UNREACHABLE or not self._fall_back(now, name):
            self.give_up(now, name, failure, detail)

    def give_up(self, now: float, name: str, failure: Failure, detail: str) -> None:
        """Leave a source, for good or until its time has come again."""
        source = self._sources.get(name)
        if source is None or source.worker is None:
            return
        source.worker.close()
        source.worker = None
        source.give_up(now, failure, detail)

    def retry(self, now: float) -> None:
        """Begin again with those whose time has come."""
        for name, source in self._sources.items():
            if source.retry_at is None or source.retry_at > now:
                continue
            if source.kind is SourceKind.PEER and not self._neighbours.is_neighbour(name):
                source.retry_at = None
                continue
            self._restart(now, name, source)

    def pass_on(self, peer_id: str, index: int) -> None:
        """Tell a neighbour that its offer of an object will not be taken."""
        neighbour = self._neighbours.get(peer_id)
        if neighbour is not None:
            neighbour.notify(wire.Pass(self._wanted.digest(index)))

    # ---- what is known of them

    def given_up(self) -> set[str]:
        """Return who failed for good or for now; who stalled may only be busy."""
        return {
            name
            for name, source in self._sources.items()
            if source.dropped and source.failure is not Failure.STALLED
        }

    def holdings(self) -> dict[str, dict[int, bytes | None]]:
        """Return what each holds, by object index."""
        return {name: dict(each.holds.items()) for name, each in self._sources.items()}

    def has_any(self) -> bool:
        """Tell whether anybody can be asked at the moment."""
        return any(source.worker is not None for source in self._sources.values())

    def has_hope(self) -> bool:
        """Tell whether anybody will be tried again who is likely to give something."""
        return any(source.is_hoped_for for source in self._sources.values())

    def why_stuck(self, waited_s: float, *, has_looked: bool) -> TensorswarmError:
        """Return the error with which a download ends that gets nothing any more.

        `has_looked` says that neighbours were asked, and that the search for others is over.
        """
        known = self._sources
        tail = f"; {self._planner.missing_bytes} bytes are missing"
        liars = [name for name, each in known.items() if each.failure is Failure.BAD_BYTES]
        if liars:
            names = ", ".join(display_url(name) for name in liars)
            return HashMismatch(
                f"{names} sent bytes that do not match their hash and no good source is left{tail}"
            )
        reasons = "; ".join(
            f"{display_url(name)}: {each.reason}" for name, each in known.items() if each.reason
        )
        if any(each.failure is Failure.REFUSED_ACCESS for each in known.values()):
            return Refused(f"who has it refused us access: {reasons}{tail}")
        if has_looked:
            what = "no source that can be reached has all of it"
            return NotFound(f"{what}{tail}. {reasons}".rstrip())
        return NoSource(f"no source gave anything for {waited_s:.0f} s{tail}. {reasons}".rstrip())

    def reports(self, counted: Iterable[SourceStatistics]) -> list[SourceReport]:
        """Return what each source gave, and those that were dropped.

        An origin that had nothing of what was asked of it counts as dropped: whoever named it
        wants to know that its files are not there, or are others.
        """
        reports = []
        for each in counted:
            known = self._sources.get(each.source)
            dropped = known is not None and known.dropped
            if known is not None and known.kind is SourceKind.ORIGIN and not each.proved_bytes:
                dropped |= bool(known.reason)
            if each.proved_bytes or dropped:
                reports.append(
                    SourceReport(
                        each.kind.value,
                        display_url(each.source),
                        each.proved_bytes,
                        dropped,
                        known.reason if known is not None else "",
                        known.via.value if known is not None and known.via else None,
                    )
                )
        return reports

    # ---- beginning with a source

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
            self.give_up(now, name, Failure.BAD_BYTES, detail)

    # ---- what neighbours say

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
            self._on_news(now, peer_id)
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
            self.pass_on(peer_id, index)
            return
        now = trio.current_time()
        bits = bytearray(message.chunk // 8 + 1)
        bitmap.set_bit(bits, message.chunk)
        self._planner.source_holds(now, peer_id, index, bytes(bits))
        self._planner.source_offers(now, peer_id, index, message.chunk)
        self._events.wake()
