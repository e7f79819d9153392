"""A small web server of a folder's files, with faults that tests switch on.

It answers GET and HEAD over HTTP/1.1 with keep-alive and single ranges, in a thread
per connection. `HttpOrigin.fault` makes it misbehave for one path: a fault takes the
answer that would have been right and returns another one. Every request is recorded
before it is answered.

Also a program, for demonstrations::

    python -m tests.support.http_origin FOLDER --port 8080
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self
from urllib.parse import unquote, urlsplit

MAX_WAIT_S = 60.0
"""Longest wait for a test's event: a test that failed must not leave threads behind."""

LIMITED_SLICE_BYTES = 32 << 10
"""Bytes sent at once when all connections share a rate."""


class Seen(NamedTuple):
    """A request that arrived.

    Attributes
    ----------
    method, path : str
        What was asked; the path is relative to the folder.
    headers : Mapping[str, str]
        By lower-case name.
    at_s : float
        When, in seconds of the monotonic clock.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    at_s: float

    @property
    def range(self) -> str | None:
        """The ``Range`` header."""
        return self.headers.get("range")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is sent: for a file, bytes `start` to `stop` of it; else `pieces`.

    `pieces`, when given, are sent in place of the file's bytes, each at once.
    `header_lines` is sent raw in place of the status line and `headers`.
    Without a Content-Length among the headers the connection's end ends the body.
    """

    status: int
    headers: Mapping[str, str]
    file: Path | None = None
    file_size: int = 0
    start: int = 0
    stop: int = 0
    pieces: Iterable[bytes] | None = None
    header_lines: Iterable[bytes] | None = None
    closes: bool = False

    def with_headers(self, **changes: str | None) -> Answer:
        """Return a copy with headers set, or removed by None; ``_`` stands for ``-``."""
        headers = dict(self.headers)
        for name, value in changes.items():
            name = name.replace("_", "-")
            headers.pop(name, None)
            if value is not None:
                headers[name] = value
        return dataclasses.replace(self, headers=headers)

    def body(self) -> bytes:
        """Return the bytes that would be sent."""
        if self.pieces is not None:
            return b"".join(self.pieces)
        if self.file is None:
            return b""
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)


Fault = Callable[[Answer, "HttpOrigin"], Answer | None]
"""Turns the right answer into another; None closes the connection without one."""


