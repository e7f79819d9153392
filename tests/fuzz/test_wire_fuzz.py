"""Damaged and invented frames: the reader says ProtocolError or gives a sound message.

The generator is seeded, so that a failure can be repeated; the number of rounds is
small enough for every test run and can be raised with TENSORSWARM_FUZZ_ROUNDS.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tensorswarm.p2p.control import wire, wire_limits, wire_models
from tensorswarm.store.errors import ProtocolError

VECTORS = json.loads((Path(__file__).parents[1] / "vectors/wire.json").read_text("utf-8"))
SEEDS = [bytes.fromhex(vector["frame"]) for group in ("valid", "also_valid", "unknown", "invalid")
         for vector in VECTORS[group]]  # fmt: skip
ROUNDS = int(os.environ.get("TENSORSWARM_FUZZ_ROUNDS", "4000"))


def read_all(stream: bytes, step: int) -> tuple[list[wire.Message], bool]:
    """Return the messages in `stream`, fed `step` bytes at a time, and whether it broke."""
    reader = wire.FrameReader()
    found: list[wire.Message] = []
    for start in range(0, len(stream), step):
        reader.feed(stream[start : start + step])
        try:
            while (message := reader.next_message()) is not None:
                found.append(message)
        except ProtocolError:
            return found, True
    return found, False


def check(stream: bytes, step: int) -> None:
    found, broken = read_all(stream, len(stream) or 1)
    assert read_all(stream, step) == (found, broken)  # how the bytes are cut changes nothing
    for message in found:
        if not isinstance(message, wire.Unknown):
            assert read_all(wire.encode(message), 1 << 20) == ([message], False)


def damaged(rng: random.Random, frame: bytes) -> bytes:
    """Return a frame with a few bytes changed, lost, repeated or taken from another."""
    payload = bytearray(frame[4:])
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(payload) + 1)
        end = min(len(payload), at + rng.randint(1, 8))
        action = rng.randrange(4)
        if action == 0:
            payload[at:end] = rng.randbytes(end - at)
        elif action == 1:
            del payload[at:end]
        elif action == 2:
            payload[at:at] = payload[at:end]
        else:
            other = rng.choice(SEEDS)[4:]
            start = rng.randrange(len(other) + 1)
            payload[at:end] = other[start : start + rng.randint(1, 40)]
    return len(payload).to_bytes(4, "big") + payload


def invented(rng: random.Random, depth: int) -> Any:
    """Return any value that msgpack can carry, of the lengths that matter to us."""
    if depth and rng.random() < 0.5:
        return [invented(rng, depth - 1) for _ in range(rng.randint(0, 6))]
    edges = (0, 1, -1, 1 << 20, (1 << 20) + 1, 1 << 44, (1 << 44) + 1, (1 << 63) - 1, (1 << 64) - 1)
    length = rng.choice((0, 1, 31, 32, 33, 300))
    return rng.choice(
        (
            rng.choice(edges),
            bool(rng.getrandbits(1)),
            None,
            rng.random(),
            rng.randbytes(length),
            "x" * length,
            rng.choice(("/ip4/192.0.2.7/tcp/1", ":1", "[::1]:1", "\u202e", "a\x00b")),
            {"key": length},
            msgpack.ExtType(rng.randrange(128), rng.randbytes(length)),
        )
    )


@pytest.mark.parametrize("seed", range(4))
def test_damaged_frames(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(ROUNDS // 4):
        frames = [damaged(rng, rng.choice(SEEDS)), wire.encode(wire.Bye(0, "after"))]
        check(b"".join(frames), rng.randint(1, 50))


@pytest.mark.parametrize("seed", range(4))
def test_invented_arrays(seed: int) -> None:
    rng = random.Random(seed)
    accepted = 0
    for _ in range(ROUNDS // 4):
        array = [rng.randint(0, 17), *(invented(rng, 3) for _ in range(rng.randint(0, 5)))]
        payload = msgpack.packb(array, use_bin_type=True)
        stream = len(payload).to_bytes(4, "big") + payload
        check(stream, rng.randint(1, 50))
        accepted += not read_all(stream, 1 << 20)[1]
    assert accepted  # some get through, else this tests the first check only


@pytest.mark.parametrize("seed", range(2))
def test_what_is_said_of_a_model_is_within_its_manifest_or_refused(seed: int) -> None:
    """Made nearly right, so that much gets through the parser, and some of it further."""
    rng = random.Random(seed)
    sizes = [rng.choice((0, 1, 1 << 20, (1 << 20) + 1, 9 << 20)) for _ in range(40)]
    told = 0
    for _ in range(ROUNDS // 4):
        edges = sorted(rng.sample(range(44), 2 * rng.randint(0, 4)))
        flat = [n for a, b in zip(edges[::2], edges[1::2], strict=True) for n in (a, b - a)]
        parts = [[i, rng.randbytes(rng.choice((0, 1, 1, 2)))] for i in rng.sample(range(44), 2)]
        array = [16, rng.randint(0, 1), bytes(32), flat, sorted(parts)[rng.randint(0, 2) :], True]
        payload = msgpack.packb(array, use_bin_type=True)
        found, broken = read_all(len(payload).to_bytes(4, "big") + payload, 1 << 20)
        for message in found:
            assert isinstance(message, wire.HaveModel)
            try:
                wire_models.check_model(message, sizes)
            except ProtocolError:
                continue
            whole = {index for start, stop in message.runs() for index in range(start, stop)}
            assert not whole & {part.object_index for part in message.parts}
            assert all(index < len(sizes) for index in whole)
            for index, bits in message.parts:
                assert sizes[index] > 1 << 20
                assert int.from_bytes(bits, "little") >> -(-sizes[index] // (1 << 20)) == 0
            told += 1
        assert found or broken
    assert told


@pytest.mark.parametrize("seed", range(2))
def test_noise(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(ROUNDS // 4):
        payload = rng.randbytes(rng.randint(0, 60))
        check(len(payload).to_bytes(4, "big") + payload, rng.randint(1, 20))
        check(rng.randbytes(rng.randint(0, 60)), rng.randint(1, 20))


@pytest.mark.parametrize("seed", range(2))
def test_conversation_survives_any_order(seed: int) -> None:
    """Whatever comes, a conversation accepts or raises, and its table stays bounded."""
    rng = random.Random(seed)
    pool = [read_all(frame, 1 << 20)[0] for frame in SEEDS]
    messages = [message for found in pool for message in found]
    for _ in range(ROUNDS // 20):
        conversation = wire.Conversation()
        conversation.sent(wire.Hello(1, "", (), (), ()))
        asked = 0
        for _ in range(rng.randint(1, 30)):
            if rng.random() < 0.3 and asked < wire_limits.MAX_OPEN_REQUESTS:
                conversation.sent(wire.GetPeers(conversation.next_request_id(), b""))
                asked += 1
            before = conversation.theirs
            message = rng.choice(messages)
            try:
                conversation.received(message)
            except ProtocolError:
                break
            first = before is wire.State.SILENT
            assert isinstance(message, wire.Hello) == first
            assert before is not wire.State.CLOSED
