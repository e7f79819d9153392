"""DHT messages: cut out of the stream right, and read with suspicion."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from multiaddr import Multiaddr

from tensorswarm.p2p.dht.rpc import (
    MAX_MESSAGE_BYTES,
    MAX_PEERS_PER_ANSWER,
    Deframer,
    add_provider,
    addr_text,
    find_node,
    framed,
    get_providers,
    id_text,
    peers_in,
)
from tensorswarm.store.errors import ProtocolError

RAW_ID = b"\x12\x20" + bytes(range(32))


def messages_in(data: bytes, piece_bytes: int) -> list[Message]:
    deframer = Deframer()
    found = []
    for start in range(0, len(data), piece_bytes):
        deframer.feed(data[start : start + piece_bytes])
        while (message := deframer.next_message()) is not None:
            found.append(message)
    return found


@given(st.lists(st.binary(max_size=300), max_size=5), st.integers(1, 500))
def test_messages_come_out_as_they_went_in_however_they_are_cut(
    keys: list[bytes], piece_bytes: int
) -> None:
    got = messages_in(b"".join(find_node(key).data for key in keys), piece_bytes)
    assert [message.key for message in got] == keys
    assert all(message.type == Message.MessageType.FIND_NODE for message in got)


def test_an_announcement_names_the_provider() -> None:
    addr = Multiaddr("/ip4/192.0.2.7/tcp/1").to_bytes()
    (message,) = messages_in(add_provider(b"key", RAW_ID, [addr]), 1000)
    assert message.type == Message.MessageType.ADD_PROVIDER
    assert message.key == b"key"
    assert [(peer.id, list(peer.addrs)) for peer in message.providerPeers] == [(RAW_ID, [addr])]
    assert not message.HasField("senderRecord")
    (question,) = messages_in(get_providers(b"key").data, 1000)
    assert (question.type, question.key) == (Message.MessageType.GET_PROVIDERS, b"key")


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff\xff",
        b"\x80\x80\x80\x80\x80\x01",
        framed(Message(key=bytes(MAX_MESSAGE_BYTES)))[:4],
        b"\x03\xff\xff\xff",
    ],
    ids=["endless length", "padded length", "too long", "not a message"],
)
def test_nonsense_is_refused_before_it_is_kept(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        messages_in(data, 3)


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_refused(data: bytes) -> None:
    with suppress(ProtocolError):
        messages_in(data, 7)


@given(st.binary(max_size=80))
def test_any_bytes_are_an_id_an_address_or_nothing(data: bytes) -> None:
    for read in (id_text, addr_text):
        text = read(data)
        assert text is None or text.isprintable()


def test_peers_in_an_answer_are_read_with_suspicion() -> None:
    raw = [Multiaddr(f"/ip4/{host}/tcp/1").to_bytes() for host in ("127.0.0.1", "8.8.8.8")]
    peers = [
        Message.Peer(id=b"", addrs=raw),
        Message.Peer(id=b"\x12\x20short", addrs=raw),
        Message.Peer(id=RAW_ID, addrs=[b"junk", bytes(10_000), *raw]),
    ]
    for told_by, expected in (
        ("8.8.4.4", ("/ip4/8.8.8.8/tcp/1",)),
        ("127.0.0.1", ("/ip4/127.0.0.1/tcp/1", "/ip4/8.8.8.8/tcp/1")),
    ):
        (found,) = peers_in(peers, told_by)
        assert found.peer_id == id_text(RAW_ID)
        assert found.addrs == expected
    many = [Message.Peer(id=RAW_ID)] * 1000
    assert len(peers_in(many, None)) == MAX_PEERS_PER_ANSWER
