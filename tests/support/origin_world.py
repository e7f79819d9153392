"""A little model at an HTTP server, and all that a test of fetching it needs."""

from __future__ import annotations

import ipaddress
import itertools
import os
import queue
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tensorswarm.p2p.origins.origin import FileRange, Place, file_url
from tensorswarm.p2p.origins.source import OriginSource
from tensorswarm.p2p.swarm.source import Failure, Outcome, Report, Request, Sink, Span, WantedObject
from tensorswarm.store.digest import CHUNK_SIZE, chunk_count, digest_of
from tests.support.http_origin import HttpOrigin

WAIT_S = 60.0
"""Longest wait for something that must happen; no test waits that long unless it fails."""

# What the tests' model is made of: two files, the first with three objects behind a
# header that nobody wants.
HEADER = b"header" * 11
WEIGHTS, BIAS, NORM, OTHER = 0, 1, 2, 3
OBJECTS = [
    os.urandom(2 * CHUNK_SIZE + 1000),
    os.urandom(100),
    os.urandom(CHUNK_SIZE),
    os.urandom(300_000),
]
MODEL = HEADER + OBJECTS[WEIGHTS] + OBJECTS[BIAS] + OBJECTS[NORM]
PLACES: dict[int, Place] = {
    WEIGHTS: FileRange("model.bin", len(MODEL), len(HEADER)),
    BIAS: FileRange("model.bin", len(MODEL), len(HEADER) + len(OBJECTS[WEIGHTS])),
    NORM: FileRange("model.bin", len(MODEL), len(MODEL) - CHUNK_SIZE),
    OTHER: FileRange("sub/other.bin", len(OBJECTS[OTHER]), 0),
}
PATHS = ["model.bin", "sub/other.bin"]
EVERYTHING = tuple(Span(index, 0, chunk_count(len(data))) for index, data in enumerate(OBJECTS))
IN_MODEL = EVERYTHING[:OTHER]
HEAD = (Span(WEIGHTS, 0, 1),)
"""The first chunk of the model, for tests that need just any bytes of a file."""


class Chunk(NamedTuple):
    request_id: int
    object_index: int
    chunk: int
    outcome: Outcome
    byte_count: int


class End(NamedTuple):
    request_id: int | None
    failure: Failure | None
    detail: str


class MemorySink(Sink):
    """Keeps chunks in memory once their hashes are right."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.chunks: dict[tuple[int, int], bytes] = {}
        self.unwanted: set[tuple[int, int]] = set()
        self.error: Exception | None = None

    def wanted(self, object_index: int) -> WantedObject:
        data = OBJECTS[object_index]
        return WantedObject(digest_of(data), len(data))

    def is_missing(self, object_index: int, chunk: int) -> bool:
        with self.lock:
            key = (object_index, chunk)
            return key not in self.chunks and key not in self.unwanted

    def write_chunk(self, object_index: int, chunk: int, data: memoryview) -> Outcome:
        if self.error is not None:
            raise self.error
        start = chunk * CHUNK_SIZE
        if digest_of(data) != digest_of(OBJECTS[object_index][start : start + CHUNK_SIZE]):
            return Outcome.REFUSED
        with self.lock:
            if (object_index, chunk) in self.chunks:
                return Outcome.DUPLICATE
            self.chunks[object_index, chunk] = bytes(data)
        return Outcome.PROVED

    def content(self, object_index: int) -> bytes:
        count = chunk_count(len(OBJECTS[object_index]))
        return b"".join(self.chunks.get((object_index, chunk), b"") for chunk in range(count))


class Log(Report):
    """Keeps what was reported, and lets a test wait for it."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.byte_count = 0
        self._events: queue.SimpleQueue[Chunk | End] = queue.SimpleQueue()
        self._ends: dict[int | None, End] = {}

    def progress(self, source: str, request_id: int, byte_count: int) -> None:
        self.byte_count += byte_count  # tests that look at it use one connection

    def chunk(
        self,
        source: str,
        request_id: int,
        object_index: int,
        chunk: int,
        outcome: Outcome,
        byte_count: int,
    ) -> None:
        entry = Chunk(request_id, object_index, chunk, outcome, byte_count)
        self.chunks.append(entry)
        self._events.put(entry)

    def done(self, source: str, request_id: int) -> None:
        self._events.put(End(request_id, None, ""))

    def failed(self, source: str, request_id: int | None, failure: Failure, detail: str) -> None:
        self._events.put(End(request_id, failure, detail))

    def end(self, request_id: int | None) -> End:
        while request_id not in self._ends:
            event = self._events.get(timeout=WAIT_S)
            if isinstance(event, End):
                assert event.request_id not in self._ends, "a request ended twice"
                self._ends[event.request_id] = event
        return self._ends[request_id]

    def wait_for_chunk(self, object_index: int, chunk: int) -> None:
        while (object_index, chunk) not in [entry[1:3] for entry in self.chunks]:
            self._events.get(timeout=WAIT_S)

    def ended(self) -> set[int | None]:
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, End):
                self._ends[event.request_id] = event
        return set(self._ends)


class World:
    """A server with the model, and a source that fetches from it."""

    def __init__(self, folder: Path) -> None:
        (folder / "sub").mkdir(parents=True)
        (folder / "model.bin").write_bytes(MODEL)
        (folder / "sub" / "other.bin").write_bytes(OBJECTS[OTHER])
        self.folder = folder
        self.server = HttpOrigin(folder)
        self.server.start()
        self.sink = MemorySink()
        self.log = Log()
        self._sources: list[OriginSource] = []
        self._ids = itertools.count(1)

    def source(self, origin: str | None = None, **options: Any) -> OriginSource:
        origin = origin or self.server.url
        urls = {path: file_url(origin, path, PATHS) for path in PATHS}
        # Times are far above what a slow machine needs; tests of time-outs set their own.
        times = {"stall_timeout_s": WAIT_S, "progress_timeout_s": WAIT_S, "max_pause_s": 0.0}
        source = OriginSource(origin, PLACES, urls, self.sink, self.log, **(times | options))
        self._sources.append(source)
        return source

    def submit(self, source: OriginSource, spans: tuple[Span, ...]) -> int:
        request_id = next(self._ids)
        source.submit(Request("origin", request_id, spans))
        return request_id

    def ask(self, source: OriginSource, spans: tuple[Span, ...]) -> End:
        return self.log.end(self.submit(source, spans))

    def gets(self, path: str) -> int:
        return sum(seen.path == path for seen in self.server.seen)

    def has(self, *object_indices: int) -> bool:
        return all(self.sink.content(index) == OBJECTS[index] for index in object_indices)

    def close(self) -> None:
        for source in self._sources:
            source.close()
        self.server.stop()
        assert all(source.join(WAIT_S) for source in self._sources)


def self_signed(path: Path) -> ssl.SSLContext:
    """Write a new certificate for 127.0.0.1 to `path`; return a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    now = datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    pem = serialization.Encoding.PEM
    path.write_bytes(
        key.private_bytes(pem, form, serialization.NoEncryption()) + certificate.public_bytes(pem)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context
