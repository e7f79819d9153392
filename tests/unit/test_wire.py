"""The control protocol: vectors, limits, framing, order, and the document that says so."""

from __future__ import annotations

import json
import re
import tracemalloc
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tensorswarm.p2p.control import wire, wire_limits
from tensorswarm.store.errors import BadInput, ProtocolError

ROOT = Path(__file__).parents[2]
VECTORS = json.loads((ROOT / "tests/vectors/wire.json").read_text("utf-8"))
DOCUMENT = (ROOT / "docs/protocol.md").read_text("utf-8")
DIGEST = bytes(range(32))
OTHER = b"\xbb" * 32
MIB = 1 << 20

HELLO = wire.Hello(1, "test", (), (), ())
BYE = wire.Bye(0, "")
MESSAGES: list[wire.Message] = [
    HELLO,
    BYE,
    wire.Refusal(1, 1, ""),
    wire.Want(1, (DIGEST,)),
    wire.Have(1, (), last=True),
    wire.Unwant((DIGEST,)),
    wire.GetBlobs(1, (wire.BlobItem(DIGEST, 0),)),
    wire.Blobs(1, (), last=True),
    wire.GetChunkList(1, DIGEST),
    wire.ChunkListIs(1, DIGEST, -1, b""),
    wire.GetPeers(1, b""),
    wire.Peers(1, ()),
    wire.Offer(DIGEST, 0),
    wire.Pass(DIGEST),
    wire.WantModel(1, DIGEST, (0, 1)),
    wire.HaveModel(1, DIGEST, (), (), last=True),
]


def frame_of(array: object) -> bytes:
    """Frame an array without any check, as a peer with other ideas might."""
    payload: bytes = msgpack.packb(array, use_bin_type=True)
    return len(payload).to_bytes(4, "big") + payload


def read_one(frame: bytes) -> wire.Message:
    reader = wire.FrameReader()
    reader.feed(frame)
    message = reader.next_message()
    assert message is not None
    assert reader.next_message() is None
    return message


def as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    return [as_json(item) for item in value] if isinstance(value, tuple) else value


def message_as_json(message: wire.Message) -> list[Any]:
    return [message.kind, *(as_json(getattr(message, field.name)) for field in fields(message))]


def named(vectors: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(vector, id=vector["name"]) for vector in vectors]


# ---- vectors


@pytest.mark.parametrize("vector", named(VECTORS["valid"] + VECTORS["also_valid"]))
def test_vector_decodes_to_its_message(vector: dict[str, Any]) -> None:
    message = read_one(bytes.fromhex(vector["frame"]))
    assert message_as_json(message) == vector["message"]


@pytest.mark.parametrize("vector", named(VECTORS["valid"]))
def test_vector_is_what_its_message_encodes_to(vector: dict[str, Any]) -> None:
    frame = bytes.fromhex(vector["frame"])
    assert wire.encode(read_one(frame)) == frame


@pytest.mark.parametrize("vector", named(VECTORS["unknown"]))
def test_unknown_kind_is_skipped_and_told(vector: dict[str, Any]) -> None:
    reader = wire.FrameReader()
    reader.feed(bytes.fromhex(vector["frame"]) + wire.encode(BYE))
    assert reader.next_message() == wire.Unknown(vector["kind"])
    assert reader.next_message() == BYE


@pytest.mark.parametrize("vector", named(VECTORS["invalid"]))
def test_vector_is_a_violation(vector: dict[str, Any]) -> None:
    reader = wire.FrameReader()
    reader.feed(bytes.fromhex(vector["frame"]))
    with pytest.raises(ProtocolError):
        reader.next_message()


def test_vectors_cover_every_kind() -> None:
    assert {vector["message"][0] for vector in VECTORS["valid"]} == set(range(1, 17))
    assert {message.kind for message in MESSAGES} == set(range(1, 17))


# ---- the document


def test_document_shows_every_vector() -> None:
    blocks = ["".join(block.split()) for block in re.findall(r"```\n([0-9a-f\n]+)```", DOCUMENT)]
    assert sorted(blocks) == sorted(vector["frame"] for vector in VECTORS["valid"])


