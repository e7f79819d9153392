"""One thread's HTTP exchanges with one origin: ask for a range, get exact bytes.

`OriginClient` wraps an httpx client, which brings redirects, user names and
passwords from the URL or netrc, proxies from the environment, and TLS. Around it
this module holds the rules that make a hostile or broken server harmless:

- Every wait ends. httpx bounds a single read; a `Guard` bounds the whole of the
  headers, and the time for each `MIN_PROGRESS_BYTES` of a body, against servers that
  send a byte now and then. Waiting for our own limit does not count.
- At most `MAX_REDIRECTS`, whose bodies are not kept, and only the origin itself
  sees our credentials and the caller's headers.
- The answer must be what was asked: status, ``Content-Range``, length, no content
  encoding. Bytes are never unpacked here.
- Cookies live for one exchange with its redirects, so a server cannot fill memory.

Whatever goes wrong with a server leaves as an `OriginFailure`; httpx's errors are
translated in `translate` and nowhere else. Hashes are the caller's work.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from netrc import NetrcParseError
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.errors import BadInput, RemoteError

from ..limits.rates import RateLimiter
from ..swarm.source import Failure
from .guard import Guard, Watch
from .origin import (
    FileRange,
    check_origin_url,
    display_url,
    parse_content_range,
    parse_retry_after,
)

CONNECT_TIMEOUT_S = 5.0
"""Seconds for a connection, and for its TLS handshake: three lost SYNs and a bit."""

MAX_REDIRECTS = 5
"""Redirects followed in one exchange: a hub and its CDN need two, curl scripts use 5."""

MAX_DRAINED_BYTES = 64 << 10
"""Most bytes of a redirect's or error's body read to keep a connection. A longer body
costs more than connecting anew."""

PROGRESS_BYTES = 64 << 10
"""Bytes between two notes of progress: about 1 ms at 64 MB/s."""

MIN_PROGRESS_BYTES = 4 << 10
"""Fewest bytes that count as progress; less is a stall, as with a peer."""

PROGRESS_INTERVAL_S = 0.25
"""Seconds after which fewer than `PROGRESS_BYTES` are noted."""

LIMITED_RECEIVE_S = 0.1
"""Seconds of a limited rate that the kernel may receive ahead of us."""

MIN_RECEIVE_BYTES = 64 << 10
"""Smallest receive buffer: what httpx reads at once."""

DEFAULT_PAUSE_S = 1.0
"""Seconds to leave a server alone that is overloaded and does not say for how long."""

MAX_IDLE_CONNECTIONS = 2
"""Connections a thread keeps open: one to the origin, one to where it redirects."""

MAX_DETAIL = 200
"""Most characters kept of an error's text, which may quote what the server sent."""

SEND_ATTEMPTS = 2
"""A kept connection may have been closed by the server just before it is used again."""

_HTTPX_ERRORS = (httpx.HTTPError, httpx.InvalidURL, httpx.CookieConflict)
_BUSY = (408, 429, 500, 502, 503, 504)


class OriginFailure(RemoteError):
    """An exchange with an origin that came to nothing.

    Attributes
    ----------
    failure : Failure
        The kind, for the planner.
    detail : str
        What happened, for people.
    file_only : bool
        It says something about one file only; other files may be fine.
    pause_s : float
        Seconds for which the server asks to be left alone.
    """

    def __init__(
        self, failure: Failure, detail: str, *, file_only: bool = False, pause_s: float = 0.0
    ) -> None:
        super().__init__(f"{failure.value}: {detail}")
        self.failure = failure
        self.detail = detail
        self.file_only = file_only
        self.pause_s = pause_s


def translate(error: Exception) -> OriginFailure:
    """Return the failure that an httpx error means."""
    text = (str(error) or type(error).__name__)[:MAX_DETAIL]
    match error:
        case httpx.ConnectTimeout() | httpx.ConnectError() | httpx.ProxyError():
            return OriginFailure(Failure.UNREACHABLE, text)
        case httpx.TimeoutException():
            return OriginFailure(Failure.STALLED, "no bytes for too long")
        case httpx.NetworkError():
            return OriginFailure(Failure.CLOSED, text)
        case httpx.RemoteProtocolError() if "closed" in text or "disconnected" in text:
            return OriginFailure(Failure.CLOSED, text)
        case httpx.RemoteProtocolError() if "buffer too long" in text:
            return OriginFailure(Failure.PROTOCOL, "sent headers without end")
        case httpx.LocalProtocolError():
            return OriginFailure(Failure.LOCAL, f"our request is malformed: {text}")
        case _:
            return OriginFailure(Failure.PROTOCOL, text)


