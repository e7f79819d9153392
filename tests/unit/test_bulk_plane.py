"""Server and connection of the bulk plane, on real sockets."""

from __future__ import annotations

import random
import socket
import ssl
import threading

import pytest
from libp2p.security.tls.certificate import generate_self_signed_cert

from tensorswarm.p2p.bulk import table as bulk_table
from tensorswarm.p2p.bulk.client import (
    BulkConnection,
    Busy,
    Closed,
    Denied,
    Lacks,
    Stalled,
    Unreachable,
)
from tensorswarm.p2p.bulk.http1 import RangeRequest
from tensorswarm.p2p.bulk.server import BulkServer
from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.errors import LocalError, ProtocolError
from tests.support.bulk_fakes import (
    WAIT_S,
    MemoryShelf,
    ScriptedConnection,
    bulk_server,
    identity,
    make_object,
    scripted_peer,
)

SERVER = identity(100).peer_id
OBJECT = make_object(3 * CHUNK_SIZE + 12_345)
SMALL = make_object(1000, seed=1)
STALL_S = 0.2


def connect(server: BulkServer, number: int = 1) -> BulkConnection:
    return BulkConnection.connect(server.address, identity(number), SERVER)


def fetch(connection: BulkConnection, digest: bytes, offset: int, length: int) -> bytes:
    connection.send_get(digest, offset, length)
    connection.read_head()
    buffer = bytearray(length)
    connection.read_into(memoryview(buffer))
    return bytes(buffer)


def test_ranges_come_back_as_they_are() -> None:
    draw = random.Random(7)
    size = len(OBJECT.data)
    with bulk_server(MemoryShelf(OBJECT)) as server:
        connection = connect(server)
        ranges = [(0, 1), (0, size), (size - 1, 1), (CHUNK_SIZE - 1, 2)]
        for _ in range(20):
            offset = draw.randrange(size)
            ranges.append((offset, draw.randint(1, size - offset)))
        for offset, length in ranges:
            assert (
                fetch(connection, OBJECT.digest, offset, length)
                == (OBJECT.data[offset : offset + length])
            )
        connection.close()
        sent = sum(length for _, length in ranges)
        statistics = server.statistics()
        assert statistics.bytes_sent == sent
        assert statistics.bytes_sent_to == {identity(1).peer_id: sent}
        assert statistics.requests == len(ranges)


def test_fifty_requests_are_answered_in_order() -> None:
    shelf = MemoryShelf(OBJECT, SMALL)
    draw = random.Random(8)
    asked = []
    for number in range(50):
        each = (OBJECT, SMALL)[number % 2]
        offset = draw.randrange(len(each.data))
        length = draw.randint(1, min(100_000, len(each.data) - offset))
        asked.append((each, offset, length))
    with bulk_server(shelf) as server:
        connection = connect(server)
        connection.send_gets([RangeRequest(each.digest, o, n) for each, o, n in asked])
        assert connection.outstanding == 50
        for each, offset, length in asked:
            connection.read_head()
            buffer = bytearray(length)
            half = length // 2  # a body may be taken in pieces
            connection.read_into(memoryview(buffer)[:half])
            connection.read_into(memoryview(buffer)[half:])
            assert buffer == each.data[offset : offset + length]
        connection.close()


def test_a_body_must_be_taken_before_the_next_head() -> None:
    with bulk_server(MemoryShelf(SMALL)) as server:
        connection = connect(server)
        connection.send_gets([RangeRequest(SMALL.digest, 0, 10)] * 2)
        connection.read_head()
        with pytest.raises(RuntimeError, match="was not read"):
            connection.read_head()
        with pytest.raises(ValueError, match="11 bytes wanted, 10 left"):
            connection.read_into(memoryview(bytearray(11)))
        connection.close()


def test_the_last_reader_is_kept_and_others_are_closed() -> None:
    shelf = MemoryShelf(OBJECT, SMALL)
    with bulk_server(shelf) as server:
        connection = connect(server)
        for digest in (OBJECT.digest, OBJECT.digest, SMALL.digest, OBJECT.digest):
            fetch(connection, digest, 0, 10)
        assert shelf.opened == [OBJECT.digest, SMALL.digest, OBJECT.digest]
        connection.close()