class HttpOrigin:
    """The server. Use it in a ``with`` statement.

    Parameters
    ----------
    folder : Path
        What it serves.
    host : str
        Address to listen on.
    port : int
        Port; 0 takes a free one.
    tls : ssl.SSLContext or None
        With one, the server speaks HTTPS.
    bytes_per_s : float or None
        What it sends of files in all, over all connections; None for no limit.

    Attributes
    ----------
    body_bytes_sent : int
        What it has sent of files.
    """

    def __init__(
        self,
        folder: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        bytes_per_s: float | None = None,
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self.body_bytes_sent = 0
        self._line_free_at_s = 0.0
        self.folder = folder.resolve()
        self.stopping = threading.Event()
        self.connections_accepted = 0
        self._lock = threading.Lock()
        self._seen: list[Seen] = []
        self._faults: dict[str, list[Fault | None]] = {}
        self._connections: set[socket.socket] = set()
        self._scheme = "http" if tls is None else "https"
        self._server = _Server((host, port), self, tls)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def url(self) -> str:
        """The folder's URL, with a slash at its end."""
        host, port = self._server.server_address[:2]
        return f"{self._scheme}://{host!s}:{port}/"

    @property
    def seen(self) -> list[Seen]:
        """The requests so far, in order of arrival."""
        with self._lock:
            return list(self._seen)

    def fault(self, path: str, *faults: Fault | None) -> None:
        """Answer a path's requests with these faults in turn; the last one stays.

        None stands for the right answer; no faults at all end the misbehaviour.
        """
        with self._lock:
            self._faults[path] = list(faults)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Close all connections and stop listening."""
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    # For TLS too only the socket: its threads may be writing.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def wait(self) -> None:
        """Wait until the server is stopped."""
        self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # Called from the connections' threads.

    def record(self, seen: Seen) -> Fault | None:
        """Keep a request; return the fault that its answer gets."""
        with self._lock:
            self._seen.append(seen)
            faults = self._faults.get(seen.path)
            if not faults:
                return None
            return faults.pop(0) if len(faults) > 1 else faults[0]

    def wait_turn(self, byte_count: int) -> None:
        """Count bytes that are about to be sent, and wait as long as the line needs."""
        with self._lock:
            self.body_bytes_sent += byte_count
            if self.bytes_per_s is None:
                return
            begin_s = max(self._line_free_at_s, time.monotonic())
            self._line_free_at_s = begin_s + byte_count / self.bytes_per_s
            wait_s = self._line_free_at_s - time.monotonic()
        self.stopping.wait(wait_s)

    def opened(self, connection: socket.socket) -> None:
        """Note a connection, to be closed by `stop`."""
        with self._lock:
            self.connections_accepted += 1
            self._connections.add(connection)

    def closed(self, connection: socket.socket) -> None:
        """Forget a connection."""
        with self._lock:
            self._connections.discard(connection)

    def right_answer(self, path: str, range_header: str | None) -> Answer:
        """Return what a well-behaved server answers."""
        file = (self.folder / path).resolve()
        if not file.is_relative_to(self.folder) or not file.is_file():
            return _status_answer(HTTPStatus.NOT_FOUND)
        size = file.stat().st_size
        headers = {
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "Content-Length": str(size),
        }
        whole = Answer(HTTPStatus.OK, headers, file, size, 0, size)
        span = _parse_range(range_header, size)
        if span is None:
            return whole
        start, stop = span
        if start >= stop:
            answer = _status_answer(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            return answer.with_headers(Content_Range=f"bytes */{size}")
        return dataclasses.replace(
            whole, status=HTTPStatus.PARTIAL_CONTENT, start=start, stop=stop
        ).with_headers(
            Content_Length=str(stop - start), Content_Range=f"bytes {start}-{stop - 1}/{size}"
        )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(
        self, address: tuple[str, int], origin: HttpOrigin, tls: ssl.SSLContext | None
    ) -> None:
        self.origin = origin
        super().__init__(address, _Handler)
        if tls is not None:
            # The handshake is left to the connection's thread, at its first read.
            self.socket = tls.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that hang up; raise nothing away from the test."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.origin.opened(self.connection)

    def finish(self) -> None:
        self.server.origin.closed(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def do_GET(self) -> None:  # noqa: N802 - the name that the base class calls
        origin = self.server.origin
        # A client that uses us as its proxy names the host as well.
        path = unquote(urlsplit(self.path).path).lstrip("/")
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = origin.record(Seen(self.command, path, headers, time.monotonic()))
        answer: Answer | None = origin.right_answer(path, headers.get("range"))
        if fault is not None and answer is not None:
            answer = fault(answer, origin)
        if answer is None:
            self.close_connection = True
            return
        try:
            self._send(answer)
        except OSError:  # the client went away
            self.close_connection = True

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing; requests are recorded."""

    def _send(self, answer: Answer) -> None:
        if answer.header_lines is not None:
            self.close_connection = True
            for line in answer.header_lines:
                self.wfile.write(line)
            return
        if answer.closes or "Content-Length" not in answer.headers:
            self.close_connection = True
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        if answer.pieces is not None:
            for piece in answer.pieces:
                self.wfile.write(piece)
        elif answer.file is not None:
            with answer.file.open("rb") as file:
                self._send_file(file, answer.start, answer.stop)

    def _send_file(self, file: BinaryIO, start: int, stop: int) -> None:
        origin = self.server.origin
        slice_bytes = stop - start if origin.bytes_per_s is None else LIMITED_SLICE_BYTES
        while start < stop:
            count = min(slice_bytes, stop - start)
            origin.wait_turn(count)
            self.connection.sendfile(file, start, count)
            start += count


def _status_answer(status: int, **headers: str) -> Answer:
    answer = Answer(status, {"Content-Length": "0"}, pieces=())
    return answer.with_headers(**headers)


def _parse_range(text: str | None, size: int) -> tuple[int, int] | None:
    """Return start and stop of a single range; None for none or a form not served."""
    unit, _, spec = (text or "").partition("=")
    first, dash, last = spec.partition("-")
    if unit != "bytes" or not dash or not (first + last).isdecimal():
        return None
    if not first:
        return max(0, size - int(last)), size
    if not last:
        return int(first), size
    return int(first), min(int(last) + 1, size)


# Faults.


def ignore_range(answer: Answer, origin: HttpOrigin) -> Answer:
    """Send the whole file, whatever was asked."""
    size = answer.file_size
    whole = dataclasses.replace(answer, status=200, start=0, stop=size)
    return whole.with_headers(Content_Range=None, Content_Length=str(size))


def ignore_range_and_length(answer: Answer, origin: HttpOrigin) -> Answer:
    """Send the whole file without its length: the connection's end ends it."""
    return ignore_range(answer, origin).with_headers(Content_Length=None)


def status(code: int, **headers: str) -> Fault:
    """Answer with a status and no body; ``Retry_After="3"`` sets ``Retry-After``."""
    return lambda answer, origin: _status_answer(code, **headers)


def redirect(location: str, code: int = 302) -> Fault:
    """Redirect elsewhere."""
    return status(code, Location=location)


def headers(**changes: str | None) -> Fault:
    """Set headers of the right answer, or with None remove them."""
    return lambda answer, origin: answer.with_headers(**changes)


def shift_range(answer: Answer, origin: HttpOrigin) -> Answer:
    """Send the same bytes as another range of the file."""
    first, last = answer.start + 1, answer.stop
    return answer.with_headers(Content_Range=f"bytes {first}-{last}/{answer.file_size + 1}")


def cut_after(byte_count: int) -> Fault:
    """Close the connection after so many bytes of the body."""

    def fault(answer: Answer, origin: HttpOrigin) -> Answer:
        return dataclasses.replace(answer, stop=answer.start + byte_count, closes=True)

    return fault


def append(extra: bytes) -> Fault:
    """Send more than was asked, with a body that the connection's end ends."""

    def fault(answer: Answer, origin: HttpOrigin) -> Answer:
        longer = dataclasses.replace(answer, pieces=(answer.body(), extra))
        return longer.with_headers(Content_Length=None)

    return fault


def compress(answer: Answer, origin: HttpOrigin) -> Answer:
    """Send the body packed with gzip, though nobody asked for that."""
    packed = gzip.compress(answer.body(), compresslevel=1)
    return dataclasses.replace(answer, pieces=(packed,)).with_headers(
        Content_Encoding="gzip", Content_Length=str(len(packed))
    )


def change_bytes(offset: int) -> Fault:
    """Send another byte at an offset of the file."""

    def fault(answer: Answer, origin: HttpOrigin) -> Answer:
        data = bytearray(answer.body())
        if answer.start <= offset < answer.stop:
            data[offset - answer.start] ^= 0xFF
        return dataclasses.replace(answer, pieces=(bytes(data),))

    return fault


def trickle(interval_s: float, free_bytes: int = 0) -> Fault:
    """Send a byte at a time with a pause after each, once `free_bytes` are sent."""

    def fault(answer: Answer, origin: HttpOrigin) -> Answer:
        data = answer.body()
        slow = _slowly((data[i : i + 1] for i in range(free_bytes, len(data))), interval_s, origin)
        return dataclasses.replace(answer, pieces=_chain(data[:free_bytes], slow))

    return fault


def hang(answer: Answer, origin: HttpOrigin) -> None:
    """Never answer."""
    origin.stopping.wait()


def pause_at(
    byte_count: int,
    event: threading.Event | None = None,
    second: int | None = None,
    second_event: threading.Event | None = None,
) -> Fault:
    """Send so many bytes of the body, and the rest after an event, or never without one.

    There may be a second place to pause at, further on in the body.
    """

    def pieces(answer: Answer, origin: HttpOrigin) -> Iterator[bytes]:
        data = answer.body()
        yield data[:byte_count]
        if not (event or origin.stopping).wait(MAX_WAIT_S) or event is None:
            return
        yield data[byte_count:second]
        if second is not None and second_event is not None and second_event.wait(MAX_WAIT_S):
            yield data[second:]

    return lambda answer, origin: dataclasses.replace(answer, pieces=pieces(answer, origin))


def tell(event: threading.Event) -> Fault:
    """Set an event, and give the right answer."""

    def fault(answer: Answer, origin: HttpOrigin) -> Answer:
        event.set()
        return answer

    return fault


def rendezvous(count: int, then: Fault) -> Fault:
    """Answer only when so many requests are here, in the way of another fault."""
    barrier = threading.Barrier(count)

    def fault(answer: Answer, origin: HttpOrigin) -> Answer | None:
        barrier.wait(MAX_WAIT_S)
        return then(answer, origin)

    return fault


def body(pieces: Iterable[bytes]) -> Fault:
    """Send this body, which the connection's end ends."""

    def fault(answer: Answer, origin: HttpOrigin) -> Answer:
        return dataclasses.replace(answer, pieces=pieces).with_headers(Content_Length=None)

    return fault


def wait_for(event: threading.Event) -> Fault:
    """Give the right answer, but only after an event."""

    def fault(answer: Answer, origin: HttpOrigin) -> Answer:
        event.wait(MAX_WAIT_S)
        return answer

    return fault


def endless_header(interval_s: float = 0.0) -> Fault:
    """Send header lines without end, with a pause after each."""

    def lines(origin: HttpOrigin) -> Iterator[bytes]:
        yield b"HTTP/1.1 206 Partial Content\r\n"
        while not origin.stopping.is_set():
            yield b"X-More: more\r\n"

    def fault(answer: Answer, origin: HttpOrigin) -> Answer:
        return dataclasses.replace(answer, header_lines=_slowly(lines(origin), interval_s, origin))

    return fault


def raw(data: bytes) -> Fault:
    """Send these bytes in place of an answer, and close the connection."""
    return lambda answer, origin: dataclasses.replace(answer, header_lines=(data,))


def close(answer: Answer, origin: HttpOrigin) -> None:
    """Close the connection without an answer."""


def both(first: Fault, second: Fault) -> Fault:
    """Apply two faults, one after the other."""

    def fault(answer: Answer, origin: HttpOrigin) -> Answer | None:
        changed = first(answer, origin)
        return changed and second(changed, origin)

    return fault


def _slowly(pieces: Iterable[bytes], interval_s: float, origin: HttpOrigin) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        if interval_s and origin.stopping.wait(interval_s):
            return


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def main(arguments: list[str] | None = None) -> int:
    """Serve a folder until interrupted."""
    parser = argparse.ArgumentParser(
        prog="http_origin", description="Serve a folder's files over HTTP, with ranges."
    )
    parser.add_argument("folder", type=Path, help="what to serve")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port, 0 for any (%(default)s)")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"not a folder: {options.folder}")
    with HttpOrigin(options.folder, host=options.host, port=options.port) as origin:
        sys.stdout.write(f"{origin.url}\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            origin.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