def test_document_names_every_kind_and_its_answer() -> None:
    rows = re.findall(r"^\| (\d+) \| (\w+) \| [^|]+ \| ([\w–]+) \|$", DOCUMENT, re.MULTILINE)
    snake = {
        message.kind: re.sub(r"(?<!^)(?=[A-Z])", "_", type(message).__name__).lower()
        for message in MESSAGES
    }
    assert {int(kind): name for kind, name, _ in rows} == snake
    headings = re.findall(r"^### (\w+) \((\d+)\)$", DOCUMENT, re.MULTILINE)
    assert {int(kind): name for name, kind in headings} == snake
    answers = {name: answer for _, name, answer in rows if answer != "–"}
    assert answers == {
        "want": "have",
        "want_model": "have_model",
        "get_blobs": "blobs",
        "get_chunk_list": "chunk_list_is",
        "get_peers": "peers",
    }


def test_document_state_table_is_what_conversation_does() -> None:
    rows = re.findall(r"^\| (silent|open|closed) \| (\w+) \| (\w+) \| (\w+) \|$", DOCUMENT, re.M)
    assert [row[0] for row in rows] == ["silent", "open", "closed"]
    others = [message for message in MESSAGES if message not in (HELLO, BYE)]
    others += [wire.Have(0, (), last=True), wire.Refusal(0, 1, ""), wire.Unknown(99)]
    others += [wire.HaveModel(0, DIGEST, (), (), last=True)]
    for state, on_hello, on_bye, on_other in rows:
        cases: list[tuple[wire.Message, str]] = [(HELLO, on_hello), (BYE, on_bye)]
        cases += [(message, on_other) for message in others]
        for message, expected in cases:
            assert _after(wire.State(state), message) == expected, (state, message)


REQUESTS: dict[int, wire.Request] = {
    wire.Have.kind: wire.Want(1, ()),
    wire.HaveModel.kind: wire.WantModel(1, DIGEST, (0, 1)),
    wire.Blobs.kind: wire.GetBlobs(1, ()),
    wire.Peers.kind: wire.GetPeers(1, b""),
}


def _after(state: wire.State, message: wire.Message) -> str:
    conversation = _conversation(state)
    if isinstance(message, wire.Answer) and message.request_id:
        conversation.sent(HELLO)
        conversation.next_request_id()
        conversation.sent(REQUESTS.get(message.kind, wire.GetChunkList(1, DIGEST)))
    try:
        conversation.received(message)
    except ProtocolError:
        return "violation"
    return conversation.theirs.value


def _conversation(theirs: wire.State) -> wire.Conversation:
    conversation = wire.Conversation()
    steps: dict[wire.State, tuple[wire.Message, ...]] = {
        wire.State.SILENT: (),
        wire.State.OPEN: (HELLO,),
        wire.State.CLOSED: (HELLO, BYE),
    }
    for message in steps[theirs]:
        conversation.received(message)
    return conversation


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MAX_FRAME_BYTES", "1,048,576"),
        ("MAX_ARRAY_ITEMS", "8,192"),
        ("MAX_MAP_ITEMS", "1,024"),
        ("MAX_KIND", "65,535"),
        ("MAX_WANT_DIGESTS", "8,192"),
        ("MAX_SUBSCRIPTIONS", "131,072"),
        ("MAX_HAVE_ENTRIES", "8,192"),
        ("MAX_BITMAP_BYTES", "524,288"),
        ("MAX_MODEL_SUBSCRIPTIONS", "64 subscriptions to models"),
        ("MAX_BLOB_ITEMS", "1,024"),
        ("MAX_BLOB_DATA_PER_FRAME", "524,288"),
        ("MAX_PEERS", "64"),
        ("MAX_PEER_ADDRS", "8"),
        ("MAX_PEER_ID_CHARS", "1 to 128"),
        ("MAX_HELLO_ADDRS", "32"),
        ("MAX_ADDR_CHARS", "512"),
        ("MAX_FEATURES", "32"),
        ("MAX_FEATURE_CHARS", "1 to 64"),
        ("MAX_AGENT_CHARS", "128"),
        ("MAX_REASON_CHARS", "256"),
        ("MAX_OPEN_REQUESTS", "at most 64 requests"),
        ("HELLO_TIMEOUT_S", "5 s"),
        ("ANSWER_TIMEOUT_S", "10 s"),
    ],
)
def test_document_says_the_limits(name: str, text: str) -> None:
    number = re.findall(r"\d+", text.replace(",", ""))[-1]
    assert int(number) == getattr(wire_limits, name)
    assert text in DOCUMENT


