"""In-memory stand-ins for the bulk plane's neighbours, and peers that misbehave.

`MemoryShelf` takes the place of the store on the serving side, `MemorySink` on the
receiving side, and `RecordingReport` that of the planner. `ScriptedPeer` is a real TLS
server that answers whatever a test tells it to.
"""

from __future__ import annotations

import errno
import random
import socket
import ssl
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple

from libp2p.crypto.ed25519 import create_new_key_pair

from tensorswarm.p2p.bulk.server import BulkServer
from tensorswarm.p2p.bulk.tls import BulkIdentity
from tensorswarm.p2p.swarm.source import Failure, Outcome, Sink, SmallBatch, WantedObject
from tensorswarm.store.digest import CHUNK_SIZE, chunk_count, digest_of, split_chunk_list
from tensorswarm.store.digest import chunk_list_of as list_of

WAIT_S = 10.0
"""Longest wait for something that must happen; a test that works never waits that long."""


@cache
def identity(number: int) -> BulkIdentity:
    """Return the same identity for the same number."""
    return BulkIdentity(create_new_key_pair(bytes([number]) * 32))


class TestObject(NamedTuple):
    """An object and what verifies it."""

    __test__ = False

    digest: bytes
    data: bytes
    chunk_digests: tuple[bytes, ...]


def make_object(size_bytes: int, seed: int = 0) -> TestObject:
    """Make an object of random bytes."""
    data = random.Random(seed).randbytes(size_bytes)
    digest = digest_of(data)
    chunks = tuple(split_chunk_list(list_of(data))) or (digest,)
    return TestObject(digest, data, chunks)


class MemoryReader:
    """Reads an object in memory. `proved` are the chunks that may be served."""

    def __init__(self, data: bytes, proved: frozenset[int] | None, shelf: MemoryShelf) -> None:
        self.size_bytes = len(data)
        self._data = memoryview(data)
        self._proved = proved
        self._shelf = shelf

    def covers(self, offset: int, length: int) -> bool:
        if offset + length > self.size_bytes:
            return False
        chunks = range(offset // CHUNK_SIZE, -(-(offset + length) // CHUNK_SIZE))
        return self._proved is None or all(chunk in self._proved for chunk in chunks)

    def read_into(self, offset: int, view: memoryview) -> None:
        if self._shelf.broken:
            raise OSError(errno.EIO, "the disk is broken")
        view[:] = self._data[offset : offset + len(view)]

    def close(self) -> None:
        self._shelf.reader_closed.set()


class MemoryShelf:
    """What a server has. Give its `open_reader` to a `BulkServer`."""

    def __init__(self, *objects: TestObject) -> None:
        self.data = {each.digest: each.data for each in objects}
        self.proved: dict[bytes, frozenset[int]] = {}
        self.opened: list[bytes] = []
        self.reader_closed = threading.Event()
        self.broken = False
        self.before_open: Callable[[], object] = lambda: None

    def open_reader(self, digest: bytes) -> MemoryReader | None:
        self.before_open()
        self.opened.append(digest)
        data = self.data.get(digest)
        return None if data is None else MemoryReader(data, self.proved.get(digest), self)


class MemorySink(Sink):
    """What a download wants; verifies chunks and keeps them."""

    def __init__(self, *objects: TestObject) -> None:
        self.objects = objects
        self.kept: dict[tuple[int, int], bytes] = {}
        self.unwanted: set[tuple[int, int]] = set()
        self.fault: Exception | None = None

    def wanted(self, object_index: int) -> WantedObject:
        each = self.objects[object_index]
        return WantedObject(each.digest, len(each.data))

    def is_missing(self, object_index: int, chunk: int) -> bool:
        key = (object_index, chunk)
        return key not in self.kept and key not in self.unwanted

    def write_chunk(self, object_index: int, chunk: int, data: memoryview) -> Outcome:
        if self.fault is not None:
            raise self.fault
        if digest_of(data) != self.objects[object_index].chunk_digests[chunk]:
            return Outcome.REFUSED
        if (object_index, chunk) in self.kept:
            return Outcome.DUPLICATE
        self.kept[object_index, chunk] = bytes(data)
        return Outcome.PROVED

    def write_small(self, parts: Sequence[tuple[int, bytes | memoryview]]) -> list[Outcome]:
        return [self.write_chunk(index, 0, memoryview(data)) for index, data in parts]

    def data_of(self, object_index: int) -> bytes:
        """Return what was kept of an object, chunks in order."""
        chunks = range(chunk_count(len(self.objects[object_index].data)))
        return b"".join(self.kept.get((object_index, chunk), b"") for chunk in chunks)


class RecordingReport:
    """Remembers what it was told, and lets a test wait for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.progressed: list[tuple[int, int]] = []
        self.chunks: list[tuple[int, int, int, Outcome, int]] = []
        self.finished: list[int] = []
        self.failures: list[tuple[int | None, Failure, str]] = []

    def progress(self, source: str, request_id: int, byte_count: int) -> None:
        self._note(self.progressed, (request_id, byte_count))

    def chunk(
        self,
        source: str,
        request_id: int,
        object_index: int,
        chunk: int,
        outcome: Outcome,
        byte_count: int,
    ) -> None:
        self._note(self.chunks, (request_id, object_index, chunk, outcome, byte_count))

    def small(self, source: str, request_id: int, batch: SmallBatch) -> None:
        """Note objects that came together; those that were right with their mean size."""
        for index in batch.proved:
            byte_count = batch.proved_bytes // len(batch.proved)
            self._note(self.chunks, (request_id, index, 0, Outcome.PROVED, byte_count))
        for index, outcome, byte_count in batch.others:
            self._note(self.chunks, (request_id, index, 0, outcome, byte_count))

    def done(self, source: str, request_id: int) -> None:
        self._note(self.finished, request_id)

    def failed(self, source: str, request_id: int | None, failure: Failure, detail: str) -> None:
        self._note(self.failures, (request_id, failure, detail))

    def _note(self, events: list[Any], event: object) -> None:
        with self._changed:
            events.append(event)
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on what was reported holds."""
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_S), (
                f"waited in vain; done {self.finished}, failed {self.failures}"
            )

    def wait_done(self, *request_ids: int) -> None:
        """Wait until these requests are done, and check that nothing failed."""
        self.wait_for(lambda: bool(self.failures) or set(request_ids) <= set(self.finished))
        assert not self.failures

    def wait_failure(self) -> tuple[int | None, Failure, str]:
        """Wait for a failure and return the first."""
        self.wait_for(lambda: bool(self.failures))
        return self.failures[0]


