"""HTTP origins, the part without I/O: where objects lie, URLs, answer headers."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorswarm.p2p.origins.origin import (
    MAX_ORIGIN_URL,
    ContentRange,
    FileRange,
    JoinedRanges,
    check_origin_url,
    continues_run,
    display_url,
    file_url,
    locate_objects,
    parse_content_range,
    parse_retry_after,
    pieces_of_file,
    pieces_of_span,
)
from tensorswarm.p2p.swarm.source import Span
from tensorswarm.store.digest import CHUNK_SIZE, digest_of
from tensorswarm.store.errors import BadInput
from tensorswarm.store.manifest import ManifestBuilder, ObjectRef

# Where objects lie.


def test_objects_are_located_at_their_first_place() -> None:
    header, first, second = (
        ObjectRef(digest_of(text), len(text), b"") for text in (b"head", b"first", b"second")
    )
    builder = ManifestBuilder()
    builder.add_file("b.bin", "verbatim", [second, first], [])
    builder.add_file("a.bin", "verbatim", [header, first, header], [])
    manifest = builder.build()
    places = locate_objects(manifest)
    at = {manifest.objects[index].digest: place for index, place in places.items()}
    assert at == {
        header.digest: FileRange("a.bin", 13, 0),
        first.digest: FileRange("a.bin", 13, 4),
        second.digest: FileRange("b.bin", 11, 0),
    }


def test_object_in_no_file_has_no_place() -> None:
    ref = SimpleNamespace(size_bytes=5)
    entry = SimpleNamespace(path="a", size_bytes=5, parts=(1,))
    manifest: Any = SimpleNamespace(objects=(ref, ref), files=(entry,))
    assert locate_objects(manifest) == {1: FileRange("a", 5, 0)}


def cut_object(cuts: list[int], size_bytes: int, kept: list[int]) -> Any:
    """Return a manifest whose object 0 lies in files of its slices, some of them left out."""
    bounds = [0, *cuts, size_bytes]
    recipes = [
        SimpleNamespace(kind="slice", parameters=(a,), size_bytes=b - a, inputs=(0,))
        for a, b in itertools.pairwise(bounds)
    ]
    files = [
        SimpleNamespace(path=f"f{i}", size_bytes=recipes[i].size_bytes, parts=(1 + i,))
        for i in kept
    ]
    objects = (SimpleNamespace(size_bytes=size_bytes),)
    return SimpleNamespace(objects=objects, files=files, recipes=recipes)


def test_object_that_was_cut_is_located_in_all_its_files() -> None:
    runs = ((FileRange("f0", 10, 0), 10), (FileRange("f1", 5, 0), 5), (FileRange("f2", 7, 0), 7))
    assert locate_objects(cut_object([10, 15], 22, [2, 0, 1])) == {0: JoinedRanges(runs)}
    assert locate_objects(cut_object([10, 15], 22, [0, 2])) == {}


@given(st.lists(st.integers(1, 3 * CHUNK_SIZE), min_size=1, max_size=6), st.integers(0, CHUNK_SIZE))
def test_pieces_of_a_cut_object_are_all_of_it_in_order(sizes: list[int], before: int) -> None:
    runs = tuple((FileRange(f"f{i}", before + size, before), size) for i, size in enumerate(sizes))
    total = sum(sizes)
    pieces = list(pieces_of_span(Span(3, 0, -(-total // CHUNK_SIZE)), JoinedRanges(runs), total))
    position = 0
    for piece in pieces:
        assert piece.chunk * CHUNK_SIZE + piece.at == position
        run = int(piece.place.path[1:])
        assert before <= piece.offset < piece.stop <= before + sizes[run]
        assert position == sum(sizes[:run]) + piece.offset - before
        chunk_bytes = min(CHUNK_SIZE, total - piece.chunk * CHUNK_SIZE)
        assert piece.at + piece.length + piece.rest == chunk_bytes
        position += piece.length
    assert position == total
    inside = [piece for piece in pieces if not piece.is_part]
    given_whole = [
        piece
        for run, _ in runs
        for piece in pieces_of_file(run.path, {3: JoinedRanges(runs)}, {3: total})
    ]
    assert given_whole == inside


def test_pieces_of_span_are_chunks_with_a_short_last_one() -> None:
    place = FileRange("f", 10 * CHUNK_SIZE, 7)
    pieces = list(pieces_of_span(Span(4, 1, 2), place, 2 * CHUNK_SIZE + 9))
    assert [(piece.chunk, piece.offset, piece.length) for piece in pieces] == [
        (1, 7 + CHUNK_SIZE, CHUNK_SIZE),
        (2, 7 + 2 * CHUNK_SIZE, 9),
    ]


@pytest.mark.parametrize("span", [Span(0, 0, 0), Span(0, -1, 1), Span(0, 2, 2), Span(0, 3, 1)])
def test_span_outside_its_object_is_refused(span: Span) -> None:
    with pytest.raises(BadInput):
        list(pieces_of_span(span, FileRange("f", 3 * CHUNK_SIZE, 0), 3 * CHUNK_SIZE))


@given(st.lists(st.integers(0, 3 * CHUNK_SIZE), max_size=8), st.integers(1, 6))
def test_runs_cover_a_file_without_gaps(sizes: list[int], max_chunks: int) -> None:
    offsets = [0, *itertools.accumulate(sizes)]
    places = {i: FileRange("f", sum(sizes), offset) for i, offset in enumerate(offsets[:-1])}
    run: list[Any] = []
    position = 0
    for piece in pieces_of_file("f", places, dict(enumerate(sizes))):
        if not continues_run(run, piece, max_chunks * CHUNK_SIZE):
            # A run ends only when the next piece would make it too long.
            assert piece.stop - run[0].offset > max_chunks * CHUNK_SIZE
            run = []
        run.append(piece)
        assert run[-1].stop - run[0].offset <= max_chunks * CHUNK_SIZE
        assert piece.offset == position
        position = piece.stop
    assert position == sum(sizes)


def test_run_does_not_go_over_a_gap_or_into_another_file() -> None:
    first, second, third = pieces_of_span(
        Span(0, 0, 3), FileRange("f", 3 * CHUNK_SIZE, 0), 3 * CHUNK_SIZE
    )
    assert continues_run([], third)
    assert continues_run([first], second)
    assert not continues_run([first], third)
    elsewhere = second._replace(place=second.place._replace(path="g"))
    assert not continues_run([first], elsewhere)


# URLs.


@pytest.mark.parametrize(
    ("origin", "path", "url"),
    [
        ("http://h/x/", "a b/m.bin", "http://h/x/a%20b/m.bin"),
        ("http://h", "m.bin", "http://h/m.bin"),
        ("http://h/x", "m.bin", "http://h/x/m.bin"),
        ("http://h/x/m.bin", "m.bin", "http://h/x/m.bin"),
        ("http://h/x/m.bin", "other.json", "http://h/x/other.json"),
        ("http://h/m.bin", "a b/m.bin", "http://h/a%20b/m.bin"),
        ("http://h/x/a%20b/n.bin", "m.bin", "http://h/x/m.bin"),
        ("http://h/x/n.bin", "m.bin", "http://h/x/m.bin"),
        ("http://h/x/m.bin/", "m.bin", "http://h/x/m.bin/m.bin"),
        ("https://u:p@h:81/x/?download=true", "m.bin", "https://u:p@h:81/x/m.bin?download=true"),
        ("https://h/x/m.bin?sig=a%2Fb#top", "other.json", "https://h/x/other.json?sig=a%2Fb"),
        ("http://[::1]:8/", "50%+é?#.bin", "http://[::1]:8/50%25%2B%C3%A9%3F%23.bin"),
    ],
)
def test_file_url(origin: str, path: str, url: str) -> None:
    paths = ["m.bin", "other.json", "a b/m.bin", "a b/n.bin", "50%+é?#.bin"]
    assert file_url(origin, path, paths) == url


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), min_size=1),
        min_size=1,
        max_size=4,
    ).filter(lambda names: not {".", ".."} & set(names)),
    st.sampled_from(["http://h/deep/er/", "http://h", "https://u@h:1/x?y=z"]),
)
def test_file_url_round_trip(names: list[str], origin: str) -> None:
    path = "/".join(names)
    url = file_url(origin, path, [])
    check_origin_url(url) if len(url) <= MAX_ORIGIN_URL else None
    parts = urlsplit(url)
    assert parts.netloc == urlsplit(origin).netloc
    assert parts.query == urlsplit(origin).query
    folder = urlsplit(origin).path.rstrip("/") + "/"
    assert [unquote(name) for name in parts.path.removeprefix(folder).split("/")] == names
    # An origin that names a file of the model gives the same URLs as the folder.
    assert file_url(url, path, [path]) == url


@pytest.mark.parametrize("path", ["", "/m", "a//b", "../m", "a/./b", "a/"])
def test_file_url_refuses_paths_that_are_not_plain(path: str) -> None:
    with pytest.raises(BadInput):
        file_url("http://h/", path, [])


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h/x",
        "ftp://h/x",
        "file:///etc/passwd",
        "http://",
        "http:///x",
        "http://:80/",
        "http://h:0/",
        "http://h:99999/",
        "http://h:p/",
        "http://[::1/",
        "http://h/a b",
        "http://h/\r\nX: y",
        "http://h/\x00",
        "http://h\\@evil/",
        "http://h/" + "a" * MAX_ORIGIN_URL,
    ],
)
def test_urls_that_cannot_be_origins(url: str) -> None:
    with pytest.raises(BadInput):
        check_origin_url(url)


def test_secrets_are_not_shown() -> None:
    assert display_url("https://me:secret@h:1/x/y?token=secret#z") == "https://h:1/x/y"
    with pytest.raises(BadInput) as caught:
        check_origin_url("ftp://me:secret@h/x?token=secret")
    assert "secret" not in str(caught.value)
    with pytest.raises(BadInput) as caught:
        check_origin_url("http://me:secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bytes 0-0/1", ContentRange(0, 1, 1)),
        ("bytes 5-9/10", ContentRange(5, 10, 10)),
        ("bytes 5-9/*", None),
        ("bytes */10", None),
        ("bytes 5-10/10", None),
        ("bytes 9-5/10", None),
        ("items 5-9/10", None),
        ("bytes -5-9/10", None),
        ("bytes 5-9/10, 11-12/20", None),
        ("bytes ٥-9/10", None),
        ("", None),
    ],
)
def test_content_range(text: str, expected: ContentRange | None) -> None:
    assert parse_content_range(text) == expected


NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        ("Wed, 01 May 2024 12:00:30 GMT", 30.0),
        ("Wed, 01 May 2024 11:00:00 GMT", 0.0),
        ("-1", None),
        ("1.5", None),
        ("٣", None),
        ("1" * 10, None),
        ("soon", None),
        ("", None),
        ("Wed, 01 May 2024 12:00:30 -0000", None),
    ],
)
def test_retry_after(text: str, seconds: float | None) -> None:
    assert parse_retry_after(text, NOON) == seconds


@given(
    st.text(max_size=80)
    | st.from_regex(r"[A-Z][a-z]{2}, \d{1,3} [A-Z][a-z]{2} \d{1,9} [\d:]{1,12} [+\-\dA-Z]{0,9}")
)
def test_retry_after_of_any_text(text: str) -> None:
    seconds = parse_retry_after(text, NOON)
    assert seconds is None or 0 <= seconds < timedelta(days=365 * 10_000).total_seconds()
