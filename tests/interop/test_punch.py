"""From a relayed connection to a direct one, with real hosts on this machine.

No NAT is in between here: what is dialled is let in (tests/e2e/test_hole_punching.py has
NATs). The hosts are told to believe loopback addresses.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

import pytest
import trio
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.dcutr import DCUtRProtocol

from tensorswarm.p2p.host.addresses import (
    PeerAddress,
    Scope,
    circuit_through,
    parse_peer_address,
    tcp_host,
)
from tensorswarm.p2p.host.host import Host
from tensorswarm.p2p.reach import dcutr, dcutr_wire, observed, punch
from tensorswarm.p2p.reach.dcutr import DCUTR_PROTOCOL, HolePunch, Kind
from tensorswarm.p2p.reach.observed import believed, of_scope
from tensorswarm.p2p.reach.punch import Puncher
from tensorswarm.p2p.reach.relay_client import RelayClient
from tensorswarm.p2p.reach.relay_server import RelayServer
from tensorswarm.p2p.reach.relay_wire import MessageStream
from tensorswarm.store.errors import NoSource, RemoteError
from tests.support.events import watch_calls
from tests.support.hosts import ECHO, HERE, assert_serves, echo, receive, run


class Scene:
    """A relay, a host that is known by its circuit address alone, and one that looks for it."""

    def __init__(self, relay: Host, hidden: Host, other: Host, innermost: Scope) -> None:
        self.relay, self.hidden, self.other = relay, hidden, other
        self.server = RelayServer(relay)
        self.server.start()
        self.hidden_client = RelayClient(hidden)
        self.client = RelayClient(other)
        self.hidden_puncher = Puncher(hidden, self.hidden_client, innermost=innermost)
        self.moved: list[str] = []

        async def move(peer_id: str) -> None:
            self.moved.append(peer_id)

        self.puncher = Puncher(other, self.client, innermost=innermost, move=move)
        hidden.set_handler(ECHO, echo)

    async def connect(self) -> None:
        await self.hidden_client.reserve(self.relay.peer_id)
        circuit = circuit_through(parse_peer_address(self.relay.addrs()[0]))
        await self.other.connect_peer(PeerAddress(self.hidden.peer_id, (circuit,)))

    async def echoes(self) -> bool:
        stream = await self.other.open_stream(self.hidden.peer_id, ECHO)
        await stream.send(b"hello")
        return await receive(stream, 5) == b"hello"


@asynccontextmanager
async def scene_hosts(
    listen: str | None = HERE, key: bytes | None = None
) -> AsyncIterator[tuple[Host, Host, Host]]:
    listening = [listen] if listen else []
    async with (
        Host(listen=[HERE], network_key=key) as relay,
        Host(listen=[HERE], network_key=key) as hidden,
        Host(listen=listening, network_key=key) as other,
    ):
        await hidden.connect(relay.addrs()[0])
        yield relay, hidden, other


@asynccontextmanager
async def scene(
    listen: str | None = HERE, innermost: Scope = Scope.LOOPBACK, key: bytes | None = None
) -> AsyncIterator[Scene]:
    async with scene_hosts(listen, key) as (relay, hidden, other):
        yield Scene(relay, hidden, other, innermost)


async def settled(puncher: Puncher, peer_id: str) -> None:
    """Wait until it is known what came of an upgrade that has not been settled yet."""
    event = trio.Event()
    puncher.settled.append(lambda settled: event.set() if settled == peer_id else None)
    await event.wait()


@pytest.mark.parametrize("key", [None, bytes(range(32))], ids=["public", "private network"])
def test_a_relayed_connection_becomes_a_direct_one(
    monkeypatch: pytest.MonkeyPatch, key: bytes | None
) -> None:
    monkeypatch.setattr(punch, "RELAY_GRACE_S", 0.0)

    async def main() -> None:
        async with scene(key=key) as it:
            left = watch_calls(it.server, "_note")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(settled, it.hidden_puncher, it.other.peer_id)
                nursery.start_soon(settled, it.puncher, it.hidden.peer_id)
                await it.connect()
                assert it.puncher.held_until(it.hidden.peer_id) > trio.current_time()
            assert not it.other.is_relayed(it.hidden.peer_id)
            assert not it.hidden.is_relayed(it.other.peer_id)
            assert it.puncher.is_punched(it.hidden.peer_id)
            assert it.hidden_puncher.is_punched(it.other.peer_id)
            assert it.puncher.held_until(it.hidden.peer_id) == 0.0
            await left.until(lambda: not it.server.statistics().circuits)
            assert it.moved == [it.hidden.peer_id]  # by the one that dialled
            assert await it.echoes()

    run(main)


def test_without_an_address_the_relay_is_used_on() -> None:
    async def main() -> None:
        async with scene(innermost=Scope.GLOBAL) as it:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(settled, it.hidden_puncher, it.other.peer_id)
                nursery.start_soon(settled, it.puncher, it.hidden.peer_id)
                await it.connect()
            assert it.other.is_relayed(it.hidden.peer_id)
            assert not it.puncher.is_punched(it.hidden.peer_id)
            assert await it.echoes()

    run(main)


def test_who_listens_nowhere_stays_behind_the_relay() -> None:
    async def main() -> None:
        async with scene(listen=None) as it:
            await it.connect()
            await it.puncher.wait_settled(it.hidden.peer_id)
            assert it.other.is_relayed(it.hidden.peer_id)
            assert await it.echoes()

    run(main)


@pytest.mark.parametrize("key", [None, bytes(range(32))], ids=["public", "private network"])
def test_the_client_speaks_first_though_it_was_dialled(key: bytes | None) -> None:
    """The server's dial may arrive before the client's has left, and at its listening port."""

    async def main() -> None:
        async with (
            Host(listen=[HERE], network_key=key) as client,
            Host(listen=[HERE], network_key=key) as server,
        ):
            place = client.advertised_addrs()[0]
            client.door.expected[tcp_host(server.advertised_addrs()[0])] = server.peer_id
            raw = await server.own_port.connect(place)
            peer_id = ID.from_string(client.peer_id)
            await server.own_port.upgrade(raw, place, peer_id, as_client=False)
            client.set_handler(ECHO, echo)
            stream = await server.open_stream(client.peer_id, ECHO)
            await stream.send(b"hello")
            assert await receive(stream, 5) == b"hello"

    run(main)


def test_another_peer_than_expected_is_not_taken() -> None:
    async def main() -> None:
        async with Host(listen=[HERE]) as a, Host(listen=[HERE]) as b, Host() as c:
            place = b.advertised_addrs()[0]
            b.door.expected[tcp_host(a.advertised_addrs()[0])] = c.peer_id
            raw = await a.own_port.connect(place)
            with pytest.raises(Exception, match="upgrade|security|mismatch|closed|reset"):
                await a.own_port.upgrade(raw, place, ID.from_string(b.peer_id), as_client=False)
            assert not b.is_connected(c.peer_id)
            await assert_serves(b)

    run(main)


# ---- with another implementation: py-libp2p's own, which its authors hold against Go and Rust


@asynccontextmanager
async def three() -> AsyncIterator[tuple[Host, Host, Host]]:
    """A relay, a host behind it, and one that looks for that."""
    async with scene_hosts() as (relay, hidden, other):
        RelayServer(relay).start()
        yield relay, hidden, other


async def connect_through(relay: Host, hidden: Host, client: RelayClient, other: Host) -> None:
    await client.reserve(relay.peer_id)
    circuit = circuit_through(parse_peer_address(relay.addrs()[0]))
    await other.connect_peer(PeerAddress(hidden.peer_id, (circuit,)))
    assert other.is_relayed(hidden.peer_id)


def test_another_implementation_answers_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own packets are dropped, as by its NAT: it would not know what to do with them."""

    async def dropped(_addr: str) -> NoReturn:
        raise ConnectionRefusedError

    async def main() -> None:
        async with three() as (relay, hidden, other):
            client = RelayClient(hidden)
            RelayClient(other)
            puncher = Puncher(hidden, client, innermost=Scope.LOOPBACK)
            monkeypatch.setattr(hidden.own_port, "connect", dropped)
            theirs = DCUtRProtocol(other.libp2p)
            protocol = TProtocol(DCUTR_PROTOCOL)
            other.libp2p.set_stream_handler(protocol, theirs._handle_dcutr_stream)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(settled, puncher, other.peer_id)
                await connect_through(relay, hidden, client, other)
            assert puncher.is_punched(other.peer_id)
            assert not other.is_relayed(hidden.peer_id)

    run(main)


