"""What is held of a model, told by its manifest: limits, and what only the manifest can judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import pytest

from tensorswarm.p2p.control import wire, wire_models
from tensorswarm.store.errors import ProtocolError
from tensorswarm.store.manifest import MAX_OBJECTS

DOCUMENT = (Path(__file__).parents[2] / "docs/protocol.md").read_text("utf-8")
DIGEST = bytes(range(32))
MIB = 1 << 20
RUNS = [number for i in range(4096) for number in (2 * i, 1)]
PARTS = [[index, b"\1"] for index in range(8192)]


def read(frame: bytes) -> wire.Message | None:
    reader = wire.FrameReader()
    reader.feed(frame)
    return reader.next_message()


@pytest.mark.parametrize(
    ("array", "allowed", "path"),
    [
        ([15, 1, DIGEST, RUNS], True, "want_model.wanted"),
        ([15, 1, DIGEST, [*RUNS, 1 << 19, 1]], False, "want_model.wanted"),
        ([16, 1, DIGEST, RUNS, [], True], True, "have_model.whole"),
        ([16, 1, DIGEST, [*RUNS, 1 << 19, 1], [], True], False, "have_model.whole"),
        ([16, 1, DIGEST, [(1 << 20) - 1, 1], [], True], True, "have_model.whole, the last one"),
        ([16, 1, DIGEST, [(1 << 20) - 1, 2], [], True], False, "have_model.whole, one too many"),
        ([16, 1, DIGEST, [], PARTS, True], True, "have_model.parts"),
        ([16, 1, DIGEST, [], [*PARTS, [8192, b""]], True], False, "have_model.parts"),
        ([16, 1, DIGEST, [], [[7, bytes(512 << 10)]], True], True, "have_model bitmap"),
        ([16, 1, DIGEST, [], [[7, bytes((512 << 10) + 1)]], True], False, "have_model bitmap"),
    ],
)  # fmt: skip
def test_limits_are_where_they_are_said_to_be(array: list[Any], allowed: bool, path: str) -> None:
    payload: bytes = msgpack.packb(array, use_bin_type=True)
    frame = len(payload).to_bytes(4, "big") + payload
    if allowed:
        assert isinstance(read(frame), wire.HaveModel | wire.WantModel), path
    else:
        with pytest.raises(ProtocolError):
            read(frame)


def test_document_says_the_limits_of_a_model() -> None:
    assert wire_models.MAX_RUN_ITEMS == wire_models.MAX_MODEL_PARTS == 8192
    assert f"ends before index {MAX_OBJECTS:,}" in DOCUMENT


@pytest.mark.parametrize(
    ("whole", "parts", "is_right"),
    [
        ((0, 5), (), True),
        ((0, 6), (), False),
        ((5, 1), (), False),
        ((0, 2, 4, 1), ((2, b"\7"), (3, b"\1")), True),
        ((0, 2, 4, 1), ((2, b"\1"), (3, b"\0")), True),
        ((0, 3), ((2, b"\1"),), False),  # of an object that is whole
        ((4, 1), ((4, b"\1"),), False),
        ((), ((1, b"\1"),), False),  # of an object of one chunk
        ((), ((5, b"\1"),), False),
        ((), ((2, b"\10"),), False),  # a bit after the last chunk
        ((), ((2, b""),), False),
        ((), ((2, b"\1\0"),), False),
    ],
)
def test_a_message_about_a_model_fits_its_manifest(
    whole: tuple[int, ...], parts: tuple[tuple[int, bytes], ...], is_right: bool
) -> None:
    sizes = [1, MIB, 2 * MIB + 1, 2 * MIB, 7]
    message = wire.HaveModel(0, DIGEST, whole, tuple([wire.ModelPart(*p) for p in parts]), True)
    assert read(wire.encode(message)) == message
    if is_right:
        wire_models.check_model(message, sizes)
    else:
        with pytest.raises(ProtocolError):
            wire_models.check_model(message, sizes)


def test_an_empty_answer_is_one_frame_and_empty_news_none() -> None:
    empty = wire.HaveModel(3, DIGEST, (), (), last=True)
    assert list(wire.fit_have_model(3, DIGEST, [], [])) == [empty]
    assert list(wire.fit_have_model(0, DIGEST, [], [])) == []


def test_a_bitmap_that_cannot_be_told_is_left_out() -> None:
    parts = [wire.ModelPart(1, bytes(1 << 20)), wire.ModelPart(2, b"\1")]
    (frame,) = wire.fit_have_model(3, DIGEST, [], parts)
    assert frame.parts == (parts[1],)