# ---- limits: the largest that fits, and one more


@pytest.mark.parametrize(
    ("array", "allowed", "path"),
    [
        ([2, 0, "x" * 256], True, "bye.text"),
        ([3, 0, 65535, "x" * 256], True, "refusal.text"),
        ([3, 0, 65536, ""], False, "refusal.code"),
        ([1, 1, "x" * 128, [], [], []], True, "agent"),
        ([1, 1, "x" * 129, [], [], []], False, "agent"),
        ([1, 1, "", [":1"] * 32, ["/x"] * 32, ["x"] * 32], True, "32 each"),
        ([1, 1, "", [":1"] * 33, [], []], False, "bulk"),
        ([1, 1, "", [], ["/x"] * 33, []], False, "addrs"),
        ([1, 1, "", [], [], ["x"] * 33], False, "features"),
        ([1, 1, "", [], [], ["x" * 64]], True, "feature"),
        ([1, 1, "", [], [], ["x" * 65]], False, "feature"),
        ([1, 1, "", [], [], [""]], False, "empty feature"),
        ([1, 1, "", [], [], ["a b"]], False, "feature with a space"),
        ([1, 1, "", [], ["/" + "x" * 511], []], True, "address"),
        ([1, 1, "", [], ["/" + "x" * 512], []], False, "address"),
        ([4, (1 << 63) - 1, [DIGEST] * 8192], True, "want.digests"),
        ([4, 1, [DIGEST] * 8193], False, "want.digests"),
        ([6, [DIGEST] * 8192], True, "unwant.digests"),
        ([5, 1, [[DIGEST, 1, None, b""]] * 8192, True], True, "have.entries"),
        ([5, 1, [[DIGEST, 1, None, b""]] * 8193, True], False, "have.entries"),
        ([5, 1, [[DIGEST, (4 << 40), b"\xff" * (512 << 10), OTHER]], True], True, "bitmap"),
        ([5, 1, [[DIGEST, (4 << 40) + 1, bytes((512 << 10) + 1), OTHER]], True], False, "bitmap"),
        ([5, 1, [[DIGEST, 1 << 44, None, b""]], True], True, "size"),
        ([5, 1, [[DIGEST, MIB + 1, b"\3", OTHER]], True], True, "part of two chunks"),
        ([5, 1, [[DIGEST, MIB, b"\1", OTHER]], True], False, "part of one chunk"),
        ([5, 1, [[DIGEST, MIB, b"\1", b""]], True], False, "part of one chunk, no list"),
        ([5, 1, [[DIGEST, 0, b"", b""]], True], False, "part of nothing"),
        ([5, 1, [[DIGEST, MIB + 1, b"\3", b""]], True], False, "part without a list"),
        ([5, 1, [[DIGEST, MIB + 1, b"\3", None]], True], False, "part with nil as list"),
        ([5, 1, [[DIGEST, MIB + 1, b"\3"]], True], False, "part without the field"),
        ([5, 1, [[DIGEST, MIB + 1, b"\3", OTHER[1:]]], True], False, "list of 31 bytes"),
        ([5, 1, [[DIGEST, MIB + 1, None, OTHER]], True], False, "whole with a list"),
        ([5, 1, [[DIGEST, MIB + 1, None, None]], True], False, "whole with nil as list"),
        ([7, 1, [[DIGEST, 0]] * 1024], True, "items"),
        ([7, 1, [[DIGEST, 0]] * 1025], False, "items"),
        ([8, 1, [[DIGEST, 1, 0, b"x"]] * 1024, True], True, "pieces"),
        ([8, 1, [[DIGEST, 1, 0, b"x"]] * 1025, True], False, "pieces"),
        ([8, 1, [[DIGEST, MIB, 0, bytes(512 << 10)]], True], True, "data"),
        ([8, 1, [[DIGEST, MIB, 0, bytes((512 << 10) + 1)]], True], False, "data in one"),
        ([8, 1, [[DIGEST, MIB, 0, bytes(256 << 10)]] * 2, True], True, "data in all"),
        ([8, 1, [[DIGEST, MIB, 0, bytes(175 << 10)]] * 3, True], False, "data in all"),
        ([12, 1, [["x" * 128, ["/x"] * 8]] * 64], True, "peers"),
        ([12, 1, [["x" * 128, []]] * 65], False, "peers"),
        ([12, 1, [["x" * 129, []]]], False, "peer id"),
        ([12, 1, [["", []]]], False, "no peer id"),
    ],
)  # fmt: skip
def test_limits_are_where_they_are_said_to_be(array: list[Any], allowed: bool, path: str) -> None:
    frame = frame_of(array)
    if allowed:
        assert read_one(frame).kind == array[0], path
    else:
        with pytest.raises(ProtocolError):
            read_one(frame)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_field_has_its_exact_type(message: wire.Message) -> None:
    array = msgpack.unpackb(wire.encode(message)[4:])
    for index in range(1, len(array)):
        strangers = [0.5, {}, None, msgpack.ExtType(7, b"x"), msgpack.Timestamp(1)]
        candidates: tuple[object, ...] = (1, True, b"", "", [])
        strangers += [value for value in candidates if type(value) is not type(array[index])]
        for stranger in strangers:
            damaged = [*array[:index], stranger, *array[index + 1 :]]
            with pytest.raises(ProtocolError):
                read_one(frame_of(damaged))
        with pytest.raises(ProtocolError):
            read_one(frame_of(array[:index]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":4002", ("", 4002)),
        ("192.0.2.7:1", ("192.0.2.7", 1)),
        ("host-1.example.org:65535", ("host-1.example.org", 65535)),
        ("[2001:db8::1]:4002", ("2001:db8::1", 4002)),
        ("[::ffff:192.0.2.7]:4002", ("::ffff:192.0.2.7", 4002)),
    ],
)
def test_bulk_address_is_split(text: str, expected: tuple[str, int]) -> None:
    assert wire_limits.split_bulk_address(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "host",
        "host:",
        ":04002",
        ":-1",
        ":99999",
        "a:b:1",
        "[]:1",
        "[::g]:1",
        "[::1%eth0]:1",
    ]
    + ["[192.0.2.7]:1", "host:1\n", "user@host:1", "host/path:1", ":１", "x" * 254 + ":1"],
)
def test_what_is_no_bulk_address(text: str) -> None:
    with pytest.raises(ProtocolError):
        wire_limits.split_bulk_address(text)


