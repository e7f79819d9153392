"""The vectors of the DHT, of conversations and of the bulk plane, held against our code.

Those of objects, manifests, paths and single frames are read by the tests of their parts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from multiaddr import Multiaddr

from tensorswarm.p2p.bulk.http1 import Answer, ClientExchange, RangeRequest, ServerExchange
from tensorswarm.p2p.control import wire
from tensorswarm.p2p.dht import rpc as dht_rpc
from tensorswarm.p2p.dht.lookup import kad_id, peer_kad_id
from tensorswarm.p2p.host.addresses import peer_id_bytes, peer_id_text
from tensorswarm.store.cid import dht_key
from tensorswarm.store.errors import ProtocolError

FOLDER = Path(__file__).resolve().parents[1] / "vectors"


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return document


DHT, BULK = read("dht"), read("bulk")
CONVERSATIONS = read("conversations")["conversations"]


def name_of(vector: dict[str, Any]) -> str:
    return str(vector["name"])


# ---- the DHT


def test_where_keys_and_peers_lie() -> None:
    for vector in DHT["keys"]:
        key = dht_key(bytes.fromhex(vector["digest"]))
        assert key.hex() == vector["key"]
        assert f"{kad_id(key):064x}" == vector["point"]
    for vector in DHT["peers"]:
        assert peer_id_bytes(vector["peer_id"]).hex() == vector["binary"]
        assert peer_id_text(bytes.fromhex(vector["binary"])) == vector["peer_id"]
        assert f"{peer_kad_id(vector['peer_id']):064x}" == vector["point"]
    vector = DHT["distance"]
    distance = kad_id(bytes.fromhex(vector["key"])) ^ peer_kad_id(vector["peer_id"])
    assert f"{distance:064x}" == vector["distance"]


def test_dht_messages() -> None:
    messages = DHT["messages"]
    key = bytes.fromhex(messages["find_node"]["key"])
    assert dht_rpc.find_node(key).data.hex() == messages["find_node"]["message"]
    assert dht_rpc.get_providers(key).data.hex() == messages["get_providers"]["message"]
    vector = messages["add_provider"]
    addrs = [Multiaddr(addr).to_bytes() for addr in vector["addrs"]]
    made = dht_rpc.add_provider(key, peer_id_bytes(vector["peer_id"]), addrs)
    assert made.hex() == vector["message"]

    vector = messages["providers_are"]
    deframer = dht_rpc.Deframer()
    deframer.feed(bytes.fromhex(vector["message"]))
    answer = deframer.next_message()
    assert answer is not None
    assert (answer.type, answer.key) == (dht_rpc.GET_PROVIDERS, key)
    (provider,) = answer.providerPeers
    assert dht_rpc.id_text(provider.id) == vector["peer_id"]
    assert [dht_rpc.addr_text(raw) for raw in provider.addrs] == vector["addrs"]


# ---- the order of messages


def message_of(frame: str) -> wire.Message:
    reader = wire.FrameReader()
    reader.feed(bytes.fromhex(frame))
    message = reader.next_message()
    assert message is not None
    return message


@pytest.mark.parametrize("vector", CONVERSATIONS, ids=name_of)
def test_conversations(vector: dict[str, Any]) -> None:
    conversation = wire.Conversation()
    for index, step in enumerate(vector["steps"]):
        ((who, frame),) = step.items()
        message = message_of(frame)
        if who == "we":
            if isinstance(message, wire.Request):
                assert conversation.next_request_id() == message.request_id
            conversation.sent(message)
        elif index == vector["violation"]:
            with pytest.raises(ProtocolError):
                conversation.received(message)
            return
        else:
            conversation.received(message)
    assert vector["violation"] is None


# ---- the bulk plane

VERDICTS = {
    Answer.CONTENT: "content",
    Answer.LACKS: "lacks",
    Answer.DENIED: "denied",
    Answer.BUSY: "busy",
}


@pytest.mark.parametrize("vector", BULK["requests"], ids=name_of)
def test_requests_that_are_taken(vector: dict[str, Any]) -> None:
    first, last = vector["first"], vector["last"]
    asked = RangeRequest(bytes.fromhex(vector["digest"]), first, last - first + 1)
    assert ServerExchange(vector["head"].encode()).request == asked


@pytest.mark.parametrize("vector", BULK["bad_requests"], ids=name_of)
def test_requests_that_are_not(vector: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        ServerExchange(vector["head"].encode())


@pytest.mark.parametrize("vector", BULK["answers"], ids=name_of)
def test_what_answers_mean(vector: dict[str, Any]) -> None:
    first, last = vector["first"], vector["last"]
    exchange = ClientExchange(RangeRequest(bytes(32), first, last - first + 1), "x")
    try:
        verdict = VERDICTS[exchange.read_head(vector["head"].encode())]
    except ProtocolError:
        verdict = "violation"
    assert verdict == vector["verdict"]
