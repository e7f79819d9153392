"""Hole punching: from a connection through a relay to a direct one.

Purpose: when two peers have met through a relay, get a direct connection between them, and
move to it what runs between them. What they say to each other is in `dcutr`; this file does
it with streams and sockets.

Rules
- Who was found through the relay begins (B). It first tries the addresses at which the other
  says it can be dialled; if it can, no hole has to be punched.
- Else both dial at the moment agreed on, from their listening ports, so that their NATs let
  the other's packets in. A refusal is not the end of an attempt: a NAT in front of the other
  may have refused what came before its turn.
- On the connection that comes of it A speaks first (the client), whichever of both dialled,
  and though it may have come in at A's own listening port.
- Addresses are a stranger's claims: those on the Internet alone are dialled, few of
  them, and a few times in an attempt. `MAX_AT_ONCE` peers at once; who could not be reached
  is left in peace for a while (`dcutr.BackOffs`). Every wait has a deadline.
- A failure changes nothing: the connection through the relay is used on.
- When there is a direct connection, new streams take it by themselves. A then says hello on
  it, and the way through the relay is left after a grace, for what is still under way there.
- Bytes are worth a short wait (`HOLD_S`): what is asked through the relay loads the relay.

It reaches the bulk plane's port no more than before: that one has not been seen by anybody.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID

from tensorswarm.store.errors import NoSource, RemoteError

from ..host.addresses import Scope, tcp_host
from ..host.host import Host, Stream
from . import circuit, dcutr, dcutr_wire
from .dcutr import DCUTR_PROTOCOL, Answerer, BackOffs, Beginner, Dial
from .observed import Observers, of_scope
from .relay_client import RelayClient
from .relay_wire import MESSAGE_TIMEOUT_S, MessageStream

MAX_AT_ONCE = 8
"""Peers with whom an upgrade is tried at once; others stay on the relay."""

ATTEMPT_S = 5.0
"""Seconds to dial, and again for the handshake: a first packet that a NAT dropped is repeated
after one second, and after three. A connection on which both wait for the other to speak must
be gone before the next attempt, which would not get past it."""

UPGRADE_S = 60.0
"""Seconds for everything with one peer: three attempts and their messages."""

IDENTIFY_S = 5.0
"""Seconds to wait for what the other says of itself."""

KNOCK_PAUSES_S = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Pauses after which an address that refused is dialled again within an attempt."""

HOLD_S = 5.0
"""Seconds that bytes wait for a direct connection rather than go through the relay."""

RELAY_GRACE_S = 30.0
"""Seconds after which the way through the relay is left: what is under way there may take
as long as a large answer."""

_log = logging.getLogger("tensorswarm.reach")


async def _nothing(_peer_id: str) -> None:
    """Do nothing."""


