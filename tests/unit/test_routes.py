"""Which bulk addresses are tried, in which order, and which of them wins."""

from __future__ import annotations

import socket
import threading

import pytest

from tensorswarm.p2p.bulk.client import BulkConnection, Unreachable
from tensorswarm.p2p.bulk.dial import Race
from tensorswarm.p2p.routes import bulk_candidates, bulk_told
from tests.support.bulk_fakes import WAIT_S, MemoryShelf, bulk_server, identity

SERVER = identity(100).peer_id


def test_the_nearest_addresses_come_first_and_none_nearer_than_the_peer_is_seen() -> None:
    told = (
        ":1",
        "8.8.8.8:2",
        "192.168.7.7:3",
        "127.0.0.1:4",
        "[::1]:5",
        "[2001:4860:4860::8888]:6",
        "169.254.169.254:7",
        "0.0.0.0:8",
        "example.org:9",
    )
    wan = [("8.8.8.8", 2), ("2001:4860:4860::8888", 6)]
    assert bulk_candidates(told, "9.9.9.9") == [("9.9.9.9", 1), *wan]
    assert bulk_candidates(told, "10.0.0.9") == [("10.0.0.9", 1), ("192.168.7.7", 3), *wan]
    assert bulk_candidates(told, "127.0.0.1")[:3] == [
        ("127.0.0.1", 1),
        ("127.0.0.1", 4),
        ("::1", 5),
    ]
    assert bulk_candidates(told, None) == wan  # through a relay


def test_no_more_addresses_are_tried_than_agreed() -> None:
    told = [f"8.8.8.8:{port}" for port in range(1, 30)]
    assert bulk_candidates(told, "9.9.9.9") == [("8.8.8.8", port) for port in range(1, 9)]


def test_what_is_told_names_every_interface() -> None:
    assert bulk_told(["/ip4/192.0.2.7/tcp/1", "/ip6/2001:db8::1/tcp/1"], 99) == (
        ":99",
        "192.0.2.7:99",
        "[2001:db8::1]:99",
    )


def silent_listener(host: str = "127.0.0.1") -> socket.socket:
    """Accept nothing: connecting works, the handshake is never answered."""
    return socket.create_server((host, 0))


def test_a_silent_address_does_not_hold_up_the_next() -> None:
    with silent_listener() as silent, bulk_server(MemoryShelf()) as server:
        addresses = [silent.getsockname(), server.address]
        connection = Race(addresses, identity(1), SERVER, stagger_s=0.01, timeout_s=WAIT_S).run()
        connection.close()


def test_a_peer_with_another_id_does_not_win() -> None:
    with bulk_server(MemoryShelf()) as server, silent_listener() as silent:
        addresses = [server.address, silent.getsockname()]
        race = Race(addresses, identity(1), identity(7).peer_id, stagger_s=0.01, timeout_s=0.3)
        with pytest.raises(Unreachable, match="not"):
            race.run()


def test_ipv6_is_raced_too() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as dead,
        bulk_server(MemoryShelf(), host="::1") as server,
    ):
        place = dead.getsockname()
        dead.close()
        connection = Race([place, server.address], identity(1), SERVER).run()
        connection.close()


def test_all_of_them_silent_end_in_time() -> None:
    with silent_listener() as one, silent_listener() as two:
        race = Race(
            [one.getsockname(), two.getsockname()],
            identity(1),
            SERVER,
            timeout_s=0.05,
            stagger_s=0.01,
        )
        with pytest.raises(Unreachable):
            race.run()


def test_a_race_can_be_ended_from_outside() -> None:
    with silent_listener() as one, silent_listener() as two:
        one.settimeout(WAIT_S)
        race = Race([one.getsockname(), two.getsockname()], identity(1), SERVER, timeout_s=60.0)
        ended: list[BulkConnection | Unreachable] = []

        def run() -> None:
            try:
                ended.append(race.run())
            except Unreachable as error:
                ended.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        sock, _ = one.accept()
        with sock:
            race.abort()
            thread.join(WAIT_S)
        assert len(ended) == 1 and isinstance(ended[0], Unreachable)
