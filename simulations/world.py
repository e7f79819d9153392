"""The simulated network: nodes, an origin, the lines between them, and who can reach whom.

Messages take `latency_s`; bytes flow through `network`. Everybody who starts finds a few
others by discovery (as a DHT would name them), dials some of them, and learns of more by
peer exchange. A message is encoded and decoded once for all who get it, and for all times
that it is sent: its bytes are the same.
"""

from __future__ import annotations

import gc
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tensorswarm.p2p.control import wire
from tensorswarm.p2p.swarm.membership import MembershipLimits
from tensorswarm.p2p.swarm.planner import PlannerLimits
from tensorswarm.p2p.swarm.source import Request
from tensorswarm.store.digest import CHUNK_SIZE, digest_of

from .checker import Checker
from .engine import Engine, Trace
from .network import Flow, Link, Network
from .peer import PROGRESS_S, Nature, SimulatedPeer, chunks_of


@dataclass(frozen=True)
class Setup:
    """A simulated swarm.

    Attributes
    ----------
    chunks : int
        Chunks of the one object that all want.
    latency_s : float
        Time of a message, one way.
    origin_bytes_per_s : float
        Uplink of the HTTP origin; 0 for none.
    slots : int
        Requests a node serves at a time.
    ahead : int
        Offers open besides.
    makes_offers : bool
        Whether nodes offer uploads, or wait to be asked.
    is_rarest_first : bool
        Whether offers name the rarest chunk, or any.
    is_eager : bool
        Whether nodes offer more while their uplink is idle, and for what nobody has.
    is_duty_shared : bool
        Whether members share origin duty.
    settle_s : float
        Time from a node's start to its first use of the origin: for meeting others.
    tick_s : float
        Time within which what happens to a node is decided upon together.
    have_batch_s : float
        Least time between two have-messages of a node.
    exchange_soon_s, exchange_s : float
        Pauses between rounds of peer exchange: the shortest, and the longest. They grow
        with a node's age.
    exchange_asked : int
        Neighbours asked in each of the first rounds, later one; who is on duty asks all.
    roster_s : float
        Time until the planner hears of a change of members.
    discovered : int
        Members that discovery names at a time: what a DHT's provider list holds.
    limits_s : float
        Virtual time after which a run is given up.
    """

    chunks: int
    latency_s: float = 0.02
    origin_bytes_per_s: float = 0.0
    slots: int = 1
    ahead: int = 1
    makes_offers: bool = True
    is_rarest_first: bool = True
    is_eager: bool = True
    is_duty_shared: bool = True
    settle_s: float = 0.15
    tick_s: float = 0.002
    have_batch_s: float = 0.02
    exchange_soon_s: float = 0.04
    exchange_s: float = 5.0
    exchange_asked: int = 3
    roster_s: float = 0.02
    discovered: int = 20
    limit_s: float = 100_000.0
    limits: PlannerLimits = field(default_factory=PlannerLimits)
    membership: MembershipLimits = field(default_factory=MembershipLimits)


After: TypeAlias = tuple[Any, ...]
"""What to call when something is done, and with what: no closure, as compiled ones leak."""


class SimulatedOrigin:
    """An HTTP server: it shares its uplink among all who ask, and knows nobody.

    Attributes
    ----------
    sent_bytes : int
        Bytes of the chunks it sent.
    """

    def __init__(self, world: World, bytes_per_s: float) -> None:
        self._world = world
        self.uplink = Link(bytes_per_s)
        self.sent_bytes = 0
        self._flows: dict[str, list[Flow]] = {}

    def asked(self, asker: SimulatedPeer, request: Request) -> None:
        """Serve a request at once, chunk after chunk."""
        self._send(asker, request, chunks_of(request.spans))

    def _send(self, asker: SimulatedPeer, request: Request, chunks: list[tuple[int, int]]) -> None:
        if not chunks or not asker.is_present:
            return
        chunk = chunks.pop(0)
        self.sent_bytes += CHUNK_SIZE
        flow = self._world.transfer(
            self.uplink,
            asker,
            "origin",
            request,
            chunk,
            is_good=True,
            is_last=not chunks,
            after=(self._send, asker, request, chunks),
        )
        flows = [each for each in self._flows.get(asker.name, []) if each.version >= 0]
        self._flows[asker.name] = [*flows, flow]

    def forget(self, asker: SimulatedPeer) -> None:
        """Break off what is on its way to somebody who has left."""
        for flow in self._flows.pop(asker.name, []):
            self._world.network.stop(flow)


