"""Leaving TLS on the bulk plane: only where both want it and nobody is in between."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import pytest
from libp2p.crypto.ed25519 import create_new_key_pair

from tensorswarm.p2p.bulk import clear as bulk_clear
from tensorswarm.p2p.bulk.client import BulkConnection, Closed, Denied, Unreachable
from tensorswarm.p2p.bulk.server import BulkServer
from tensorswarm.p2p.bulk.tls import APPLICATION_PROTOCOL, CLEAR_PROTOCOL, BulkIdentity
from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.errors import ProtocolError, RemoteError
from tensorswarm.store.reader import FileReader
from tests.support.bulk_fakes import WAIT_S, content_head, identity, make_object

OBJECT = make_object(2 * CHUNK_SIZE + 12_345)
SERVER = identity(100).peer_id
DEADLINE_S = 0.3


@cache
def clear_identity(number: int) -> BulkIdentity:
    """Return an identity that has opted in."""
    return BulkIdentity(create_new_key_pair(bytes([number]) * 32), may_clear=True)


@contextmanager
def file_server(
    path: Path,
    who: BulkIdentity,
    reader: Callable[[Path], FileReader] = lambda path: FileReader(path, 7, len(OBJECT.data)),
    allow: Callable[[str], bool] = lambda peer_id: True,
    **options: float,
) -> Iterator[BulkServer]:
    """Serve `OBJECT` from the eighth byte of a file on."""
    if not path.exists():
        path.write_bytes(b"before " + OBJECT.data)
    server = BulkServer(
        who,
        lambda digest: reader(path) if digest == OBJECT.digest else None,
        allow,
        host="127.0.0.1",
        **options,  # type: ignore[arg-type]
    )
    server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def sent_files(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the bytes that went from a file straight into a socket."""
    counts: list[int] = []
    real = os.sendfile

    def sendfile(to: int, source: int, offset: int, count: int) -> int:
        counts.append(real(to, source, offset, count))
        return counts[-1]

    monkeypatch.setattr(os, "sendfile", sendfile)
    return counts


def connect(address: tuple[str, int], who: BulkIdentity, **options: float) -> BulkConnection:
    return BulkConnection.connect(address, who, SERVER, **options)  # type: ignore[arg-type]


def take(connection: BulkConnection, offset: int, length: int) -> bytes:
    connection.send_get(OBJECT.digest, offset, length)
    connection.read_head()
    buffer = bytearray(length)
    connection.read_into(memoryview(buffer))
    return bytes(buffer)


def test_where_both_want_it_bytes_go_from_the_file_into_the_socket(
    tmp_path: Path, sent_files: list[int]
) -> None:
    size = len(OBJECT.data)
    with file_server(tmp_path / "file", clear_identity(100)) as server:
        connection = connect(server.address, clear_identity(1))
        assert connection.is_clear
        assert take(connection, 0, size) == OBJECT.data
        assert take(connection, CHUNK_SIZE - 3, 7) == OBJECT.data[CHUNK_SIZE - 3 :][:7]
        assert take(connection, 5, size - 5) == OBJECT.data[5:]
        assert sum(sent_files) == size + size - 5  # the seven bytes went by the buffer
        statistics = server.statistics()
        assert statistics.bytes_sent_to == {clear_identity(1).peer_id: 2 * size + 2}
        assert statistics.requests == 3
        connection.close()


@pytest.mark.parametrize("wants", [(False, False), (True, False), (False, True)])
def test_one_side_alone_cannot_leave_tls(
    tmp_path: Path, sent_files: list[int], wants: tuple[bool, bool]
) -> None:
    served, asking = (clear_identity if want else identity for want in wants)
    with file_server(tmp_path / "file", served(100)) as server:
        connection = connect(server.address, asking(1))
        assert not connection.is_clear
        assert take(connection, 0, len(OBJECT.data)) == OBJECT.data
        assert not sent_files
        connection.close()


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("::1", "::1", True),
        ("::ffff:127.0.0.1", "::ffff:127.9.9.9", True),
        ("127.0.0.1", "10.0.0.2", False),
        ("10.0.0.1", "127.0.0.1", False),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.1", False),
        ("fe80::1%eth0", "fe80::2%eth0", False),
        ("", "", False),
    ],
)
def test_only_loopback_at_both_ends_counts(here: str, there: str, expected: bool) -> None:
    class Ends(socket.socket):
        def getsockname(self) -> tuple[str, int]:
            return here, 1

        def getpeername(self) -> tuple[str, int]:
            return there, 2

    with Ends() as sock:
        assert bulk_clear.is_on_loopback(sock) is expected
        who = clear_identity(1)
        chosen = bulk_clear.context_for(who, sock, server_side=False)
        assert chosen is (who.clear_client_context if expected else who.client_context)


