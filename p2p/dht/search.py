"""Looking for peers: bootstraps, the DHT, and what neighbours know of others.

A search meets whom it finds; what each of them holds is asked afterwards, by
whoever wants something. Nobody found here is believed before it has shown bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import trio

from tensorswarm.store.errors import RemoteError

from ..control.neighbours import Neighbours
from ..host.addresses import PeerAddress, believable
from .discovery import Discovery

ROUND_TIMEOUT_S = 6.0
"""Longest time one round of a search may take, in seconds."""

MAX_KEYS_PER_ROUND = 4
"""Keys looked up on the DHT in one round; the largest share of a model's bytes is
found under its own id and a few of its largest tensors."""

MAX_PARALLEL_DIALS = 16
"""Peers dialled at once."""

MAX_FAILURES_KEPT = 64
"""Reasons remembered for the final message."""

REDIAL_AFTER_S = 5.0
"""Pause before a peer that could not be reached is dialled again, in seconds. It doubles
with each failure: whoever names a hundred addresses where nobody is gets our attention
once, and those behind them get their turn."""

MAX_REDIAL_AFTER_S = 120.0
"""Longest such pause, in seconds."""

FRESH_S = 1.0
"""A key looked up so short a time ago is not looked up again: the steps of one fetch
follow each other faster than providers come."""

MAX_KEYS_REMEMBERED = 1_000
"""Keys of which it is remembered when they were looked up."""


DHT = "dht"
"""Who names those that were found there."""


class Chooser(Protocol):
    """Who decides whom of those that were found to dial."""

    def choose(self, teller: str, peers: Sequence[PeerAddress]) -> list[PeerAddress]:
        """Note peers that somebody names; return whom to dial now."""
        ...

    def after(self, peer_id: str) -> list[PeerAddress]:
        """Note that a dial has ended, well or badly; return whom to dial now."""
        ...


class Search:
    """Finds and meets peers.

    Parameters
    ----------
    neighbours : Neighbours
        Where the peers that were met are.
    discovery : Discovery
        The DHT.
    bootstrap : sequence of PeerAddress
        Peers to begin with.

    Attributes
    ----------
    failures : dict of str to str
        Why peers could not be met, by peer id.
    chooser : Chooser or None
        Decides whom to dial of those found under `chosen_key`; without one everybody is.
    chosen_key : bytes
        What the chooser knows of.
    """

    def __init__(
        self, neighbours: Neighbours, discovery: Discovery, bootstrap: Sequence[PeerAddress]
    ) -> None:
        self._neighbours = neighbours
        self._discovery = discovery
        self._bootstrap = bootstrap  # grows when names are looked up
        self._redial_at: dict[str, tuple[float, float]] = {}
        self._looked_up_at: dict[bytes, float] = {}
        self._dials = trio.CapacityLimiter(MAX_PARALLEL_DIALS)
        self.failures: dict[str, str] = {}
        self.chooser: Chooser | None = None
        self.chosen_key = b""

    async def round(self, keys: Sequence[bytes], *, widely: bool = False) -> bool:
        """Look everywhere once, and meet those found; returns after `ROUND_TIMEOUT_S` at most.

        Parameters
        ----------
        keys : sequence of bytes
            Digests to look for, most important first.
        widely : bool
            Also ask neighbours for peers of which nothing is known.

        Returns
        -------
        bool
            Whether everybody asked has answered, or failed, in that time. What was not
            found then is not there; on a busy machine a round may well be cut short.
        """
        with trio.move_on_after(ROUND_TIMEOUT_S) as limit:
            async with trio.open_nursery() as nursery:
                for peer in self._bootstrap:
                    nursery.start_soon(self.meet, peer)
                for key in keys[:MAX_KEYS_PER_ROUND]:
                    if self._is_to_be_looked_up(key):
                        nursery.start_soon(self._ask_dht, key, nursery)
                for neighbour in self._neighbours.all():
                    topic = b"" if widely else keys[0]
                    nursery.start_soon(self._ask_neighbour, neighbour.peer_id, topic, nursery)
        return not limit.cancelled_caught

    async def ask_neighbour(self, peer_id: str, key: bytes, meeting: trio.Nursery) -> None:
        """Ask one neighbour who else holds or wants something; meet them in tasks of `meeting`."""
        await self._ask_neighbour(peer_id, key, meeting)

    def _is_to_be_looked_up(self, key: bytes) -> bool:
        now = trio.current_time()
        if now - self._looked_up_at.get(key, -FRESH_S) < FRESH_S:
            return False
        if len(self._looked_up_at) >= MAX_KEYS_REMEMBERED:
            self._looked_up_at.clear()  # a forgotten key only costs a second look-up
        self._looked_up_at[key] = now
        return True

    async def _ask_dht(self, key: bytes, nursery: trio.Nursery) -> None:
        async with self._discovery.find_providers(key, timeout_s=ROUND_TIMEOUT_S) as providers:
            async for provider in providers:
                peer = PeerAddress(provider.peer_id, provider.addrs)
                self._meet_some(DHT, key, [peer], nursery)

    async def _ask_neighbour(self, peer_id: str, key: bytes, nursery: trio.Nursery) -> None:
        neighbour = self._neighbours.get(peer_id)
        if neighbour is None:
            return
        try:
            entries = await neighbour.get_peers(key)
        except RemoteError as error:
            self.note_failure(peer_id, error)
            return
        seen_at = self._neighbours.seen_at(peer_id)
        peers = [
            PeerAddress(entry.peer_id, addrs)
            for entry in entries
            if (addrs := believable(entry.addrs, told_by=seen_at))
        ]
        self._meet_some(peer_id, key, peers, nursery)

    def _meet_some(
        self, teller: str, key: bytes, peers: Sequence[PeerAddress], nursery: trio.Nursery
    ) -> None:
        """Meet those that were named under a key, or those of them that the chooser takes."""
        if self.chooser is None or key != self.chosen_key:
            for peer in peers:
                nursery.start_soon(self.meet, peer)
            return
        for peer in self.chooser.choose(teller, peers):
            nursery.start_soon(self._meet_chosen, self.chooser, peer, nursery)

    async def _meet_chosen(
        self, chooser: Chooser, peer: PeerAddress, nursery: trio.Nursery
    ) -> None:
        try:
            await self.meet(peer)
        finally:
            following = chooser.after(peer.peer_id)
        for other in following:
            nursery.start_soon(self._meet_chosen, chooser, other, nursery)

    async def meet(self, peer: PeerAddress) -> None:
        """Meet one peer, unless it was tried a moment ago."""
        now = trio.current_time()
        if self._neighbours.is_neighbour(peer.peer_id):
            return
        redial_at, pause_s = self._redial_at.get(peer.peer_id, (now, REDIAL_AFTER_S))
        if now < redial_at:
            return
        if len(self._redial_at) >= MAX_FAILURES_KEPT * 16:
            self._redial_at.clear()  # stale notes only cost a second attempt
        self._redial_at[peer.peer_id] = (now + pause_s, min(2 * pause_s, MAX_REDIAL_AFTER_S))
        async with self._dials:
            try:
                await self._neighbours.meet(peer)
            except RemoteError as error:
                self.note_failure(peer.peer_id, error)
            else:
                self.failures.pop(peer.peer_id, None)

    def note_failure(self, peer_id: str, error: RemoteError) -> None:
        """Remember why a peer was of no use."""
        if len(self.failures) < MAX_FAILURES_KEPT:
            self.failures[peer_id] = str(error)

    def failure_text(self) -> str:
        """Return the reasons why peers could not be met, for a message."""
        shown = [f"{peer_id}: {reason}" for peer_id, reason in list(self.failures.items())[:3]]
        more = len(self.failures) - len(shown)
        return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