class World:
    """One run.

    Parameters
    ----------
    setup : Setup
        The swarm.
    natures : sequence of Nature
        Its nodes.
    seed : int
        Replays the run.

    Attributes
    ----------
    message_count : int
        Messages on their way so far, one for each receiver.
    """

    def __init__(self, setup: Setup, natures: Sequence[Nature], seed: int) -> None:
        self.setup = setup
        self.seed = seed
        self.rng = random.Random(f"{seed}/world")
        self.engine = Engine()
        self.trace = Trace()
        self.network = Network(self.engine)
        self.everything = (1 << setup.chunks) - 1
        self.size_bytes = setup.chunks * CHUNK_SIZE
        self.digest = digest_of(b"simulated object")
        self.key = digest_of(b"simulated swarm")
        self.chunk_list = digest_of(b"simulated chunk list") if setup.chunks > 1 else b""
        self.origin = (
            SimulatedOrigin(self, setup.origin_bytes_per_s) if setup.origin_bytes_per_s else None
        )
        self.checker = Checker(self)
        self.all_want_the_same = all(nature.wants is None for nature in natures)
        self.peers = [SimulatedPeer(self, i, nature) for i, nature in enumerate(natures)]
        self.by_name = {peer.name: peer for peer in self.peers}
        self.present: dict[str, int] = {}  # and the place of each in `_shown`
        self._shown: list[str] = []
        self.unfinished = 0
        self.on_finished: list[Callable[[SimulatedPeer], None]] = []
        self.groups: dict[str, int] = {}
        self._reader = wire.FrameReader()
        self.message_count = 0
        self._offers: dict[int, wire.Message] = {}
        self.passed = self.read(wire.Pass(self.digest))
        self.whom_do_you_know = self.read(wire.GetPeers(1, self.key))
        self.what_do_you_have = self.read(wire.Want(1, (self.digest, self.key)))
        self._in_transit: deque[tuple[float, Transfer]] = deque()
        self._is_watching = False
        for peer in self.peers:
            self.engine.at(peer.nature.starts_at, peer.start)
            if peer.nature.leaves_at < float("inf"):
                self.engine.at(peer.nature.leaves_at, peer.leave)
        self.unfinished = len(self.finishers)

    @property
    def finishers(self) -> list[SimulatedPeer]:
        """The nodes that must finish: honest, and there to the end."""
        return [
            peer
            for peer in self.peers
            if peer.planner is not None and peer.nature.leaves_at == float("inf")
        ]

    def run(self) -> None:
        """Run until everybody who must has finished."""
        was_enabled = gc.isenabled()
        gc.disable()  # nearly nothing is left to it: connections that ended, some 10 kB each
        try:
            if self.unfinished:
                self.engine.run(self.setup.limit_s)
        finally:
            if was_enabled:
                gc.enable()
        self.checker.ended()

    def finished(self, peer: SimulatedPeer) -> None:
        """Note that a node has everything."""
        self.trace.note(self.engine.now, 2, peer.index, 0, 0)
        if peer.nature.leaves_at == float("inf"):
            self.unfinished -= 1
            if not self.unfinished:
                self.engine.stop()
        if peer.nature.stays_s < float("inf"):
            self.engine.after(peer.nature.stays_s, peer.leave)
        for listener in self.on_finished:
            listener(peer)

    def number_of(self, name: str) -> int:
        """Return the number of a node; -1 for the origin."""
        return self.by_name[name].index if name in self.by_name else -1

    def wake(self, peer: SimulatedPeer, deadline: float) -> None:
        """Wake a node at its planner's deadline, if it is not to be woken before."""
        if peer.wakes_at > deadline:
            peer.wakes_at = max(deadline, self.engine.now + self.setup.tick_s)
            self.engine.at(peer.wakes_at, self._wake, peer, peer.wakes_at)

    def _wake(self, peer: SimulatedPeer, planned_at: float) -> None:
        if peer.wakes_at == planned_at:
            peer.wakes_at = math.inf
            peer.woken()

    def bitmap(self, mask: int) -> bytes:
        """Return a set of chunks as the bitmap of a have-message."""
        return mask.to_bytes((self.setup.chunks + 7) // 8, "little")

    def mask(self, bitmap: bytes | None) -> int:
        """Return the bitmap of a have-message as a set of chunks."""
        return self.everything if bitmap is None else int.from_bytes(bitmap, "little")

    # ---- who reaches whom

    def discover(self, peer: SimulatedPeer, count: int) -> list[str]:
        """Return some of those who are there, as a DHT would name them."""
        shown = self.rng.sample(self._shown, min(count + 1, len(self._shown)))
        return [name for name in shown if name != peer.name][:count]

    def come(self, peer: SimulatedPeer) -> None:
        """Note that a node is there."""
        self.present[peer.name] = len(self._shown)
        self._shown.append(peer.name)

    def go(self, peer: SimulatedPeer) -> None:
        """Note that a node is there no more."""
        place = self.present.pop(peer.name, None)
        if place is not None:
            last = self._shown.pop()
            if last != peer.name:
                self._shown[place] = last
                self.present[last] = place

    def can_dial(self, peer: SimulatedPeer, other: SimulatedPeer) -> bool:
        """Tell whether a node can open a connection to another."""
        return (
            other.is_present
            and not other.nature.is_behind_nat
            and self.groups.get(peer.name) == self.groups.get(other.name)
        )

    def dial(self, peer: SimulatedPeer, name: str) -> None:
        """Let a node connect to another: both hear of it after a round trip."""
        self.engine.after(2 * self.setup.latency_s, self._answer_dial, peer, name)

    def _answer_dial(self, peer: SimulatedPeer, name: str) -> None:
        other = self.by_name[name]
        limits = self.setup.membership
        if not peer.is_present:
            return
        if not self.can_dial(peer, other) or peer.name in other.banned:
            peer.dial_failed(name, is_full=False)
            return
        count = len(other.neighbours)
        if count >= limits.max_neighbours and peer.name not in other.neighbours:
            is_colleague = other.membership.is_colleague(self.engine.now, peer.name)
            if not is_colleague or count >= 2 * limits.max_neighbours:
                peer.dial_failed(name, is_full=True)
                return
        other.connected(peer)
        peer.connected(other)

    def disconnect(
        self, peer: SimulatedPeer, other: SimulatedPeer, *, is_polite: bool = False
    ) -> None:
        """Take a connection down; who is still there notices."""
        peer.disconnected(other, is_polite=is_polite)
        other.disconnected(peer, is_polite=is_polite)

    def part(self, group_of: Callable[[SimulatedPeer], int]) -> None:
        """Part the network into groups that cannot reach each other."""
        self.groups = {peer.name: group_of(peer) for peer in self.peers}
        for peer in self.peers:
            for known in list(peer.neighbours.values()):
                if self.groups[peer.name] != self.groups[known.peer.name]:
                    self.disconnect(peer, known.peer)

    # ---- what moves

    def deliver(
        self, sender: SimulatedPeer, receivers: Sequence[SimulatedPeer], message: wire.Message
    ) -> None:
        """Send a message as its frame; who receives it gets what the frame says."""
        self.message_count += len(receivers)
        self.engine.after(self.setup.latency_s, self._arrive, sender, receivers, self.read(message))

    def pass_on(
        self, sender: SimulatedPeer, receiver: SimulatedPeer, received: wire.Message
    ) -> None:
        """Send what a frame says, once it was read."""
        self.message_count += 1
        self.engine.after(self.setup.latency_s, receiver.receive, sender, received)

    def offer_of(self, chunk: int) -> wire.Message:
        """Return the offer of a chunk, as its frame says it."""
        offer = self._offers.get(chunk)
        if offer is None:
            offer = self._offers[chunk] = self.read(wire.Offer(self.digest, chunk))
        return offer

    def read(self, message: wire.Message) -> wire.Message:
        """Return what a receiver makes of a message's frame."""
        self._reader.feed(wire.encode(message))
        received = self._reader.next_message()
        assert received is not None
        return received

    @staticmethod
    def _arrive(
        sender: SimulatedPeer, receivers: Sequence[SimulatedPeer], message: wire.Message
    ) -> None:
        for receiver in receivers:
            receiver.receive(sender, message)

    def tell(
        self, sender: SimulatedPeer, receivers: Sequence[SimulatedPeer], message: wire.Have
    ) -> None:
        """Send news, of which seldom two are alike; what they name is made out once."""
        self.message_count += len(receivers)
        received = self.read(message)
        assert isinstance(received, wire.Have)
        for entry in received.entries:
            self.engine.after(
                self.setup.latency_s,
                *(self._heard, sender.name, receivers, entry.bitmap, self.mask(entry.bitmap)),
            )

    @staticmethod
    def _heard(
        sender: str, receivers: Sequence[SimulatedPeer], bitmap: bytes | None, mask: int
    ) -> None:
        for receiver in receivers:
            known = receiver.neighbours.get(sender)
            if known is not None:
                receiver.holds(known, bitmap, mask)

    def transfer(
        self,
        uplink: Link,
        asker: SimulatedPeer,
        source: str,
        request: Request,
        chunk: tuple[int, int],
        *,
        is_good: bool,
        is_last: bool,
        after: After,
    ) -> Flow:
        """Send one chunk; `after`, with what follows it, is called when the last byte has left."""
        transfer = Transfer(self, asker, source, request, chunk, is_good, is_last, after)
        transfer.flow = self.network.send(uplink, asker.downlink, CHUNK_SIZE, transfer.left)
        self._in_transit.append((self.engine.now + PROGRESS_S, transfer))
        if not self._is_watching:
            self._is_watching = True
            self.engine.after(PROGRESS_S, self._report)
        return transfer.flow

    def _report(self) -> None:
        """Tell of what has been on its way for a while; most is there long before."""
        in_transit, now = self._in_transit, self.engine.now
        while in_transit:
            at, transfer = in_transit[0]
            is_moving = transfer.flow is not None and transfer.flow.version >= 0
            if is_moving and at > now:
                self.engine.at(at, self._report)
                return
            in_transit.popleft()
            if is_moving:
                transfer.report()
                in_transit.append((now + PROGRESS_S, transfer))
        self._is_watching = False


class Transfer:
    """One chunk on its way to whoever asked for it."""

    __slots__ = (
        "_after", "_asker", "_chunk", "_is_good", "_is_last", "_request", "_source",
        "_told_bytes", "_world", "flow",
    )  # fmt: skip

    def __init__(
        self,
        world: World,
        asker: SimulatedPeer,
        source: str,
        request: Request,
        chunk: tuple[int, int],
        is_good: bool,
        is_last: bool,
        after: After,
    ) -> None:
        self._world = world
        self._asker = asker
        self._source = source
        self._request = request
        self._chunk = chunk
        self._is_good = is_good
        self._is_last = is_last
        self._after = after
        self._told_bytes = 0
        self.flow: Flow | None = None

    def left(self) -> None:
        """Note that the last byte has left."""
        self._world.engine.after(self._world.setup.latency_s, self.arrive)
        after, *args = self._after
        after(*args)

    def arrive(self) -> None:
        """Give the asker the whole chunk."""
        self._asker.arrived(
            self._source, self._request, self._chunk, is_good=self._is_good, is_last=self._is_last
        )

    def report(self) -> None:
        """Tell the asker how much is there."""
        flow = self.flow
        assert flow is not None
        gone = CHUNK_SIZE - flow.left_bytes + flow.rate * (self._world.engine.now - flow.since)
        new_bytes = int(gone) - self._told_bytes
        self._told_bytes += new_bytes
        self._asker.progressed(self._source, self._request.request_id, new_bytes)
