"""AutoNAT: peers dial back, and what several of them say becomes a verdict."""

from __future__ import annotations

import socket

import pytest
from libp2p.host.autonat.pb.autonat_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from tensorswarm.p2p.host.host import Host
from tensorswarm.p2p.reach.autonat import (
    AUTONAT_PROTOCOL,
    AutoNatServer,
    Reachability,
    Verdicts,
    ask_to_dial_back,
)
from tensorswarm.p2p.reach.reach import Reach
from tensorswarm.p2p.reach.relay_client import RelayClient
from tensorswarm.p2p.reach.relay_server import RelayServer
from tensorswarm.p2p.reach.relay_wire import MessageStream
from tests.support.hosts import HERE, NOBODY, run


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return int(closed.getsockname()[1])


def hidden_host() -> Host:
    """Return a host that can dial, and is not where it says it is."""
    return Host(announce=[f"/ip4/127.0.0.1/tcp/{closed_port()}"])


def test_a_node_that_listens_can_be_dialled_and_keeps_its_connection() -> None:
    async def main() -> None:
        async with Host(listen=[HERE]) as asking, Host(listen=[HERE]) as server:
            AutoNatServer(server)
            await asking.connect(server.addrs()[0])
            assert await ask_to_dial_back(asking, server.peer_id) is Reachability.PUBLIC
            assert server.is_connected(asking.peer_id)
            assert asking.is_connected(server.peer_id)

    run(main)


def test_a_node_that_is_not_where_it_says_cannot_be_dialled() -> None:
    async def main() -> None:
        async with Host(listen=[HERE]) as server, hidden_host() as asking, Host() as silent:
            AutoNatServer(server, dial_interval_s=0)
            await asking.connect(server.addrs()[0])
            assert await ask_to_dial_back(asking, server.peer_id) is Reachability.PRIVATE
            assert await ask_to_dial_back(silent, server.peer_id) is Reachability.PRIVATE

    run(main)


def test_where_another_peer_answers_nobody_can_be_dialled() -> None:
    async def main() -> None:
        async with (
            Host(listen=[HERE]) as server,
            Host(listen=[HERE]) as another,
            Host(announce=[another.addrs()[0]]) as asking,
        ):
            AutoNatServer(server)
            await asking.connect(server.addrs()[0])
            assert await ask_to_dial_back(asking, server.peer_id) is Reachability.PRIVATE

    run(main)


def test_one_address_is_dialled_only_so_often() -> None:
    async def main() -> None:
        async with Host(listen=[HERE]) as asking, Host(listen=[HERE]) as server:
            AutoNatServer(server, dial_interval_s=3600)
            await asking.connect(server.addrs()[0])
            assert await ask_to_dial_back(asking, server.peer_id) is Reachability.PUBLIC
            assert await ask_to_dial_back(asking, server.peer_id) is Reachability.UNKNOWN

    run(main)


@pytest.mark.parametrize(
    ("peer_id", "addrs", "status"),
    [
        (NOBODY, ["/ip4/127.0.0.1/tcp/1"], Message.E_BAD_REQUEST),
        (None, [], Message.E_DIAL_REFUSED),
        (None, ["/ip4/127.0.0.1/udp/1/quic-v1"], Message.E_DIAL_REFUSED),
        # Somebody else's machine: its port is dialled at the address we come from.
        (None, ["/ip4/192.0.2.7/tcp/1"], Message.E_DIAL_ERROR),
    ],
)
def test_nobody_is_dialled_for_a_third_party(
    peer_id: str | None, addrs: list[str], status: int
) -> None:
    async def main() -> None:
        async with Host() as asking, Host(listen=[HERE]) as server:
            AutoNatServer(server)
            await asking.connect(server.addrs()[0])
            messages = MessageStream(await asking.open_stream(server.peer_id, AUTONAT_PROTOCOL))
            asked = Message(type=Message.DIAL)
            asked.dial.peer.id = ID.from_string(peer_id or asking.peer_id).to_bytes()
            asked.dial.peer.addrs.extend(Multiaddr(addr).to_bytes() for addr in addrs)
            await messages.write(asked)
            assert (await messages.read(Message)).dialResponse.status == status

    run(main)


def test_most_of_those_asked_decide() -> None:
    verdicts = Verdicts()
    assert verdicts.result() is Reachability.UNKNOWN
    verdicts.add("a", Reachability.PRIVATE)
    assert verdicts.result() is Reachability.PRIVATE
    verdicts.add("b", Reachability.PUBLIC)
    verdicts.add("c", Reachability.UNKNOWN)
    assert verdicts.result() is Reachability.PUBLIC
    verdicts.add("d", Reachability.PRIVATE)
    assert verdicts.result() is Reachability.PRIVATE
    verdicts.add("a", Reachability.PUBLIC)  # the same peer has changed its mind
    assert verdicts.result() is Reachability.PUBLIC


def test_a_node_that_cannot_be_dialled_takes_a_place_at_a_relay_and_a_new_one_when_it_is_lost() -> (
    None
):
    async def main() -> None:
        async with (
            Host(listen=[HERE]) as first,
            Host(listen=[HERE]) as second,
            hidden_host() as hidden,
        ):
            for relay in (first, second):
                RelayServer(relay).start()
                AutoNatServer(relay)
            reach = Reach(hidden, RelayClient(hidden))
            for relay in (first, second):
                await hidden.connect(relay.addrs()[0])
            while len(reach.places) < 2:
                await reach.tick()
            assert reach.reachability is Reachability.PRIVATE
            assert set(reach.places) == {first.peer_id, second.peer_id}
            assert len([addr for addr in hidden.addrs() if "/p2p-circuit/" in addr]) == 2
            await hidden.disconnect(first.peer_id)
            await reach.tick()
            assert reach.places == (second.peer_id,)

    run(main)


def test_a_node_that_can_be_dialled_uses_no_relay() -> None:
    async def main() -> None:
        async with Host(listen=[HERE]) as relay, Host(listen=[HERE]) as node:
            RelayServer(relay).start()
            AutoNatServer(relay)
            reach = Reach(node, RelayClient(node))
            await node.connect(relay.addrs()[0])
            while reach.reachability is Reachability.UNKNOWN:
                await reach.tick()
            assert reach.reachability is Reachability.PUBLIC
            assert reach.places == ()

    run(main)