def test_another_implementation_begins_and_we_answer() -> None:
    async def main() -> None:
        async with three() as (relay, hidden, other):
            client = RelayClient(hidden)
            puncher = Puncher(other, RelayClient(other), innermost=Scope.LOOPBACK)
            await connect_through(relay, hidden, client, other)
            theirs = DCUtRProtocol(hidden.libp2p)
            assert await theirs.initiate_hole_punch(ID.from_string(other.peer_id))
            assert puncher.is_punched(hidden.peer_id)
            assert not hidden.is_relayed(other.peer_id)

    run(main)


# ---- peers of ill will


async def begin(it: Scene, *messages: bytes) -> bytes:
    """Send the other side messages as its B; return its answer, b"" if there is none."""
    stream = await it.hidden.open_stream(it.other.peer_id, DCUTR_PROTOCOL)
    wire = MessageStream(stream)
    try:
        for message in messages:
            await wire.write_bytes(message)
        return await wire.read_bytes("answer")
    except RemoteError:
        return b""
    finally:
        stream.abort()


CONNECT = dcutr_wire.encode(HolePunch(Kind.CONNECT, ("/ip4/127.0.0.1/tcp/1",)))
SYNC = dcutr_wire.encode(HolePunch(Kind.SYNC))


def test_nonsense_ends_the_stream_and_nothing_else() -> None:
    async def main() -> None:
        async with scene(innermost=Scope.GLOBAL) as it:
            await it.connect()
            for messages in ((b"\xff" * 100,), (SYNC,), (b"\x08\x64" + b"\x12\x00" * 3000,)):
                assert await begin(it, *messages) == b""
            assert dcutr_wire.parse(await begin(it, CONNECT)).kind is Kind.CONNECT
            assert it.other.is_relayed(it.hidden.peer_id)
            assert await it.echoes()

    run(main)


