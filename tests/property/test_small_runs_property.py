"""Many small objects at once: the same as one after the other, for any sizes and orders."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tensorswarm.p2p.control.holdings import Holdings
from tensorswarm.p2p.swarm.chunk_map import BLOCK_CHUNKS, ChunkMap
from tensorswarm.p2p.swarm.source import Span
from tensorswarm.store.digest import CHUNK_SIZE, chunk_count

sizes = st.lists(
    st.one_of(st.integers(1, 5000), st.sampled_from((CHUNK_SIZE, CHUNK_SIZE + 1, 5 * CHUNK_SIZE))),
    min_size=1,
    max_size=60,
).flatmap(lambda few: st.integers(1, 12).map(lambda times: few * times))


def make(sizes_bytes: list[int], data: st.DataObject) -> ChunkMap:
    count = len(sizes_bytes)
    urgent = data.draw(st.dictionaries(st.integers(0, count - 1), st.integers(-1, 1), max_size=4))
    return ChunkMap(sizes_bytes, {}, urgent, max_chunks=1 << 20, max_priorities=4)


def positions_of(chunks: ChunkMap, sizes_bytes: list[int]) -> dict[int, tuple[int, int]]:
    return {
        chunks.position(index, chunk): (index, chunk)
        for index, size in enumerate(sizes_bytes)
        for chunk in range(chunk_count(size))
    }


@given(sizes, st.data())
@settings(max_examples=60, deadline=None)
def test_what_fits_into_a_request(sizes_bytes: list[int], data: st.DataObject) -> None:
    chunks = make(sizes_bytes, data)
    places = positions_of(chunks, sizes_bytes)
    position = data.draw(st.sampled_from(sorted(places)))
    width = 1
    while position + width in places and width < data.draw(st.integers(1, BLOCK_CHUNKS)):
        width += 1
    room = data.draw(st.integers(CHUNK_SIZE, 4 * CHUNK_SIZE) | st.integers(1, 20_000))
    most = data.draw(st.integers(1, 300))
    spans, used, size_bytes = chunks.fit(position, width, room, most)
    covered = [(s.object_index, c) for s in spans for c in range(s[1], s[1] + s[2])]
    assert covered == [places[position + i] for i in range(used)]
    assert len(spans) <= most and all(isinstance(span, Span) for span in spans)
    assert size_bytes == sum(chunks.size_at(position + i) for i in range(used)) <= room
    if used < width and len(spans) < most:  # the next one does not fit
        assert size_bytes + chunks.size_at(position + used) > room


@given(sizes, st.data())
@settings(max_examples=60, deadline=None)
def test_proving_many_is_proving_each(sizes_bytes: list[int], data: st.DataObject) -> None:
    count = len(sizes_bytes)
    urgent = data.draw(st.dictionaries(st.integers(0, count - 1), st.integers(-1, 1), max_size=4))
    one, other = (
        ChunkMap(sizes_bytes, {}, urgent, max_chunks=1 << 20, max_priorities=4) for _ in range(2)
    )
    small = [index for index, size in enumerate(sizes_bytes) if size <= CHUNK_SIZE]
    if not small:
        return
    start = data.draw(st.integers(0, len(small) - 1))
    batch = small[start : start + data.draw(st.integers(1, 300))]
    taken = data.draw(st.sampled_from((0, len(batch) // 2, len(batch))))
    again = data.draw(st.sampled_from((0, len(batch) // 3)))
    for chunks in (one, other):
        for index in batch[:taken]:
            position = chunks.position(index, 0)
            chunks.take(position // BLOCK_CHUNKS, 1 << position % BLOCK_CHUNKS, sizes_bytes[index])
        chunks.prove_small(batch[:again])
    proved, known = one.prove_small(batch)
    for index in batch:
        position = other.position(index, 0)
        if other.prove(position, sizes_bytes[index]):
            assert proved.pop(position) == sizes_bytes[index]
        else:
            assert known.pop(index) == sizes_bytes[index]
    assert not proved and not known
    for name in ("proved", "free", "missing_chunks", "missing_bytes", "free_bytes"):
        assert getattr(one, name) == getattr(other, name), name


@given(sizes, st.data())
@settings(max_examples=60, deadline=None)
def test_a_run_of_objects_is_all_its_chunks(sizes_bytes: list[int], data: st.DataObject) -> None:
    chunks = make(sizes_bytes, data)
    start = data.draw(st.integers(0, len(sizes_bytes) - 1))
    stop = data.draw(st.integers(start, len(sizes_bytes)))
    masks: dict[int, int] = {}
    for block, mask in chunks.spread_whole(range(start, stop)):
        masks[block] = masks.get(block, 0) | mask
    expected: dict[int, int] = {}
    for index in range(start, stop):
        for block, mask in chunks.spread(index, None):
            expected[block] = expected.get(block, 0) | mask
    assert masks == expected


@given(st.integers(1, 200), st.data())
@settings(max_examples=60, deadline=None)
def test_a_run_that_is_held_is_each_object_held(count: int, data: st.DataObject) -> None:
    one, other = Holdings(count), Holdings(count)
    indices = st.integers(0, count - 1)
    for _ in range(data.draw(st.integers(1, 8))):
        kind = data.draw(st.sampled_from(("run", "part", "discard")))
        index = data.draw(indices)
        if kind == "part":
            assert one.add(index, b"\1") == other.add(index, b"\1")
        elif kind == "discard":
            one.discard(index)
            other.discard(index)
        else:
            stop = data.draw(st.integers(index + 1, count))
            is_news = [other.add(each, None) for each in range(index, stop)]
            assert one.add_run(index, stop) == any(is_news)
        assert sorted(one.items()) == sorted(other.items())
        assert len(one) == len(other) and one.whole_count == len(list(one.whole()))
        assert [i for start, stop in one.runs() for i in range(start, stop)] == list(one.whole())