def test_what_is_not_there_or_not_proved_is_lacking() -> None:
    shelf = MemoryShelf(OBJECT)
    shelf.proved[OBJECT.digest] = frozenset({1})
    with bulk_server(shelf) as server:
        connection = connect(server)
        assert fetch(connection, OBJECT.digest, CHUNK_SIZE, 5) == OBJECT.data[CHUNK_SIZE:][:5]
        for digest, offset, length in (
            (OBJECT.digest, CHUNK_SIZE - 1, 2),
            (OBJECT.digest, CHUNK_SIZE, CHUNK_SIZE + 1),
            (OBJECT.digest, len(OBJECT.data), 1),
            (SMALL.digest, 0, 1),
        ):
            connection.send_get(digest, offset, length)
            with pytest.raises(Lacks, match=f"{offset}-{offset + length - 1} of .*{digest.hex()}"):
                connection.read_head()
        connection.close()


def test_what_was_proved_since_a_reader_was_opened_is_served() -> None:
    shelf = MemoryShelf(OBJECT)
    shelf.proved[OBJECT.digest] = frozenset({1})
    with bulk_server(shelf) as server:
        connection = connect(server)
        fetch(connection, OBJECT.digest, CHUNK_SIZE, 5)
        shelf.proved[OBJECT.digest] = frozenset({1, 2})
        both = fetch(connection, OBJECT.digest, CHUNK_SIZE, 2 * CHUNK_SIZE)
        assert both == OBJECT.data[CHUNK_SIZE : 3 * CHUNK_SIZE]
        connection.close()


def test_another_peer_than_expected_is_refused() -> None:
    other = identity(2).peer_id
    with (
        bulk_server(MemoryShelf(SMALL)) as server,
        pytest.raises(ProtocolError, match=f"is {SERVER} at .* not {other}"),
    ):
        BulkConnection.connect(server.address, identity(1), other)


def test_a_stranger_is_denied_and_so_is_who_loses_access() -> None:
    allowed = {identity(1).peer_id}
    with bulk_server(MemoryShelf(SMALL), allowed.__contains__) as server:
        stranger = connect(server, 2)
        stranger.send_get(SMALL.digest, 0, 1)
        with pytest.raises(Denied):
            stranger.read_head()
        stranger.close()
        friend = connect(server, 1)
        fetch(friend, SMALL.digest, 0, 1)
        allowed.clear()
        friend.send_get(SMALL.digest, 0, 1)
        with pytest.raises(Denied):
            friend.read_head()
        friend.close()


def tls_client(server: BulkServer, context: ssl.SSLContext) -> ssl.SSLSocket:
    return context.wrap_socket(socket.create_connection(server.address, timeout=WAIT_S))


def bare_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def context_without_identity(folder: str) -> ssl.SSLContext:
    from cryptography.hazmat.primitives import serialization

    key, certificate = generate_self_signed_cert()
    path = f"{folder}/pem"
    with open(path, "wb") as file:
        file.write(certificate.public_bytes(serialization.Encoding.PEM))
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
    context = bare_context()
    context.load_cert_chain(path)
    return context


