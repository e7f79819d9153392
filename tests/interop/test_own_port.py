"""Connections that leave from the listening port, and what others see of them.

Loopback counts as the Internet here: only what goes there leaves from that port.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import NoReturn

import pytest

from tensorswarm.p2p.host import own_port
from tensorswarm.p2p.host.addresses import Scope
from tensorswarm.p2p.host.host import Host
from tensorswarm.p2p.host.own_port import OBSERVERS
from tensorswarm.p2p.reach.observed import Observers
from tests.support.hosts import HERE, run


@pytest.fixture
def loopback_is_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_port, "scope_of", lambda _host: Scope.GLOBAL)


async def listening(stack: AsyncExitStack, count: int) -> list[Host]:
    return [await stack.enter_async_context(Host(listen=[HERE])) for _ in range(count)]


def test_the_first_connections_leave_from_the_listening_port(loopback_is_far: None) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            host, *others = await listening(stack, OBSERVERS + 3)
            for other in others:
                await host.connect(other.addrs()[0])
            first = [other.peer_id for other in others[:OBSERVERS]]
            assert host.own_port.observers() == first
            await host.disconnect(first[0])
            await host.connect(others[-1].addrs()[0])  # is connected: nothing is dialled
            assert host.own_port.observers() == first[1:]
            (another,) = await listening(stack, 1)
            await host.connect(another.addrs()[0])
            assert host.own_port.observers() == [*first[1:], another.peer_id]
            assert another.own_port.observers() == []  # it was dialled

    run(main)


def test_observers_say_where_the_listening_port_is_seen(loopback_is_far: None) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            host, other, third = await listening(stack, 3)
            await host.connect(other.addrs()[0])
            await host.connect(third.addrs()[0])
            assert await Observers(host, Scope.LOOPBACK).own_addrs() == host.advertised_addrs()
            assert await Observers(host, Scope.GLOBAL).own_addrs() == ()

    run(main)


def test_a_connection_that_cannot_leave_from_there_leaves_from_another_port(
    loopback_is_far: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            host, other = await listening(stack, 2)

            async def in_use(_addr: str) -> NoReturn:
                raise OSError(99, "Cannot assign requested address")

            monkeypatch.setattr(host.own_port, "connect", in_use)
            await host.connect(other.addrs()[0])
            assert host.own_port.observers() == []

    run(main)


def test_a_handshake_that_fails_is_tried_again_from_another_port(loopback_is_far: None) -> None:
    """As when both have dialled at once, and each takes the other for the server."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            host, other = await listening(stack, 2)
            # The other will take our connection for its own, and speak as a client.
            (own_addr,) = host.own_port._bound
            other.door.expected[own_addr] = host.peer_id
            await host.connect(other.addrs()[0])
            assert host.own_port.observers() == []
            assert host.is_connected(other.peer_id)

    run(main)


def test_on_loopback_nothing_does() -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            host, other = await listening(stack, 2)
            await host.connect(other.addrs()[0])
            assert host.own_port.observers() == []

    run(main)