def _failure_of(error: Exception, watch: Watch, limits: Limits) -> OriginFailure:
    """Return what an httpx error means; after a cut, a missed deadline."""
    if watch.is_cut:
        detail = (
            f"too slow: took over {limits.progress_timeout_s:g} s for "
            f"{MIN_PROGRESS_BYTES} bytes or the headers"
        )
        return OriginFailure(Failure.STALLED, detail)
    return translate(error)


class Limits(NamedTuple):
    """Deadlines of an exchange, in seconds.

    Attributes
    ----------
    stall_timeout_s : float
        Longest wait for any bytes.
    progress_timeout_s : float
        Longest wait for `MIN_PROGRESS_BYTES`, and for the headers with all redirects.
    """

    stall_timeout_s: float
    progress_timeout_s: float


class Body:
    """The bytes of one answer, in order, in the portions the caller wants.

    Parameters
    ----------
    pieces : Iterator[bytes]
        The raw body.
    watch : Watch
        Keeps the deadlines.
    limits : Limits
        The deadlines.
    note_progress : Callable[[int], None]
        Hears of bytes received.
    take : Callable[[int], int]
        Waits for our own limit; returns how many of so many bytes may be taken.
    """

    def __init__(
        self,
        pieces: Iterator[bytes],
        watch: Watch,
        limits: Limits,
        note_progress: Callable[[int], None],
        take: Callable[[int], int],
    ) -> None:
        self._pieces = pieces
        self._watch = watch
        self._limits = limits
        self._note_progress = note_progress
        self._wait_for_limit = take
        self._reported_at = 0.0
        self._rest = memoryview(b"")
        self._unreported = 0

    def read_into(self, view: memoryview) -> None:
        """Fill `view`.

        Raises
        ------
        OriginFailure
            CLOSED: the body ended before; STALLED: it did not come in time.
        """
        size = len(view)
        filled = 0
        with self._portion():
            while filled < size:
                taken = self._take(size - filled)
                view[filled : filled + len(taken)] = taken
                filled += len(taken)

    def skip(self, byte_count: int) -> None:
        """Read bytes that nobody wants; raises as `read_into` does."""
        while byte_count > 0:
            portion = min(byte_count, CHUNK_SIZE)
            byte_count -= portion
            with self._portion():
                while portion > 0:
                    portion -= len(self._take(portion))

    def expect_end(self) -> None:
        """Check that nothing follows, which leaves the connection fit for reuse.

        Raises
        ------
        OriginFailure
            PROTOCOL: more bytes came than were asked for.
        """
        with self._portion():
            if self._rest or self._next_piece():
                raise OriginFailure(Failure.PROTOCOL, "sent more bytes than were asked for")

    def _take(self, limit: int) -> memoryview:
        while not self._rest:
            piece = self._next_piece()
            if piece is None:
                raise OriginFailure(Failure.CLOSED, "the answer ended too early")
            self._rest = memoryview(piece)
        room = self._wait_for_limit(min(limit, len(self._rest)))
        taken, self._rest = self._rest[:room], self._rest[room:]
        self._unreported += len(taken)
        waited_s = time.monotonic() - self._reported_at
        if self._unreported >= PROGRESS_BYTES or (
            waited_s >= PROGRESS_INTERVAL_S and self._unreported >= MIN_PROGRESS_BYTES
        ):
            self._report()
            self._watch.extend(self._limits.progress_timeout_s)
        return taken

    def _next_piece(self) -> bytes | None:
        try:
            return next(self._pieces, None)
        except _HTTPX_ERRORS as error:
            raise _failure_of(error, self._watch, self._limits) from error

    @contextlib.contextmanager
    def _portion(self) -> Iterator[None]:
        with self._watch.deadline(self._limits.progress_timeout_s):
            try:
                yield
            finally:
                self._report()

    def _report(self) -> None:
        self._reported_at = time.monotonic()
        if self._unreported:
            self._note_progress(self._unreported)
            self._unreported = 0


class Answer(NamedTuple):
    """An answer whose headers are in order.

    Attributes
    ----------
    is_whole_file : bool
        The range was ignored: the body is the file from its first byte, which is
        not what was asked for.
    body : Body
        The bytes.
    """

    is_whole_file: bool
    body: Body


