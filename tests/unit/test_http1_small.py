"""Many small objects in one request: what is taken, and the name of every fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorswarm.p2p.bulk import http1, http1_small
from tensorswarm.p2p.bulk.client import BulkConnection, Denied
from tensorswarm.p2p.bulk.http1_small import (
    MAX_ANSWER_BYTES,
    MAX_SMALL_BYTES,
    MAX_SMALL_OBJECTS,
    SmallClientExchange,
    SmallRequest,
    SmallServerExchange,
)
from tensorswarm.p2p.bulk.peer_source import PeerSource
from tensorswarm.p2p.swarm.source import Failure, Outcome, Request, Span, WantedObject
from tensorswarm.store.errors import ProtocolError
from tests.support.bulk_fakes import (
    WAIT_S,
    MemoryShelf,
    MemorySink,
    RecordingGate,
    RecordingReport,
    ScriptedConnection,
    bulk_server,
    identity,
    make_object,
    scripted_peer,
)

SMALLS = [make_object(100 + seed, seed) for seed in range(20)]
HEAD = "POST /small HTTP/1.1\r\nHost: x\r\n"


def small_request(sizes: Sequence[int]) -> SmallRequest:
    objects = [WantedObject(bytes([i % 256]) * 32, size) for i, size in enumerate(sizes)]
    return SmallRequest(objects, sum(sizes))


ASKED = small_request([3, 4, 5])


@given(
    st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=MAX_SMALL_OBJECTS)
)
def test_what_is_asked_is_understood_and_what_is_answered_is_accepted(
    plan: list[tuple[int, bool]],
) -> None:
    request = small_request([size for size, _ in plan])
    asking = SmallClientExchange(request, "12D3KooWpeer")
    head_end = asking.encoded.index(b"\r\n\r\n") + 4
    answering = http1_small.read_request(asking.encoded[:head_end])
    assert isinstance(answering, SmallServerExchange)
    body = asking.encoded[head_end:]
    assert answering.body_bytes == len(body)
    assert answering.read_body(body) == request
    head, answer = answering.answer([bytes(size) if held else None for size, held in plan])
    assert asking.read_head(head) is http1.Answer.CONTENT
    assert asking.body_bytes == len(answer)
    held = [i for i, (_, is_held) in enumerate(plan) if is_held]
    assert asking.read_bitmap(answer[: (len(plan) + 7) // 8]) == held


@pytest.mark.parametrize(
    ("status", "answer"),
    [(http1.FORBIDDEN, http1.Answer.DENIED), (http1.UNAVAILABLE, http1.Answer.BUSY)],
)
def test_refusals_are_understood(status: int, answer: http1.Answer) -> None:
    asking = SmallClientExchange(ASKED, "x")
    head = asking.encoded[: asking.encoded.index(b"\r\n\r\n") + 4]
    assert asking.read_head(SmallServerExchange(head).refusal(status)) is answer


def answer_head(status: str = "200 OK", extra: str = "Content-Length: 13\r\n") -> bytes:
    return f"HTTP/1.1 {status}\r\n{extra}\r\n".encode()


@pytest.mark.parametrize(
    ("head", "fault"),
    [
        (answer_head("404 Not Found", "Content-Length: 0\r\n"), "status 404"),
        (answer_head("206 Partial Content"), "status 206"),
        (answer_head(extra=""), "without a content-length"),
        (answer_head(extra="Content-Length: 14\r\n"), "announced 14 bytes"),
        (answer_head(extra="Content-Length: 0\r\n"), "announced 0 bytes"),
        (answer_head(extra="Content-Length: 99999999999999999999\r\n"), "announced"),
        (answer_head(extra="Transfer-Encoding: chunked\r\n"), "transfer-encoding"),
        (answer_head(extra="Content-Encoding: gzip\r\nContent-Length: 9\r\n"), "content-enc"),
    ],
)
def test_a_false_head_is_named(head: bytes, fault: str) -> None:
    with pytest.raises(ProtocolError, match=fault):
        SmallClientExchange(ASKED, "x").read_head(head)


@pytest.mark.parametrize(
    ("given_", "length", "fault"),
    [
        (0b1111, 13, "nobody asked for"),
        (0b111, 12, "gives objects of 12 bytes"),
        (0b011, 13, "gives objects of 7 bytes"),
        (0b000, 2, "gives objects of 0 bytes"),
    ],
)
def test_a_bitmap_that_does_not_fit_is_named(given_: int, length: int, fault: str) -> None:
    asking = SmallClientExchange(ASKED, "x")
    asking.read_head(answer_head(extra=f"Content-Length: {length}\r\n"))
    with pytest.raises(ProtocolError, match=fault):
        asking.read_bitmap(bytes([given_]))


@pytest.mark.parametrize(
    ("head", "fault"),
    [
        (HEAD, "without the length"),
        (HEAD + "Content-Length: 0\r\n", "body of 0 bytes"),
        (HEAD + "Content-Length: 41\r\n", "body of 41 bytes"),
        (HEAD + f"Content-Length: {40 * (MAX_SMALL_OBJECTS + 1)}\r\n", "body of 10280 bytes"),
        (HEAD + "Content-Length: 999999999999\r\n", "without the length"),
        (HEAD + "Content-Length: 40\r\nTransfer-Encoding: chunked\r\n", "transfer-encoding"),
        ("POST /tensor HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n", "asked for '/tensor'"),
        ("POST /small HTTP/1.0\r\nContent-Length: 40\r\n", "HTTP '1.0'"),
    ],
)
def test_a_false_request_is_named(head: str, fault: str) -> None:
    with pytest.raises(ProtocolError, match=fault):
        http1_small.read_request(f"{head}\r\n".encode())


@pytest.mark.parametrize("sizes", [[0], [MAX_SMALL_BYTES + 1], [MAX_SMALL_BYTES] * 17, [1 << 63]])
def test_sizes_beyond_the_limits_are_refused(sizes: list[int]) -> None:
    head = f"{HEAD}Content-Length: {40 * len(sizes)}\r\n\r\n".encode()
    body = b"".join(bytes(32) + size.to_bytes(8, "big") for size in sizes)
    with pytest.raises(ProtocolError, match="not small"):
        SmallServerExchange(head).read_body(body)
    assert sum([MAX_SMALL_BYTES] * 16) == MAX_ANSWER_BYTES


# --- on real sockets -----------------------------------------------------------------


def fetch_small(connection: BulkConnection, wanted: Sequence[WantedObject]) -> dict[int, bytes]:
    connection.send_gets([SmallRequest(wanted, sum(size for _, size in wanted))])
    found = {}
    for position in connection.read_small_head():
        buffer = bytearray(wanted[position].size_bytes)
        connection.read_into(memoryview(buffer))
        found[position] = bytes(buffer)
    return found


def test_one_answer_has_what_the_server_holds_in_the_size_asked_for() -> None:
    wanted = [WantedObject(each.digest, len(each.data)) for each in SMALLS]
    wanted[3] = wanted[3]._replace(size_bytes=7)
    with bulk_server(MemoryShelf(*SMALLS[1:])) as server:
        connection = BulkConnection.connect(server.address, identity(1), identity(100).peer_id)
        for _ in range(2):  # the connection goes on afterwards
            found = fetch_small(connection, wanted)
            assert found == {i: each.data for i, each in enumerate(SMALLS) if i not in (0, 3)}
        connection.close()
        assert server.statistics().requests == 2


def test_the_largest_request_is_answered() -> None:
    objects = [make_object(4096, seed) for seed in range(MAX_SMALL_OBJECTS)]
    with bulk_server(MemoryShelf(*objects)) as server:
        connection = BulkConnection.connect(server.address, identity(1), identity(100).peer_id)
        found = fetch_small(connection, [WantedObject(o.digest, 4096) for o in objects])
        connection.close()
    assert list(found.values()) == [each.data for each in objects]


def test_a_gate_hears_what_was_given() -> None:
    gate = RecordingGate()
    with bulk_server(MemoryShelf(*SMALLS[1:]), gate=gate) as server:
        connection = BulkConnection.connect(server.address, identity(1), identity(100).peer_id)
        fetch_small(connection, [WantedObject(each.digest, len(each.data)) for each in SMALLS])
        connection.close()
    assert gate.given == [each.digest for each in SMALLS[1:]]
    assert not gate.asked


def test_who_is_not_allowed_gets_nothing() -> None:
    with bulk_server(MemoryShelf(*SMALLS), allow=lambda peer_id: False) as server:
        connection = BulkConnection.connect(server.address, identity(1), identity(100).peer_id)
        with pytest.raises(Denied):
            fetch_small(connection, [WantedObject(SMALLS[0].digest, 100)])
        connection.close()


def test_an_unfinished_or_false_body_ends_the_connection() -> None:
    with bulk_server(MemoryShelf(*SMALLS), idle_timeout_s=0.2) as server:
        for body in (b"\x01" * 39, bytes(40)):
            connection = BulkConnection.connect(server.address, identity(1), identity(100).peer_id)
            connection._socket.sendall(f"{HEAD}Content-Length: 40\r\n\r\n".encode() + body)
            connection._socket.settimeout(WAIT_S)
            answer = connection._socket.recv(1000)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
            connection.close()


def run_scripted(script: Callable[[ScriptedConnection], None]) -> tuple[MemorySink, Failure, str]:
    """Ask a peer for all small objects; return what was kept, and how the source failed."""
    sink, report = MemorySink(*SMALLS), RecordingReport()
    with scripted_peer(script) as peer:
        source = PeerSource(
            peer.identity.peer_id, [peer.address], identity(1), sink, report, stall_timeout_s=0.3
        )
        source.submit(Request("peer", 1, tuple(Span(i, 0, 1) for i in range(len(SMALLS)))))
        _, failure, detail = report.wait_failure()
        source.close()
        assert source.join(WAIT_S)
    return sink, failure, detail


def send_all(connection: ScriptedConnection, spoilt: int | None = None) -> None:
    connection.read_request()
    parts = [bytearray(each.data) for each in SMALLS]
    if spoilt is not None:
        parts[spoilt][0] ^= 1
    body = ((1 << len(parts)) - 1).to_bytes(3, "little") + b"".join(parts)
    connection.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


def test_a_false_object_is_refused_and_the_true_ones_beside_it_are_kept() -> None:
    sink, failure, detail = run_scripted(lambda connection: send_all(connection, spoilt=5))
    assert failure is Failure.BAD_BYTES
    assert SMALLS[5].digest.hex() in detail
    assert sorted(index for index, _ in sink.kept) == [i for i in range(20) if i != 5]


def test_too_few_bytes_are_a_stall_or_a_cut() -> None:
    def script(connection: ScriptedConnection) -> None:
        connection.read_request()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 103\r\n\r\n\x01\0\0" + bytes(50))
        connection.hold()

    sink, failure, _ = run_scripted(script)
    assert (failure, sink.kept) == (Failure.STALLED, {})


def test_a_lie_about_the_length_is_a_broken_protocol() -> None:
    def script(connection: ScriptedConnection) -> None:
        connection.read_request()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 104\r\n\r\n\x01\0\0" + bytes(101))
        connection.hold()

    sink, failure, detail = run_scripted(script)
    assert (failure, sink.kept) == (Failure.PROTOCOL, {})
    assert "gives objects of 100 bytes" in detail


def test_objects_go_together_and_those_left_out_are_lacking() -> None:
    objects = [make_object(1000, seed) for seed in range(600)]
    sink, report = MemorySink(*objects), RecordingReport()
    with bulk_server(MemoryShelf(*objects[1:])) as server:
        source = PeerSource(identity(100).peer_id, [server.address], identity(1), sink, report)
        source.submit(Request("peer", 1, tuple(Span(i, 0, 1) for i in range(600))))
        assert report.wait_failure()[:2] == (1, Failure.LACKS)
        source.close()
        assert source.join(WAIT_S)
        assert server.statistics().requests == 3
    assert sorted(index for index, _ in sink.kept) == list(range(1, 600))
    assert {outcome for *_, outcome, _ in report.chunks} == {Outcome.PROVED}
