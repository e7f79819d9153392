"""The simulated network: nodes, an origin, the lines between them, and who can reach whom.

Messages take `latency_s`; bytes flow through `network`. Everybody who starts finds a few
others by discovery (as a DHT would name them), dials some of them, and learns of more by
peer exchange. A message that goes to several neighbours is encoded and decoded once, as
its bytes are the same for all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
    is_duty_shared : bool
        Whether members share origin duty.
    settle_s : float
        Time from a node's start to its first use of the origin: for meeting others.
    tick_s : float
        Time within which what happens to a node is decided upon together.
    have_batch_s : float
        Least time between two have-messages of a node.
    exchange_soon_s, exchange_s : float
        Pauses between rounds of peer exchange: for the first few, and later.
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
    is_duty_shared: bool = True
    settle_s: float = 0.15
    tick_s: float = 0.002
    have_batch_s: float = 0.02
    exchange_soon_s: float = 0.04
    exchange_s: float = 5.0
    roster_s: float = 0.02
    discovered: int = 20
    limit_s: float = 100_000.0
    limits: PlannerLimits = field(default_factory=PlannerLimits)
    membership: MembershipLimits = field(default_factory=MembershipLimits)


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
            after=lambda: self._send(asker, request, chunks),
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
        self.peers = [SimulatedPeer(self, i, nature) for i, nature in enumerate(natures)]
        self.by_name = {peer.name: peer for peer in self.peers}
        self.present: dict[str, SimulatedPeer] = {}
        self.unfinished = 0
        self.on_finished: list[Callable[[SimulatedPeer], None]] = []
        self.groups: dict[str, int] = {}
        self._wakes: dict[str, float] = {}
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
        self.engine.run(self.setup.limit_s, lambda: not self.unfinished)
        self.checker.ended()

    def finished(self, peer: SimulatedPeer) -> None:
        """Note that a node has everything."""
        self.trace.note(self.engine.now, 2, peer.index, 0, 0)
        if peer.nature.leaves_at == float("inf"):
            self.unfinished -= 1
        if peer.nature.stays_s < float("inf"):
            self.engine.after(peer.nature.stays_s, peer.leave)
        for listener in self.on_finished:
            listener(peer)

    def number_of(self, name: str) -> int:
        """Return the number of a node; -1 for the origin."""
        return self.by_name[name].index if name in self.by_name else -1

    def wake(self, peer: SimulatedPeer, deadline: float) -> None:
        """Wake a node at its planner's deadline, if it is not to be woken before."""
        planned = self._wakes.get(peer.name)
        if planned is not None and planned <= deadline:
            return
        deadline = max(deadline, self.engine.now + self.setup.tick_s)
        self._wakes[peer.name] = deadline

        def wake() -> None:
            if self._wakes.get(peer.name) == deadline:
                del self._wakes[peer.name]
                peer.woken()

        self.engine.at(deadline, wake)

    def bitmap(self, mask: int) -> bytes:
        """Return a set of chunks as the bitmap of a have-message."""
        return mask.to_bytes((self.setup.chunks + 7) // 8, "little")

    # ---- who reaches whom

    def discover(self, peer: SimulatedPeer, count: int) -> list[str]:
        """Return some of those who are there, as a DHT would name them."""
        names = [name for name in self.present if name != peer.name]
        return self.rng.sample(names, min(count, len(names)))

    def can_dial(self, peer: SimulatedPeer, other: SimulatedPeer) -> bool:
        """Tell whether a node can open a connection to another."""
        return (
            other.is_present
            and not other.nature.is_behind_nat
            and self.groups.get(peer.name) == self.groups.get(other.name)
        )

    def dial(self, peer: SimulatedPeer, name: str) -> None:
        """Let a node connect to another: both hear of it after a round trip."""

        def answered() -> None:
            other = self.by_name[name]
            limits = self.setup.membership
            if not peer.is_present:
                return
            if not self.can_dial(peer, other) or peer.name in other.banned:
                peer.dial_failed(name, is_full=False)
                return
            most = limits.max_neighbours * (
                1 + other.membership.is_colleague(self.engine.now, peer.name)
            )
            if len(other.neighbours) >= most and peer.name not in other.neighbours:
                peer.dial_failed(name, is_full=True)
                return
            other.connected(peer)
            peer.connected(other)

        self.engine.after(2 * self.setup.latency_s, answered)

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
        reader = wire.FrameReader()
        reader.feed(wire.encode(message))
        received = reader.next_message()
        assert received is not None

        def arrive() -> None:
            for receiver in receivers:
                receiver.receive(sender, received)

        self.engine.after(self.setup.latency_s, arrive)

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
        after: Callable[[], None],
    ) -> Flow:
        """Send one chunk; `after` is called when the last byte has left."""
        latency_s = self.setup.latency_s

        def left() -> None:
            self.engine.after(
                latency_s,
                lambda: asker.arrived(source, request, chunk, is_good=is_good, is_last=is_last),
            )
            after()

        flow = self.network.send(uplink, asker.downlink, CHUNK_SIZE, left)
        told_bytes = 0

        def report() -> None:
            nonlocal told_bytes
            if flow.version < 0:
                return
            gone = CHUNK_SIZE - flow.left_bytes + flow.rate * (self.engine.now - flow.since)
            asker.progressed(source, request.request_id, int(gone) - told_bytes)
            told_bytes = int(gone)
            self.engine.after(PROGRESS_S, report)

        self.engine.after(PROGRESS_S, report)
        return flow