def test_who_begins_again_and_again_has_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punch, "ATTEMPT_S", 0.0)

    async def main() -> None:
        async with scene() as it:
            # B's own upgrade is not to get in the way: it has no room for one.
            monkeypatch.setattr(it.hidden_puncher, "_upgrade", lambda _peer_id: trio.sleep(0))
            await it.connect()
            answers = []
            for _ in range(dcutr.ATTEMPTS + 1):
                settling = trio.Event()
                it.puncher.settled.append(lambda _peer, event=settling: event.set())
                answers.append(await begin(it, CONNECT, SYNC))
                if answers[-1]:
                    await settling.wait()
            assert all(answers[:-1])
            assert answers[-1] == b""

    run(main)


def test_most_observers_are_believed() -> None:
    a, b, c = "/ip4/203.0.113.9/tcp/1", "/ip4/203.0.113.9/tcp/2", "/ip4/198.51.100.1/tcp/3"
    assert believed([]) == ()
    assert believed([a, b, a, c]) == (a,)
    assert believed([a, b]) == (a, b)
    assert len(believed(f"/ip4/203.0.113.9/tcp/{port}" for port in range(1, 99))) == (
        observed.MAX_TOLD
    )


def test_addresses_of_other_scopes_are_neither_told_nor_dialled() -> None:
    public, private = "/ip4/8.8.8.8/tcp/4001", "/ip4/192.168.1.2/tcp/4001"
    others = ("/dns4/example.com/tcp/1", "/ip4/169.254.1.1/tcp/1", "/ip4/127.0.0.1/tcp/1")
    assert of_scope((*others, private, public, public), Scope.GLOBAL) == (public,)
    assert of_scope((*others, private, public), Scope.PRIVATE) == (private, public)


def test_nothing_is_dialled_from_a_port_that_is_not_listened_on() -> None:
    async def main() -> None:
        async with Host() as host, Host(listen=[HERE]) as other:
            with pytest.raises(NoSource, match="no listening port"):
                await host.own_port.connect(other.advertised_addrs()[0])
            assert host.own_port.observers() == []

    run(main)
