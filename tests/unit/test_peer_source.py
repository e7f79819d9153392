"""A peer as a source, on real sockets: what it brings, and what peers may do to it."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable

import pytest

from tensorswarm.p2p.bulk.peer_source import (
    MAX_CUTS_IN_VAIN,
    MAX_QUEUED_REQUESTS,
    MAX_RANGES_AHEAD,
    PeerSource,
    TooManyRequests,
)
from tensorswarm.p2p.bulk.server import BulkServer
from tensorswarm.p2p.swarm.source import Failure, Outcome, Request, Span
from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.errors import NoRoom
from tests.support.bulk_fakes import (
    WAIT_S,
    MemoryShelf,
    MemorySink,
    RecordingReport,
    ScriptedConnection,
    ScriptedPeer,
    bulk_server,
    content_head,
    identity,
    make_object,
    scripted_peer,
)

SERVER = identity(100).peer_id
OBJECT = make_object(3 * CHUNK_SIZE + 12_345)
SMALL = make_object(1000, seed=1)
STALL_S = 0.2


def source_of(
    server: BulkServer | ScriptedPeer,
    sink: MemorySink,
    report: RecordingReport,
    **options: float,
) -> PeerSource:
    peer_id = SERVER if isinstance(server, BulkServer) else server.identity.peer_id
    return PeerSource(peer_id, [server.address], identity(1), sink, report, **options)  # type: ignore[arg-type]


def request(number: int, *spans: tuple[int, int, int]) -> Request:
    return Request("peer", number, tuple(Span(*span) for span in spans))


def end(source: PeerSource) -> None:
    source.close()
    assert source.join(WAIT_S)


# --- the source: what goes well ------------------------------------------------------


def test_a_source_brings_everything_and_reports_it() -> None:
    smalls = [make_object(4096, seed) for seed in range(300)]
    sink, report = MemorySink(OBJECT, *smalls), RecordingReport()
    with bulk_server(MemoryShelf(OBJECT, *smalls)) as server:
        source = source_of(server, sink, report)
        source.submit(request(1, (0, 0, 2)))
        source.submit(request(2, *[(number, 0, 1) for number in range(1, 301)]))
        source.submit(request(3, (0, 2, 2)))
        report.wait_done(1, 2, 3)
        end(source)
    for index, each in enumerate(sink.objects):
        assert sink.data_of(index) == each.data
    assert report.finished == [1, 2, 3]
    assert {outcome for *_, outcome, _ in report.chunks} == {Outcome.PROVED}
    assert [key[:3] for key in report.chunks[:2]] == [(1, 0, 0), (1, 0, 1)]
    total = sum(len(each.data) for each in sink.objects)
    assert sum(count for _, count in report.progressed) == total
    assert sum(count for *_, count in report.chunks) == total
    assert max(count for _, count in report.progressed) <= 256 << 10


def test_chunks_no_longer_missing_are_not_asked_for() -> None:
    sink, report = MemorySink(OBJECT, SMALL), RecordingReport()
    sink.unwanted = {(0, 1), (1, 0)}
    with bulk_server(MemoryShelf(OBJECT, SMALL)) as server:
        source = source_of(server, sink, report)
        source.submit(request(1, (0, 0, 4), (1, 0, 1)))
        report.wait_done(1)
        end(source)
        assert server.statistics().bytes_sent == len(OBJECT.data) - CHUNK_SIZE
    assert sorted(sink.kept) == [(0, 0), (0, 2), (0, 3)]


def test_a_cancelled_request_is_not_begun_but_is_done() -> None:
    shelf, sink, report = MemoryShelf(OBJECT, SMALL), MemorySink(OBJECT, SMALL), RecordingReport()
    cancelled = threading.Event()
    shelf.before_open = lambda: cancelled.wait(WAIT_S)
    with bulk_server(shelf) as server:
        source = source_of(server, sink, report, pipeline_depth=1)
        source.submit(request(1, (0, 0, 1)))
        source.submit(request(2, (1, 0, 1)))
        source.cancel(2)
        source.cancel(77)  # unknown: nothing happens
        cancelled.set()
        report.wait_done(1, 2)
        end(source)
    assert sorted(sink.kept) == [(0, 0)]


def test_two_connections_work_at_the_same_time() -> None:
    shelf, sink, report = MemoryShelf(OBJECT, SMALL), MemorySink(OBJECT, SMALL), RecordingReport()
    meeting = threading.Barrier(2, timeout=WAIT_S)
    shelf.before_open = meeting.wait  # nobody passes alone
    with bulk_server(shelf) as server:
        source = source_of(server, sink, report, connections=2)
        source.submit(request(1, (0, 0, 4)))
        source.submit(request(2, (1, 0, 1)))
        report.wait_done(1, 2)
        end(source)


def test_the_next_address_is_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = closed.getsockname()
    sink, report = MemorySink(SMALL), RecordingReport()
    with bulk_server(MemoryShelf(SMALL)) as server, scripted_peer(ScriptedConnection.hold) as other:
        source = PeerSource(
            SERVER, [dead, other.address, server.address], identity(1), sink, report
        )
        source.submit(request(1, (0, 0, 1)))
        report.wait_done(1)
        end(source)


def test_an_idle_connection_is_given_back_and_made_again() -> None:
    shelf, sink, report = MemoryShelf(OBJECT, SMALL), MemorySink(OBJECT, SMALL), RecordingReport()
    with bulk_server(shelf) as server:
        source = source_of(server, sink, report, idle_close_s=0.05)
        source.submit(request(1, (0, 0, 4)))
        report.wait_done(1)
        assert shelf.reader_closed.wait(WAIT_S)  # the server has seen the end
        source.submit(request(2, (1, 0, 1)))
        report.wait_done(2)
        end(source)
        assert server.statistics().accepted == 2


def test_the_queue_is_bounded_and_ends_with_the_source() -> None:
    shelf, sink, report = MemoryShelf(SMALL), MemorySink(SMALL), RecordingReport()
    closed = threading.Event()
    shelf.before_open = lambda: closed.wait(WAIT_S)
    with bulk_server(shelf) as server:
        source = source_of(server, sink, report)
        with pytest.raises(TooManyRequests):
            for number in range(MAX_QUEUED_REQUESTS + 100):
                source.submit(request(number, (0, 0, 1)))
        source.close()
        closed.set()
        assert source.join(WAIT_S)
        source.submit(request(1, (0, 0, 1)))  # ignored
        source.close()
    assert (report.finished, report.failures, report.chunks) == ([], [], [])


# --- the source: what goes wrong -----------------------------------------------------


def test_lacking_bytes_fail_their_request_only() -> None:
    shelf, sink, report = MemoryShelf(OBJECT, SMALL), MemorySink(OBJECT, SMALL), RecordingReport()
    shelf.proved[OBJECT.digest] = frozenset({0, 3})
    sink.unwanted = {(0, 1)}  # so that three ranges are asked for
    with bulk_server(shelf) as server:
        source = source_of(server, sink, report)
        source.submit(request(1, (0, 0, 4)))
        source.submit(request(2, (1, 0, 1)))
        report.wait_for(lambda: report.finished == [2] and len(report.failures) == 1)
        end(source)
    assert report.failures[0][:2] == (1, Failure.LACKS)
    assert "does not have bytes 2097152-" in report.failures[0][2]
    assert sorted(sink.kept) == [(0, 0), (1, 0)]


def test_what_a_peer_lacks_does_not_keep_the_rest_of_a_request_away() -> None:
    smalls = [make_object(10, seed) for seed in range(2 * MAX_RANGES_AHEAD)]
    sink, report = MemorySink(*smalls), RecordingReport()
    with bulk_server(MemoryShelf(*smalls[1:])) as server:
        source = source_of(server, sink, report)
        source.submit(request(1, *[(number, 0, 1) for number in range(len(smalls))]))
        assert report.wait_failure()[:2] == (1, Failure.LACKS)
        end(source)
    assert len(sink.kept) == len(smalls) - 1


def test_altered_bytes_end_the_source() -> None:
    altered = OBJECT._replace(data=OBJECT.data[:-1] + bytes([OBJECT.data[-1] ^ 1]))
    sink, report = MemorySink(OBJECT), RecordingReport()
    with bulk_server(MemoryShelf(altered)) as server:
        source = source_of(server, sink, report)
        source.submit(request(1, (0, 0, 4)))
        number, failure, detail = report.wait_failure()
        assert source.join(WAIT_S)
    assert (number, failure) == (None, Failure.BAD_BYTES)
    assert "chunk 3 of object" in detail
    assert report.chunks[-1] == (1, 0, 3, Outcome.REFUSED, 12_345)
    assert sorted(sink.kept) == [(0, 0), (0, 1), (0, 2)]
    assert report.finished == []


def test_refused_access_ends_the_source() -> None:
    sink, report = MemorySink(SMALL), RecordingReport()
    with bulk_server(MemoryShelf(SMALL), lambda peer_id: False) as server:
        source = source_of(server, sink, report)
        source.submit(request(1, (0, 0, 1)))
        assert report.wait_failure()[:2] == (None, Failure.REFUSED_ACCESS)
        assert source.join(WAIT_S)


@pytest.mark.parametrize(
    "fault", [NoRoom("the disk is full"), OSError(errno.EIO, "broken"), RuntimeError("a mistake")]
)
def test_a_fault_of_ours_ends_the_source(fault: Exception) -> None:
    sink, report = MemorySink(SMALL), RecordingReport()
    sink.fault = fault
    with bulk_server(MemoryShelf(SMALL)) as server:
        source = source_of(server, sink, report)
        source.submit(request(1, (0, 0, 1)))
        number, failure, detail = report.wait_failure()
        assert source.join(WAIT_S)
    assert (number, failure) == (None, Failure.LOCAL)
    assert str(fault) in detail


def test_nobody_there_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = closed.getsockname()
    for addresses in ([dead], []):
        report = RecordingReport()
        source = PeerSource(SERVER, addresses, identity(1), MemorySink(SMALL), report)
        source.submit(request(1, (0, 0, 1)))
        assert report.wait_failure()[:2] == (None, Failure.UNREACHABLE)
        assert source.join(WAIT_S)


def right_answer(connection: ScriptedConnection) -> None:
    connection.read_request()
    connection.send(content_head(0, 999, 1000) + SMALL.data)


def one_byte_then_silence(connection: ScriptedConnection) -> None:
    connection.read_request()
    connection.send(content_head(0, 999, 1000) + SMALL.data[:1])
    connection.hold()


def half_a_head_then_silence(connection: ScriptedConnection) -> None:
    connection.read_request()
    connection.send(content_head(0, 999, 1000)[:30])
    connection.hold()


def too_few_bytes(connection: ScriptedConnection) -> None:
    connection.read_request()
    connection.send(content_head(0, 999, 1000) + SMALL.data[:990])


def too_many_bytes(connection: ScriptedConnection) -> None:
    connection.read_request()
    connection.send(content_head(0, 999, 1000) + SMALL.data + b"more\r\n\r\n")
    connection.hold()


def endless_head(connection: ScriptedConnection) -> None:
    connection.read_request()
    connection.send(b"HTTP/1.1 206 Partial Content\r\n")
    while True:
        connection.send(b"X-Filler: " + b"x" * 1000 + b"\r\n")


def wrong_range(connection: ScriptedConnection) -> None:
    connection.read_request()
    connection.send(content_head(1, 1000, 1001) + SMALL.data)
    connection.hold()


def wrong_length(connection: ScriptedConnection) -> None:
    connection.read_request()
    connection.send(content_head(0, 999, 1000, length=2000) + SMALL.data * 2)
    connection.hold()


def encoded(connection: ScriptedConnection) -> None:
    connection.read_request()
    connection.send(content_head(0, 999, 1000, "Content-Encoding: gzip") + SMALL.data)
    connection.hold()


def chunked(connection: ScriptedConnection) -> None:
    connection.read_request()
    connection.send(
        b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-999/1000\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n" + SMALL.data + b"\r\n0\r\n\r\n"
    )
    connection.hold()


def no_http(connection: ScriptedConnection) -> None:
    connection.read_request()
    connection.send(b"\x00\x00\r\n\r\n")
    connection.hold()


@pytest.mark.parametrize(
    ("script", "failure", "detail"),
    [
        (one_byte_then_silence, Failure.STALLED, "nothing moved for 0.2 s"),
        (half_a_head_then_silence, Failure.STALLED, "nothing moved for 0.2 s"),
        (ScriptedConnection.hold, Failure.STALLED, "nothing moved for 0.2 s"),
        (too_many_bytes, Failure.PROTOCOL, "not HTTP"),
        (endless_head, Failure.PROTOCOL, "a head of more than 8192 bytes"),
        (wrong_range, Failure.PROTOCOL, "content-range 'bytes 1-1000/1001', asked for bytes 0-999"),
        (wrong_length, Failure.PROTOCOL, "announced 2000 bytes, asked for 1000"),
        (encoded, Failure.PROTOCOL, "content-encoding 'gzip'"),
        (chunked, Failure.PROTOCOL, "transfer-encoding 'chunked'"),
        (no_http, Failure.PROTOCOL, "not HTTP"),
    ],
)
def test_misbehaviour_ends_the_source_and_is_named(
    script: Callable[[ScriptedConnection], None], failure: Failure, detail: str
) -> None:
    sink, report = MemorySink(SMALL, OBJECT), RecordingReport()
    with scripted_peer(script) as peer:
        source = source_of(peer, sink, report, stall_timeout_s=STALL_S)
        source.submit(request(1, (0, 0, 1), (1, 0, 1)))
        found = report.wait_failure()
        assert source.join(WAIT_S)
    assert found[:2] == (None, failure)
    assert detail in found[2]
    assert len(report.failures) == 1


def test_after_a_cut_a_new_connection_is_asked_for_what_has_not_come() -> None:
    """Of the first answer one chunk came whole: it is not asked for again."""
    asked: list[bytes] = []

    def cut_in_the_second_chunk(connection: ScriptedConnection) -> None:
        connection.read_request()
        head = content_head(0, 2 * CHUNK_SIZE - 1, len(OBJECT.data))
        connection.send(head + OBJECT.data[: CHUNK_SIZE + 10])

    def the_rest(connection: ScriptedConnection) -> None:
        asked.append(connection.read_request())
        head = content_head(CHUNK_SIZE, 2 * CHUNK_SIZE - 1, len(OBJECT.data))
        connection.send(head + OBJECT.data[CHUNK_SIZE : 2 * CHUNK_SIZE])
        connection.hold()

    sink, report = MemorySink(OBJECT), RecordingReport()
    with scripted_peer(cut_in_the_second_chunk, the_rest) as peer:
        source = source_of(peer, sink, report)
        source.submit(request(1, (0, 0, 2)))
        report.wait_done(1)
        end(source)
        assert peer.served == 2
    assert f"Range: bytes={CHUNK_SIZE}-".encode() in asked[0]
    assert [(chunk, each) for _, _, chunk, each, _ in report.chunks] == [
        (0, Outcome.PROVED),
        (1, Outcome.PROVED),
    ]


def test_cuts_in_vain_end_the_source() -> None:
    sink, report = MemorySink(SMALL, SMALL), RecordingReport()
    with scripted_peer(*[too_few_bytes] * (MAX_CUTS_IN_VAIN + 2)) as peer:
        source = source_of(peer, sink, report, pipeline_depth=1)
        source.submit(request(1, (0, 0, 1)))
        assert report.wait_failure()[:2] == (None, Failure.CLOSED)
        assert source.join(WAIT_S)
        assert peer.served == MAX_CUTS_IN_VAIN + 1
    assert "10 bytes before the end" in report.failures[0][2]
    assert len(report.failures) == 1
    assert sink.kept == {}


def test_a_busy_peer_is_unreachable() -> None:
    with scripted_peer(no_capacity) as peer:
        report = RecordingReport()
        source = source_of(peer, MemorySink(SMALL), report)
        source.submit(request(1, (0, 0, 1)))
        assert report.wait_failure()[:2] == (None, Failure.UNREACHABLE)
        assert source.join(WAIT_S)


def no_capacity(connection: ScriptedConnection) -> None:
    connection.read_request()
    connection.send(b"HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n")


def test_one_connection_does_the_work_when_the_peer_takes_no_second() -> None:
    first_is_there, second_was_refused = threading.Event(), threading.Event()

    def first(connection: ScriptedConnection) -> None:
        connection.read_request()
        first_is_there.set()
        assert second_was_refused.wait(WAIT_S)
        connection.send(content_head(0, 999, 1000) + SMALL.data)
        right_answer(connection)
        connection.hold()

    def second(connection: ScriptedConnection) -> None:
        no_capacity(connection)
        second_was_refused.set()

    sink, report = MemorySink(SMALL, SMALL), RecordingReport()
    with scripted_peer(first, second) as peer:
        source = source_of(peer, sink, report, connections=2)
        source.submit(request(1, (0, 0, 1)))
        assert first_is_there.wait(WAIT_S)
        source.submit(request(2, (1, 0, 1)))
        report.wait_done(1, 2)
        end(source)


@pytest.mark.parametrize("script", [one_byte_then_silence, ScriptedConnection.hold])
def test_closing_ends_a_wait_at_once_and_silently(
    script: Callable[[ScriptedConnection], None],
) -> None:
    sink, report = MemorySink(SMALL), RecordingReport()
    asked = threading.Event()

    def watched(connection: ScriptedConnection) -> None:
        asked.set()
        script(connection)

    with scripted_peer(watched) as peer:
        source = source_of(peer, sink, report, stall_timeout_s=60.0)
        source.submit(request(1, (0, 0, 1)))
        assert asked.wait(WAIT_S)
        end(source)
    assert (report.finished, report.failures) == ([], [])


def test_closing_ends_a_handshake_that_hangs() -> None:
    report = RecordingReport()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(WAIT_S)
        source = PeerSource(
            SERVER,
            [silent.getsockname()] * 3,
            identity(1),
            MemorySink(SMALL),
            report,
            connect_timeout_s=60.0,
        )
        source.submit(request(1, (0, 0, 1)))
        sock, _ = silent.accept()
        with sock:
            sock.settimeout(WAIT_S)
            assert sock.recv(1)  # the handshake has begun
            end(source)
    assert report.failures == []