@pytest.mark.parametrize("with_certificate", [False, True])
def test_who_proves_no_peer_id_gets_no_answer(
    with_certificate: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = str(tmp_path_factory.mktemp("certificate"))
    context = context_without_identity(folder) if with_certificate else bare_context()
    shelf = MemoryShelf(SMALL)
    with bulk_server(shelf) as server:
        sock = tls_client(server, context)
        try:
            sock.sendall(f"GET /tensor/{SMALL.digest.hex()} HTTP/1.1\r\n".encode())
            answer = sock.recv(100)
        except OSError:
            answer = b""
        sock.close()
    assert answer == b""
    assert shelf.opened == []
    assert server.statistics().failed == 1


def test_a_server_without_an_identity_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = str(tmp_path_factory.mktemp("certificate"))
    context_without_identity(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{folder}/pem")
    with scripted_peer(ScriptedConnection.hold) as peer:
        peer.identity = type("Imposter", (), {"server_context": context})()
        with pytest.raises(ProtocolError, match="without a libp2p identity"):
            BulkConnection.connect(peer.address, identity(1), SERVER)


def test_what_is_no_request_is_answered_400_and_ends_the_connection() -> None:
    with bulk_server(MemoryShelf(SMALL)) as server:
        sock = tls_client(server, identity(1).client_context)
        sock.sendall(b"GET /etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while data := sock.recv(1000):
            answer += data
        sock.close()
        assert answer.startswith(b"HTTP/1.1 400 ")


def test_an_endless_request_ends_the_connection() -> None:
    with bulk_server(MemoryShelf(SMALL)) as server:
        sock = tls_client(server, identity(1).client_context)
        with pytest.raises(OSError):  # noqa: PT011 - closed, reset or a broken pipe
            while True:
                sock.sendall(b"x" * 4096)
        sock.close()


@pytest.mark.parametrize("sent", [b"", b"GET /tensor/"])
def test_who_asks_for_nothing_is_cut_off(sent: bytes) -> None:
    with bulk_server(MemoryShelf(SMALL), idle_timeout_s=0.1, handshake_timeout_s=0.1) as server:
        sock = tls_client(server, identity(1).client_context)
        sock.sendall(sent)
        assert sock.recv(1) == b""
        sock.close()
        assert server.statistics().failed == bool(sent)


def test_who_does_not_shake_hands_is_cut_off() -> None:
    with bulk_server(MemoryShelf(SMALL), handshake_timeout_s=0.1) as server:
        with socket.create_connection(server.address, timeout=WAIT_S) as sock:
            assert sock.recv(1) == b""
        assert server.statistics().failed == 1


def test_a_reader_that_takes_nothing_is_cut_off() -> None:
    huge = make_object(0)._replace(data=bytes(64 << 20))
    shelf = MemoryShelf(huge)
    with bulk_server(shelf, read_patience_s=0.2) as server:
        connection = connect(server)
        connection.send_get(huge.digest, 0, len(huge.data))
        connection.read_head()
        assert shelf.reader_closed.wait(WAIT_S)
        assert server.statistics().failed == 1
        assert server.statistics().connections == 0
        with pytest.raises(Closed):
            connection.read_into(memoryview(bytearray(len(huge.data))))
        connection.close()


def test_a_broken_disk_ends_that_connection_only() -> None:
    shelf = MemoryShelf(SMALL)
    with bulk_server(shelf) as server:
        first, second = connect(server), connect(server)
        shelf.broken = True
        first.send_get(SMALL.digest, 0, 10)
        with pytest.raises(Closed):
            first.read_head()
        shelf.broken = False
        assert fetch(second, SMALL.digest, 0, 10) == SMALL.data[:10]
        first.close()
        second.close()


def test_connections_are_limited_in_all() -> None:
    with bulk_server(MemoryShelf(SMALL), max_connections=1) as server:
        first = connect(server)
        fetch(first, SMALL.digest, 0, 1)
        second = connect(server, 2)
        second.send_get(SMALL.digest, 0, 1)
        with pytest.raises(Busy):
            second.read_head()
        assert server.statistics().turned_away == 1
        assert fetch(first, SMALL.digest, 0, 5) == SMALL.data[:5]
        first.close()
        second.close()


def test_handshakes_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_table, "MAX_UNIDENTIFIED", 1)
    with bulk_server(MemoryShelf(SMALL), max_connections=1) as server:
        first = connect(server)
        fetch(first, SMALL.digest, 0, 1)
        with (
            socket.create_connection(server.address, timeout=WAIT_S),
            socket.create_connection(server.address, timeout=WAIT_S) as third,
        ):
            assert third.recv(1) == b""
        first.close()


def test_who_has_most_makes_room_for_a_newcomer() -> None:
    with bulk_server(MemoryShelf(SMALL), max_connections=3) as server:
        made = []
        for number in (1, 1, 1, 2, 3):
            made.append(connect(server, number))
            assert fetch(made[-1], SMALL.digest, 0, 5) == SMALL.data[:5]
        for cut in made[1:3]:  # the youngest of peer 1
            with pytest.raises(Closed):
                fetch(cut, SMALL.digest, 0, 1)
        made.append(connect(server, 4))
        with pytest.raises(Busy):  # nobody has more than one any more
            fetch(made[-1], SMALL.digest, 0, 1)
        for number in (0, 3, 4):
            assert fetch(made[number], SMALL.digest, 0, 5) == SMALL.data[:5]
        for each in made:
            each.close()


def test_who_is_idle_makes_room_for_a_newcomer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_table, "IDLE_GRACE_S", 0.0)
    shelf = MemoryShelf(SMALL)
    with bulk_server(shelf, max_connections=1) as server:
        idle = connect(server)
        fetch(idle, SMALL.digest, 0, 1)
        busy = None
        while busy is None:  # until the server's thread has come to wait
            busy = connect(server, 2)
            busy.send_get(SMALL.digest, 0, 5)
            try:
                busy.read_head()
            except Busy:
                busy = None
        with pytest.raises(Closed):
            fetch(idle, SMALL.digest, 0, 1)
        idle.close()
        busy.close()


def test_connections_are_limited_for_each_peer() -> None:
    with bulk_server(MemoryShelf(SMALL), max_connections_per_peer=1) as server:
        first = connect(server)
        fetch(first, SMALL.digest, 0, 1)
        second = connect(server)
        second.send_get(SMALL.digest, 0, 1)
        with pytest.raises(Busy):
            second.read_head()
        other = connect(server, 2)
        fetch(other, SMALL.digest, 0, 1)
        for connection in (first, second, other):
            connection.close()


def test_strangers_from_one_address_cannot_take_every_place() -> None:
    with bulk_server(MemoryShelf(SMALL), max_connections=4) as server:
        strangers = [socket.create_connection(server.address, timeout=WAIT_S) for _ in range(3)]
        assert strangers[2].recv(1) == b""  # half of four may be unproved
        for sock in strangers:
            sock.close()


def test_who_does_not_shake_hands_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_table, "IDLE_GRACE_S", 0.0)
    with bulk_server(MemoryShelf(SMALL), max_connections=4) as server:
        silent = [socket.create_connection(server.address, timeout=WAIT_S) for _ in range(9)]
        honest = connect(server)
        assert fetch(honest, SMALL.digest, 0, 5) == SMALL.data[:5]
        assert silent[0].recv(1) == b""
        assert server.statistics().connections <= 4
        honest.close()
        for sock in silent:
            sock.close()