def test_the_mark_of_a_place_is_the_machine_and_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = ("127.0.0.1", 1), ("127.0.0.1", 2)
    mark = bulk_clear.place_mark(one, two)
    assert mark == bulk_clear.place_mark(("::ffff:127.0.0.1", 1), two)
    others = [(two, one), (one, ("127.0.0.1", 3)), (one, ("127.0.0.2", 2))]
    assert mark not in [bulk_clear.place_mark(*ends) for ends in others]
    monkeypatch.setattr(bulk_clear, "boot_identity", lambda: "another machine")
    assert mark != bulk_clear.place_mark(one, two)


@contextmanager
def forwarder(to: tuple[str, int]) -> Iterator[tuple[tuple[str, int], bytearray]]:
    """Pass one connection on, and remember what came from the far side."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(WAIT_S)
    seen = bytearray()

    def pump(source: socket.socket, target: socket.socket, keep: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if keep:
                    seen.extend(data)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def run() -> None:
        near, _ = listener.accept()
        with near, socket.create_connection(to) as far:
            back = threading.Thread(target=pump, args=(far, near, True))
            back.start()
            pump(near, far, False)
            back.join(WAIT_S)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield listener.getsockname(), seen
    finally:
        listener.close()
        thread.join(WAIT_S)


def test_behind_a_forwarder_it_stays_in_tls(tmp_path: Path, sent_files: list[int]) -> None:
    with (
        file_server(tmp_path / "file", clear_identity(100)) as server,
        forwarder(server.address) as (address, seen),
    ):
        connection = connect(address, clear_identity(1))
        assert not connection.is_clear
        assert take(connection, 0, len(OBJECT.data)) == OBJECT.data
        connection.close()
    assert len(seen) > len(OBJECT.data)
    assert OBJECT.data[:32] not in seen
    assert not sent_files


def member(number: int, key: bytes | None) -> BulkIdentity:
    """Return an identity that has opted in, in a private network."""
    pair = create_new_key_pair(bytes([number]) * 32)
    return BulkIdentity(pair, may_clear=True, network_key=key)


def test_in_a_private_network_it_goes_in_the_clear_over_any_wire(
    tmp_path: Path, sent_files: list[int]
) -> None:
    key = bytes(range(32))
    with (
        file_server(tmp_path / "file", member(100, key)) as server,
        forwarder(server.address) as (address, seen),
    ):
        connection = connect(address, member(1, key))
        assert connection.is_clear
        assert take(connection, 0, len(OBJECT.data)) == OBJECT.data
        connection.close()
    assert OBJECT.data in seen
    assert sum(sent_files) == len(OBJECT.data)
    assert key not in seen and key.hex().encode() not in seen


@pytest.mark.parametrize("keys", [(b"a" * 32, b"b" * 32), (None, b"b" * 32), (b"a" * 32, None)])
def test_members_of_two_networks_stay_in_tls(
    tmp_path: Path, sent_files: list[int], keys: tuple[bytes | None, bytes | None]
) -> None:
    with file_server(tmp_path / "file", member(100, keys[0])) as server:
        connection = connect(server.address, member(1, keys[1]))
        assert not connection.is_clear
        assert take(connection, 0, len(OBJECT.data)) == OBJECT.data
        assert not sent_files
        connection.close()


def test_the_mark_of_a_network_is_its_key_and_who_asks_whom() -> None:
    key = bytes(32)
    mark = bulk_clear.network_mark(key, "client", "server")
    others = [(key, "server", "client"), (b"x" * 32, "client", "server")]
    assert mark not in [bulk_clear.network_mark(*other) for other in others]


def test_a_member_offers_it_at_any_address_and_only_if_told_to() -> None:
    class Far(socket.socket):
        def getsockname(self) -> tuple[str, int]:
            return "10.0.0.1", 1

        def getpeername(self) -> tuple[str, int]:
            return "10.0.0.2", 2

    who = member(1, bytes(32))
    careful = BulkIdentity(create_new_key_pair(bytes(32)), network_key=bytes(32))
    with Far() as sock:
        assert bulk_clear.context_for(who, sock, server_side=True) is who.clear_server_context
        assert bulk_clear.context_for(careful, sock, server_side=True) is careful.server_context


def test_somebody_else_is_found_out_before_anything_is_in_the_clear(tmp_path: Path) -> None:
    with (
        file_server(tmp_path / "file", clear_identity(101)) as server,
        pytest.raises(ProtocolError, match=f"not {SERVER}"),
    ):
        connect(server.address, clear_identity(1))


def test_who_is_not_allowed_gets_nothing_in_the_clear_either(tmp_path: Path) -> None:
    with file_server(tmp_path / "file", clear_identity(100), allow=lambda _: False) as server:
        connection = connect(server.address, clear_identity(1))
        assert connection.is_clear
        with pytest.raises(Denied):
            take(connection, 0, 10)
        connection.close()


def test_a_request_without_tls_gets_nothing(tmp_path: Path) -> None:
    with (
        file_server(tmp_path / "file", clear_identity(100)) as server,
        socket.create_connection(server.address) as sock,
    ):
        sock.settimeout(WAIT_S)
        request = f"GET /tensor/{OBJECT.digest.hex()} HTTP/1.1\r\nHost: x\r\n"
        sock.sendall(request.encode() + b"Range: bytes=0-99\r\n\r\n")
        answer = bytearray()
        with suppress(ConnectionResetError):
            while data := sock.recv(4096):
                answer += data
        assert b"HTTP" not in answer


# ---- peers that keep to the handshake and to nothing after it


@contextmanager
def hostile_server(script: Callable[[ssl.SSLSocket], object]) -> Iterator[tuple[str, int]]:
    """Shake hands as the right peer, then do what a test says."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(WAIT_S)
    over = threading.Event()

    def run() -> None:
        with suppress(OSError):
            raw, _ = listener.accept()
            raw.settimeout(WAIT_S)
            context = clear_identity(100).clear_server_context
            with context.wrap_socket(raw, server_side=True) as secured:
                script(secured)
                over.wait(WAIT_S)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        over.set()
        listener.close()
        thread.join(WAIT_S)


