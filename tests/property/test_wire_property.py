"""Properties of the control protocol over all messages that may be sent."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from tensorswarm.p2p.control import wire, wire_limits
from tensorswarm.store.digest import CHUNK_SIZE, MAX_OBJECT_SIZE, chunk_count
from tensorswarm.store.manifest import MAX_OBJECTS

MAX_SMALL_SIZE = 40 * CHUNK_SIZE

digests = st.binary(min_size=32, max_size=32)
request_ids = st.integers(1, wire_limits.MAX_INT)
codes = st.integers(0, wire_limits.MAX_CODE)
reasons = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=256)
words = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=64)
multiaddrs = words.map(lambda text: "/" + text)
ports = st.integers(1, 65535)
bulk_addresses = st.one_of(
    ports.map(lambda port: f":{port}"),
    st.builds("{}:{}".format, st.ip_addresses(v=4), ports),
    st.builds("[{}]:{}".format, st.ip_addresses(v=6), ports),
)


def tuples(items: st.SearchStrategy[object], most: int) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(items, max_size=most).map(tuple)


@st.composite
def have_entries(draw: st.DrawFn) -> wire.HaveEntry:
    if draw(st.booleans()):
        return wire.HaveEntry(draw(digests), draw(st.integers(0, MAX_OBJECT_SIZE)), None, b"")
    size = draw(st.integers(CHUNK_SIZE + 1, MAX_SMALL_SIZE))
    chunks = chunk_count(size)
    bits = draw(st.integers(0, (1 << chunks) - 1))
    bitmap = bits.to_bytes(-(-chunks // 8), "little")
    return wire.HaveEntry(draw(digests), size, bitmap, draw(digests))


@st.composite
def blob_pieces(draw: st.DrawFn, max_bytes: int = 100) -> wire.BlobPiece:
    data = bytes(draw(st.integers(0, max_bytes)))
    offset = draw(st.integers(0, MAX_OBJECT_SIZE - max_bytes))
    left = draw(st.integers(0, 10)) if data else 0
    size = min(offset + len(data) + left, MAX_OBJECT_SIZE)
    return wire.BlobPiece(draw(digests), size, offset, data)


@st.composite
def chunk_lists(draw: st.DrawFn) -> wire.ChunkListIs:
    size = draw(st.integers(-1, CHUNK_SIZE) | st.integers(CHUNK_SIZE + 1, MAX_OBJECT_SIZE))
    chunk_list = draw(digests) if size > CHUNK_SIZE else b""
    return wire.ChunkListIs(draw(request_ids), draw(digests), size, chunk_list)


@st.composite
def runs(draw: st.DrawFn, most: int = 5) -> list[tuple[int, int]]:
    """Runs of objects, each as the first and the one after the last."""
    edges = draw(st.lists(st.integers(0, MAX_OBJECTS), max_size=2 * most, unique=True))
    edges = sorted(edges)[: len(edges) // 2 * 2]
    return list(zip(edges[::2], edges[1::2], strict=True))  # unique: there are gaps


@st.composite
def model_parts(draw: st.DrawFn) -> list[wire.ModelPart]:
    indices = draw(st.lists(st.integers(0, MAX_OBJECTS - 1), max_size=5, unique=True))
    return [wire.ModelPart(index, draw(st.binary(max_size=40))) for index in sorted(indices)]


@st.composite
def model_holdings(draw: st.DrawFn) -> wire.HaveModel:
    request_id = draw(st.just(0) | request_ids)
    whole, parts = wire.flat_runs(draw(runs())), tuple(draw(model_parts()))
    return wire.HaveModel(request_id, draw(digests), whole, parts, draw(st.booleans()))


peer_entries = st.builds(
    wire.PeerEntry,
    st.from_regex(r"[0-9A-Za-z]{1,128}", fullmatch=True),
    tuples(multiaddrs, wire_limits.MAX_PEER_ADDRS),
)
messages: st.SearchStrategy[wire.Message] = st.one_of(
    st.builds(
        wire.Hello,
        request_ids,
        reasons.map(lambda text: text[:128]),
        tuples(bulk_addresses, 4),
        tuples(multiaddrs, 4),
        tuples(words, 4),
    ),
    st.builds(wire.Bye, codes, reasons),
    st.builds(wire.Refusal, st.just(0) | request_ids, codes, reasons),
    st.builds(wire.Want, request_ids, tuples(digests, 5)),
    st.builds(wire.Have, st.just(0) | request_ids, tuples(have_entries(), 5), st.booleans()),
    st.builds(wire.Unwant, tuples(digests, 5)),
    st.builds(
        wire.GetBlobs,
        request_ids,
        tuples(st.builds(wire.BlobItem, digests, st.integers(0, MAX_OBJECT_SIZE)), 5),
    ),
    st.builds(wire.Blobs, request_ids, tuples(blob_pieces(), 5), st.booleans()),
    st.builds(wire.GetChunkList, request_ids, digests),
    chunk_lists(),
    st.builds(wire.GetPeers, request_ids, digests | st.just(b"")),
    st.builds(wire.Peers, request_ids, tuples(peer_entries, 3)),
    st.builds(wire.WantModel, request_ids, digests, runs().map(wire.flat_runs)),
    model_holdings(),
)


def read_all(parts: Iterable[bytes]) -> list[wire.Message]:
    reader = wire.FrameReader()
    found = []
    for part in parts:
        reader.feed(part)
        while (message := reader.next_message()) is not None:
            found.append(message)
    return found


@given(st.lists(messages, max_size=5), st.data())
@settings(max_examples=150, deadline=None)
def test_messages_come_out_as_they_went_in_however_the_bytes_are_cut(
    sent: list[wire.Message], data: st.DataObject
) -> None:
    stream = b"".join(map(wire.encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    ends = [*cuts, len(stream)]
    parts = [stream[start:end] for start, end in zip([0, *cuts], ends, strict=True)]
    assert read_all(parts) == sent


@given(
    st.integers(0, 5),
    st.lists(
        st.tuples(st.sampled_from((2, 9, 10_000, 1_000_000, 1 << 22)), st.booleans()), max_size=40
    ),
    st.integers(1, 400),
)
@settings(max_examples=30, deadline=None)
def test_have_fits_frames_and_loses_nothing(
    request_id: int, shapes: list[tuple[int, bool]], repeat: int
) -> None:
    entries = [
        wire.HaveEntry(bytes(32), chunks * CHUNK_SIZE, None, b"")
        if whole
        else wire.HaveEntry(bytes(32), chunks * CHUNK_SIZE, bytes(-(-chunks // 8)), b"\2" * 32)
        for chunks, whole in shapes
    ]
    entries += [wire.HaveEntry(b"\1" * 32, 1 << 43, None, b"")] * repeat * 50
    entries += [wire.HaveEntry(b"\4" * 32, MAX_SMALL_SIZE, bytes(5), b"\2" * 32)] * repeat * 50
    frames = list(wire.fit_have(request_id, entries))
    assert [entry for frame in frames for entry in frame.entries] == entries
    assert [frame.last for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert all(frame.request_id == request_id and frame.entries for frame in frames)
    assert all(len(wire.encode(frame)) <= 4 + wire_limits.MAX_FRAME_BYTES for frame in frames)


@given(
    st.integers(0, 5),
    st.integers(0, 10_000),
    st.integers(0, 9_000),
    st.lists(st.sampled_from((1, 300_000, 512 << 10)), max_size=6),
)
@settings(max_examples=30, deadline=None)
def test_have_model_fits_frames_and_loses_nothing(
    request_id: int, run_count: int, small_parts: int, large_parts: list[int]
) -> None:
    told = [(3 * i, 3 * i + 2) for i in range(run_count)]
    sizes = [1] * small_parts + large_parts
    parts = [wire.ModelPart(3 * i + 2, bytes(size)) for i, size in enumerate(sizes)]
    frames = list(wire.fit_have_model(request_id, bytes(32), told, parts))
    assert [run for frame in frames for run in frame.runs()] == told
    assert [part for frame in frames for part in frame.parts] == parts
    assert [frame.last for frame in frames[:-1]] == [False] * (len(frames) - 1)
    assert not frames or frames[-1].last
    assert bool(frames) == bool(request_id or told or parts)
    for frame in frames:
        assert read_all([wire.encode(frame)]) == [frame]


@given(st.lists(st.integers(0, 1_500_000), max_size=6), st.integers(0, 2500))
@settings(max_examples=30, deadline=None)
def test_blobs_fit_frames_and_come_back_whole(sizes: list[int], small: int) -> None:
    blobs = {index: bytes([index + 1]) * size for index, size in enumerate([*sizes, *[3] * small])
             if index < 255}  # fmt: skip
    pieces = [
        wire.BlobPiece(index.to_bytes(32, "big"), len(data), 0, data)
        for index, data in blobs.items()
    ]
    rebuilt: dict[int, bytearray] = {}
    frames = list(wire.fit_blobs(7, pieces * 5))
    for frame in frames:
        assert read_all([wire.encode(frame)]) == [frame]
        for piece in frame.pieces:
            whole = rebuilt.setdefault(int.from_bytes(piece.digest, "big"), bytearray())
            assert piece.offset == len(whole) % max(piece.size_bytes, 1)
            whole += piece.data
    assert rebuilt == {index: data * 5 for index, data in blobs.items()}
    assert [frame.last for frame in frames] == [False] * (len(frames) - 1) + [True]


@given(st.text(max_size=400), st.integers(0, 300))
def test_printable_makes_text_that_may_be_sent(text: str, most: int) -> None:
    clean = wire_limits.printable(text, most)
    assert wire_limits.take_words(clean, "text", most) == clean
    assert all(new in (old, "?") for old, new in zip(text, clean, strict=False))
