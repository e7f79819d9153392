"""AutoNAT: asking peers whether they can reach us, and answering others.

Purpose: find out whether this node can be dialled. A peer is asked to dial back; it tells
whether that worked. The protocol is libp2p's AutoNAT v1
(https://github.com/libp2p/specs/blob/master/autonat/autonat-v1.md), so that go-libp2p and
js-libp2p nodes answer us, and we them.

Rules
- Dialled back is only the IP address at which we see whoever asks, at the ports it names:
  nobody can make us knock at a third party's door. Through a relay nothing is dialled.
- A dial back is a TCP connection and a Noise handshake that proves the peer's id, on a
  connection of its own, which is closed at once.
- Answers to others are bounded: in all, and for each peer in a time.
- A verdict is a majority of the peers asked last: each of them may be wrong, or lie.

Not here: what is done about it (`reach`).

Not used: py-libp2p's `AutoNATService` (0.8.1), which waits for four agreeing servers before
it says anything; a small network has fewer.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from enum import Enum

import trio
from libp2p.host.autonat.pb.autonat_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from tensorswarm.store.errors import BadInput, NoSource, ProtocolError

from ..host.addresses import is_circuit, multiaddr_of, plain, tcp_host
from ..host.host import Host, Stream
from .relay_wire import MessageStream

AUTONAT_PROTOCOL = "/libp2p/autonat/1.0.0"

DIAL_BACK_TIMEOUT_S = 5.0
"""Seconds to dial somebody back, all ports together."""

ANSWER_TIMEOUT_S = 15.0
"""Seconds to wait for a peer's answer: it dials us first."""

MAX_PORTS = 4
"""Ports of one peer that are dialled: a node listens on one or two."""

MAX_DIALS = 8
"""Peers dialled back at once; further ones are refused."""

DIAL_INTERVAL_S = 10.0
"""Seconds between two dials back to the same IP address."""

MAX_REMEMBERED = 1_000
"""Addresses of which the last dial is remembered; the oldest are forgotten first."""

MAX_VERDICTS = 8
"""Peers whose last answers are counted."""

Status = Message.ResponseStatus

_log = logging.getLogger(__name__)


class Reachability(Enum):
    """Whether others can dial this node."""

    UNKNOWN = "unknown"
    PUBLIC = "public"
    PRIVATE = "private"


class AutoNatServer:
    """Dials peers back that ask for it.

    Parameters
    ----------
    host : Host
        Ours; requests are taken as soon as this is made.
    dial_interval_s : float, optional
        Seconds between two dials back to the same IP address.
    """

    def __init__(self, host: Host, *, dial_interval_s: float = DIAL_INTERVAL_S) -> None:
        self._host = host
        self._dial_interval_s = dial_interval_s
        self._dialled_at: OrderedDict[str, float] = OrderedDict()
        self._dialling = 0
        host.set_handler(AUTONAT_PROTOCOL, self._handle)

    async def _handle(self, peer_id: str, stream: Stream) -> None:
        messages = MessageStream(stream)
        asked = await messages.read(Message)
        answer = Message(type=Message.DIAL_RESPONSE)
        answer.dialResponse.CopyFrom(await self._answer(peer_id, asked))
        await messages.write(answer)

    async def _answer(self, peer_id: str, asked: Message) -> Message.DialResponse:
        if asked.type != Message.DIAL:
            return _refusal(Status.E_BAD_REQUEST, "not a request to dial")
        if asked.dial.peer.id != ID.from_string(peer_id).to_bytes():
            return _refusal(Status.E_BAD_REQUEST, "you may only ask for yourself")
        host = self._host.remote_host(peer_id)
        if host is None:
            return _refusal(Status.E_DIAL_REFUSED, "you came through a relay")
        addrs = _places(asked.dial.peer.addrs, host)
        if not addrs:
            return _refusal(Status.E_DIAL_REFUSED, "no TCP address")
        if self._dialling >= MAX_DIALS or not self._may_dial(host):
            return _refusal(Status.E_DIAL_REFUSED, "not so often")
        self._dialling += 1
        try:
            with trio.move_on_after(DIAL_BACK_TIMEOUT_S):
                for addr in addrs:
                    if await self._host.probe(addr, peer_id):
                        return Message.DialResponse(status=Status.OK, addr=_encoded(addr))
        finally:
            self._dialling -= 1
        return _refusal(Status.E_DIAL_ERROR, "no answer")

    def _may_dial(self, host: str) -> bool:
        now = trio.current_time()
        if now - self._dialled_at.get(host, -self._dial_interval_s) < self._dial_interval_s:
            return False
        self._dialled_at[host] = now
        self._dialled_at.move_to_end(host)
        while len(self._dialled_at) > MAX_REMEMBERED:
            self._dialled_at.popitem(last=False)
        return True