def right_mark(secured: ssl.SSLSocket) -> bytes:
    return bulk_clear.place_mark(secured.getpeername(), secured.getsockname())


def plain_answer(secured: ssl.SSLSocket) -> None:
    """Tell the right mark, and then go on in the clear without ending TLS."""
    secured.sendall(right_mark(secured))
    with socket.socket(fileno=os.dup(secured.fileno())) as plain:
        plain.sendall(content_head(0, 9, 10) + b"0123456789")


@pytest.mark.parametrize(
    "script",
    [
        lambda secured: None,  # says nothing
        lambda secured: secured.sendall(b"half"),
        lambda secured: secured.sendall(right_mark(secured)),  # and never ends TLS
        lambda secured: secured.sendall(right_mark(secured) + b"more inside TLS"),
        plain_answer,
    ],
)
def test_a_server_that_does_not_end_tls_is_not_reached(
    script: Callable[[ssl.SSLSocket], object],
) -> None:
    with hostile_server(script) as address, pytest.raises(Unreachable):
        connect(address, clear_identity(1), timeout_s=DEADLINE_S)


def test_a_server_that_goes_away_instead_is_an_error() -> None:
    def leave(secured: ssl.SSLSocket) -> None:
        secured.sendall(right_mark(secured)[:5])
        secured.unwrap()

    with hostile_server(leave) as address, pytest.raises(RemoteError):
        connect(address, clear_identity(1), timeout_s=DEADLINE_S)


def test_another_mark_keeps_the_connection_in_tls() -> None:
    def answer(secured: ssl.SSLSocket) -> None:
        secured.sendall(bytes(32) + content_head(0, 9, len(OBJECT.data)) + b"0123456789")

    with hostile_server(answer) as address:
        connection = connect(address, clear_identity(1))
        assert not connection.is_clear
        assert take(connection, 0, 10) == b"0123456789"
        connection.close()


