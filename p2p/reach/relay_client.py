"""Using relays: circuit relay v2, the end points' side.

Purpose: reserve a place at a relay, take in the connections that come through it, and dial
peers through their relays.
https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md

Rules
- A relay may hand us connections only while we have a reservation there.
- A relay is trusted with nothing: who is at the other end is proved inside the circuit.
- Every exchange with a relay has a deadline; circuits taken in are bounded by the streams
  that one peer may open to us (`host.guard`) and by the host's connections.

What it does not do: decide whether a relay is needed and which one (`reach`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage

from tensorswarm.store.errors import NoSource, ProtocolError

from ..host.addresses import PeerAddress, relay_of
from ..host.host import Host, Stream
from .circuit import accept_through, connect_through
from .relay_wire import HOP_PROTOCOL, MESSAGE_TIMEOUT_S, STOP_PROTOCOL, MessageStream

MAX_RESERVATION_S = 24 * 3600.0
"""Longest that a reservation is believed to last; it is renewed sooner anyway."""

MIN_RESERVATION_S = 60.0
"""Shortest one that is taken for use: renewing is an exchange of messages."""

_REASONS = {
    Status.RESERVATION_REFUSED: "it takes no more reservations",
    Status.RESOURCE_LIMIT_EXCEEDED: "it carries as many connections as it can",
    Status.PERMISSION_DENIED: "it does not let us",
    Status.CONNECTION_FAILED: "it does not reach the peer",
    Status.NO_RESERVATION: "the peer has no place there",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """A reservation that we hold.

    Attributes
    ----------
    relay : str
        The relay's peer id.
    lasts_s : float
        Seconds from when it was made to its end.
    """

    relay: str
    lasts_s: float


class RelayClient:
    """The use of relays by a host.

    Parameters
    ----------
    host : Host
        Ours. It dials circuit addresses through this from now on.
    clock : callable, optional
        Seconds since 1970.

    Attributes
    ----------
    dialled, taken_in : list of callables
        Hear, by peer id, of each connection through a relay: of those that we made, and of
        those that peers made to us.
    """

    def __init__(self, host: Host, *, clock: Callable[[], float] = time.time) -> None:
        self._host = host
        self._clock = clock
        self._reserved: set[str] = set()
        self.dialled: list[Callable[[str], object]] = []
        self.taken_in: list[Callable[[str], object]] = []
        host.set_circuit_dialer(self.dial)
        host.set_handler(STOP_PROTOCOL, self._take_in)

    async def reserve(self, relay: str) -> Place:
        """Make a reservation at a connected relay, or renew it.

        Raises
        ------
        RemoteError
            It gives none; says why.
        """
        stream = await self._host.open_stream(relay, HOP_PROTOCOL, MESSAGE_TIMEOUT_S)
        self._reserved.add(relay)  # it may call before we have read its answer
        try:
            messages = MessageStream(stream)
            await messages.write(HopMessage(type=HopMessage.RESERVE))
            answer = await messages.read(HopMessage)
            _check(relay, answer)
            lasts_s = answer.reservation.expire - self._clock()
            if lasts_s < MIN_RESERVATION_S:
                raise NoSource(f"relay {relay} gives a place for {lasts_s:.0f} s only")
        except BaseException:
            self._reserved.discard(relay)
            stream.abort()
            raise
        await stream.aclose()
        return Place(relay, min(lasts_s, MAX_RESERVATION_S))

    def release(self, relay: str) -> None:
        """Take in no more connections through a relay."""
        self._reserved.discard(relay)

    async def dial(self, address: str, peer_id: str) -> None:
        """Connect to a peer through the relay that an address names.

        Raises
        ------
        RemoteError
            It cannot be reached that way; says why.
        """
        relay = relay_of(address)
        if relay.peer_id in (peer_id, self._host.peer_id):
            raise NoSource("the relay is one of the two ends")
        await self._reach(relay)
        stream = await self._host.open_stream(relay.peer_id, HOP_PROTOCOL, MESSAGE_TIMEOUT_S)
        messages = MessageStream(stream)
        try:
            call = HopMessage(type=HopMessage.CONNECT)
            call.peer.id = ID.from_string(peer_id).to_bytes()
            await messages.write(call)
            _check(relay.peer_id, await messages.read(HopMessage))
        except BaseException:
            stream.abort()
            raise
        await connect_through(self._host, messages, peer_id)
        for listener in self.dialled:
            listener(peer_id)

    async def _reach(self, relay: PeerAddress) -> None:
        await self._host.connect_peer(relay)
        if self._host.is_relayed(relay.peer_id):
            raise NoSource(f"relay {relay.peer_id} can itself be reached through a relay only")

    async def _take_in(self, relay: str, stream: Stream) -> None:
        """Take in a connection that a relay hands us; returns when it has ended."""
        messages = MessageStream(stream)
        call = await messages.read(StopMessage)
        if call.type != StopMessage.CONNECT:
            raise ProtocolError(f"relay {relay} called with something else than a connection")
        if relay not in self._reserved:
            await messages.write(
                StopMessage(type=StopMessage.STATUS, status=Status.PERMISSION_DENIED)
            )
            return
        await messages.write(StopMessage(type=StopMessage.STATUS, status=Status.OK))
        circuit, peer_id = await accept_through(self._host, messages)
        for listener in self.taken_in:
            listener(peer_id)
        await circuit.closed.wait()


def _check(relay: str, answer: HopMessage) -> None:
    if answer.type != HopMessage.STATUS:
        raise ProtocolError(f"relay {relay} answered with something else than a status")
    if answer.status != Status.OK:
        reason = _REASONS.get(answer.status, f"status {answer.status}")
        raise NoSource(f"relay {relay}: {reason}")
