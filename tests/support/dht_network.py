"""A DHT among hosts on this machine, for tests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import trio
import trio.testing
from libp2p.crypto.keys import KeyPair
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT

from tensorswarm.p2p.dht.discovery import Discovery, Provider
from tensorswarm.p2p.dht.rpc import (
    KAD_PROTOCOL,
)
from tensorswarm.p2p.host.host import Handler, Host
from tensorswarm.store.digest import digest_of
from tests.support.hosts import HERE

WANTED = digest_of(b"what is looked for")


def digests(count: int) -> list[bytes]:
    return [os.urandom(32) for _ in range(count)]


class Network:
    """Nodes that live as long as the test; the first is everybody's bootstrap."""

    def __init__(self, stack: AsyncExitStack, nursery: trio.Nursery) -> None:
        self._stack = stack
        self._nursery = nursery
        self.nodes: list[tuple[Host, Discovery]] = []

    async def host(self, key_pair: KeyPair | None = None) -> Host:
        return await self._stack.enter_async_context(Host(key_pair, listen=[HERE]))

    async def join(
        self, key_pair: KeyPair | None = None, *, server: bool = True, **options: Any
    ) -> tuple[Host, Discovery]:
        host = await self.host(key_pair)
        discovery = Discovery(host, server=server, **options)
        await self._nursery.start(discovery.run)
        if self.nodes:
            outcome = await discovery.bootstrap([self.nodes[0][0].addrs()[0]])
            assert outcome.failed == {}
        self.nodes.append((host, discovery))
        return host, discovery

    async def stock(self) -> tuple[Host, KadDHT]:
        """A node that answers as py-libp2p does by itself."""
        host = await self.host()
        dht = KadDHT(host.libp2p, DHTMode.SERVER)
        return host, dht

    async def impostor(self, handler: Handler) -> Host:
        """A node that answers DHT questions as the test likes."""
        host = await self.host()
        host.set_handler(KAD_PROTOCOL, handler)
        return host


@asynccontextmanager
async def network(size: int = 0) -> AsyncIterator[Network]:
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        net = Network(stack, nursery)
        for _ in range(size):
            await net.join()
        yield net
        nursery.cancel_scope.cancel()


async def providers(discovery: Discovery, digest: bytes, **options: Any) -> list[Provider]:
    async with discovery.find_providers(digest, **{"timeout_s": 10, **options}) as found:
        return [provider async for provider in found]


def event_when_recorded(discovery: Discovery, count: int = 1) -> trio.Event:
    """Return an event for when a node has kept `count` records that others sent it."""
    records, recorded, left = discovery.dht.records, trio.Event(), [count]
    inner = records.take

    def take(key: bytes, peer_id: str, claimed: Sequence[bytes]) -> bool:
        kept = inner(key, peer_id, claimed)
        left[0] -= 1
        if left[0] == 0:
            recorded.set()
        return kept

    records.take = take  # type: ignore[method-assign]
    return recorded
