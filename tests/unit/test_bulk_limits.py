"""Rates and ceilings of the bulk plane, on real sockets: fair, and nobody holds a thread."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from tensorswarm.p2p.bulk.client import BulkConnection, Busy, Closed, Stalled
from tensorswarm.p2p.bulk.peer_source import PeerSource
from tensorswarm.p2p.bulk.server import MIN_SHARE_BYTES_PER_S, BulkServer
from tensorswarm.p2p.limits.patience import Patience
from tensorswarm.p2p.limits.rates import RateLimiter
from tensorswarm.p2p.swarm.source import Failure, Request, Span
from tensorswarm.store.digest import CHUNK_SIZE
from tests.support.bulk_fakes import (
    WAIT_S,
    MemoryShelf,
    MemorySink,
    RecordingReport,
    ScriptedConnection,
    bulk_server,
    content_head,
    identity,
    make_object,
    scripted_peer,
)

SERVER = identity(100).peer_id
HUGE = make_object(0)._replace(data=bytes(64 << 20))
SMALL = make_object(1000, seed=1)
OBJECT = make_object(2 * CHUNK_SIZE)


def connect(server: BulkServer, number: int = 1) -> BulkConnection:
    return BulkConnection.connect(server.address, identity(number), SERVER)


def test_a_peer_with_eight_connections_gets_no_more_than_one_with_one() -> None:
    limiter = RateLimiter(8_000_000)
    taken: Counter[int] = Counter()
    lock = threading.Lock()
    finished = threading.Event()

    def read(connection: BulkConnection, number: int) -> None:
        buffer = memoryview(bytearray(16 << 10))
        while not finished.is_set():
            try:
                came = connection.read_into(buffer)
            except Closed:
                return
            with lock:
                taken[number] += came
                if taken.total() >= 12_000_000:
                    finished.set()

    begun = time.monotonic()
    with bulk_server(MemoryShelf(HUGE), limiter=limiter) as server:
        connections = [(connect(server, number), number) for number in (1, *[2] * 8)]
        for connection, _ in connections:
            connection.send_get(HUGE.digest, 0, len(HUGE.data))
            connection.read_head()
        threads = [threading.Thread(target=read, args=each) for each in connections]
        for thread in threads:
            thread.start()
        assert finished.wait(WAIT_S)
        seconds = time.monotonic() - begun
        server.close()
        for thread in threads:
            thread.join(WAIT_S)
        for connection, _ in connections:
            connection.close()
    assert taken[1] == pytest.approx(taken[2], rel=0.1)
    assert taken.total() / seconds < 8_000_000 * 1.2  # the burst of the first moment included


def test_no_more_connections_than_the_rate_can_feed() -> None:
    rate = 4 * MIN_SHARE_BYTES_PER_S
    with bulk_server(MemoryShelf(SMALL), limiter=RateLimiter(rate)) as server:
        served = [connect(server, number) for number in range(1, 5)]
        for connection in served:
            connection.send_get(SMALL.digest, 0, 10)
            connection.read_head()
            connection.read_into(memoryview(bytearray(10)))
        late = connect(server, 5)
        late.send_get(SMALL.digest, 0, 10)
        with pytest.raises(Busy):
            late.read_head()
        for connection in (*served, late):
            connection.close()


def test_who_waits_for_a_turn_does_not_hold_up_the_end() -> None:
    with bulk_server(MemoryShelf(HUGE), limiter=RateLimiter(16 << 10)) as server:
        connection = connect(server)
        connection.send_get(HUGE.digest, 0, len(HUGE.data))
        connection.read_head()
        server.close()
        assert server.statistics().connections == 0
        connection.close()


# ---- readers


def test_a_reader_must_keep_up_the_least_rate() -> None:
    patience = Patience(20.0, 4096)
    for _ in range(1000):  # 64 KiB at a time, as slowly as is allowed
        patience.note(64 << 10, 16.0)
        assert patience.left_s > 0
    fast = Patience(20.0, 4096)
    fast.note(1 << 30, 1.0)
    fast.note(0, 19.0)
    assert 0 < fast.left_s <= 1.0, "what it took long ago gives no credit"
    slow, waited_s = Patience(20.0, 4096), 0.0
    while slow.left_s > 0:  # half of the rate
        slow.note(16 << 10, 8.0)
        waited_s += 8.0
    assert waited_s <= 2 * 20.0 + 8.0


@pytest.mark.parametrize("byte_count", [0, 1])
def test_a_reader_of_a_byte_now_and_then_loses_its_thread(byte_count: int) -> None:
    with bulk_server(MemoryShelf(HUGE), read_patience_s=0.3) as server:
        connection = connect(server)
        connection.send_get(HUGE.digest, 0, len(HUGE.data))
        connection.read_head()
        deadline = time.monotonic() + WAIT_S
        while server.statistics().connections and time.monotonic() < deadline:
            connection.read_into(memoryview(bytearray(byte_count)))
            threading.Event().wait(0.02)
        assert server.statistics().connections == 0
        assert server.statistics().failed == 1
        connection.close()


# ---- givers


def trickle(interval_s: float, free_bytes: int = 0) -> object:
    """Return a script: answer, and send the body a byte at a time."""

    def script(connection: ScriptedConnection) -> None:
        connection.read_request()
        connection.send(content_head(0, CHUNK_SIZE - 1, len(OBJECT.data)))
        connection.send(OBJECT.data[:free_bytes])
        for at in range(free_bytes, CHUNK_SIZE):
            connection.send(OBJECT.data[at : at + 1])
            threading.Event().wait(interval_s)

    return script


@pytest.mark.parametrize("free_bytes", [0, 100_000])
def test_a_giver_of_a_byte_now_and_then_is_stalled(free_bytes: int) -> None:
    sink, report = MemorySink(OBJECT), RecordingReport()
    with scripted_peer(trickle(0.01, free_bytes)) as peer:  # type: ignore[arg-type]
        source = PeerSource(
            peer.identity.peer_id,
            [peer.address],
            identity(1),
            sink,
            report,
            stall_timeout_s=0.3,
        )
        source.submit(Request("peer", 1, (Span(0, 0, 1),)))
        request_id, failure, detail = report.wait_failure()
        source.close()
        assert source.join(WAIT_S)
    assert (request_id, failure) == (None, Failure.STALLED)
    assert "bytes in 0." in detail


def test_a_slow_body_is_given_in_parts_and_a_stalled_one_is_told() -> None:
    parts = [b"x" * 5000, b"y" * 5000]
    go_on = threading.Event()

    def script(connection: ScriptedConnection) -> None:
        connection.read_request()
        connection.send(content_head(0, CHUNK_SIZE - 1, CHUNK_SIZE))
        connection.send(parts[0])
        assert go_on.wait(WAIT_S)
        connection.send(parts[1])
        connection.hold()

    with scripted_peer(script) as peer:
        connection = BulkConnection.connect(
            peer.address, identity(1), peer.identity.peer_id, stall_timeout_s=0.3
        )
        connection.send_get(OBJECT.digest, 0, CHUNK_SIZE)
        connection.read_head()
        view = memoryview(bytearray(CHUNK_SIZE))
        assert connection.read_into(view, within_s=0.0) == 5000
        go_on.set()
        with pytest.raises(Stalled):
            connection.read_into(view[5000:])
        assert bytes(view[5000:10000]) == parts[1]
        connection.close()


# ---- our own limit


def test_our_own_limit_holds_and_is_no_stall() -> None:
    """At 200 kB/s, with a patience of 0.1 s: what we wait for ourselves does not count."""
    sink, report = MemorySink(OBJECT), RecordingReport()
    limiter = RateLimiter(500_000)
    begun = time.monotonic()
    with bulk_server(MemoryShelf(OBJECT)) as server:
        source = PeerSource(SERVER, [server.address], identity(1), sink, report, limiter=limiter)
        source.submit(Request("peer", 1, (Span(0, 0, 1),)))
        report.wait_done(1)
        source.close()
        assert source.join(WAIT_S)
    seconds = time.monotonic() - begun
    assert seconds >= CHUNK_SIZE / 500_000 / 1.05 - 0.2  # the burst
    assert max(count for _, count in report.progressed) <= limiter.slice_bytes
    assert sum(count for _, count in report.progressed) == CHUNK_SIZE


def test_the_planner_is_told_when_we_keep_a_source_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tensorswarm.p2p.bulk.desk.HELD_S", 0.0)
    sink, report = MemorySink(SMALL), RecordingReport()
    with bulk_server(MemoryShelf(SMALL)) as server:
        source = PeerSource(
            SERVER, [server.address], identity(1), sink, report, limiter=RateLimiter(1e9)
        )
        source.submit(Request("peer", 1, (Span(0, 0, 1),)))
        report.wait_done(1)
        source.close()
        assert source.join(WAIT_S)
    assert report.progressed == [(1, 0), (1, 1000)]