class ScriptedPeer:
    """A TLS server whose answers a test writes. Made by `scripted_peer`."""

    def __init__(self, scripts: Sequence[Callable[[ScriptedConnection], None]]) -> None:
        self.identity = identity(200)
        self.ended = threading.Event()
        self.served = 0
        self._scripts = scripts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(WAIT_S)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            for script in self._scripts:
                sock, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(sock, script), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, raw: socket.socket, script: Callable[[ScriptedConnection], None]) -> None:
        raw.settimeout(WAIT_S)
        with (
            suppress(OSError),  # the other side gave up, as it should
            self.identity.server_context.wrap_socket(raw, server_side=True) as sock,
        ):
            self.served += 1
            script(ScriptedConnection(sock, self))

    def stop(self) -> None:
        self.ended.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in list(self._threads):
            thread.join(WAIT_S)


class ScriptedConnection:
    """What a script has in hand: one connection of a `ScriptedPeer`."""

    def __init__(self, sock: ssl.SSLSocket, peer: ScriptedPeer) -> None:
        self._sock = sock
        self._peer = peer
        self._received = b""

    def read_request(self) -> bytes:
        """Return the next request's head."""
        while b"\r\n\r\n" not in self._received:
            data = self._sock.recv(1 << 14)
            if not data:
                raise ConnectionError("no further request")
            self._received += data
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        return head

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def hold(self) -> None:
        """Do nothing until the test is over."""
        self._peer.ended.wait(WAIT_S)


@contextmanager
def scripted_peer(*scripts: Callable[[ScriptedConnection], None]) -> Iterator[ScriptedPeer]:
    """Run a server that carries out one script for each connection, in order."""
    peer = ScriptedPeer(scripts)
    try:
        yield peer
    finally:
        peer.stop()


class RecordingGate:
    """Lets everybody through, and notes who came."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.ended = 0
        self.given: list[bytes] = []

    def concerns(self, peer_id: str, digest: bytes) -> bool:
        return True

    def ask(self, peer_id: str, digest: bytes, offset: int) -> Hashable:
        self.asked.append(digest)
        return len(self.asked)

    def end(self, ticket: object) -> None:
        self.ended += 1

    def gave(self, peer_id: str, digests: Sequence[bytes]) -> None:
        self.given += digests


@contextmanager
def bulk_server(
    shelf: MemoryShelf, allow: Callable[[str], bool] = lambda peer_id: True, **options: object
) -> Iterator[BulkServer]:
    """Run a real server with identity 100 on the loopback interface."""
    options.setdefault("host", "127.0.0.1")
    server = BulkServer(identity(100), shelf.open_reader, allow, **options)  # type: ignore[arg-type]
    server.start()
    try:
        yield server
    finally:
        server.close()


def content_head(first: int, last: int, size: int, *extra: str, length: int | None = None) -> bytes:
    """Return the head of an answer, right unless told otherwise."""
    lines = [
        "HTTP/1.1 206 Partial Content",
        f"Content-Range: bytes {first}-{last}/{size}",
        f"Content-Length: {last - first + 1 if length is None else length}",
        *extra,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