def test_printable_text_may_always_be_sent() -> None:
    text = wire_limits.printable("caf\u00e9\n\x1b[31m" + "x" * 1000, wire_limits.MAX_REASON_CHARS)
    assert text.startswith("caf???[31mx")
    assert read_one(wire.encode(wire.Bye(0, text))) == wire.Bye(0, text)


# ---- encoding


@pytest.mark.parametrize(
    "message",
    [
        wire.Unknown(99),
        wire.Bye(0, "two\nlines"),
        wire.Want(0, (DIGEST,)),
        wire.Want(True, (DIGEST,)),
        wire.Want(1, (DIGEST[:31],)),
        wire.Have(1, (wire.HaveEntry(DIGEST, 9 * MIB, b"\xff", OTHER),), last=True),
        wire.Have(1, (wire.HaveEntry(DIGEST, 8 * MIB, b"\xff", b""),), last=True),
        wire.Have(1, (wire.HaveEntry(DIGEST, 4 << 40, bytes(512 << 10), OTHER),) * 2, last=True),
    ],
    ids=["unknown", "control", "id 0", "bool id", "digest", "bitmap", "list", "frame too long"],
)
def test_our_own_mistakes_are_not_sent(message: wire.Message) -> None:
    with pytest.raises(BadInput):
        wire.encode(message)


# ---- the reader