def test_the_table_of_peers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_table, "MAX_TRACKED_PEERS", 2)
    with bulk_server(MemoryShelf(SMALL)) as server:
        for number in (1, 2, 1, 3):
            connection = connect(server, number)
            fetch(connection, SMALL.digest, 0, 5)
            connection.close()
        statistics = server.statistics()
    assert statistics.bytes_sent == 20
    assert statistics.bytes_sent_to == {identity(1).peer_id: 10, identity(3).peer_id: 5}


def test_closing_the_server_ends_waiting_connections() -> None:
    with bulk_server(MemoryShelf(SMALL)) as server:
        connection = connect(server)
        fetch(connection, SMALL.digest, 0, 1)
        server.close()
        connection.send_get(SMALL.digest, 0, 1)
        with pytest.raises(Closed):
            connection.read_head()
        connection.close()
        with pytest.raises(Unreachable):
            connect(server)
        assert server.statistics().connections == 0


def test_an_address_in_use_is_told() -> None:
    with bulk_server(MemoryShelf()) as server:
        second = BulkServer(
            identity(1), MemoryShelf().open_reader, bool, host="127.0.0.1", port=server.address[1]
        )
        with pytest.raises(LocalError, match="cannot listen on 127.0.0.1"):
            second.start()
        second.close()


def test_both_address_families_are_served() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this system has no IPv6")
    with bulk_server(MemoryShelf(SMALL), host="::") as server:
        for host in ("127.0.0.1", "::1"):
            connection = BulkConnection.connect((host, server.address[1]), identity(1), SERVER)
            assert fetch(connection, SMALL.digest, 0, 3) == SMALL.data[:3]
            connection.close()


@pytest.mark.parametrize("address", [("localhost", 1), ("127.0.0.1", 1 << 20), ("", 1)])
def test_only_numeric_addresses_are_tried(address: tuple[str, int]) -> None:
    with pytest.raises(Unreachable):
        BulkConnection.connect(address, identity(1), SERVER)


def test_a_connection_can_be_aborted_while_it_is_made() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        seen: list[BulkConnection] = []

        def abort_at_handshake() -> None:
            sock, _ = silent.accept()
            with sock:
                sock.recv(1)  # the handshake has begun
                seen[0].abort()

        thread = threading.Thread(target=abort_at_handshake)
        thread.start()
        with pytest.raises(Unreachable):
            BulkConnection.connect(
                silent.getsockname(), identity(1), SERVER, timeout_s=WAIT_S, watch=seen.append
            )
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_a_stalled_send_is_told() -> None:
    with scripted_peer(ScriptedConnection.hold) as peer:
        connection = BulkConnection.connect(
            peer.address, identity(1), peer.identity.peer_id, stall_timeout_s=STALL_S
        )
        with pytest.raises(Stalled):
            for _ in range(1000):  # nobody reads: the buffers are full at some point
                connection.send_gets([RangeRequest(SMALL.digest, 0, 1)] * 256)
        connection.close()