class Puncher:
    """Upgrades a host's relayed connections.

    Parameters
    ----------
    host : Host
        Ours; requests of others are taken as soon as this is made.
    client : RelayClient
        Tells of connections through relays.
    innermost : Scope, optional
        Addresses further inside are neither told nor dialled.
    move : callable, optional
        From a peer id: moves to the new connection what should not stay on the old one.

    Attributes
    ----------
    settled : list of callables
        Hear, by peer id, of each peer of which it is known now whether there is a direct
        connection.
    """

    def __init__(
        self,
        host: Host,
        client: RelayClient,
        *,
        innermost: Scope = Scope.GLOBAL,
        move: Callable[[str], Awaitable[object]] = _nothing,
    ) -> None:
        self._host = host
        self._innermost = innermost
        self._move = move
        self._observers = Observers(host, innermost)
        self._back_offs = BackOffs()
        self._refusals = BackOffs()  # of peers whose own attempts came to nothing
        self._in_vain: Counter[str] = Counter()
        self._beginning: set[str] = set()
        self._answering: dict[str, trio.CancelScope] = {}
        self._dialled: dict[str, bool] = {}  # peers met through a relay: whether we dialled
        self._held_until: dict[str, float] = {}
        self._arrivals: dict[str, trio.Event] = {}  # of direct connections awaited
        self._knocking: set[str] = set()
        self._shaking: Counter[str] = Counter()  # handshakes under way
        self._identified: dict[str, trio.Event] = {}
        self._punched: set[str] = set()
        self._shut: set[str] = set()
        self.settled: list[Callable[[str], object]] = []
        client.dialled.append(self._after_dialling)
        client.taken_in.append(self._after_taking_in)
        host.on_connected(self._on_connected)
        host.on_identified(self._on_identified)
        host.set_handler(DCUTR_PROTOCOL, self._answer)

    # ---- what others may know

    def is_punched(self, peer_id: str) -> bool:
        """Tell whether the direct connection to a peer goes through a punched hole."""
        return peer_id in self._punched and self._host.is_connected(peer_id)

    def is_shut(self, peer_id: str) -> bool:
        """Tell whether a peer can be dialled at no other port: it was found through a relay."""
        return peer_id in self._shut and self._host.is_connected(peer_id)

    def held_until(self, peer_id: str) -> float:
        """Return until when bytes should wait for a direct connection to a peer."""
        if not self._host.is_relayed(peer_id):
            return 0.0
        speaks = self._host.protocols_of(peer_id)
        return self._held_until.get(peer_id, 0.0) if not speaks or DCUTR_PROTOCOL in speaks else 0.0

    async def wait_settled(self, peer_id: str) -> None:
        """Wait until it is known whether a peer can be reached directly, or `held_until`."""
        event = trio.Event()

        def listen(settled: str) -> None:
            if settled == peer_id:
                event.set()

        self.settled.append(listen)
        try:
            with trio.move_on_at(self.held_until(peer_id)):
                await event.wait()
        finally:
            self.settled.remove(listen)

    # ---- connections as they come

    def _after_dialling(self, peer_id: str) -> None:
        self._note_relayed(peer_id, we_dialled=True)
        self._host.start_soon(lambda: self._prepare(peer_id))

    async def _prepare(self, peer_id: str) -> None:
        """Learn our addresses before B begins: asking meanwhile would spoil its timing."""
        if not await self._observers.own_addrs():
            self._settle(peer_id)  # nothing can come of it

    def _after_taking_in(self, peer_id: str) -> None:
        self._note_relayed(peer_id, we_dialled=False)
        self._host.start_soon(lambda: self._upgrade(peer_id))

    def _note_relayed(self, peer_id: str, *, we_dialled: bool) -> None:
        tables: tuple[dict[str, Any], ...] = (self._dialled, self._held_until, self._in_vain)
        for table in tables:
            for gone in [each for each in table if not self._host.is_connected(each)]:
                del table[gone]
        for peers in (self._punched, self._shut):
            peers.difference_update([each for each in peers if not self._host.is_connected(each)])
        self._dialled[peer_id] = we_dialled
        now = trio.current_time()
        if self._back_offs.may_try(now, peer_id) and self._host.is_relayed(peer_id):
            self._held_until[peer_id] = now + HOLD_S

    def _on_identified(self, peer_id: str) -> None:
        if peer_id in self._identified:
            self._identified[peer_id].set()

    def _on_connected(self, peer_id: str) -> None:
        if peer_id not in self._dialled or self._host.is_relayed(peer_id):
            return
        if peer_id in self._knocking:
            self._punched.add(peer_id)
        if peer_id in self._arrivals:
            self._arrivals[peer_id].set()
        we_dialled = self._dialled.pop(peer_id)
        if we_dialled or peer_id in self._punched:
            self._shut.add(peer_id)
        _log.info("%s is connected directly now", peer_id)
        self._back_offs.succeeded(peer_id)
        self._refusals.succeeded(peer_id)
        self._settle(peer_id)
        self._host.start_soon(lambda: self._leave_relay(peer_id, we_dialled))

    def _settle(self, peer_id: str) -> None:
        self._held_until.pop(peer_id, None)
        for listener in list(self.settled):
            listener(peer_id)

    async def _leave_relay(self, peer_id: str, we_dialled: bool) -> None:
        if we_dialled:
            await self._move(peer_id)
        # Who moves leaves first; the other side only if that one does not.
        await trio.sleep(RELAY_GRACE_S if we_dialled else 2 * RELAY_GRACE_S)
        await circuit.leave(self._host, peer_id)

    # ---- B: who was found through the relay begins

    async def _upgrade(self, peer_id: str) -> None:
        """Try to get a direct connection to a peer that has come through a relay."""
        if peer_id in self._beginning or len(self._beginning) >= MAX_AT_ONCE:
            return
        if not self._host.is_relayed(peer_id) or peer_id not in self._held_until:
            return
        self._beginning.add(peer_id)
        reason = f"not within {UPGRADE_S:.0f} s"
        try:
            with trio.move_on_after(UPGRADE_S):
                try:
                    await self._try_all(peer_id)
                    reason = "no packet came through"
                except RemoteError as error:
                    reason = str(error)
        finally:
            self._beginning.discard(peer_id)
        if self._host.is_relayed(peer_id):
            pause_s = self._back_offs.failed(trio.current_time(), peer_id)
            self._settle(peer_id)
            _log.info(
                "%s stays behind its relay, for %.0f s at least: %s", peer_id, pause_s, reason
            )

    async def _try_all(self, peer_id: str) -> None:
        await self._wait_identified(peer_id)
        await self._reverse(peer_id)
        speaks = self._host.protocols_of(peer_id)
        if self._host.is_relayed(peer_id) and speaks and DCUTR_PROTOCOL not in speaks:
            raise NoSource("it knows nothing of hole punching")
        failure: RemoteError | None = None
        for _ in range(dcutr.ATTEMPTS):
            if not self._host.is_relayed(peer_id):
                return
            try:
                await self._begin(peer_id)
            except RemoteError as error:
                failure = error
            if self._host.is_relayed(peer_id):
                self._settle(peer_id)  # bytes need not wait for the next attempts
        if failure is not None:
            raise failure

    async def _wait_identified(self, peer_id: str) -> None:
        if self._host.protocols_of(peer_id):
            return
        event = self._identified.setdefault(peer_id, trio.Event())
        try:
            with trio.move_on_after(IDENTIFY_S):
                await event.wait()
        finally:
            self._identified.pop(peer_id, None)

    async def _reverse(self, peer_id: str) -> None:
        """Dial a peer where it says it can be dialled."""
        addrs = of_scope(self._host.addrs_of(peer_id), self._innermost)
        if addrs:
            await self._race(peer_id, addrs, (), as_client=True)

    async def _begin(self, peer_id: str) -> None:
        """Make one attempt."""
        own = await self._observers.own_addrs()
        if not own:
            raise NoSource("nobody says where we are seen")
        stream = await self._host.open_stream(peer_id, DCUTR_PROTOCOL, MESSAGE_TIMEOUT_S)
        try:
            self._knocking.add(peer_id)
            messages = MessageStream(stream)
            beginner = Beginner(own)
            await messages.write_bytes(dcutr_wire.encode(beginner.connect(trio.current_time())))
            answer = dcutr_wire.parse(await messages.read_bytes("CONNECT"))
            sync, dial = beginner.receive(trio.current_time(), answer)
            await messages.write_bytes(dcutr_wire.encode(sync))
            await self._knock(peer_id, dial)
        except BaseException:
            stream.abort()
            raise
        finally:
            self._knocking.discard(peer_id)
        await stream.aclose()

    # ---- A: who has dialled through the relay answers

    async def _answer(self, peer_id: str, stream: Stream) -> None:
        """Take part in a peer's attempts."""
        now = trio.current_time()
        if not self._host.is_relayed(peer_id) or not self._refusals.may_try(now, peer_id):
            raise NoSource("there is nothing to punch, or it has been tried")
        earlier = self._answering.get(peer_id)
        if earlier is not None:
            earlier.cancel()  # it begins anew, before we have seen that this one is over
        elif len(self._answering) >= MAX_AT_ONCE:
            raise NoSource("too many at once")
        with trio.move_on_after(UPGRADE_S) as scope:
            self._answering[peer_id] = scope
            try:
                await self._answer_all(peer_id, MessageStream(stream))
            finally:
                if self._answering.get(peer_id) is scope:
                    del self._answering[peer_id]

    async def _answer_all(self, peer_id: str, messages: MessageStream) -> None:
        answerer = Answerer(await self._observers.own_addrs())
        expected = self._host.door.expected
        places: set[tuple[str, int]] = set()
        self._knocking.add(peer_id)
        try:
            for _ in range(2 * dcutr.ATTEMPTS):  # each is a CONNECT and a SYNC
                if not self._host.is_relayed(peer_id):
                    return
                message = dcutr_wire.parse(await messages.read_bytes("CONNECT or SYNC"))
                step = answerer.receive(trio.current_time(), message)
                if isinstance(step, Dial):
                    await self._knock_as_client(peer_id, step)
                    continue
                # It may dial us as soon as it has our answer, and before we dial it.
                places |= {tcp_host(addr) for addr in of_scope(message.addrs, self._innermost)}
                expected.update(dict.fromkeys(places, peer_id))
                await messages.write_bytes(dcutr_wire.encode(step))
        finally:
            self._knocking.discard(peer_id)
            for place in places:
                expected.pop(place, None)

    async def _knock_as_client(self, peer_id: str, dial: Dial) -> None:
        await self._knock(peer_id, dial)
        if self._host.is_relayed(peer_id):
            self._settle(peer_id)
            self._count_in_vain(peer_id)

    def _count_in_vain(self, peer_id: str) -> None:
        """Note an attempt of a peer that led nowhere; after a few it has to wait."""
        self._in_vain[peer_id] += 1
        if self._in_vain[peer_id] >= dcutr.ATTEMPTS:
            del self._in_vain[peer_id]
            self._refusals.failed(trio.current_time(), peer_id)

    # ---- both

    async def _knock(self, peer_id: str, dial: Dial) -> None:
        """Dial at the moment agreed on, until a direct connection is there or time is up."""
        addrs = of_scope(dial.addrs, self._innermost)
        if not addrs:
            raise NoSource("it names no address that could be dialled")
        await trio.sleep_until(dial.at)
        await self._race(peer_id, addrs, KNOCK_PAUSES_S, as_client=dial.as_client)

    async def _race(
        self, peer_id: str, addrs: Sequence[str], pauses_s: Sequence[float], *, as_client: bool
    ) -> None:
        """Dial all addresses, until a direct connection is there or time is up.

        Without `pauses_s` each is dialled once, and nothing is awaited when all have refused.
        """
        arrival = self._arrivals.setdefault(peer_id, trio.Event())
        try:
            with trio.move_on_after(ATTEMPT_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_after, arrival, nursery.cancel_scope)
                    async with trio.open_nursery() as dials:
                        for addr in addrs:
                            dials.start_soon(self._knock_at, addr, peer_id, pauses_s, as_client)
                    if not pauses_s and not self._shaking[peer_id]:
                        nursery.cancel_scope.cancel()
        finally:
            self._arrivals.pop(peer_id, None)

    async def _knock_at(
        self, addr: str, peer_id: str, pauses_s: Sequence[float], as_client: bool
    ) -> None:
        for pause_s in (*pauses_s, None):
            try:
                raw = await self._host.own_port.connect(addr)
                break
            except RemoteError as error:
                _log.debug("knocking at %s: %s", addr, error)
                return
            except OSError as error:
                _log.debug("knocking at %s: %s", addr, error)
                if pause_s is None:
                    return
                await trio.sleep(pause_s)
        self._shaking[peer_id] += 1
        self._host.start_soon(lambda: self._shake_hands(raw, addr, peer_id, as_client))

    async def _shake_hands(
        self, raw: RawConnection, addr: str, peer_id: str, as_client: bool
    ) -> None:
        """Make a TCP connection one of libp2p's; not to be cancelled when one has arrived."""
        try:
            target = ID.from_string(peer_id)
            await self._host.own_port.upgrade(
                raw, addr, target, as_client=as_client, timeout_s=ATTEMPT_S
            )
        except Exception as error:  # libp2p's layers each have their own kinds
            _log.debug("%s at %s: %s: %s", peer_id, addr, type(error).__name__, error)
        finally:
            self._shaking[peer_id] -= 1
            self._shaking += Counter()  # without those at zero


async def _cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
