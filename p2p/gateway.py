"""A plain HTTP door to the store, for programs that speak nothing else.

``GET /model/<model id>/<path>`` gives a file of a model, ``GET /tensor/<digest>`` the
bytes of a tensor or blob; both take a single ``Range``. So any node can be another's
``--origin``. There is no listing: who asks must know the hash.

Everything given was verified when it was stored. Built on the standard library's
server: the bulk plane is the fast way, this is the common one.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from tensorswarm.store.checking import iterate_part
from tensorswarm.store.cid import MODEL_CODEC, parse_reference
from tensorswarm.store.errors import BadInput, TensorswarmError
from tensorswarm.store.manifest import Manifest
from tensorswarm.store.store import Store
from tensorswarm.store.version import VERSION

from .host.addresses import parse_listen, tcp_host
from .limits.rates import RateLimiter

MAX_CONNECTIONS = 64
"""Connections served at once; each holds a thread."""

REQUEST_TIMEOUT_S = 30.0
"""Longest wait for a client to ask, or to take what it is sent, in seconds."""

BUFFER_SIZE = 1 << 20
"""Bytes read from the store at a time."""

_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


class Gateway:
    """The HTTP server of a node.

    Parameters
    ----------
    store : Store
        What it gives.
    address : str
        ``host:port`` to listen on; port 0 for any free one.
    limiter : RateLimiter, optional
        Holds what is sent below a rate, fairly between the clients' addresses.

    is_public : callable, optional
        Tells whether anybody may have an object; others are answered as missing.

    Raises
    ------
    BadInput
        The address is malformed or cannot be listened on.
    """

    def __init__(
        self,
        store: Store,
        address: str,
        limiter: RateLimiter | None = None,
        is_public: Callable[[bytes], bool] = lambda _digest: True,
    ) -> None:
        host, port = tcp_host(parse_listen(address))
        try:
            self._server = _Server((host, port), store, limiter, is_public)
        except OSError as error:
            raise BadInput(f"cannot serve HTTP on {address}: {error.strerror}") from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="gateway", daemon=True
        )

    @property
    def url(self) -> str:
        """Where it can be reached."""
        host, port = self._server.server_address[:2]
        text = host.decode() if isinstance(host, bytes) else str(host)
        return f"http://{f'[{text}]' if ':' in text else text}:{port}"

    def start(self) -> None:
        """Serve in a thread of its own."""
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


class _Part(NamedTuple):
    """A part of what is sent; with a manifest it may be one that a recipe makes."""

    digest: bytes
    size_bytes: int
    manifest: Manifest | None = None
    place: int = 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        address: tuple[str, int],
        store: Store,
        limiter: RateLimiter | None,
        is_public: Callable[[bytes], bool],
    ) -> None:
        self.is_public = is_public
        self.store = store
        self.limiter = limiter
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, _Handler)

    def process_request(self, request: object, client_address: object) -> None:
        if not self.slots.acquire(blocking=False):
            self.shutdown_request(request)  # type: ignore[arg-type]
            return
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self.slots.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """Do nothing: a client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = f"tensorswarm/{VERSION}"
    sys_version = ""
    timeout = REQUEST_TIMEOUT_S

    def __init__(self, request: object, client_address: object, server: BaseServer) -> None:
        assert isinstance(server, _Server)
        self._store = server.store
        self._limiter = server.limiter
        self._is_public = server.is_public
        super().__init__(request, client_address, server)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep quiet: requests are not logged."""

    def do_GET(self) -> None:
        """Answer a GET."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Answer a HEAD."""
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        try:
            parts = self._parts()
        except (BadInput, UnicodeDecodeError):
            parts = None
        if not parts or not all(self._is_public(part.digest) for part in parts):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        size = sum(part.size_bytes for part in parts)
        start, stop = 0, size
        header = self.headers.get("Range")
        if header is not None:
            found = parse_range(header, size)
            if found is None:
                self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start, stop = found
        self.send_response(HTTPStatus.OK if header is None else HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        if header is not None:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if with_body:
            self._send(parts, start, stop)

    def _parts(self) -> list[_Part] | None:
        """Return what makes up what is asked for."""
        _, kind, name, *rest = [*urlsplit(self.path).path.split("/", 3), "", ""]
        reference = parse_reference(unquote(name))
        if kind == "tensor" and not rest[0]:
            record = self._store.records([reference.digest]).get(reference.digest)
            return None if record is None else [_Part(record.digest, record.size_bytes)]
        if kind != "model" or reference.codec != MODEL_CODEC:
            return None
        manifest = self._store.manifest(reference.digest)
        if manifest is None:
            return None
        file = manifest.file_by_path.get(unquote(rest[0], errors="strict"))
        if file is None or self._store.missing_objects(manifest, manifest.objects_of(file.parts)):
            return None
        return [_Part(manifest.digest_of(i), manifest.size_of(i), manifest, i) for i in file.parts]

    def _send(self, parts: list[_Part], start: int, stop: int) -> None:
        buffer = memoryview(bytearray(BUFFER_SIZE))
        position = 0
        for part in parts:
            end = position + part.size_bytes
            first, last = max(start, position), min(stop, end)
            if first < last and part.manifest is not None and part.manifest.recipe(part.place):
                self._send_made(part.manifest, part.place, first - position, last - position)
            elif first < last:
                self._send_object(part.digest, first - position, last - position, buffer)
            position = end

    def _send_made(self, manifest: Manifest, index: int, start: int, stop: int) -> None:
        """Send a range of what a recipe makes: made from the beginning, as it has to be.

        It is made once before, to verify it: a recipe is the word of who made the manifest.
        """
        position = 0
        try:
            for _ in iterate_part(self._store, manifest, index):
                pass
            for block in iterate_part(self._store, manifest, index):
                self.wfile.write(block[max(0, start - position) : max(0, stop - position)])
                position += len(block)
                if position >= stop:
                    return
        except (OSError, TensorswarmError):
            self.close_connection = True
            raise

    def _send_object(self, digest: bytes, start: int, stop: int, buffer: memoryview) -> None:
        reader = self._store.open_reader(digest)
        if reader is None:
            self.close_connection = True
            raise ConnectionAbortedError("an object went away while it was sent")
        try:
            for offset in range(start, stop, len(buffer)):
                view = buffer[: min(len(buffer), stop - offset)]
                reader.read_into(offset, view)
                self._write(view)
        except (OSError, TensorswarmError):
            self.close_connection = True  # too late for an error status: the client sees it short
            raise
        finally:
            reader.close()

    def _write(self, view: memoryview) -> None:
        """Send bytes; each slice has the whole time-out."""
        if self._limiter is None:
            self.wfile.write(view)
            return
        for start in range(0, len(view), self._limiter.slice_bytes):
            part = view[start : start + self._limiter.slice_bytes]
            self._limiter.take(self.client_address[0], len(part))
            self.wfile.write(part)


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """Read a single byte range (RFC 9110, section 14.1.2).

    Returns
    -------
    tuple of int or None
        First byte, and the byte after the last; None when it cannot be given.
    """
    match = _RANGE.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1 if last else size)
    return (start, stop) if start < stop else None
