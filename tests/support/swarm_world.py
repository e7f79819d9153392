"""A tiny world in virtual time that drives the planner: no sockets, no clock, no threads.

Sources answer one request after the other, each at its own rate and after its own
latency; they may hold only a part, gain more, claim more than they hold, make offers,
join late, leave, fall silent, or lie; other members of the swarm may come and go. Links
do not share a bottleneck: the sum of the rates is what a perfect plan reaches.

The world keeps its own books and checks every action against them, so a broken rule
fails at the action that breaks it, with `AssertionError`.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tensorswarm.p2p.swarm.planner import (
    Ask,
    Cancel,
    Drop,
    PassOn,
    Planner,
    PlannerLimits,
    SourceKind,
)
from tensorswarm.p2p.swarm.source import Failure, Request
from tensorswarm.store.digest import CHUNK_SIZE, chunk_count, chunk_length

MIB = 1 << 20
Chunk = tuple[int, int]


@dataclass
class SimulatedSource:
    """What a source is like; times in virtual seconds.

    Attributes
    ----------
    holds : mapping or None
        Per object the chunks it has; None for everything.
    claims : mapping or None
        What it says it holds, where that differs.
    lies : set of (int, int)
        Chunks that it gives wrongly.
    stalls_at, wakes_at : float
        From when to when it sends nothing, without saying so.
    gains : sequence of (float, (int, int))
        When it gets which chunks besides, and says so if it is here then.
    makes_offers : bool
        Whether it says at once that it is to be asked when it offers.
    offers_every_s : float
        Time between its offers; infinity for none.
    """

    name: str
    rate_bytes_per_s: float
    latency_s: float = 0.02
    kind: SourceKind = SourceKind.PEER
    distance: int = 0
    holds: Mapping[int, frozenset[int]] | None = None
    claims: Mapping[int, frozenset[int]] | None = None
    lies: frozenset[Chunk] = frozenset()
    joins_at: float = 0.0
    leaves_at: float = math.inf
    stalls_at: float = math.inf
    wakes_at: float = math.inf
    gains: Sequence[tuple[float, Chunk]] = ()
    makes_offers: bool = False
    offers_every_s: float = math.inf

    def has(self, now: float, chunk: Chunk) -> bool:
        """Tell whether it can give a chunk."""
        return self._is_in(now, chunk, self.holds)

    def says_it_has(self, now: float, chunk: Chunk) -> bool:
        """Tell whether it has said that it holds a chunk, if it is here."""
        return self._is_in(now, chunk, self.holds if self.claims is None else self.claims)

    def _is_in(self, now: float, chunk: Chunk, held: Mapping[int, frozenset[int]] | None) -> bool:
        if held is None or chunk[1] in held.get(chunk[0], ()):
            return True
        return any(gained == chunk and at <= now for at, gained in self.gains)


@dataclass(eq=False)
class Worker:
    """A source's side of one connection.

    `asked` is what the planner still expects. `on_the_way` is what may still come: a
    cancelled request stays in it until the source is done with it, because a cancel
    takes nothing back that is sent already. Silence counts from `heard_at`, and slowness
    from `answered_at`.
    """

    source: SimulatedSource
    queue: deque[tuple[float, Request]] = field(default_factory=deque)
    asked: dict[int, set[Chunk]] = field(default_factory=dict)
    on_the_way: dict[int, set[Chunk]] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    heard_at: float = 0.0
    answered_at: float = 0.0
    is_busy: bool = False
    is_open: bool = True


class SwarmWorld:
    """A download in virtual time.

    Parameters
    ----------
    sizes_bytes : sequence of int
        The wanted objects.
    sources : sequence of SimulatedSource
        Who is there.
    seed : int
        Replays the run.
    proved, priorities, limits
        As for `Planner`.
    members : sequence of (float, frozenset of str)
        From when on which other members of the swarm are in sight.
    progress_bytes : int
        How often a source tells of progress; a chunk's end always does.
    """

    def __init__(
        self,
        sizes_bytes: Sequence[int],
        sources: Sequence[SimulatedSource],
        *,
        seed: int = 0,
        proved: Mapping[int, bytes] | None = None,
        priorities: Mapping[int, int] | None = None,
        limits: PlannerLimits | None = None,
        members: Sequence[tuple[float, frozenset[str]]] = (),
        progress_bytes: int = CHUNK_SIZE // 4,
    ) -> None:
        self.now = 0.0
        self.sizes = list(sizes_bytes)
        self.limits = limits or PlannerLimits()
        self.planner = Planner(
            self.sizes,
            rng=random.Random(seed),
            proved=proved or {},
            priorities=priorities or {},
            limits=self.limits,
        )
        self.proved: set[Chunk] = {
            (index, chunk)
            for index, bitmap in (proved or {}).items()
            for chunk in range(chunk_count(self.sizes[index]))
            if bitmap[chunk // 8] >> chunk % 8 & 1
        }
        self.missing = sum(map(chunk_count, self.sizes)) - len(self.proved)
        self.workers: dict[str, Worker] = {}
        self.sources = {source.name: source for source in sources}
        self.drops: list[tuple[float, Drop]] = []
        self.asks: list[tuple[float, Request]] = []
        self.cancels: list[Cancel] = []
        self.passes: list[PassOn] = []
        self.is_crowd = False
        self._offer_rng = random.Random(~seed)
        self.given: Counter[str] = Counter()
        self.action_calls = 0
        self._drop_counts: Counter[str] = Counter()
        self._progress_bytes = progress_bytes
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._event_count = 0
        for time, others in members:
            self.at(time, lambda others=others: self._see(others))  # type: ignore[misc]
        for source in sources:
            for time, chunk in source.gains:
                self.at(time, lambda s=source, chunk=chunk: self._gain(s, chunk))  # type: ignore[misc]
            self.at(source.joins_at, lambda source=source: self._join(source))  # type: ignore[misc]
            if source.leaves_at < math.inf:
                self.at(source.leaves_at, lambda source=source: self._leave(source))  # type: ignore[misc]

    # running

    def at(self, time: float, event: Callable[[], None]) -> None:
        """Let something happen at a time."""
        self._event_count += 1
        heapq.heappush(self._events, (time, self._event_count, event))

    def run(self, until: float = 1e6) -> float:
        """Run until the download is done, nothing can happen any more, or a time comes.

        Returns
        -------
        float
            The time at the end.
        """
        self._act()
        idle_calls = 0
        while not self.planner.is_done() and self.now < until:
            event_at = self._events[0][0] if self._events else math.inf
            deadline = self.planner.next_deadline(self.now)
            wake_at = math.inf if deadline is None else max(deadline, self.now)
            if event_at == wake_at == math.inf:
                break
            if event_at <= wake_at:
                self.now, _, event = heapq.heappop(self._events)
                event()
                idle_calls = 0
            else:
                idle_calls = idle_calls + 1 if wake_at == self.now else 0
                assert idle_calls < 10, "the planner wakes us up for nothing, again and again"
                self.now = wake_at
            self._act()
        return self.now

    def _act(self) -> None:
        self.action_calls += 1
        for action in self.planner.actions(self.now):
            if isinstance(action, Ask):
                self._check_request(action.request)
                self._submit(action.request)
            elif isinstance(action, Cancel):
                self.cancels.append(action)
                worker = self.workers.get(action.source)
                if worker is not None:
                    worker.asked.pop(action.request_id, None)
                    worker.cancelled.add(action.request_id)
            elif isinstance(action, PassOn):
                assert action.source in self.workers
                self.passes.append(action)
            else:
                self._dropped(action)
        in_flight = any(worker.asked for worker in self.workers.values())
        deadline = self.planner.next_deadline(self.now)
        if in_flight and not self.planner.is_done():
            assert deadline is not None, "a request is in flight without a deadline"
            longest_s = self.limits.stall_s * 2**self.limits.max_stall_doublings
            assert deadline <= self.now + longest_s + 1e-9
        if self.missing and any(map(self._can_give_all, self.workers.values())):
            assert deadline is not None, "it waits for nothing, and could ask"
            assert deadline <= self.now + self.limits.duty_longest_s + 1e-9

    # checks

    def chunks_of(self, request: Request) -> list[Chunk]:
        """Return the chunks of a request, in order."""
        return [
            (span.object_index, chunk)
            for span in request.spans
            for chunk in range(span.first_chunk, span.first_chunk + span.count)
        ]

    def length(self, chunk: Chunk) -> int:
        """Return the bytes of a chunk."""
        return chunk_length(self.sizes[chunk[0]], chunk[1])

    def _check_request(self, request: Request) -> None:
        worker = self.workers[request.source]
        chunks = self.chunks_of(request)
        assert chunks, "an empty request"
        assert len(set(chunks)) == len(chunks), "a chunk twice in one request"
        assert len(request.spans) <= self.limits.max_request_spans
        assert sum(map(self.length, chunks)) <= self.limits.max_request_chunks * CHUNK_SIZE
        assert all(self.length(chunk) > 0 for chunk in chunks), "no such chunk"
        assert request.request_id not in worker.asked
        assert len(worker.asked) < self.limits.max_requests_per_source
        for chunk in chunks:
            assert chunk not in self.proved, "a proved chunk is asked for"
            assert worker.source.says_it_has(self.now, chunk), "asked of a non-holder"
            holders = [
                name
                for name, other in self.workers.items()
                if any(chunk in chunks for chunks in other.on_the_way.values())
            ]
            assert request.source not in holders, "asked twice of the same source"
            assert len(holders) < self.limits.max_copies
            if holders and self.is_crowd:
                covered = {c for w in self.workers.values() for a in w.asked.values() for c in a}
                assert len(covered) == self.missing, "a copy in a crowd while something is free"

    def _can_give_all(self, worker: Worker) -> bool:
        source = worker.source
        return source.holds is None and source.claims is None and not source.lies

    def _check_drop(self, drop: Drop, worker: Worker) -> None:
        """Check the reason; sources that close connections themselves there are none."""
        if drop.failure is Failure.BAD_BYTES:
            assert worker.source.lies, "an honest source is called a liar"
        else:
            assert drop.failure is Failure.STALLED
            assert any(worker.on_the_way.values()), "dropped as silent, and asked for nothing"
            is_silent = self.now >= worker.heard_at + self.limits.stall_s - 1e-9
            is_slow = self.now >= worker.answered_at + self.limits.slow_chunk_s - 1e-9
            assert is_silent or is_slow

    # the swarm

    def _see(self, others: frozenset[str]) -> None:
        self.is_crowd = bool(others)
        self.planner.set_members(self.now, b"key", "me", others)

    def _gain(self, source: SimulatedSource, chunk: Chunk) -> None:
        if source.name in self.workers:
            self._tell_gain(source, chunk)

    def _tell_gain(self, source: SimulatedSource, chunk: Chunk) -> None:
        bitmap = (1 << chunk[1]).to_bytes(chunk[1] // 8 + 1, "little")
        self.planner.source_holds(self.now, source.name, chunk[0], bitmap)

    def _offer_later(self, worker: Worker) -> None:
        if worker.source.offers_every_s < math.inf and not self.planner.is_done():
            self.at(self.now + worker.source.offers_every_s, lambda: self._offer(worker))

    def _offer(self, worker: Worker) -> None:
        """Offer any chunk, or none if it has not got that one."""
        if not worker.is_open:
            return
        index = self._offer_rng.randrange(len(self.sizes))
        chunk = (index, int(self._offer_rng.random() * chunk_count(self.sizes[index])))
        if chunk[1] < chunk_count(self.sizes[index]) and worker.source.has(self.now, chunk):
            self.planner.source_offers(self.now, worker.source.name, *chunk)
        self._offer_later(worker)

    # sources

    def _join(self, source: SimulatedSource) -> None:
        if source.name in self.workers or self.now >= source.leaves_at:
            return
        worker = self.workers[source.name] = Worker(source)
        self.planner.add_source(
            self.now,
            source.name,
            source.kind,
            makes_offers=source.makes_offers,
            distance=source.distance,
        )
        self._offer_later(worker)
        claims = source.claims if source.claims is not None else source.holds
        if claims is None:
            self.planner.source_holds_all(self.now, source.name)
            return
        for object_index, chunks in claims.items():
            bits = sum(1 << chunk for chunk in chunks)
            bitmap = bits.to_bytes(max(chunks, default=0) // 8 + 1, "little")
            self.planner.source_holds(self.now, source.name, object_index, bitmap)
        for at, chunk in source.gains:
            if at <= self.now:
                self._tell_gain(source, chunk)

    def _leave(self, source: SimulatedSource) -> None:
        worker = self.workers.pop(source.name, None)
        if worker is not None:
            worker.is_open = False
            self.planner.remove_source(self.now, source.name)

    def _dropped(self, drop: Drop) -> None:
        self.drops.append((self.now, drop))
        worker = self.workers.pop(drop.source, None)
        assert worker is not None, "a source is dropped that is not there"
        self._check_drop(drop, worker)
        worker.is_open = False
        source = worker.source
        if drop.failure is not Failure.BAD_BYTES:
            self._drop_counts[source.name] += 1
            backoff_s = min(2.0 ** self._drop_counts[source.name], 30.0)
            self.at(self.now + backoff_s, lambda: self._join(source))

    def _submit(self, request: Request) -> None:
        worker = self.workers[request.source]
        if not worker.asked:
            worker.heard_at = worker.answered_at = self.now
        worker.asked[request.request_id] = set(self.chunks_of(request))
        worker.on_the_way[request.request_id] = set(self.chunks_of(request))
        worker.queue.append((self.now + worker.source.latency_s, request))
        self.asks.append((self.now, request))
        if not worker.is_busy:
            self._serve_next(worker)

    def _serve_next(self, worker: Worker) -> None:
        worker.is_busy = bool(worker.queue)
        if worker.queue:
            ready_at, request = worker.queue.popleft()
            todo = deque(self.chunks_of(request))
            self.at(max(ready_at, self.now), lambda: self._serve(worker, request, todo))

    def _serve(self, worker: Worker, request: Request, todo: deque[Chunk]) -> None:
        """Begin the next chunk of a request, or finish the request."""
        if not worker.is_open:
            return
        name, request_id = worker.source.name, request.request_id
        is_cancelled = request_id in worker.cancelled
        if not is_cancelled and todo and not worker.source.has(self.now, todo[0]):
            worker.asked.pop(request_id, None)
            del worker.on_the_way[request_id]
            self.planner.request_failed(self.now, name, request_id, Failure.LACKS)
            self._serve_next(worker)
        elif todo and not is_cancelled:
            self._send(worker, request, todo, self.length(todo[0]))
        else:
            worker.asked.pop(request_id, None)
            del worker.on_the_way[request_id]
            self.planner.request_done(self.now, name, request_id)
            self._serve_next(worker)

    def _send(self, worker: Worker, request: Request, todo: deque[Chunk], left_bytes: int) -> None:
        """Send a chunk, a piece at a time."""
        source = worker.source
        piece = min(left_bytes, self._progress_bytes)
        arrives_at = self.now + piece / source.rate_bytes_per_s
        if source.stalls_at < arrives_at < source.wakes_at:
            arrives_at = source.wakes_at  # perhaps never
        if arrives_at == math.inf:
            return

        def arrive() -> None:
            if not worker.is_open:
                return
            worker.heard_at = self.now
            self.planner.progress(self.now, source.name, request.request_id, piece)
            if left_bytes > piece:
                self._send(worker, request, todo, left_bytes - piece)
            else:
                self._finish_chunk(worker, request, todo.popleft())
                self._serve(worker, request, todo)

        self.at(arrives_at, arrive)

    def _finish_chunk(self, worker: Worker, request: Request, chunk: Chunk) -> None:
        name, size = worker.source.name, self.length(chunk)
        worker.answered_at = self.now
        worker.asked.get(request.request_id, set()).discard(chunk)
        worker.on_the_way[request.request_id].discard(chunk)
        if chunk in worker.source.lies:
            self.planner.chunk_refused(self.now, name, *chunk)
        elif chunk in self.proved:
            self.planner.chunk_duplicate(self.now, name, *chunk, size)
        else:
            self.proved.add(chunk)
            self.missing -= 1
            self.given[name] += size
            for other in self.workers.values():  # nobody is expected to bring it any more
                for asked in other.asked.values():
                    asked.discard(chunk)
            self.planner.chunk_proved(self.now, name, *chunk, size)
            assert self.planner.missing_chunks == self.missing
