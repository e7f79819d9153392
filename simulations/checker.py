"""Watches a run from outside and notes every rule that is broken.

It keeps its own books from what crosses the network, and asks the planner nothing but
when it wants to be woken. The rules:

- No chunk is shown or served before it was proved.
- A planner with work in flight, or with something to ask for, has a deadline.
- Nothing is asked for that the asker has, and of no neighbour that has not shown it.
- Who shares origin duty asks nothing of the origin that an honest neighbour has shown, unless
  nothing has come to it for its patience, or the origin is faster than all its peers. A
  node judges that by what it has seen so far, so a few such asks are no fault
  (`NEEDLESS_SHARE`).
- No honest node is banned. Every honest node that stays finishes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorswarm.p2p.swarm.planner import Drop
from tensorswarm.p2p.swarm.source import Failure, Request

if TYPE_CHECKING:
    from .peer import SimulatedPeer
    from .world import World

MAX_FAILURES = 20
"""Broken rules that are kept: the first ones say what went wrong."""

NEEDLESS_SHARE = 0.05
"""Part of what is asked of the origin that may be needless, besides `NEEDLESS_FREE`."""

NEEDLESS_FREE = 2
"""Needless asks of the origin that are never a fault: small swarms have few in all."""

RECENT_S = 2.0
"""Time over which what peers gave is held against the origin's speed."""


class Checker:
    """The books of one run.

    Attributes
    ----------
    failures : list of str
        The rules that were broken.
    origin_asks, needless_origin_asks : int
        Chunks asked of the origin, and those that a neighbour had shown.
    bans, stalls : int
        Sources dropped for wrong bytes, and for silence.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.failures: list[str] = []
        self.origin_asks = 0
        self.needless_origin_asks = 0
        self._without_need: list[str] = []
        self.bans = 0
        self.stalls = 0

    def _fail(self, text: str) -> None:
        if len(self.failures) < MAX_FAILURES:
            self.failures.append(f"at {self._world.engine.now:.3f} s: {text}")

    def shown(self, peer: SimulatedPeer, mask: int) -> None:
        """Check what a node tells its neighbours."""
        if peer.is_honest and mask & ~peer.has:
            self._fail(f"{peer.name} shows what it has not proved")

    def serves(self, peer: SimulatedPeer, chunks: list[tuple[int, int]]) -> None:
        """Check what a node is asked to serve."""
        for _, chunk in chunks:
            if peer.is_honest and not peer.has >> chunk & 1:
                self._fail(f"{peer.name} is asked for chunk {chunk}, which it has not proved")

    def asked(self, peer: SimulatedPeer, request: Request) -> None:
        """Check a request as it is made."""
        world = self._world
        for chunk in [
            chunk
            for span in request.spans
            for chunk in range(span.first_chunk, span.first_chunk + span.count)
        ]:
            if peer.has >> chunk & 1:
                self._fail(f"{peer.name} asks for chunk {chunk}, which it has")
            if request.source != "origin":
                known = peer.neighbours.get(request.source)
                if known is None or not known.mask >> chunk & 1:
                    self._fail(f"{peer.name} asks {request.source} for chunk {chunk}: not shown")
                continue
            self.origin_asks += 1
            if not any(
                known.mask >> chunk & 1 and known.peer.is_honest
                for known in peer.neighbours.values()
            ):
                continue
            self.needless_origin_asks += 1
            waited_s = world.engine.now - peer.moved_at
            if peer.is_sharing and waited_s < world.setup.limits.duty_patience_s:
                now = world.engine.now
                from_peers = sum(at > now - RECENT_S for at in peer.recent) / RECENT_S
                if from_peers * peer.origin_chunk_s > 1:
                    self._without_need.append(f"{peer.name} for chunk {chunk}")

    def acted(self, peer: SimulatedPeer, deadline: float | None) -> None:
        """Check a planner that has just decided."""
        if deadline is not None or peer.planner is None or peer.planner.is_done():
            return
        missing = peer.wants & ~peer.has
        holders = [known for known in peer.neighbours.values() if known.mask & missing]
        if peer.in_flight:
            self._fail(f"{peer.name} waits for an answer without a deadline")
        elif holders:
            self._fail(f"{peer.name} waits for nothing, though neighbours have what it lacks")

    def dropped(self, peer: SimulatedPeer, drop: Drop) -> None:
        """Check whom a planner drops."""
        if drop.failure is not Failure.BAD_BYTES:
            self.stalls += drop.failure is Failure.STALLED
            return
        self.bans += 1
        other = self._world.by_name.get(drop.source)
        if other is None or not other.nature.is_liar:
            self._fail(f"{peer.name} bans {drop.source}, which is honest")

    def ended(self) -> None:
        """Check that everybody has finished."""
        count = len(self._without_need)
        if count > NEEDLESS_FREE + NEEDLESS_SHARE * self.origin_asks:
            first = self._without_need[0]
            self._fail(f"{count} chunks are asked of the origin without need ({first} …)")
        lost = [peer.name for peer in self._world.finishers if peer.finished_at is None]
        if lost:
            shown = ", ".join(lost[:5])
            self._fail(f"{len(lost)} honest nodes have not finished ({shown} …)")
