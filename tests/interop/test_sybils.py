"""Identities made for one key, over real sockets: they want its provider not to be found.

Twenty honest nodes, and among them twenty that are nearer to the key than any. These name
each other to whoever asks, confirm what they are announced and forget it, and then either
keep silent about providers, or invent some, and nodes, at an address where nobody answers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from tensorswarm.p2p.dht import walker
from tensorswarm.p2p.dht.discovery import DEFAULT_PROVIDERS, Discovery
from tensorswarm.p2p.dht.lookup import MAX_ASKED, K, closest, kad_id, peer_kad_id
from tensorswarm.p2p.dht.rpc import (
    ADD_PROVIDER,
    GET_PROVIDERS,
    KAD_PROTOCOL,
    Deframer,
    framed,
)
from tensorswarm.p2p.dht.walker import MAX_ASKED_IN_CROWD, MAX_DEAD
from tensorswarm.p2p.host.guard import MAX_KNOWN_PEERS
from tensorswarm.p2p.host.host import Host, Stream
from tensorswarm.store.cid import dht_key
from tensorswarm.store.errors import RemoteError
from tests.support.dht_network import WANTED, Network, network, providers

HONEST = 20
SYBILS = 20
GROUND = 4_000
PATIENCE_S = 20.0
KEY = dht_key(WANTED)
NOWHERE = "/ip4/127.0.0.1/tcp/1"


def key_pair(number: int) -> KeyPair:
    """Return an identity, the same at every run."""
    return create_new_key_pair(number.to_bytes(32, "big"))


@cache
def ground_near(point: int) -> list[KeyPair]:
    """Make many identities and keep those nearest to a point."""
    made = [key_pair(number) for number in range(3, GROUND)]
    made.sort(key=lambda pair: peer_kad_id(str(ID.from_pubkey(pair.public_key))) ^ point)
    return made[:SYBILS]


class Crowd:
    """Sybils, and what they say."""

    def __init__(self, nowhere: str | None) -> None:
        self.hosts: list[Host] = []
        self.announced = 0
        self._nowhere = nowhere

    async def answer(self, peer_id: str, stream: Stream) -> None:
        """Answer as one of them."""
        deframer = Deframer()
        with suppress(RemoteError):
            while data := await stream.receive_some():
                deframer.feed(data)
                while (question := deframer.next_message()) is not None:
                    await stream.send(framed(self._reply(peer_id, question)))

    def _reply(self, asker: str, question: Message) -> Message:
        answer = Message(type=question.type, key=question.key)
        if question.type == ADD_PROVIDER:
            self.announced += 1
            return answer
        for host in self.hosts[:K]:
            _name(answer.closerPeers, ID.from_string(host.peer_id).to_bytes(), host.addrs()[0])
        if question.type == GET_PROVIDERS:
            # Whoever reads back what it announced is told that all is well.
            _name(answer.providerPeers, ID.from_string(asker).to_bytes(), self.hosts[0].addrs()[0])
        if self._nowhere is not None:
            for _ in range(20):
                _name(answer.closerPeers, _invented(question.key), self._nowhere)
                if question.type == GET_PROVIDERS:
                    _name(answer.providerPeers, b"\x12\x20" + os.urandom(32), self._nowhere)
        return answer


def _name(peers: object, raw_id: bytes, addr: str) -> None:
    place = Multiaddr(addr.partition("/p2p/")[0]).to_bytes()
    peers.add(id=raw_id, addrs=[place])  # type: ignore[attr-defined]


def _invented(key: bytes) -> bytes:
    """Invent an id that is nearer to a key than most."""
    return min(
        (b"\x12\x20" + os.urandom(32) for _ in range(16)), key=lambda raw: kad_id(raw) ^ kad_id(key)
    )


async def crowd_round_the_key(
    net: Network, identities: Sequence[KeyPair], nowhere: str | None
) -> Crowd:
    """Have Sybils join a network, as servers that honest nodes take into their tables."""
    crowd = Crowd(nowhere)
    entrances = [host.addrs()[0] for host, _ in net.nodes]
    for number, identity in enumerate(identities):
        host = await net.host(identity)
        host.set_handler(KAD_PROTOCOL, crowd.answer)
        crowd.hosts.append(host)
        for step in range(2):
            await host.connect(entrances[(number + 7 * step) % len(entrances)])
    everybody = [host.peer_id for host, _ in net.nodes] + [host.peer_id for host in crowd.hosts]
    assert set(closest(kad_id(KEY), everybody)) <= {host.peer_id for host in crowd.hosts}
    return crowd


def assert_bounded(host: Host, discovery: Discovery, look_ups: int) -> None:
    """Check what a node may have asked and kept, by its stated bounds."""
    counters = discovery.statistics()
    assert counters["questions_asked"] <= look_ups * (MAX_ASKED + MAX_ASKED_IN_CROWD)
    assert len(host.libp2p.get_peerstore().peer_ids()) <= MAX_KNOWN_PEERS
    assert len(discovery._walker._dead) <= MAX_DEAD


@pytest.mark.parametrize("invents", [False, True])
def test_a_crowd_round_a_key_does_not_hide_its_provider(
    invents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PEER_TIMEOUT_S", "SLOW_S"):  # nobody stalls, so nobody needs to hurry
        monkeypatch.setattr(walker, name, PATIENCE_S)
    identities = ground_near(kad_id(KEY))

    async def main() -> None:
        async with network() as net:
            for number in range(HONEST):
                await net.join(key_pair(GROUND + number))
            crowd = await crowd_round_the_key(net, identities, NOWHERE if invents else None)
            host, announcer = await net.join(key_pair(1), rng=random.Random(1))
            assert (await announcer.announce([WANTED])).confirmed == {WANTED}
            assert crowd.announced > 0
            assert any(each.dht.records.others(KEY) for _, each in net.nodes[:HONEST])
            searcher_host, searcher = await net.join(
                key_pair(2), server=False, rng=random.Random(2)
            )
            found = await providers(searcher, WANTED, timeout_s=3 * PATIENCE_S)
            assert host.peer_id in [provider.peer_id for provider in found]
            assert len(found) <= DEFAULT_PROVIDERS
            for each_host, each in ((host, announcer), (searcher_host, searcher)):
                assert each.statistics()["crowds_met"] > 0
                assert_bounded(each_host, each, look_ups=4)

    trio.run(main)
