"""A long wire that is cut: what is fetched again, and what that asks for ahead."""

from __future__ import annotations

from tensorswarm.p2p.bulk.peer_source import PeerSource
from tensorswarm.p2p.bulk.ranges import ranges_of
from tensorswarm.p2p.bulk.wire_plan import (
    FAR_S,
    FIRST_BYTES_AHEAD,
    MAX_BYTES_AHEAD,
    MAX_CONNECTIONS,
    MIN_BYTES_AHEAD,
    MIN_NEAR_BYTES_AHEAD,
    NEAR_AHEAD_S,
    NEAR_BYTES_AHEAD,
    Pace,
    connections_for,
)
from tensorswarm.p2p.swarm.source import Outcome, Request, Span
from tensorswarm.store.digest import CHUNK_SIZE
from tests.support.bulk_fakes import (
    WAIT_S,
    MemoryShelf,
    MemorySink,
    RecordingReport,
    bulk_server,
    identity,
    make_object,
)
from tests.support.delay_proxy import PIECE_BYTES, DelayProxy

ROUND_TRIP_S = 0.03
BYTES_PER_S = 40e6
QUEUE_BYTES = 256 << 10
SOCKET_BYTES = 512 << 10
"""What the sockets at the proxy's ends hold besides, generously."""


def test_a_cut_costs_no_more_than_was_under_way() -> None:
    """Each connection is cut after 12 MB on average; all of 24 MiB comes, once."""
    whole = make_object(24 * CHUNK_SIZE + 5)
    sink, report = MemorySink(whole), RecordingReport()
    with (
        bulk_server(MemoryShelf(whole)) as server,
        DelayProxy(
            server.address,
            round_trip_s=ROUND_TRIP_S,
            bytes_per_s=BYTES_PER_S,
            queue_bytes=QUEUE_BYTES,
            mean_life_bytes=12e6,
            seed=3,
        ) as proxy,
    ):
        source = PeerSource(
            identity(100).peer_id, [proxy.address], identity(1), sink, report, connections=2
        )
        source.submit(Request("peer", 1, (Span(0, 0, 12),)))
        source.submit(Request("peer", 2, (Span(0, 12, 13),)))
        report.wait_done(1, 2)
        source.close()
        assert source.join(WAIT_S)
        cuts, taken = proxy.cuts, proxy.bytes_taken
    assert sink.data_of(0) == whole.data
    assert cuts > 0
    assert {outcome for *_, outcome, _ in report.chunks} == {Outcome.PROVED}
    assert len(report.chunks) == 25
    under_way = int(BYTES_PER_S * ROUND_TRIP_S) + QUEUE_BYTES + PIECE_BYTES + SOCKET_BYTES
    heads_and_tls = len(whole.data) // 50 + 10_000 * (cuts + 2)
    assert taken <= len(whole.data) + heads_and_tls + cuts * (under_way + CHUNK_SIZE)


def test_the_proxy_delays_both_ways_and_keeps_the_rate() -> None:
    whole = make_object(2 * CHUNK_SIZE)
    sink, report = MemorySink(whole), RecordingReport()
    with (
        bulk_server(MemoryShelf(whole)) as server,
        DelayProxy(server.address, round_trip_s=ROUND_TRIP_S, bytes_per_s=20e6) as proxy,
    ):
        source = PeerSource(identity(100).peer_id, [proxy.address], identity(1), sink, report)
        source.submit(Request("peer", 1, (Span(0, 0, 2),)))
        report.wait_done(1)
        source.close()
        assert source.join(WAIT_S)
    # Only now has the proxy counted what it passed on last.
    assert proxy.bytes_sent >= len(whole.data)
    assert proxy.cuts == 0


def test_connections_and_bytes_ahead_follow_from_what_is_measured() -> None:
    assert [connections_for(s) for s in (0.0001, 0.019, 0.1, 0.3)] == [1, 1, 2, MAX_CONNECTIONS]
    pace = Pace()
    pace.begin(10.0, 0.1)
    assert pace.bytes_ahead() == MIN_BYTES_AHEAD, "nothing is known of the rate"
    for step in range(1, 21):
        pace.note(10.0 + step / 10, 10_000_000)
    assert pace.bytes_ahead() == 2 * 100_000_000 // 10
    pace.begin(20.0, 0.1)
    assert pace.bytes_ahead() == 2 * 100_000_000 // 10, "a new connection begins as fast"
    pace.begin(30.0, 3.0)
    assert pace.bytes_ahead() == MAX_BYTES_AHEAD


def test_of_a_near_peer_no_more_is_asked_for_ahead_than_its_rate_is_worth() -> None:
    pace = Pace()
    pace.begin(0.0, FAR_S / 2)
    assert pace.bytes_ahead() == FIRST_BYTES_AHEAD, "nothing is known of the rate"
    pace.note(0.002, 2 * CHUNK_SIZE)
    assert pace.bytes_ahead() == FIRST_BYTES_AHEAD, "it may be a burst"
    pace.note(0.012, 10 * CHUNK_SIZE)
    assert pace.bytes_ahead() == 12 * CHUNK_SIZE
    pace.note(0.022, 10 * CHUNK_SIZE)
    assert pace.bytes_ahead() == NEAR_BYTES_AHEAD
    for step in range(1, 4):
        pace.note(float(step), 2_400_000)
    assert pace.bytes_ahead() == MIN_NEAR_BYTES_AHEAD, "its uplink is limited"
    pace.note(4.0, 40_000_000)
    assert pace.bytes_ahead() == 40_000_000 * NEAR_AHEAD_S


def test_a_range_is_no_longer_than_what_may_be_asked_for_when_it_is_sent() -> None:
    room = [3]
    sink = MemorySink(make_object(12 * CHUNK_SIZE))
    asked = ranges_of(Request("p", 1, (Span(0, 0, 12),)), sink, lambda: room[0])
    assert (next(asked).first_chunk, next(asked).chunks) == (0, 3)
    room[0] = 4
    assert [(each.first_chunk, each.chunks) for each in asked] == [(6, 4), (10, 2)]