@pytest.mark.parametrize("tells", [b"", b"half", None])
def test_a_client_that_does_not_end_tls_costs_a_thread_until_the_deadline(
    tmp_path: Path, tells: bytes | None
) -> None:
    options = {"handshake_timeout_s": DEADLINE_S}
    with file_server(tmp_path / "file", clear_identity(100), **options) as server:
        raw = socket.create_connection(server.address)
        raw.settimeout(WAIT_S)
        with clear_identity(1).clear_client_context.wrap_socket(raw) as secured:
            assert secured.selected_alpn_protocol() == CLEAR_PROTOCOL
            mark = bulk_clear.place_mark(secured.getsockname(), secured.getpeername())
            secured.sendall(mark if tells is None else tells)
            with socket.socket(fileno=os.dup(secured.fileno())) as plain, suppress(OSError):
                plain.settimeout(WAIT_S)
                while plain.recv(4096):  # whatever comes inside TLS, and then the end
                    pass
        assert server.statistics().connections == 0
        assert server.statistics().failed == 1


def test_a_client_that_never_heard_of_it_is_served_in_tls(tmp_path: Path) -> None:
    context = clear_identity(1).client_context
    with file_server(tmp_path / "file", clear_identity(100)) as server:
        raw = socket.create_connection(server.address)
        raw.settimeout(WAIT_S)
        with context.wrap_socket(raw) as secured:
            assert secured.selected_alpn_protocol() == APPLICATION_PROTOCOL
            secured.sendall(
                f"GET /tensor/{OBJECT.digest.hex()} HTTP/1.1\r\n"
                "Host: x\r\nRange: bytes=0-9\r\n\r\n".encode()
            )
            received = b""
            while not received.endswith(OBJECT.data[:10]):
                received += secured.recv(4096)


# ---- files and readers


def test_an_adopted_file_goes_by_the_buffer(tmp_path: Path, sent_files: list[int]) -> None:
    def adopted(path: Path) -> FileReader:
        return FileReader(path, 7, len(OBJECT.data), is_unchanged=lambda status: True)

    with file_server(tmp_path / "file", clear_identity(100), adopted) as server:
        connection = connect(server.address, clear_identity(1))
        assert connection.is_clear
        assert take(connection, 0, len(OBJECT.data)) == OBJECT.data
        assert not sent_files
        connection.close()


def test_a_file_that_is_too_short_ends_the_connection(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before " + OBJECT.data[:-1])
    with file_server(tmp_path / "file", clear_identity(100)) as server:
        connection = connect(server.address, clear_identity(1))
        with pytest.raises(Closed):
            take(connection, 0, len(OBJECT.data))
        connection.close()


def test_a_reader_that_stops_is_given_up(tmp_path: Path) -> None:
    closed = threading.Event()
    size = 256 << 20  # more than all buffers on the way hold

    class Reader(FileReader):
        def close(self) -> None:
            super().close()
            closed.set()

    path = tmp_path / "file"
    path.touch()
    os.truncate(path, size)
    options = {"read_patience_s": DEADLINE_S}
    with file_server(
        path, clear_identity(100), lambda path: Reader(path, 0, size), **options
    ) as server:
        connection = connect(server.address, clear_identity(1))
        connection.send_get(OBJECT.digest, 0, size)
        assert closed.wait(WAIT_S)
        assert server.statistics().failed == 1
        connection.close()


def test_abort_wakes_a_reader_in_the_clear() -> None:
    def go_clear(secured: ssl.SSLSocket) -> None:
        end = time.monotonic() + WAIT_S
        assert bulk_clear.agree(secured, clear_identity(100), "", end, server_side=True)
        bulk_clear.end_tls(secured, end)

    with hostile_server(go_clear) as address:
        connection = connect(address, clear_identity(1), stall_timeout_s=WAIT_S)
        assert connection.is_clear
        connection.send_get(OBJECT.digest, 0, 10)
        threading.Thread(target=connection.abort).start()
        with pytest.raises(Closed):
            connection.read_head()
        connection.close()