async def ask_to_dial_back(host: Host, peer_id: str) -> Reachability:
    """Ask a connected peer whether it can dial us.

    Returns
    -------
    Reachability
        UNKNOWN when it does not want to try.

    Raises
    ------
    RemoteError
        It does not speak the protocol, or does not answer.
    """
    direct = [addr for addr in host.advertised_addrs() if not is_circuit(addr)]
    if not direct:
        return Reachability.PRIVATE  # we listen nowhere
    stream = await host.open_stream(peer_id, AUTONAT_PROTOCOL)
    try:
        with trio.fail_after(ANSWER_TIMEOUT_S):
            messages = MessageStream(stream)
            asked = Message(type=Message.DIAL)
            asked.dial.peer.id = ID.from_string(host.peer_id).to_bytes()
            asked.dial.peer.addrs.extend(_encoded(addr) for addr in direct)
            await messages.write(asked)
            answer = await messages.read(Message)
    except trio.TooSlowError as error:
        raise NoSource(f"{peer_id} did not say whether it can dial us") from error
    finally:
        stream.abort()
    if answer.type != Message.DIAL_RESPONSE:
        raise ProtocolError(f"{peer_id} answered with something else")
    if answer.dialResponse.status == Status.OK:
        return Reachability.PUBLIC
    if answer.dialResponse.status == Status.E_DIAL_ERROR:
        return Reachability.PRIVATE
    return Reachability.UNKNOWN


class Verdicts:
    """What the peers asked last have said. No I/O."""

    def __init__(self) -> None:
        self._said: OrderedDict[str, Reachability] = OrderedDict()

    def add(self, peer_id: str, said: Reachability) -> None:
        """Note what a peer says; what it said before no longer counts."""
        if said is Reachability.UNKNOWN:
            return
        self._said[peer_id] = said
        self._said.move_to_end(peer_id)
        while len(self._said) > MAX_VERDICTS:
            self._said.popitem(last=False)

    def has(self, peer_id: str) -> bool:
        """Tell whether a peer's word counts now."""
        return peer_id in self._said

    def result(self) -> Reachability:
        """Return what most of them say; PUBLIC when both are said as often."""
        public = sum(said is Reachability.PUBLIC for said in self._said.values())
        if not self._said:
            return Reachability.UNKNOWN
        return Reachability.PUBLIC if 2 * public >= len(self._said) else Reachability.PRIVATE


def _places(claimed: Iterable[bytes], host: str) -> list[str]:
    """Return where to dial: the ports claimed, at the address at which we see the peer."""
    ports: dict[int, None] = {}
    for raw in claimed:
        try:
            addr = str(Multiaddr(raw))
            if not is_circuit(addr):
                ports[tcp_host(plain(addr))[1]] = None
        except BadInput:
            continue
        except Exception as error:  # the library raises many kinds; all mean "unreadable"
            _log.debug("an address that cannot be read: %s", error)
    return [multiaddr_of(host, port) for port in ports if port][:MAX_PORTS]


def _encoded(addr: str) -> bytes:
    return bytes(Multiaddr(addr).to_bytes())


def _refusal(status: Status.ValueType, text: str) -> Message.DialResponse:
    return Message.DialResponse(status=status, statusText=text)