class OriginClient:
    """Asks one origin for file ranges. Belongs to one thread.

    Parameters
    ----------
    guard : Guard
        Keeps the deadlines.
    limits : Limits
        The deadlines.
    ssl_context : ssl.SSLContext
        Shared by the clients of a source: making one takes 20 ms.
    headers : Mapping[str, str]
        Further headers for the origin, which nobody it redirects to sees.
    limiter : RateLimiter or None
        Holds what all sources receive together below a rate.
    """

    def __init__(
        self,
        guard: Guard,
        limits: Limits,
        ssl_context: ssl.SSLContext,
        headers: Mapping[str, str],
        limiter: RateLimiter | None = None,
    ) -> None:
        self._limiter = limiter
        self._watch = guard.watch()
        self._limits = limits
        self._headers = httpx.Headers(headers)
        self._netrc = _netrc_auth()
        self._client = httpx.Client(
            verify=ssl_context,
            timeout=httpx.Timeout(limits.stall_timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(
                max_connections=MAX_IDLE_CONNECTIONS + 1,
                max_keepalive_connections=MAX_IDLE_CONNECTIONS,
            ),
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def probe(self, url: str) -> tuple[int, bool, int]:
        """Ask for a file's first byte, to learn how long the file is.

        Returns
        -------
        tuple of int, bool and int
            Its size in bytes; whether the server gives ranges; bytes of it received.

        Raises
        ------
        OriginFailure
            There is no such file, or the server does not say how long it is.
        """
        headers = httpx.Headers({"User-Agent": "tensorswarm"})
        headers.update(self._headers)
        headers["Accept-Encoding"] = "identity"
        headers["Range"] = "bytes=0-0"
        self._client.cookies.clear()
        self._watch.renew()
        response = self._send(url, headers)
        place = FileRange(display_url(url), 0, 0)
        try:
            found = parse_content_range(response.headers.get("Content-Range", ""))
            if response.status_code == 206 and found is not None and found[:2] == (0, 1):
                with self._watch.deadline(self._limits.progress_timeout_s):
                    _drain(response)
                return found.total, True, 1
            length = response.headers.get("Content-Length", "")
            empty = response.status_code == 416 and response.headers.get(
                "Content-Range", ""
            ).endswith("*/0")
            if empty:
                return 0, True, 0
            if response.status_code != 200:
                raise _failure_of_status(response.status_code, response.headers, place)
            if not (length.isascii() and length.isdigit() and len(length) < 18):
                detail = f"{place.path}: the server does not say how long it is"
                raise OriginFailure(Failure.PROTOCOL, detail)
            return int(length), False, 0
        finally:
            response.close()

    @contextlib.contextmanager
    def open(
        self,
        url: str,
        place: FileRange,
        start: int,
        stop: int,
        note_progress: Callable[[int], None],
        *,
        ranged: bool = True,
    ) -> Iterator[Answer]:
        """Ask for bytes `start` to `stop` (exclusive) of a file.

        Parameters
        ----------
        url : str
            Where the file is.
        place : FileRange
            Path and size of the file.
        start, stop : int
            The range in bytes.
        note_progress : Callable[[int], None]
            Hears of the body's bytes as they arrive.
        ranged : bool
            False asks for the whole file, with no range.

        Raises
        ------
        OriginFailure
            No answer, or one that does not fit the question.
        """
        headers = httpx.Headers({"User-Agent": "tensorswarm"})
        headers.update(self._headers)
        headers["Accept-Encoding"] = "identity"
        if ranged:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        self._client.cookies.clear()
        self._watch.renew()
        response = self._send(url, headers)
        try:
            try:
                is_whole_file = _check_answer(response, place, start, stop)
            except OriginFailure:
                with self._watch.deadline(self._limits.progress_timeout_s):
                    _drain(response)
                raise
            take = functools.partial(self._take_room, url)
            body = Body(response.iter_raw(), self._watch, self._limits, note_progress, take)
            yield Answer(is_whole_file, body)
        finally:
            response.close()  # also ends the connection unless the body was read to its end

    def _take_room(self, url: str, byte_count: int) -> int:
        if self._limiter is None:
            return byte_count
        room = min(byte_count, self._limiter.slice_bytes)
        with self._watch.paused():
            self._limiter.take(urlsplit(url).netloc, room)
        return room

    def _send(self, url: str, headers: httpx.Headers) -> httpx.Response:
        for attempt in range(1, SEND_ATTEMPTS + 1):
            try:
                with self._watch.deadline(self._limits.progress_timeout_s):
                    return self._follow(url, headers)
            except _HTTPX_ERRORS as error:
                failure = _failure_of(error, self._watch, self._limits)
                if attempt == SEND_ATTEMPTS or failure.failure is not Failure.CLOSED:
                    raise failure from error
        raise AssertionError("unreachable")

    def _follow(self, url: str, headers: httpx.Headers) -> httpx.Response:
        """Send, and follow redirects without keeping their bodies, which httpx would."""
        request = self._client.build_request(
            "GET", url, headers=headers, extensions={"trace": self._note_socket}
        )
        # A name and password in the URL come before those in netrc.
        auth = None if request.url.userinfo else self._netrc
        for _ in range(MAX_REDIRECTS + 1):
            response = self._client.send(request, auth=auth, stream=True, follow_redirects=False)
            following = response.next_request
            if following is None:
                return response
            _drain(response)
            try:
                check_origin_url(str(following.url))
            except BadInput as error:
                raise OriginFailure(Failure.PROTOCOL, f"redirected astray: {error}") from error
            if not _may_keep_secrets(request.url, following.url):
                for name in self._headers:
                    following.headers.pop(name, None)
            request, auth = following, None
        raise OriginFailure(Failure.PROTOCOL, f"more than {MAX_REDIRECTS} redirects")

    def _note_socket(self, event: str, info: dict[str, Any]) -> None:
        """Learn of a new connection's socket, from httpcore's ``trace`` extension."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            new = info["return_value"].get_extra_info("socket")
            if self._limiter is not None:
                ahead_bytes = int(self._limiter.bytes_per_s * LIMITED_RECEIVE_S)
                new.setsockopt(
                    socket.SOL_SOCKET, socket.SO_RCVBUF, max(MIN_RECEIVE_BYTES, ahead_bytes)
                )
            self._watch.add(new)


def _check_answer(response: httpx.Response, place: FileRange, start: int, stop: int) -> bool:
    """Check status and headers; tell whether the body is the whole file instead."""
    status, headers = response.status_code, response.headers
    if status not in (200, 206):
        raise _failure_of_status(status, headers, place)
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise OriginFailure(Failure.PROTOCOL, f"{place.path}: came encoded, which we did not ask")
    length = headers.get("Content-Length")
    if status == 200:
        if length is not None and length != str(place.file_size):
            raise _other_size(place)
        return (start, stop) != (0, place.file_size)
    found = parse_content_range(headers.get("Content-Range", ""))
    if found is None or found[:2] != (start, stop):
        raise OriginFailure(Failure.PROTOCOL, f"{place.path}: came as another range than asked")
    if found.total != place.file_size:
        raise _other_size(place)
    if length is not None and length != str(stop - start):
        raise OriginFailure(Failure.PROTOCOL, f"{place.path}: came with another length than asked")
    return False


def _failure_of_status(status: int, headers: httpx.Headers, place: FileRange) -> OriginFailure:
    if status in (404, 410):
        return OriginFailure(Failure.LACKS, f"{place.path}: not there ({status})", file_only=True)
    if status in (401, 403, 407, 451):
        detail = f"{place.path}: access refused ({status})"
        return OriginFailure(Failure.REFUSED_ACCESS, detail, file_only=True)
    if status == 416:
        return _other_size(place)
    if status in _BUSY:
        pause_s = parse_retry_after(headers.get("Retry-After", ""), datetime.now(UTC))
        if pause_s is None:
            return OriginFailure(Failure.STALLED, f"busy ({status})", pause_s=DEFAULT_PAUSE_S)
        detail = f"busy ({status}), asks to wait {pause_s:.0f} s"
        return OriginFailure(Failure.STALLED, detail, pause_s=pause_s)
    return OriginFailure(Failure.PROTOCOL, f"{place.path}: answered {status}")


def _other_size(place: FileRange) -> OriginFailure:
    detail = f"{place.path}: the file there has another size"
    return OriginFailure(Failure.LACKS, detail, file_only=True)


def _drain(response: httpx.Response) -> None:
    """Read a short body, so that the connection can be used again, and close."""
    try:
        if response.headers.get("Content-Length") is not None:
            left = MAX_DRAINED_BYTES
            for piece in response.iter_raw():
                left -= len(piece)
                if left < 0:
                    break
    except _HTTPX_ERRORS:
        return  # the connection is lost; what the headers said still counts
    finally:
        response.close()


def _may_keep_secrets(old: httpx.URL, new: httpx.URL) -> bool:
    """Tell whether a redirect stays at the origin, or only turns from http to https."""
    if old.host != new.host:
        return False
    ports = {"http": 80, "https": 443}
    old_port = old.port or ports.get(old.scheme)
    new_port = new.port or ports.get(new.scheme)
    same = (old.scheme, old_port) == (new.scheme, new_port)
    return same or (old.scheme, old_port, new.scheme, new_port) == ("http", 80, "https", 443)


def _netrc_auth() -> httpx.Auth | None:
    try:
        return httpx.NetRCAuth(os.environ.get("NETRC"))
    except (OSError, NetrcParseError, UnicodeDecodeError):
        return None  # no such file for most people; a broken one must not stop a download
