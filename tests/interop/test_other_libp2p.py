"""go-libp2p and js-libp2p beside us: connecting, identify, ping, and the DHT.

In the networks of the DHT tests, only the others keep records, or only we do: what one
side writes the other side reads.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TypeVar

import pytest
import trio

from tensorswarm.p2p.dht import announce_schedule
from tensorswarm.p2p.dht import discovery as discovery_module
from tensorswarm.p2p.dht import publish as dht_publish
from tensorswarm.p2p.dht.discovery import Discovery
from tensorswarm.p2p.dht.rpc import KAD_PROTOCOL
from tensorswarm.p2p.host.host import Host
from tensorswarm.store.cid import dht_key
from tensorswarm.store.digest import digest_of
from tests.support.hosts import HERE, receive
from tests.support.interop import JsPeer, js_peer
from tests.support.p2pd import GoPeer, go_peer

pytestmark = pytest.mark.interop

PING = "/ipfs/ping/1.0.0"
PATIENCE_S = 60
"""For starting six programs on a busy machine; none of the waits needs it."""

Other = GoPeer | JsPeer
Found = TypeVar("Found")
Node = TypeVar("Node")


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def in_time() -> None:
        with trio.fail_after(PATIENCE_S):
            await main()

    trio.run(in_time)


async def start(stack: AsyncExitStack, kind: str, *, server: bool) -> Other:
    if kind == "go":
        return await stack.enter_async_context(go_peer(server=server))
    return await stack.enter_async_context(js_peer(server=server))


async def identified(host: Host, peer_id: str) -> frozenset[str]:
    """Return what a connected peer speaks, once it has told."""
    told = trio.Event()
    host.on_identified(lambda known: told.set() if known == peer_id else None)
    if not host.protocols_of(peer_id):
        await told.wait()
    return host.protocols_of(peer_id)


# ---- connecting


@pytest.mark.parametrize("kind", ["go", "js"])
def test_we_dial_it_and_it_says_who_it_is_and_echoes_our_ping(kind: str) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack, Host(listen=[HERE]) as ours:
            other = await start(stack, kind, server=True)
            assert await ours.connect(other.addrs[0]) == other.peer_id
            assert await identified(ours, other.peer_id) >= {PING, KAD_PROTOCOL}
            listening = {addr.rpartition("/p2p/")[0] for addr in other.addrs}
            assert listening <= set(ours.addrs_of(other.peer_id))
            stream = await ours.open_stream(other.peer_id, PING)
            for _ in range(3):
                payload = os.urandom(32)
                await stream.send(payload)
                assert await receive(stream, 32) == payload
            await stream.aclose()

    run(main)


def test_go_dials_us_knows_what_we_speak_and_pings_us() -> None:
    async def main() -> None:
        async with go_peer() as go, Host(listen=[HERE]) as ours:
            await go.connect(ours.addrs()[0])
            assert await go.connected() == {ours.peer_id}
            assert ours.connected() == (go.peer_id,)
            async with await go.open_stream(ours.peer_id, PING) as stream:
                for _ in range(3):
                    payload = os.urandom(32)
                    await stream.send_all(payload)
                    assert await stream.receive_some(32) == payload

    run(main)


def test_js_dials_us_knows_what_we_speak_and_pings_us() -> None:
    async def main() -> None:
        async with js_peer() as js, server_of_ours() as (ours, _):
            known = await js.do("connect", addr=ours.addrs()[0])
            assert known["peer_id"] == ours.peer_id
            assert {PING, KAD_PROTOCOL} <= set(known["protocols"])
            assert (known["encryption"], known["muxer"]) == ("/noise", "/yamux/1.0.0")
            assert (await js.do("ping", peer=ours.peer_id))["ms"] >= 0

    run(main)


# ---- the DHT


@asynccontextmanager
async def ours_on(addrs: Sequence[str], *, server: bool) -> AsyncIterator[tuple[Host, Discovery]]:
    """A node of ours that joined the network at these addresses."""
    async with Host(listen=[HERE]) as host, trio.open_nursery() as nursery:
        discovery = Discovery(host, server=server)
        await nursery.start(discovery.run)
        outcome = await discovery.bootstrap(addrs)
        assert outcome.failed == {}
        yield host, discovery
        nursery.cancel_scope.cancel()


def server_of_ours() -> AbstractAsyncContextManager[tuple[Host, Discovery]]:
    return ours_on([], server=True)


async def meet(first: Other, second: Other) -> None:
    """Connect two of them, and wait until each has the other in its routing table."""
    if isinstance(first, GoPeer):
        await first.connect(second.addrs[0])
    else:
        await first.do("connect", addr=second.addrs[0])
    for other in (first, second):
        await knows_a_node(other)


async def knows_a_node(other: Other) -> None:
    if isinstance(other, GoPeer):
        await other.dht_has_nodes()
    else:
        await other.do("dht_nodes", count=1)


async def provide(other: Other, digest: bytes) -> None:
    if isinstance(other, GoPeer):
        await other.provide(dht_key(digest))
    else:
        await other.do("provide", digest=digest.hex())


async def providers(other: Other, digest: bytes) -> set[str]:
    if isinstance(other, GoPeer):
        return set(await other.find_providers(dht_key(digest)))
    answer = await other.do("find_providers", digest=digest.hex())
    return {found["id"] for found in answer["providers"]}


async def found_by_us(discovery: Discovery, digest: bytes) -> dict[str, tuple[str, ...]]:
    async with discovery.find_providers(digest, timeout_s=15) as channel:
        return {provider.peer_id: provider.addrs async for provider in channel}


async def until_any(
    look: Callable[[Node, bytes], Awaitable[Found]], node: Node, digest: bytes
) -> Found:
    """Look until something is found: nobody acknowledges a record that was sent."""
    while not (found := await look(node, digest)):
        pass
    return found


@pytest.mark.parametrize("kinds", [("go", "go"), ("js", "js"), ("go", "js")], ids="+".join)
def test_records_both_ways_where_only_the_others_are_servers(kinds: tuple[str, str]) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            first, second = [await start(stack, kind, server=True) for kind in kinds]
            await meet(first, second)
            # Each of ours knows one of the two, and none of the other of ours.
            announcer_host, announcer = await stack.enter_async_context(
                ours_on(first.addrs, server=False)
            )
            _, searcher = await stack.enter_async_context(ours_on(second.addrs, server=False))
            ours = [digest_of(b"ours %d" % number) for number in range(8)]
            outcome = await announcer.announce(ours)
            assert outcome.confirmed == set(ours)
            for digest in ours:
                assert announcer_host.peer_id in await found_by_us(searcher, digest)
            for other in (first, second):
                assert await providers(other, ours[0]) == {announcer_host.peer_id}
            for other in (first, second):
                theirs = digest_of(other.peer_id.encode())
                await provide(other, theirs)
                for finder in (searcher, announcer):
                    found = await until_any(found_by_us, finder, theirs)
                    assert set(found) == {other.peer_id}

    run(main)


def test_stock_js_servers_take_sha256_keys_and_of_others_we_claim_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """js-libp2p's limit, not ours; when this fails, dht_keys.mjs is no longer needed."""

    async def main() -> None:
        async with (
            js_peer(stock=True) as first,
            js_peer(stock=True) as second,
            ours_on(first.addrs, server=False) as (host, announcer),
            ours_on(second.addrs, server=False) as (_, searcher),
        ):
            await meet(first, second)
            digest = digest_of(b"as if of SHA-256")
            with monkeypatch.context() as patched:
                for module in (announce_schedule, dht_publish, discovery_module):
                    patched.setattr(module, "dht_key", lambda digest: b"\x12\x20" + digest)
                outcome = await announcer.announce([digest])
                assert outcome.confirmed == {digest}
                assert host.peer_id in await found_by_us(searcher, digest)
            outcome = await announcer.announce([digest_of(b"under BLAKE3")])
            assert outcome.confirmed == frozenset()

    run(main)


def test_records_both_ways_where_only_we_are_servers() -> None:
    async def main() -> None:
        async with (
            server_of_ours() as (ours, discovery),
            go_peer(server=False) as go,
            js_peer(server=False) as js,
        ):
            await go.connect(ours.addrs()[0])
            await js.do("connect", addr=ours.addrs()[0])
            await knows_a_node(go)
            await knows_a_node(js)
            for writer, reader in ((go, js), (js, go)):
                digest = digest_of(writer.peer_id.encode())
                await provide(writer, digest)
                read = await until_any(providers, reader, digest)
                assert read == {writer.peer_id}
                found = await found_by_us(discovery, digest)
                assert writer.peer_id in found
                assert set(addr.rpartition("/p2p/")[0] for addr in writer.addrs) <= set(
                    found[writer.peer_id]
                )

    run(main)
