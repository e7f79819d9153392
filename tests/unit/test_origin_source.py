"""HTTP origins: what comes of a request, at good servers, bad ones and slow ones."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorswarm.p2p.origins.guard import Guard
from tensorswarm.p2p.origins.origin import FileRange, JoinedRanges
from tensorswarm.p2p.origins.source import MAX_QUEUED_REQUESTS, OriginSource
from tensorswarm.p2p.swarm.source import Failure, Outcome, Request, Span
from tensorswarm.store.digest import CHUNK_SIZE, chunk_count, chunk_length
from tensorswarm.store.errors import BadInput, LocalError, NoRoom
from tests.support import http_origin as faults
from tests.support import origin_world
from tests.support.origin_world import (
    BIAS,
    EVERYTHING,
    HEAD,
    HEADER,
    IN_MODEL,
    MODEL,
    NORM,
    OBJECTS,
    OTHER,
    WAIT_S,
    WEIGHTS,
    Chunk,
    World,
)

OTHER_SIZE = faults.headers(Content_Range="bytes 66-1048641/9999999")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    world = World(tmp_path / "origin")
    yield world
    world.close()


# A server that does what it should.


def test_everything_comes_and_is_reported(world: World) -> None:
    assert world.ask(world.source(connections=1), EVERYTHING).failure is None
    assert world.has(WEIGHTS, BIAS, NORM, OTHER)
    assert world.log.chunks == [
        Chunk(1, index, chunk, Outcome.PROVED, chunk_length(len(data), chunk))
        for index, data in enumerate(OBJECTS)
        for chunk in range(chunk_count(len(data)))
    ]
    assert world.log.byte_count == sum(map(len, OBJECTS))


def test_adjacent_chunks_are_one_request(world: World) -> None:
    world.ask(world.source(), EVERYTHING)
    start, stop = len(HEADER), len(MODEL)
    assert [(seen.path, seen.range) for seen in world.server.seen] == [
        ("model.bin", f"bytes={start}-{stop - 1}"),
        ("sub/other.bin", f"bytes=0-{len(OBJECTS[OTHER]) - 1}"),
    ]
    assert {seen.headers["accept-encoding"] for seen in world.server.seen} == {"identity"}


def test_chunk_that_is_not_missing_is_answered_without_asking(world: World) -> None:
    world.sink.unwanted.add((WEIGHTS, 1))
    assert world.ask(world.source(connections=1), EVERYTHING[:1]).failure is None
    assert Chunk(1, WEIGHTS, 1, Outcome.DUPLICATE, 0) in world.log.chunks
    assert len(world.log.chunks) == 3
    assert world.gets("model.bin") == 2
    assert world.log.byte_count == len(OBJECTS[WEIGHTS]) - CHUNK_SIZE


def test_connection_is_kept_between_requests(world: World) -> None:
    world.server.fault("sub/other.bin", faults.status(404))
    source = world.source(connections=1)
    for spans in (IN_MODEL, EVERYTHING[OTHER:], HEAD):
        world.ask(source, spans)
    assert world.server.connections_accepted == 1


@pytest.mark.parametrize("fault", [faults.status(404), faults.status(416), OTHER_SIZE])
def test_a_file_that_is_not_there_is_asked_for_once(world: World, fault: faults.Fault) -> None:
    world.server.fault("model.bin", fault)
    source = world.source(connections=1)
    for spans in (HEAD, IN_MODEL, IN_MODEL):
        end = world.ask(source, spans)
        assert end.failure is Failure.LACKS and end.detail.startswith("model.bin: ")
    assert world.gets("model.bin") == 1
    assert world.ask(source, EVERYTHING[OTHER:]).failure is None


def test_threads_share_the_queue(world: World) -> None:
    release = threading.Event()
    world.server.fault("model.bin", faults.wait_for(release))
    source = world.source(connections=2)
    slow = world.submit(source, HEAD)
    assert world.ask(source, EVERYTHING[OTHER:]).failure is None
    release.set()
    assert world.log.end(slow).failure is None


def test_object_outside_all_files_is_lacking(world: World) -> None:
    source = OriginSource("o", {}, {}, world.sink, world.log)
    assert world.ask(source, HEAD).failure is Failure.LACKS
    source.close()
    assert not world.server.seen


# An object that lies in two files, as TensorFlow.js cuts them.


def cut_source(world: World, monkeypatch: pytest.MonkeyPatch) -> OriginSource:
    """Return a source of WEIGHTS, its second chunk half in one file and half in another."""
    cut = CHUNK_SIZE + 5000
    (world.folder / "1.bin").write_bytes(b"before" + OBJECTS[WEIGHTS][:cut])
    (world.folder / "2.bin").write_bytes(OBJECTS[WEIGHTS][cut:])
    rest = len(OBJECTS[WEIGHTS]) - cut
    runs = ((FileRange("1.bin", 6 + cut, 6), cut), (FileRange("2.bin", rest, 0), rest))
    monkeypatch.setattr(origin_world, "PLACES", {WEIGHTS: JoinedRanges(runs)})
    monkeypatch.setattr(origin_world, "PATHS", ["1.bin", "2.bin"])
    return world.source(connections=1)


def test_cut_object_is_put_together(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cut_source(world, monkeypatch)
    assert world.ask(source, EVERYTHING[:1]).failure is None
    assert world.has(WEIGHTS)
    assert [chunk[1:] for chunk in world.log.chunks] == [
        (WEIGHTS, chunk, Outcome.PROVED, chunk_length(len(OBJECTS[WEIGHTS]), chunk))
        for chunk in range(3)
    ]
    assert (world.gets("1.bin"), world.gets("2.bin")) == (1, 1)


def test_halves_of_a_chunk_that_came_elsewhere_are_answered_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cut_source(world, monkeypatch)
    world.sink.unwanted.add((WEIGHTS, 1))
    assert world.ask(source, EVERYTHING[:1]).failure is None
    outcomes = [(chunk.chunk, chunk.outcome) for chunk in world.log.chunks]
    assert outcomes == [(0, Outcome.PROVED), (1, Outcome.DUPLICATE), (2, Outcome.PROVED)]


def test_cut_object_when_half_of_it_is_not_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cut_source(world, monkeypatch)
    world.server.fault("1.bin", faults.status(404))
    assert world.ask(source, EVERYTHING[:1]).failure is Failure.LACKS
    assert [chunk.chunk for chunk in world.log.chunks] == [2]
    assert world.log.chunks[0].outcome is Outcome.PROVED


def test_cut_object_from_files_that_are_given_whole(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cut_source(world, monkeypatch)
    world.server.fault("1.bin", faults.ignore_range)
    world.server.fault("2.bin", faults.ignore_range)
    end = world.ask(source, EVERYTHING[:1])
    assert end.failure is Failure.LACKS
    assert {chunk.chunk for chunk in world.log.chunks} == {0, 2}


# Refusals, and answers that do not fit.

FAULTS: list[tuple[faults.Fault, Failure, str]] = [
    (faults.status(404), Failure.LACKS, "not there"),
    (faults.status(410), Failure.LACKS, "not there"),
    (faults.status(401), Failure.REFUSED_ACCESS, "401"),
    (faults.status(403), Failure.REFUSED_ACCESS, "403"),
    (faults.status(416), Failure.LACKS, "the file there has another size"),
    (faults.status(500), Failure.STALLED, "busy (500)"),
    (faults.status(503, Retry_After="3600"), Failure.STALLED, "asks to wait 3600 s"),
    (faults.status(429, Retry_After="soon"), Failure.STALLED, "busy (429)"),
    (faults.status(204), Failure.PROTOCOL, "answered 204"),
    (faults.status(304), Failure.PROTOCOL, "answered 304"),
    (faults.status(400), Failure.PROTOCOL, "answered 400"),
    (faults.shift_range, Failure.PROTOCOL, "another range"),
    (faults.headers(Content_Range=None), Failure.PROTOCOL, "another range"),
    (faults.headers(Content_Range="bytes 66-1048641/*"), Failure.PROTOCOL, "another range"),
    (OTHER_SIZE, Failure.LACKS, "the file there has another size"),
    (
        faults.both(faults.ignore_range, faults.headers(Content_Length="5")),
        Failure.LACKS,
        "the file there has another size",
    ),
    (faults.headers(Content_Length="1048577"), Failure.PROTOCOL, "another length"),
    (faults.append(b"x"), Failure.PROTOCOL, "more bytes"),
    (faults.cut_after(1000), Failure.CLOSED, ""),
    (faults.cut_after(0), Failure.CLOSED, ""),
    (
        faults.both(faults.cut_after(1000), faults.headers(Content_Length=None)),
        Failure.CLOSED,
        "too early",
    ),
    (faults.close, Failure.CLOSED, ""),
    (faults.compress, Failure.PROTOCOL, "encoded"),
    (faults.change_bytes(100), Failure.BAD_BYTES, "model.bin"),
    (faults.redirect("/model.bin"), Failure.PROTOCOL, "redirects"),
    (faults.redirect("file:///etc/passwd"), Failure.PROTOCOL, "astray"),
    (faults.redirect("http://127.0.0.1:99999/"), Failure.PROTOCOL, "astray"),
    (faults.redirect("http://127.0.0.1/" + "a" * 5000), Failure.PROTOCOL, "astray"),
    (faults.raw(b"SSH-2.0-OpenSSH\r\n\r\n"), Failure.PROTOCOL, ""),
    (faults.raw(b"HTTP/1.1 206 OK\r\nContent-Length: -1\r\n\r\n"), Failure.PROTOCOL, ""),
    (
        faults.raw(
            b"HTTP/1.1 206 OK\r\nContent-Range: bytes 66-1048641/3146894\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
        ),
        Failure.PROTOCOL,
        "",
    ),
    (faults.endless_header(), Failure.PROTOCOL, ""),
]


@pytest.mark.parametrize(("fault", "failure", "detail"), FAULTS)
def test_fault_is_told_apart(
    world: World, fault: faults.Fault, failure: Failure, detail: str
) -> None:
    assert len(MODEL) == 3146894 and len(HEADER) == 66  # as some of the faults have it
    world.server.fault("model.bin", fault)
    source = world.source(connections=1)
    end = world.ask(source, HEAD)
    assert (end.failure, detail in end.detail) == (failure, True), end
    proved = [entry for entry in world.log.chunks if entry.outcome is Outcome.PROVED]
    # Too many bytes are noticed when all that were asked for are here, and good.
    assert bool(proved) == ("more bytes" in detail)
    # The thread lives, and the origin's other files are none the worse.
    assert world.ask(source, EVERYTHING[OTHER:]).failure is None
    assert world.has(OTHER)


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        (faults.status(404), Failure.LACKS),
        (faults.status(403), Failure.REFUSED_ACCESS),
        (faults.change_bytes(100), Failure.BAD_BYTES),
    ],
)
def test_bad_file_does_not_block_the_others_in_a_request(
    world: World, fault: faults.Fault, failure: Failure
) -> None:
    world.server.fault("model.bin", fault)
    end = world.ask(world.source(), EVERYTHING)
    assert (end.failure, end.detail.split(":")[0]) == (failure, "model.bin")
    assert world.has(OTHER)
    assert world.gets("model.bin") == 1


def test_changed_file_gives_its_good_chunks_up_to_the_bad_one(world: World) -> None:
    world.server.fault("model.bin", faults.change_bytes(len(HEADER) + CHUNK_SIZE))
    end = world.ask(world.source(), IN_MODEL)
    assert (end.failure, "model.bin" in end.detail) == (Failure.BAD_BYTES, True)
    assert world.log.chunks == [
        Chunk(1, WEIGHTS, 0, Outcome.PROVED, CHUNK_SIZE),
        Chunk(1, WEIGHTS, 1, Outcome.REFUSED, CHUNK_SIZE),
    ]


def test_nobody_listens(world: World) -> None:
    world.server.stop()
    assert world.ask(world.source(), HEAD).failure is Failure.UNREACHABLE


def test_kept_connection_that_the_server_closed_is_opened_again(world: World) -> None:
    world.server.fault("model.bin", faults.close, None)
    assert world.ask(world.source(), HEAD).failure is None
    assert world.gets("model.bin") == 2


@pytest.mark.parametrize("error", [NoRoom("the disk is full"), OSError("the disk is gone")])
def test_trouble_of_our_own_is_not_the_origins(world: World, error: Exception) -> None:
    world.sink.error = error
    end = world.ask(world.source(), HEAD)
    assert end[1:] == (Failure.LOCAL, str(error))


def test_malformed_proxy_setting_is_reported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "gopher://proxy")
    world.submit(world.source(connections=1), HEAD)
    assert world.log.end(None).failure is Failure.LOCAL


# Slowness.


@pytest.mark.parametrize("fault", [faults.hang, faults.pause_at(1000), faults.pause_at(0)])
def test_silent_server_is_stalled(world: World, fault: faults.Fault) -> None:
    world.server.fault("model.bin", fault)
    assert world.ask(world.source(stall_timeout_s=0.1), HEAD).failure is Failure.STALLED


@pytest.mark.parametrize(
    "fault",
    [
        faults.trickle(0.01),
        faults.trickle(0.01, free_bytes=CHUNK_SIZE - 3000),
        faults.both(faults.ignore_range, faults.trickle(0.01)),
        faults.endless_header(0.01),
    ],
)
def test_trickle_has_a_deadline(world: World, fault: faults.Fault) -> None:
    world.server.fault("model.bin", fault)
    source = world.source(progress_timeout_s=0.2, connections=1)
    end = world.ask(source, HEAD)
    assert (end.failure, "too slow" in end.detail) == (Failure.STALLED, True)
    # A cut connection does not spoil the next one; a slow machine may need some tries.
    world.server.fault("model.bin")
    assert any(world.ask(source, EVERYTHING[BIAS : BIAS + 1]).failure is None for _ in range(50))


def test_body_of_an_error_is_not_waited_for(world: World) -> None:
    world.server.fault("model.bin", faults.status(404, Content_Length="9"))
    end = world.ask(world.source(progress_timeout_s=0.1), HEAD)
    assert end.failure is Failure.LACKS


def test_busy_server_is_left_alone_for_a_while(world: World) -> None:
    world.server.fault("model.bin", faults.status(503, Retry_After="3600"), None)
    source = world.source(max_pause_s=0.2)
    assert world.ask(source, HEAD).failure is Failure.STALLED
    assert world.ask(source, HEAD).failure is None
    first, second = world.server.seen
    assert second.at_s - first.at_s >= 0.2


# A server that ignores ranges.


@pytest.mark.parametrize("fault", [faults.ignore_range, faults.ignore_range_and_length])
def test_file_is_read_once_when_ranges_are_ignored(world: World, fault: faults.Fault) -> None:
    world.server.fault("model.bin", fault)
    source = world.source(connections=1)
    assert world.ask(source, (Span(WEIGHTS, 1, 1),)).failure is None
    # The one pass brought all that is wanted from the file, under the first request.
    assert world.has(WEIGHTS, BIAS, NORM)
    assert {entry.request_id for entry in world.log.chunks} == {1}
    assert {entry.outcome for entry in world.log.chunks} == {Outcome.PROVED}
    assert world.log.byte_count == len(MODEL)
    assert world.ask(source, IN_MODEL).failure is None
    assert world.log.chunks[-1] == Chunk(2, NORM, 0, Outcome.DUPLICATE, 0)
    assert world.gets("model.bin") == 1


def test_pass_stops_after_the_last_missing_chunk(world: World) -> None:
    world.sink.unwanted |= {(BIAS, 0), (NORM, 0)}
    world.server.fault("model.bin", faults.both(faults.ignore_range, faults.pause_at(3 << 20)))
    assert world.ask(world.source(), HEAD).failure is None
    assert world.has(WEIGHTS)


def test_requests_for_the_file_wait_for_the_pass_and_others_do_not(world: World) -> None:
    before_norm, to_end = threading.Event(), threading.Event()
    world.server.fault(
        "model.bin",
        faults.both(
            faults.ignore_range,
            faults.pause_at(CHUNK_SIZE + 1000, before_norm, len(MODEL) - 1000, to_end),
        ),
    )
    source = world.source(connections=2)
    first = world.submit(source, HEAD)
    world.log.wait_for_chunk(WEIGHTS, 0)
    behind = world.submit(source, HEAD)
    bias = world.submit(source, EVERYTHING[BIAS : BIAS + 1])
    norm = world.submit(source, EVERYTHING[NORM : NORM + 1])
    # The pass is held up, and takes one thread; three parked requests take none.
    assert world.ask(source, EVERYTHING[OTHER:]).failure is None
    assert not {first, bias, norm} & world.log.ended()
    before_norm.set()
    assert world.log.end(bias).failure is None  # as soon as the pass has gone by
    assert not {first, norm} & world.log.ended()
    to_end.set()
    assert [world.log.end(each).failure for each in (first, behind, norm)] == [None] * 3
    assert world.has(WEIGHTS, BIAS, NORM)
    assert world.gets("model.bin") == 1


def test_two_threads_that_find_ranges_ignored_at_once_make_one_pass(world: World) -> None:
    world.server.fault("model.bin", faults.rendezvous(2, faults.ignore_range))
    source = world.source(connections=2)
    ids = [world.submit(source, spans) for spans in (IN_MODEL[:1], IN_MODEL[2:])]
    assert [world.log.end(each).failure for each in ids] == [None, None]
    assert world.has(WEIGHTS, BIAS, NORM)
    proved = [entry for entry in world.log.chunks if entry.outcome is Outcome.PROVED]
    assert len(proved) == len({entry.request_id for entry in proved}) * 5


def test_second_pass_brings_the_rest_and_a_third_is_not_made(world: World) -> None:
    cut = faults.both(faults.ignore_range, faults.cut_after(CHUNK_SIZE + 1000))
    world.server.fault("model.bin", cut)
    source = world.source(connections=1)
    failures = [world.ask(source, IN_MODEL).failure for _ in range(4)]
    assert failures == [Failure.CLOSED, Failure.CLOSED, Failure.LACKS, Failure.LACKS]
    assert [seen.range is None for seen in world.server.seen] == [False, True]
    assert [entry[1:] for entry in world.log.chunks if entry.byte_count] == [
        (WEIGHTS, 0, Outcome.PROVED, CHUNK_SIZE)
    ]


def test_pass_that_never_began_is_not_counted(world: World) -> None:
    busy = faults.status(503)
    cut = faults.both(faults.ignore_range, faults.cut_after(1000))
    world.server.fault("model.bin", cut, busy, busy, busy, faults.ignore_range)
    source = world.source(connections=1)
    failures = [world.ask(source, IN_MODEL).failure for _ in range(5)]
    assert failures == [Failure.CLOSED, *[Failure.STALLED] * 3, None]


def test_bad_chunk_ends_a_pass_and_frees_those_who_wait(world: World) -> None:
    go_on = threading.Event()
    bad = faults.both(faults.ignore_range, faults.change_bytes(len(HEADER) + CHUNK_SIZE))
    held = faults.both(bad, faults.pause_at(CHUNK_SIZE + 1000, go_on))
    world.server.fault("model.bin", held, faults.ignore_range)
    source = world.source(connections=2)
    first = world.submit(source, IN_MODEL[:1])
    world.log.wait_for_chunk(WEIGHTS, 0)
    second = world.submit(source, IN_MODEL[2:])
    go_on.set()
    assert world.log.end(first).failure is Failure.BAD_BYTES
    assert world.log.end(second).failure is None
    assert world.has(WEIGHTS, BIAS, NORM)


# Deadlines.


def test_missed_deadline_ends_a_read() -> None:
    guard = Guard()
    watch = guard.watch()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watch.add(ours)
        with watch.deadline(0.05):
            assert ours.recv(1) == b""
        assert watch.is_cut
    guard.close()


def test_socket_that_comes_after_the_cut_is_cut_too() -> None:
    guard = Guard()
    watch = guard.watch()
    watch.cut()
    for wanted in (b"", b"x"):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            watch.add(ours)
            with contextlib.suppress(BrokenPipeError):
                theirs.send(b"x")
            assert ours.recv(1) == wanted
        watch.renew()
    guard.close()


def test_closed_guard_cuts_for_good() -> None:
    guard = Guard()
    watch = guard.watch()
    guard.close()
    late = guard.watch()
    for each in (watch, late):
        each.renew()
        assert each.is_cut


# Cancelling and closing.


def test_cancelled_request_is_skipped(world: World) -> None:
    release = threading.Event()
    world.server.fault("model.bin", faults.wait_for(release))
    source = world.source(connections=1)
    first = world.submit(source, HEAD)
    second = world.submit(source, EVERYTHING[OTHER:])
    third = world.submit(source, EVERYTHING[BIAS : BIAS + 1])
    source.cancel(second)
    source.cancel(999)
    release.set()
    assert world.log.end(third).failure is None
    assert world.log.ended() == {first, third}
    assert world.gets("sub/other.bin") == 0


def test_cancel_stops_a_request_at_the_next_chunk(world: World) -> None:
    release = threading.Event()
    world.server.fault("model.bin", faults.pause_at(CHUNK_SIZE + 1000, release))
    source = world.source(connections=1)
    first = world.submit(source, IN_MODEL)
    world.log.wait_for_chunk(WEIGHTS, 0)
    source.cancel(first)
    release.set()
    assert world.ask(source, EVERYTHING[OTHER:]).failure is None
    assert first not in world.log.ended()
    assert not world.has(NORM)


def test_cancel_of_a_parked_request(world: World) -> None:
    release = threading.Event()
    pause = faults.both(faults.ignore_range, faults.pause_at(CHUNK_SIZE + 1000, release))
    world.server.fault("model.bin", pause)
    source = world.source(connections=2)
    first = world.submit(source, HEAD)
    world.log.wait_for_chunk(WEIGHTS, 0)
    parked = world.submit(source, IN_MODEL[2:])
    # The queue is first in, first out, so when this is done the other is parked.
    assert world.ask(source, EVERYTHING[OTHER:]).failure is None
    source.cancel(parked)
    assert parked not in world.log.ended()
    source.submit(Request("origin", parked, IN_MODEL[2:]))  # its place is free at once
    release.set()
    assert world.log.end(first).failure is None
    assert world.log.end(parked).failure is None


@pytest.mark.parametrize(
    "fault",
    [faults.hang, faults.pause_at(1000), faults.both(faults.ignore_range, faults.pause_at(99))],
)
def test_close_stops_a_thread_that_is_reading(world: World, fault: faults.Fault) -> None:
    asked = threading.Event()
    world.server.fault("model.bin", faults.both(faults.tell(asked), fault))
    source = world.source()
    request_id = world.submit(source, HEAD)
    assert asked.wait(WAIT_S)
    source.close()
    assert source.join(WAIT_S / 2)  # far sooner than the time-outs
    source.submit(Request("origin", 77, HEAD))  # too late, and no harm
    assert not {request_id, 77, None} & world.log.ended()
    assert not world.log.chunks


def test_queue_is_bounded(world: World) -> None:
    world.server.fault("model.bin", faults.hang)
    source = world.source(connections=1)
    for _ in range(MAX_QUEUED_REQUESTS):
        world.submit(source, HEAD)
    with pytest.raises(LocalError):
        world.submit(source, HEAD)


def test_request_id_in_use_is_refused(world: World) -> None:
    world.server.fault("model.bin", faults.hang)
    source = world.source(connections=1)
    request_id = world.submit(source, HEAD)
    with pytest.raises(BadInput):
        source.submit(Request("origin", request_id, HEAD))
