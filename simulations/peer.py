"""A simulated node: the real planner, upload queue, membership and messages of one peer.

It stands where `p2p.download` and `p2p.neighbours` stand in a real node: it carries
events to the planner and actions to the network, tells its neighbours what it has, and
serves what they ask. All of that goes through the frames of `p2p.control.wire`.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from tensorswarm.p2p.control import wire
from tensorswarm.p2p.swarm.membership import WATCHED, Membership
from tensorswarm.p2p.swarm.planner import Ask, Cancel, Drop, PassOn, Planner, SourceKind
from tensorswarm.p2p.swarm.source import Failure, Request, Span
from tensorswarm.p2p.swarm.upload_slots import UploadSlots, Waiting
from tensorswarm.store.digest import CHUNK_SIZE

from .nature import Nature as Nature
from .network import Flow, Link

if TYPE_CHECKING:
    from .world import World

PROGRESS_S = 1.0
"""How often bytes are reported of a chunk that is still on its way."""


@dataclass(slots=True)
class Serving:
    """A request that is being served."""

    asker: SimulatedPeer
    request: Request
    chunks: list[tuple[int, int]]
    flow: Flow | None = None
    is_cancelled: bool = False


@dataclass(slots=True)
class Known:
    """What a node knows of one neighbour, and whether it makes it offers."""

    peer: SimulatedPeer
    is_served: bool
    mask: int = 0
    given_bytes: int = 0
    asked: dict[int, Request] = field(default_factory=dict)


def chunks_of(spans: tuple[Span, ...]) -> list[tuple[int, int]]:
    """Return the chunks of some spans, in order."""
    if len(spans) == 1 and spans[0].count == 1:
        return [spans[0][:2]]
    return [
        (span.object_index, chunk)
        for span in spans
        for chunk in range(span.first_chunk, span.first_chunk + span.count)
    ]


class SimulatedPeer:
    """One node.

    Parameters
    ----------
    world : World
        Everything else.
    index : int
        Its number; its name is made of it.
    nature : Nature
        What it is like.
    """

    def __init__(self, world: World, index: int, nature: Nature) -> None:
        self.world = world
        self.index = index
        self.name = f"n{index}"
        self.nature = nature
        self.uplink = Link(nature.uplink_bytes_per_s)
        self.downlink = Link(nature.downlink_bytes_per_s)
        self.rng = random.Random(f"{world.seed}/{index}")
        self.membership = Membership(world.key, self.name, self.rng, world.setup.membership)
        self.neighbours: dict[str, Known] = {}
        self.dialled: dict[str, None] = {}
        self.banned: dict[str, None] = {}
        self.is_sharing = False
        self.lied_to_by: dict[str, float] = {}  # and when first
        self.slots = UploadSlots(
            world.setup.slots,
            world.setup.ahead,
            self.rng,
            is_rarest_first=world.setup.is_rarest_first,
            is_eager=world.setup.is_eager,
        )
        self.serving: dict[tuple[str, int], Serving] = {}
        self.has = world.everything if nature.has_everything or not nature.is_honest else 0
        self.slots.held = self.has
        self.is_present = False
        self.is_honest = nature.is_honest
        self.finished_at: float | None = None
        self.moved_at = 0.0
        self.wasted_bytes = 0
        self.origin_asked_at = 0.0
        self.origin_chunk_s = math.inf
        self.recent: deque[float] = deque(maxlen=64)
        self._news = 0
        self._others: list[SimulatedPeer] | None = []  # all neighbours, unless they changed
        self._news_due = False
        self._told_at = -1.0
        self._acting_at: float | None = None
        self.wakes_at = math.inf
        self._offers_at = float("inf")
        self._roster_due = False
        self._roster: list[str] | None = None
        self._roster_revision = -1
        self._answer: wire.Message = wire.Peers(1, ())
        self._answer_until = 0.0
        self.in_flight: dict[tuple[str, int], Request] = {}
        self.wants = world.everything if nature.wants is None else nature.wants
        self.planner = None
        if not nature.has_everything and nature.is_honest:
            unwanted = world.everything & ~self.wants
            self.planner = Planner(
                [world.setup.chunks * CHUNK_SIZE],
                rng=self.rng,
                proved={0: world.bitmap(unwanted)} if unwanted else {},
                limits=world.setup.limits,
                keys=[world.digest],
            )

    # ---- coming and going

    def start(self) -> None:
        """Come into the swarm."""
        world, now = self.world, self.world.engine.now
        self.is_present = True
        self.moved_at = now
        world.come(self)
        self._discover()
        if self.planner is not None and world.origin is not None:
            world.engine.after(world.setup.settle_s, self._use_origin)
        world.engine.after(0.0, self._look_round)

    def _use_origin(self) -> None:
        if self.is_present and self.planner is not None:
            now = self.world.engine.now
            self._tell_roster()
            self.planner.add_source(now, "origin", SourceKind.ORIGIN)
            self.planner.source_holds_all(now, "origin")
            self.act_soon()

    def leave(self) -> None:
        """Go, at once and without a word."""
        if not self.is_present:
            return
        self.is_present = False
        self.world.go(self)
        for known in list(self.neighbours.values()):
            self.world.disconnect(self, known.peer)
        if self.world.origin is not None:
            self.world.origin.forget(self)

    def _discover(self) -> None:
        setup = self.world.setup
        names = self.world.discover(self, setup.discovered)
        self.membership.heard(self.world.engine.now, names, "discovery")

    def _look_round(self) -> None:
        """Dial whom we lack, and ask neighbours for others, again and again."""
        if not self.is_present:
            return
        now, setup = self.world.engine.now, self.world.setup
        age_s = now - self.nature.starts_at
        is_young = age_s < 4 * setup.exchange_soon_s
        self._dial()
        if self.is_honest:
            asked = len(self.neighbours)
            if not self.membership.is_on_duty(now):
                asked = min(setup.exchange_asked if is_young else 1, asked)
            for name in self.rng.sample(list(self.neighbours), asked):
                other = self.neighbours[name].peer
                self.world.pass_on(self, other, self.world.whom_do_you_know)
        if not is_young:
            self._discover()
        if now > self.nature.starts_at + setup.exchange_s:
            self._exchange_one()
        if self.finished_at is None or is_young:
            pause_s = min(max(setup.exchange_soon_s, age_s / 2), setup.exchange_s)
            self.world.engine.after(pause_s, self._look_round)

    def _dial(self) -> None:
        now = self.world.engine.now
        for name in self.membership.to_dial(now, self.neighbours, self.dialled):
            self.dialled[name] = None
            self.world.dial(self, name)

    def _exchange_one(self) -> None:
        """Let the chosen neighbour go that gave least, for somebody new."""
        given = {name: known.given_bytes for name, known in self.neighbours.items()}
        name = self.membership.to_drop(self.world.engine.now, self.neighbours, self.dialled, given)
        for known in self.neighbours.values():
            known.given_bytes = 0
        if name is not None and not self.neighbours[name].asked:
            self.world.disconnect(self, self.neighbours[name].peer, is_polite=True)

    def dial_failed(self, name: str, *, is_full: bool) -> None:
        """Note that somebody could not be reached, or has neighbours enough."""
        self.dialled.pop(name, None)
        if is_full:
            self.membership.let_go(self.world.engine.now, name)
        else:
            self.membership.left(self.world.engine.now, name)
        self._dial()

    def connected(self, peer: SimulatedPeer) -> None:
        """Note a new neighbour: ask what it has, and whom it knows."""
        if peer.name in self.neighbours or peer.name in self.banned:
            return
        is_served = peer.planner is not None and self.world.setup.makes_offers
        self.neighbours[peer.name] = Known(peer, is_served)
        self._others = None
        if is_served:
            self.slots.peer_has(peer.name, self.world.everything & ~peer.wants)
        if not peer.nature.has_everything:
            self.membership.met(peer.name)
        if self.planner is not None:
            self.planner.add_source(
                self.world.engine.now,
                peer.name,
                SourceKind.PEER,
                makes_offers=self.world.setup.makes_offers,
            )
        self.world.pass_on(self, peer, self.world.what_do_you_have)
        self.world.pass_on(self, peer, self.world.whom_do_you_know)
        self._roster_changed()
        self.act_soon()

    def disconnected(self, peer: SimulatedPeer, *, is_polite: bool) -> None:
        """Note that a connection has ended, with a bye or with the neighbour gone."""
        known = self.neighbours.pop(peer.name, None)
        if known is None:
            return
        self._others = None
        self._forget_asked(peer.name)
        now = self.world.engine.now
        self.dialled.pop(peer.name, None)
        if is_polite:
            self.membership.let_go(now, peer.name)
        else:
            self.membership.left(now, peer.name)
        for waiting in self.slots.forget(peer.name):
            self._stop_serving(waiting)
        if self.planner is not None:
            self.planner.remove_source(now, peer.name)
        self._roster_changed()
        self._begin_serving()
        if self.is_present:
            self._dial()
            self.act_soon()

    def _roster_changed(self) -> None:
        if not self._roster_due and self.planner is not None:
            self._roster_due = True
            self.world.engine.after(self.world.setup.roster_s, self._tell_roster)

    def _tell_roster(self) -> None:
        self._roster_due = False
        if self.planner is not None and self.world.setup.is_duty_shared:
            now, by_name = self.world.engine.now, self.world.by_name
            if self.world.all_want_the_same:
                revision = self.membership.revision(now)
                if revision == self._roster_revision:
                    return
                self._roster_revision = revision
                members = self.membership.first_on_call(now)
            else:
                on_call = self.membership.on_call(now)
                alike = (name for name in on_call if by_name[name].wants == self.wants)
                members = list(islice(alike, WATCHED))
            if members == self._roster:
                return
            self._roster = members
            self.is_sharing = bool(members)
            self.planner.set_members(now, self.world.key, self.name, members)
            self.act_soon()

    # ---- messages

    def send(self, peer: SimulatedPeer, message: wire.Message) -> None:
        """Send a message to a neighbour."""
        self.world.deliver(self, [peer], message)

    def receive(self, sender: SimulatedPeer, message: wire.Message) -> None:
        """Take a message from a neighbour."""
        known = self.neighbours.get(sender.name)
        if known is not None:
            _TAKERS[type(message)](self, known, message)

    def _asked_what_it_has(self, known: Known, message: wire.Want) -> None:
        self.send(known.peer, wire.Have(message.request_id, self._entries(), last=True))

    def _asked_whom_it_knows(self, known: Known, message: wire.GetPeers) -> None:
        now = self.world.engine.now
        if now >= self._answer_until:
            age_s = now - self.nature.starts_at
            self._answer_until = now + max(self.world.setup.exchange_soon_s, age_s / 8)
            names = self.membership.to_tell(now)
            entries = tuple([wire.PeerEntry(name, ("/sim",)) for name in names])
            self._answer = self.world.read(wire.Peers(message.request_id, entries))
        self.world.pass_on(self, known.peer, self._answer)

    def _offered(self, known: Known, message: wire.Offer) -> None:
        if self.planner is not None:
            now = self.world.engine.now
            self.planner.source_offers(now, known.peer.name, 0, message.chunk)
            self.act_soon()

    def _passed(self, known: Known, message: wire.Pass) -> None:
        self.slots.passed(self.world.engine.now, known.peer.name)
        self._begin_serving()

    def _told_of_others(self, known: Known, message: wire.Peers) -> None:
        names = [entry.peer_id for entry in message.entries]
        self.membership.heard(self.world.engine.now, names, known.peer.name)
        self._roster_changed()
        self._dial()

    def _entries(self) -> tuple[wire.HaveEntry, ...]:
        world = self.world
        if not self.has:
            return ()
        world.checker.shown(self, self.has)
        size_bytes = world.setup.chunks * CHUNK_SIZE
        if self.has == world.everything:
            return (wire.HaveEntry(world.digest, size_bytes, None, b""),)
        bitmap = world.bitmap(self.has)
        return (wire.HaveEntry(world.digest, size_bytes, bitmap, world.chunk_list),)

    def _heard(self, known: Known, message: wire.Have) -> None:
        if message.request_id:  # a new neighbour: there may be an offer to make
            self.world.engine.after(0.0, self._begin_serving)
        for entry in message.entries:
            self.holds(known, entry.bitmap, self.world.mask(entry.bitmap))

    def holds(self, known: Known, bitmap: bytes | None, mask: int) -> None:
        """Note what a neighbour has, said as the bitmap of a message and as a set."""
        peer = known.peer
        new = mask & ~known.mask
        known.mask |= new
        if not peer.wants & ~known.mask:
            self.membership.finished(peer.name)
            self._roster_changed()
        if known.is_served and self.slots.peer_has(peer.name, new):
            self._begin_serving()
        if new & ~self.has and self.planner is not None:
            self.planner.source_holds(self.world.engine.now, peer.name, 0, bitmap)
            if self._acting_at is None and self.planner.has_news:
                self.act_soon()

    def _tell(self) -> None:
        """Tell neighbours what is new, in one message for all that came meanwhile."""
        self._news_due = False
        self._told_at = self.world.engine.now
        if self._others is None:
            self._others = [known.peer for known in self.neighbours.values()]
        if self._others and self.is_present:
            self.world.tell(self, self._others, wire.Have(0, self._entries(), last=True))

    # ---- fetching

    def act_soon(self) -> None:
        """Let the planner decide, once for all that happens within a tick."""
        if self._acting_at is None and self.planner is not None:
            self._acting_at = self.world.engine.now + self.world.setup.tick_s
            self.world.engine.at(self._acting_at, self._act)

    def _act_if_due(self) -> None:
        if self._acting_at is None and self.planner is not None and self.planner.has_news:
            self.act_soon()

    def _act(self) -> None:
        self._acting_at = None
        planner, world = self.planner, self.world
        if planner is None or not self.is_present or planner.is_done():
            return
        now = world.engine.now
        for action in planner.actions(now):
            if isinstance(action, Ask):
                self._ask(action.request)
            elif isinstance(action, Cancel):
                self._cancel(action)
            elif isinstance(action, PassOn):
                known = self.neighbours.get(action.source)
                if known is not None:
                    world.pass_on(self, known.peer, world.passed)
            else:
                self._drop(action)
        deadline = planner.next_deadline(now)
        world.checker.acted(self, deadline)
        if deadline is not None:
            world.wake(self, deadline)

    def woken(self) -> None:
        """Act on a deadline."""
        if self._acting_at is None and self.is_present:
            self._act()

    def _ask(self, request: Request) -> None:
        world = self.world
        self.in_flight[request.source, request.request_id] = request
        world.checker.asked(self, request)
        if request.source == "origin":
            assert world.origin is not None
            origin = world.origin
            self.origin_asked_at = world.engine.now
            world.engine.after(world.setup.latency_s, origin.asked, self, request)
            return
        known = self.neighbours[request.source]
        known.asked[request.request_id] = request
        world.engine.after(world.setup.latency_s, known.peer.asked, self, request)

    def _cancel(self, cancel: Cancel) -> None:
        self.in_flight.pop((cancel.source, cancel.request_id), None)
        world = self.world
        if cancel.source == "origin":
            return
        known = self.neighbours.get(cancel.source)
        if known is not None:
            known.asked.pop(cancel.request_id, None)
            world.engine.after(world.setup.latency_s, known.peer.cancelled, self, cancel.request_id)

    def _drop(self, drop: Drop) -> None:
        world = self.world
        world.checker.dropped(self, drop)
        self._forget_asked(drop.source)
        if drop.source == "origin":
            world.engine.after(3.0, self._use_origin)
            return
        if drop.failure is Failure.BAD_BYTES:
            self.banned[drop.source] = None
        known = self.neighbours.get(drop.source)
        if known is not None:
            world.disconnect(self, known.peer)

    def _forget_asked(self, source: str) -> None:
        for key in [key for key in self.in_flight if key[0] == source]:
            del self.in_flight[key]

    def progressed(self, source: str, request_id: int, byte_count: int) -> None:
        """Note bytes of a chunk that is still on its way."""
        if self.planner is not None and self.is_present:
            self.planner.progress(self.world.engine.now, source, request_id, byte_count)

    def arrived(
        self, source: str, request: Request, chunk: tuple[int, int], *, is_good: bool, is_last: bool
    ) -> None:
        """Take a chunk: check it, keep it, tell of it."""
        planner, world = self.planner, self.world
        if planner is None or not self.is_present or source in self.banned:
            return
        now, bit = world.engine.now, 1 << chunk[1]
        known = self.neighbours.get(source)
        if not is_good:
            self.wasted_bytes += CHUNK_SIZE
            if known is not None and not planner.is_done():  # else there is nobody to ban
                self.lied_to_by.setdefault(source, now)
            planner.chunk_refused(now, source, *chunk)
        elif self.has & bit:
            self.wasted_bytes += CHUNK_SIZE
            planner.chunk_duplicate(now, source, *chunk, CHUNK_SIZE)
        else:
            self.has |= bit
            self.moved_at = now
            if source == "origin":
                self.origin_chunk_s = now - self.origin_asked_at
            else:
                self.recent.append(now)
            world.trace.note(now, 1, self.index, world.number_of(source), chunk[1])
            if known is not None:
                known.given_bytes += CHUNK_SIZE
            planner.chunk_proved(now, source, *chunk, CHUNK_SIZE)
            self._proved(bit)
        if is_last:
            self.in_flight.pop((source, request.request_id), None)
            if known is not None:
                known.asked.pop(request.request_id, None)
            planner.request_done(now, source, request.request_id)
        self._act_if_due()

    def _proved(self, bit: int) -> None:
        engine = self.world.engine
        self.slots.held = self.has
        self._begin_serving()
        if not self._news_due:
            self._news_due = True
            engine.at(self._told_at + self.world.setup.have_batch_s, self._tell)
        if self.has & self.wants == self.wants:
            self.finished_at = engine.now
            self.world.finished(self)

    # ---- serving

    def asked(self, asker: SimulatedPeer, request: Request) -> None:
        """Take a request for chunks."""
        if asker.name not in self.neighbours or not self.is_present:
            return
        chunks = chunks_of(request.spans)
        self.world.checker.serves(self, chunks)
        if self.nature.is_staller:
            return
        key = asker.name, request.request_id
        self.serving[key] = Serving(asker, request, chunks)
        self.slots.ask(*key, chunks[0][1])
        self._begin_serving()

    def cancelled(self, asker: SimulatedPeer, request_id: int) -> None:
        """Forget a request, as far as it has not been sent."""
        serving = self.serving.get((asker.name, request_id))
        if serving is None:
            return
        if self.slots.withdraw(asker.name, request_id):
            del self.serving[asker.name, request_id]
        else:
            serving.is_cancelled = True

    def _begin_serving(self) -> None:
        if not self.is_present:
            return
        for waiting in self.slots.begin():
            self._serve(self.serving[waiting.peer, waiting.ticket])
        now = self.world.engine.now
        for name, chunk in self.slots.offers(now):
            self.world.pass_on(self, self.neighbours[name].peer, self.world.offer_of(chunk))
        deadline = self.slots.next_deadline(now)
        if deadline < self._offers_at:
            self._offers_at = deadline
            self.world.engine.at(deadline, self._offer_again, deadline)

    def _offer_again(self, planned_at: float) -> None:
        if planned_at == self._offers_at:
            self._offers_at = float("inf")
            self._begin_serving()

    def _serve(self, serving: Serving) -> None:
        """Send the next chunk of a request, or end it."""
        key = serving.asker.name, serving.request.request_id
        if not serving.chunks or serving.is_cancelled:
            self.serving.pop(key, None)
            self.slots.end(*key)
            self._begin_serving()
            return
        chunk = serving.chunks.pop(0)
        serving.flow = self.world.transfer(
            self.uplink,
            serving.asker,
            self.name,
            serving.request,
            chunk,
            is_good=not self.nature.is_liar,
            is_last=not serving.chunks,
            after=(self._serve, serving),
        )

    def _stop_serving(self, waiting: Waiting) -> None:
        serving = self.serving.pop((waiting.peer, waiting.ticket), None)
        if serving is not None and serving.flow is not None:
            self.world.network.stop(serving.flow)


_TAKERS: dict[type, Callable[[SimulatedPeer, Known, Any], None]] = {
    wire.Have: SimulatedPeer._heard,
    wire.Want: SimulatedPeer._asked_what_it_has,
    wire.GetPeers: SimulatedPeer._asked_whom_it_knows,
    wire.Offer: SimulatedPeer._offered,
    wire.Pass: SimulatedPeer._passed,
    wire.Peers: SimulatedPeer._told_of_others,
}
"""What a node does with each kind of message; nobody sends any other."""
