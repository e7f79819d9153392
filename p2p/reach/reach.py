"""Being reachable: knowing whether others can dial us, and using a relay when they cannot.

Purpose: ask peers to dial back, hold reservations at relays while they cannot, and tell
peers the addresses that lead through these.

Rules
- A node that can be reached uses no relay.
- At most `MAX_PLACES` reservations, renewed at half of their time, made anew elsewhere when
  the connection to a relay is lost. Relays that the user named come first, then connected
  peers that say they are one.
- Peers are asked soon after they connect, until `ENOUGH_VERDICTS` have spoken, and one of
  them again every `CHECK_INTERVAL_S`: a NAT may come and go.
- Nothing here is an error of the node: without peers or relays it tries again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from tensorswarm.store.errors import NoSource, RemoteError

from ..host.addresses import PeerAddress, circuit_through, is_circuit
from ..host.host import Host
from .autonat import AUTONAT_PROTOCOL, Reachability, Verdicts, ask_to_dial_back
from .relay_client import RelayClient
from .relay_wire import HOP_PROTOCOL

MAX_PLACES = 2
"""Reservations held at once: one may break."""

ENOUGH_VERDICTS = 3
"""Peers asked without waiting: a majority of them outvotes a single liar."""

CHECK_INTERVAL_S = 300.0
"""Seconds between questions once there is a verdict."""

TICK_S = 5.0
"""Longest time until a lost relay, or a first peer, is noticed if nobody says so."""

REFUSED_PAUSE_S = 60.0
"""Seconds before a relay or a peer that refused is asked again."""

MAX_REMEMBERED = 500
"""Peers remembered as having refused."""

_log = logging.getLogger("tensorswarm.reach")


class Reach:
    """Keeps a node reachable.

    Parameters
    ----------
    host : Host
        Ours.
    client : RelayClient
        Makes the reservations.
    relays : sequence of PeerAddress
        Relays to use, besides those met.
    on_change : callable
        Called when our addresses have changed.
    """

    def __init__(
        self,
        host: Host,
        client: RelayClient,
        relays: Sequence[PeerAddress] = (),
        *,
        on_change: Callable[[], object] = lambda: None,
    ) -> None:
        self._host = host
        self._client = client
        self._relays = {relay.peer_id: relay for relay in relays}
        self._on_change = on_change
        self._verdicts = Verdicts()
        self._checked_at = -CHECK_INTERVAL_S
        self._places: dict[str, tuple[float, str]] = {}  # when to renew, and the address
        self._refused: dict[tuple[str, str], float] = {}  # by protocol and peer
        self._changed = trio.Event()
        host.on_identified(lambda _peer_id: self._changed.set())

    @property
    def reachability(self) -> Reachability:
        """Whether others can dial us, as far as they say."""
        return self._verdicts.result()

    @property
    def places(self) -> tuple[str, ...]:
        """The relays at which we have a reservation."""
        return tuple(self._places)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the node reachable until cancelled."""
        task_status.started()
        while True:
            self._changed = trio.Event()
            await self.tick()
            with trio.move_on_after(TICK_S):
                await self._changed.wait()

    async def tick(self) -> None:
        """Do once what is due now."""
        await self.check()
        await self._keep_places()

    # ---- whether we can be reached

    async def check(self) -> Reachability:
        """Ask peers that have not said yet, or one again when it is time."""
        now = trio.current_time()
        able = [
            peer_id
            for peer_id in self._host.connected()
            if AUTONAT_PROTOCOL in self._host.protocols_of(peer_id)
            and not self._host.is_relayed(peer_id)
            and self._may_ask(AUTONAT_PROTOCOL, peer_id, now)
        ]
        fresh = [peer_id for peer_id in able if not self._verdicts.has(peer_id)]
        missing = ENOUGH_VERDICTS - sum(map(self._verdicts.has, self._host.connected()))
        chosen = fresh[: max(0, missing)]
        if not chosen and now - self._checked_at >= CHECK_INTERVAL_S:
            chosen = able[:1]
        async with trio.open_nursery() as nursery:
            for peer_id in chosen:
                nursery.start_soon(self._ask, peer_id)
        return self.reachability

    async def _ask(self, peer_id: str) -> None:
        before = self.reachability
        try:
            said = await ask_to_dial_back(self._host, peer_id)
        except RemoteError as error:
            _log.debug("asking %s to dial back: %s", peer_id, error)
            said = Reachability.UNKNOWN
        if said is Reachability.UNKNOWN:
            self._note_refused(AUTONAT_PROTOCOL, peer_id)
            return
        self._checked_at = trio.current_time()
        self._verdicts.add(peer_id, said)
        if self.reachability is not before:
            _log.info("others can dial this node: %s", self.reachability.value)

    def _may_ask(self, protocol: str, peer_id: str, now: float) -> bool:
        return now - self._refused.get((protocol, peer_id), -REFUSED_PAUSE_S) >= REFUSED_PAUSE_S

    def _note_refused(self, protocol: str, peer_id: str) -> None:
        if len(self._refused) >= MAX_REMEMBERED:
            self._refused.clear()  # asking once more is cheap
        self._refused[protocol, peer_id] = trio.current_time()

    # ---- relays

    async def _keep_places(self) -> None:
        now = trio.current_time()
        for relay, (renew_at, _) in list(self._places.items()):
            if not self._host.is_connected(relay) or self.reachability is Reachability.PUBLIC:
                self._drop(relay)
            elif now >= renew_at:
                await self._reserve(relay)
        if self.reachability is Reachability.PRIVATE:
            for relay in self._candidates(now):
                if len(self._places) >= MAX_PLACES:
                    break
                await self._reserve(relay)
        await self._tell()

    def _candidates(self, now: float) -> list[str]:
        met = (
            peer_id
            for peer_id in self._host.connected()
            if HOP_PROTOCOL in self._host.protocols_of(peer_id)
            and not self._host.is_relayed(peer_id)
        )
        return [
            relay
            for relay in dict.fromkeys((*self._relays, *met))
            if relay not in self._places and self._may_ask(HOP_PROTOCOL, relay, now)
        ]

    async def _reserve(self, relay: str) -> None:
        try:
            if relay in self._relays:
                await self._host.connect_peer(self._relays[relay])
            place = await self._client.reserve(relay)
            address = self._address_of(relay)
        except RemoteError as error:
            _log.info("no place at relay %s: %s", relay, error)
            self._note_refused(HOP_PROTOCOL, relay)
            self._drop(relay)
            return
        if relay not in self._places:
            _log.info("reachable through relay %s", relay)
        self._places[relay] = (trio.current_time() + place.lasts_s / 2, address)

    def _drop(self, relay: str) -> None:
        self._places.pop(relay, None)
        self._client.release(relay)

    def _address_of(self, relay: str) -> str:
        """Return the circuit address through a relay: at the address where we reach it."""
        direct = [addr for addr in self._host.addrs_of(relay) if not is_circuit(addr)]
        seen = self._host.remote_host(relay)
        direct.sort(key=lambda addr: f"/{seen}/" not in addr)
        if not direct:
            raise NoSource(f"where relay {relay} can be dialled is not known")
        return circuit_through(PeerAddress(relay, (direct[0],)))

    async def _tell(self) -> None:
        addrs = [address for _, address in self._places.values()]
        if self._host.set_circuits(addrs):
            self._on_change()