def test_reader_takes_bytes_as_they_come() -> None:
    stream = b"".join(map(wire.encode, MESSAGES))
    reader = wire.FrameReader()
    found = []
    for byte in stream:
        reader.feed(bytes([byte]))
        while (message := reader.next_message()) is not None:
            found.append(message)
    assert found == MESSAGES


def test_length_is_refused_before_its_bytes_come() -> None:
    reader = wire.FrameReader()
    reader.feed(b"\x00\x10\x00\x00")
    assert reader.next_message() is None
    reader = wire.FrameReader()
    reader.feed(b"\x00\x10\x00\x01")
    with pytest.raises(ProtocolError):
        reader.next_message()


def test_reader_is_of_no_use_after_a_violation() -> None:
    reader = wire.FrameReader()
    reader.feed(wire.encode(BYE) + b"\x00\x00\x00\x00" + wire.encode(BYE))
    assert reader.next_message() == BYE
    with pytest.raises(ProtocolError) as first:
        reader.next_message()
    reader.feed(wire.encode(BYE))
    with pytest.raises(ProtocolError, match=re.escape(str(first.value))):
        reader.next_message()


def test_reader_takes_a_mebibyte_when_drained_and_not_without_end_when_not() -> None:
    reader = wire.FrameReader()
    almost = (MIB).to_bytes(4, "big") + bytes(MIB - 1)
    reader.feed(almost)
    assert reader.next_message() is None
    reader.feed(bytes(MIB))
    with pytest.raises(BadInput):
        reader.feed(bytes(MIB))


def test_reader_forgets_what_was_read() -> None:
    piece = wire.BlobPiece(DIGEST, MIB, 0, bytes(512 << 10))
    frame = wire.encode(wire.Blobs(1, (piece,), last=False))
    reader = wire.FrameReader()
    tracemalloc.start()
    try:
        for start in range(0, 40 * len(frame), 1 << 18):
            begin = start % len(frame)
            part = frame[begin : begin + (1 << 18)]
            reader.feed(part + frame[: (1 << 18) - len(part)])
            while reader.next_message() is not None:
                pass
        assert tracemalloc.get_traced_memory()[1] < 6 * MIB
    finally:
        tracemalloc.stop()


def test_announced_length_and_array_headers_claim_no_memory() -> None:
    nested = b"\xdc\x20\x00" * 1020  # each is the head of an array of 8,192 items
    greedy = b"\xdd\x00\x10\x00\x00" * 1020  # and each of these of a million
    tracemalloc.start()
    try:
        for payload in (nested, greedy):
            reader = wire.FrameReader()
            reader.feed(len(payload).to_bytes(4, "big") + payload)
            with pytest.raises(ProtocolError):
                reader.next_message()
        for _ in range(200):
            wire.FrameReader().feed(b"\x00\x10\x00\x00")
        assert tracemalloc.get_traced_memory()[1] < 100 * MIB
    finally:
        tracemalloc.stop()


def test_deep_nesting_is_a_violation_and_no_crash() -> None:
    payload = b"\x91" * 100_000 + b"\x00"
    with pytest.raises(ProtocolError):
        read_one(len(payload).to_bytes(4, "big") + payload)


def test_errors_do_not_repeat_what_the_peer_sent() -> None:
    for array in ([2, 0, "SECRET\n"], [1, 1, "", ["SECRET"], [], []], [12, 1, [["SECRET!", []]]]):
        with pytest.raises(ProtocolError) as caught:
            read_one(frame_of(array))
        assert "SECRET" not in str(caught.value)


# ---- long answers


def test_empty_answers_are_one_frame_and_empty_news_none() -> None:
    assert list(wire.fit_have(3, [])) == [wire.Have(3, (), last=True)]
    assert list(wire.fit_have(0, [])) == []
    assert list(wire.fit_blobs(3, [])) == [wire.Blobs(3, (), last=True)]


def test_have_with_long_bitmaps_takes_several_frames() -> None:
    entries = [wire.HaveEntry(bytes([i]) * 32, 3 << 40, bytes(384 << 10), OTHER) for i in range(5)]
    frames = list(wire.fit_have(3, entries))
    assert [len(frame.entries) for frame in frames] == [2, 2, 1]
    assert [frame.last for frame in frames] == [False, False, True]
    assert [read_one(wire.encode(frame)) for frame in frames] == frames


