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

Whatever goes wrong with a server leaves as an `OriginFailure` (see `failure`). Hashes
are the caller's work.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from netrc import NetrcParseError
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from tensorswarm.store.errors import BadInput

from ..limits.rates import RateLimiter
from ..swarm.source import Failure
from .body import Body, Limits, failure_of
from .failure import HTTPX_ERRORS, OriginFailure, failure_of_status, other_size
from .guard import Guard
from .origin import FileRange, check_origin_url, display_url, parse_content_range

CONNECT_TIMEOUT_S = 5.0
"""Seconds for a connection, and for its TLS handshake: three lost SYNs and a bit."""

MAX_REDIRECTS = 5
"""Redirects followed in one exchange: a hub and its CDN need two, curl scripts use 5."""

MAX_DRAINED_BYTES = 64 << 10
"""Most bytes of a redirect's or error's body read to keep a connection. A longer body
costs more than connecting anew."""

LIMITED_RECEIVE_S = 0.1
"""Seconds of a limited rate that the kernel may receive ahead of us."""

MIN_RECEIVE_BYTES = 64 << 10
"""Smallest receive buffer: what httpx reads at once."""

MAX_IDLE_CONNECTIONS = 2
"""Connections a thread keeps open: one to the origin, one to where it redirects."""

SEND_ATTEMPTS = 2
"""A kept connection may have been closed by the server just before it is used again."""


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
                raise failure_of_status(response.status_code, response.headers, place)
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
            except HTTPX_ERRORS as error:
                failure = failure_of(error, self._watch, self._limits)
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
        raise failure_of_status(status, headers, place)
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise OriginFailure(Failure.PROTOCOL, f"{place.path}: came encoded, which we did not ask")
    length = headers.get("Content-Length")
    if status == 200:
        if length is not None and length != str(place.file_size):
            raise other_size(place)
        return (start, stop) != (0, place.file_size)
    found = parse_content_range(headers.get("Content-Range", ""))
    if found is None or found[:2] != (start, stop):
        raise OriginFailure(Failure.PROTOCOL, f"{place.path}: came as another range than asked")
    if found.total != place.file_size:
        raise other_size(place)
    if length is not None and length != str(stop - start):
        raise OriginFailure(Failure.PROTOCOL, f"{place.path}: came with another length than asked")
    return False


def _drain(response: httpx.Response) -> None:
    """Read a short body, so that the connection can be used again, and close."""
    try:
        if response.headers.get("Content-Length") is not None:
            left = MAX_DRAINED_BYTES
            for piece in response.iter_raw():
                left -= len(piece)
                if left < 0:
                    break
    except HTTPX_ERRORS:
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
