"""Connections through a relay: both ends and the relay are real hosts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage

from tensorswarm.p2p.host.addresses import PeerAddress, circuit_through, parse_peer_address
from tensorswarm.p2p.host.host import Host, Stream
from tensorswarm.p2p.reach.relay_client import RelayClient
from tensorswarm.p2p.reach.relay_server import RelayLimits, RelayServer
from tensorswarm.p2p.reach.relay_wire import HOP_PROTOCOL, STOP_PROTOCOL, MessageStream
from tensorswarm.store.errors import NoSource, ProtocolError, RemoteError
from tests.support.hosts import ECHO, HERE, echo, receive, run


class Scene:
    """A relay, a host that only the relay is connected with, and a host that looks for it."""

    def __init__(self, relay: Host, hidden: Host, other: Host, limits: RelayLimits) -> None:
        self.relay, self.hidden, self.other = relay, hidden, other
        self.clock_s = 1e9
        self.server = RelayServer(relay, limits, clock=lambda: self.clock_s)
        self.server.start()
        self.hidden_client = RelayClient(hidden, clock=lambda: self.clock_s)
        self.client = RelayClient(other, clock=lambda: self.clock_s)
        hidden.set_handler(ECHO, echo)

    @property
    def circuit(self) -> str:
        return circuit_through(parse_peer_address(self.relay.addrs()[0]))

    async def connect(self) -> None:
        await self.other.connect_peer(PeerAddress(self.hidden.peer_id, (self.circuit,)))

    async def echoes(self, data: bytes) -> bool:
        stream = await self.other.open_stream(self.hidden.peer_id, ECHO)
        got = b""
        for start in range(0, len(data), 100_000):  # whoever echoes is not to be run over
            part = data[start : start + 100_000]
            await stream.send(part)
            got += await receive(stream, len(part))
        await stream.aclose()
        return got == data


@asynccontextmanager
async def scene(**limits: int) -> AsyncIterator[Scene]:
    async with Host(listen=[HERE]) as relay, Host() as hidden, Host() as other:
        await hidden.connect(relay.addrs()[0])
        yield Scene(relay, hidden, other, RelayLimits(**limits))


def test_a_hidden_peer_is_reached_through_the_relay() -> None:
    async def main() -> None:
        async with scene() as it:
            place = await it.hidden_client.reserve(it.relay.peer_id)
            assert place.lasts_s == 3600
            await it.connect()
            assert it.other.is_relayed(it.hidden.peer_id)
            assert it.hidden.is_relayed(it.other.peer_id)
            assert not it.other.is_relayed(it.relay.peer_id)
            assert it.other.remote_host(it.hidden.peer_id) is None
            assert await it.echoes(b"x" * 3_000_000)
            seen = it.server.statistics()
            assert (seen.reservations, seen.circuits) == (1, 1)
            assert seen.bytes_relayed > 6_000_000

    run(main)


def test_the_other_side_may_open_streams_too() -> None:
    async def main() -> None:
        async with scene() as it:
            it.other.set_handler(ECHO, echo)
            await it.hidden_client.reserve(it.relay.peer_id)
            await it.connect()
            stream = await it.hidden.open_stream(it.other.peer_id, ECHO)
            await stream.send(b"hello")
            assert await receive(stream, 5) == b"hello"

    run(main)


def test_without_a_reservation_there_is_no_circuit() -> None:
    async def main() -> None:
        async with scene() as it:
            with pytest.raises(NoSource, match="no place there"):
                await it.connect()
            await it.hidden_client.reserve(it.relay.peer_id)
            it.clock_s += 3601
            with pytest.raises(NoSource, match="no place there"):
                await it.connect()
            assert it.server.statistics().reservations == 0

    run(main)


def test_peers_hear_of_circuit_addresses_at_once() -> None:
    async def main() -> None:
        async with scene() as it:
            assert it.hidden.set_circuits([it.circuit])
            assert not it.hidden.set_circuits([it.circuit])
            assert it.hidden.addrs() == (f"{it.circuit}/p2p/{it.hidden.peer_id}",)
            while it.circuit not in it.relay.addrs_of(it.hidden.peer_id):
                await trio.lowlevel.checkpoint()
            assert it.relay.addrs_of(it.hidden.peer_id) == (it.circuit,)

    run(main)


def test_a_reservation_ends_with_its_connection() -> None:
    async def main() -> None:
        async with scene() as it:
            await it.hidden_client.reserve(it.relay.peer_id)
            await it.relay.disconnect(it.hidden.peer_id)
            assert it.server.statistics().reservations == 0

    run(main)


def test_what_a_relay_gives_is_bounded() -> None:
    async def main() -> None:
        async with scene(reservations=1, circuits_per_peer=1) as it:
            await it.hidden_client.reserve(it.relay.peer_id)
            await it.hidden_client.reserve(it.relay.peer_id)  # renewing is no second one
            async with Host() as third:
                await third.connect(it.relay.addrs()[0])
                client = RelayClient(third, clock=lambda: it.clock_s)
                with pytest.raises(NoSource, match="no more reservations"):
                    await client.reserve(it.relay.peer_id)
                await it.connect()
                with pytest.raises(NoSource, match="as many connections as it can"):
                    await third.connect_peer(PeerAddress(it.hidden.peer_id, (it.circuit,)))
            assert it.server.statistics().refused == 2
            assert await it.echoes(b"the first one is still there")

    run(main)


def test_of_one_address_only_so_many_may_reserve() -> None:
    async def main() -> None:
        async with scene(reservations_per_host=1) as it, Host() as third:
            await it.hidden_client.reserve(it.relay.peer_id)
            await third.connect(it.relay.addrs()[0])
            with pytest.raises(NoSource, match="no more reservations"):
                await RelayClient(third).reserve(it.relay.peer_id)

    run(main)


def test_a_circuit_ends_at_its_limit_of_bytes() -> None:
    async def main() -> None:
        async with scene(circuit_bytes=200_000) as it:
            await it.hidden_client.reserve(it.relay.peer_id)
            await it.connect()
            with pytest.raises((RemoteError, AssertionError)):
                await it.echoes(b"x" * 3_000_000)
            while it.server.statistics().circuits:
                await trio.lowlevel.checkpoint()
            await it.connect()  # the reservation is still good
            assert await it.echoes(b"again")

    run(main)


def test_a_relay_hands_over_nothing_that_was_not_reserved() -> None:
    """A relay that calls unasked is refused."""

    async def main() -> None:
        async with scene() as it:
            stream = await it.relay.open_stream(it.hidden.peer_id, STOP_PROTOCOL)
            messages = MessageStream(stream)
            await messages.write(StopMessage(type=StopMessage.CONNECT))
            answer = await messages.read(StopMessage)
            assert answer.status == Status.PERMISSION_DENIED

    run(main)


def test_there_is_no_circuit_over_a_circuit() -> None:
    async def main() -> None:
        async with scene() as it:
            RelayServer(it.hidden).start()
            await it.hidden_client.reserve(it.relay.peer_id)
            await it.connect()
            with pytest.raises(NoSource, match="does not let us"):
                await it.client.reserve(it.hidden.peer_id)

    run(main)


def test_whoever_is_at_the_other_end_has_to_prove_it() -> None:
    """A relay that joins us to somebody else is found out."""

    async def main() -> None:
        async with scene() as it, Host(listen=[HERE]) as impostor:
            impostor_client = RelayClient(impostor, clock=lambda: it.clock_s)
            await impostor.connect(it.relay.addrs()[0])
            await impostor_client.reserve(it.relay.peer_id)

            async def misdirect(_peer_id: str, stream: Stream) -> None:
                messages = MessageStream(stream)
                await messages.read(HopMessage)
                await it.server._connect(it.other.peer_id, impostor.peer_id, messages)

            it.relay.set_handler(HOP_PROTOCOL, misdirect)
            with pytest.raises(NoSource):
                await it.connect()
            assert not it.other.is_connected(it.hidden.peer_id)

    run(main)


@pytest.mark.parametrize("sent", [b"\xff\xff\xff\xff\x7f", b"\x05\xff\xff\xff\xff\xff", b"\x00"])
def test_nonsense_costs_its_stream_alone(sent: bytes) -> None:
    async def main() -> None:
        async with scene() as it:
            await it.other.connect(it.relay.addrs()[0])
            stream = await it.other.open_stream(it.relay.peer_id, HOP_PROTOCOL)
            await stream.send(sent)
            with pytest.raises(RemoteError):
                while await stream.receive_some():
                    pass
                raise NoSource("refused, and closed in good order")
            await it.hidden_client.reserve(it.relay.peer_id)

    run(main)


def test_a_message_of_another_kind_is_refused() -> None:
    async def main() -> None:
        async with scene() as it:
            await it.other.connect(it.relay.addrs()[0])
            stream = await it.other.open_stream(it.relay.peer_id, HOP_PROTOCOL)
            messages = MessageStream(stream)
            await messages.write(HopMessage(type=HopMessage.STATUS))
            assert (await messages.read(HopMessage)).status == Status.UNEXPECTED_MESSAGE
            await stream.send(b"")
            with pytest.raises((ProtocolError, NoSource)):
                await messages.read(HopMessage)

    run(main)