def test_have_leaves_out_what_cannot_be_told() -> None:
    giant = wire.HaveEntry(DIGEST, 8 << 40, bytes(1 << 20), OTHER)
    small = wire.HaveEntry(OTHER, 1, None, b"")
    assert list(wire.fit_have(3, [giant, small])) == [wire.Have(3, (small,), last=True)]


def test_blob_is_split_at_the_frame_and_read_no_sooner_than_needed() -> None:
    taken = []

    def pieces() -> Any:
        for index in range(3):
            taken.append(index)
            yield wire.BlobPiece(DIGEST, 900_000, index * 300_000, bytes([index]) * 300_000)

    frames = wire.fit_blobs(5, pieces())
    first = next(frames)
    assert taken == [0, 1]
    assert [(piece.offset, len(piece.data)) for piece in first.pieces] == [
        (0, 300_000),
        (300_000, 524_288 - 300_000),
    ]
    rest = list(frames)
    assert [frame.last for frame in (first, *rest)] == [False, True]
    assert [(piece.offset, len(piece.data)) for piece in rest[0].pieces] == [
        (524_288, 600_000 - 524_288),
        (600_000, 300_000),
    ]


# ---- conversation


def _greeted() -> wire.Conversation:
    conversation = wire.Conversation()
    conversation.sent(HELLO)
    conversation.received(HELLO)
    return conversation


def _asked(conversation: wire.Conversation) -> int:
    request_id = conversation.next_request_id()
    conversation.sent(wire.Want(request_id, (DIGEST,)))
    return request_id


def test_answer_of_several_frames_closes_its_request_with_the_last() -> None:
    conversation = _greeted()
    request_id = _asked(conversation)
    assert conversation.received(wire.Have(request_id, (), last=False))
    assert conversation.received(wire.Have(request_id, (), last=True))
    assert not conversation.received(wire.Have(request_id, (), last=True))


def test_refusal_closes_a_request_of_any_kind() -> None:
    conversation = _greeted()
    request_id = _asked(conversation)
    assert conversation.received(wire.Refusal(request_id, 1, ""))
    assert not conversation.received(wire.Have(request_id, (), last=True))


def test_late_answer_is_ignored() -> None:
    conversation = _greeted()
    request_id = _asked(conversation)
    conversation.give_up(request_id)
    assert not conversation.received(wire.Have(request_id, (), last=True))
    assert not conversation.received(wire.Peers(request_id, ()))


def test_answer_of_the_wrong_kind_or_to_nothing_is_a_violation() -> None:
    conversation = _greeted()
    request_id = _asked(conversation)
    with pytest.raises(ProtocolError):
        conversation.received(wire.Blobs(request_id, (), last=True))
    with pytest.raises(ProtocolError):
        conversation.received(wire.Have(request_id + 1, (), last=True))
    unsent = conversation.next_request_id()
    with pytest.raises(ProtocolError):
        conversation.received(wire.Refusal(unsent, 1, ""))


def test_news_and_general_refusals_need_no_request() -> None:
    conversation = _greeted()
    assert conversation.received(wire.Have(0, (), last=True))
    assert conversation.received(wire.Refusal(0, 4, ""))


def test_our_own_order_is_held_too() -> None:
    conversation = wire.Conversation()
    with pytest.raises(BadInput):
        conversation.sent(BYE)
    conversation.sent(HELLO)
    with pytest.raises(BadInput):
        conversation.sent(HELLO)
    with pytest.raises(BadInput):
        conversation.sent(wire.Want(1, ()))
    request_id = _asked(conversation)
    with pytest.raises(BadInput):
        conversation.sent(wire.Want(request_id, ()))
    conversation.sent(BYE)
    with pytest.raises(BadInput):
        conversation.sent(wire.Unwant(()))


def test_open_requests_are_bounded() -> None:
    conversation = _greeted()
    ids = [_asked(conversation) for _ in range(wire_limits.MAX_OPEN_REQUESTS)]
    with pytest.raises(BadInput):
        conversation.next_request_id()
    conversation.give_up(ids[0])
    assert conversation.next_request_id() == ids[-1] + 1
