"""The HTTP/1.1 of the bulk plane: what is asked, what is answered, nothing else.

Purpose: turn "these bytes of this object" into a request head and back, and judge
an answer's head. Heads are parsed and written by h11; bodies never pass through
here, they go between socket and buffer without a copy.

Rules
- A request for a range is ``GET /tensor/<64 hexadecimal digits>`` with one ``Range: bytes=a-b``
  and no body.
- Bytes are answered with 206, the ``Content-Range`` asked for, and a
  ``Content-Length`` of exactly that many bytes. No other framing is taken
  (``Transfer-Encoding``, multipart) and no ``Content-Encoding``: the bytes on the
  wire are the object's.
- Whole small objects may be asked for together with ``POST`` (see `http1_small`).
- A refusal has no body. 404: no such object here. 416: those bytes are not proved
  here. 403: the peer is not allowed. 503: no capacity. 400: not a request of ours.
  After 400, 403 and 503 the server closes.
- Requests may be pipelined; answers come in order. Each request and its answer are
  one exchange with an h11 connection of its own, so that many can be open at once.
- A head ends at an empty line (CR LF CR LF) within `MAX_HEAD_BYTES`.

Not here: sockets, time, and the question whether the bytes are the right ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

import h11

from tensorswarm.store.digest import MAX_OBJECT_SIZE
from tensorswarm.store.errors import ProtocolError

MAX_HEAD_BYTES = 8192
"""Longest head taken: the limit of nginx and Apache for one header line. Ours have
under 300 bytes."""

MAX_QUOTED = 80
"""Characters of a peer's words repeated in an error message."""

_HEAD_END = b"\r\n\r\n"
_TARGET = re.compile(rb"/tensor/([0-9a-f]{64})")
_RANGE = re.compile(rb"bytes=([0-9]{1,16})-([0-9]{1,16})")
_CONTENT_RANGE = re.compile(rb"bytes ([0-9]{1,16})-([0-9]{1,16})/([0-9]{1,16})")

BAD_REQUEST, FORBIDDEN, NOT_FOUND, RANGE_NOT_SATISFIABLE, UNAVAILABLE = 400, 403, 404, 416, 503

_REASONS = {
    BAD_REQUEST: b"Bad Request",
    FORBIDDEN: b"Forbidden",
    NOT_FOUND: b"Not Found",
    RANGE_NOT_SATISFIABLE: b"Range Not Satisfiable",
    UNAVAILABLE: b"Service Unavailable",
}
_CLOSING = frozenset({BAD_REQUEST, FORBIDDEN, UNAVAILABLE})


class Answer(Enum):
    """What the head of an answer says."""

    CONTENT = "the bytes follow"
    LACKS = "does not have these bytes"
    DENIED = "refuses access"
    BUSY = "has no capacity"


_REFUSALS = {
    FORBIDDEN: Answer.DENIED,
    NOT_FOUND: Answer.LACKS,
    RANGE_NOT_SATISFIABLE: Answer.LACKS,
    UNAVAILABLE: Answer.BUSY,
}


class RangeRequest(NamedTuple):
    """Bytes asked for: `length` bytes of an object, from `offset` on."""

    digest: bytes
    offset: int
    length: int


def find_head(buffer: bytearray, start: int, end: int) -> int | None:
    """Return where the head that begins at `start` ends, or None when it is not whole yet.

    Parameters
    ----------
    buffer : bytearray
        Bytes received.
    start, end : int
        The part of `buffer` that is filled and not consumed.

    Raises
    ------
    ProtocolError
        There is no end within `MAX_HEAD_BYTES`.
    """
    position = buffer.find(_HEAD_END, start, min(end, start + MAX_HEAD_BYTES))
    if position >= 0:
        return position + len(_HEAD_END)
    if end - start >= MAX_HEAD_BYTES:
        raise ProtocolError(f"sent a head of more than {MAX_HEAD_BYTES} bytes")
    return None


class ClientExchange:
    """One request and the judgement of its answer, on the asking side.

    Parameters
    ----------
    request : RangeRequest
        What to ask for; at least one byte.
    host : str
        For the ``Host`` header: the peer id asked.

    Attributes
    ----------
    request : RangeRequest
        What was asked for.
    encoded : bytes
        The request head, to be sent.
    """

    def __init__(self, request: RangeRequest, host: str) -> None:
        if request.length < 1:
            raise ValueError("an HTTP range has at least one byte")
        self.request = request
        self._connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        last = request.offset + request.length - 1
        head = h11.Request(
            method="GET",
            target=f"/tensor/{request.digest.hex()}",
            headers=[("Host", host), ("Range", f"bytes={request.offset}-{last}")],
        )
        self.encoded = encode(self._connection, head)
        encode(self._connection, h11.EndOfMessage())

    @property
    def body_bytes(self) -> int:
        """Length of the answer's body, if bytes are given."""
        return self.request.length

    def read_head(self, head: bytes) -> Answer:
        """Judge the head of the answer.

        Parameters
        ----------
        head : bytes
            The whole head, with the empty line that ends it.

        Returns
        -------
        Answer
            With CONTENT, exactly the bytes asked for follow; otherwise nothing does.

        Raises
        ------
        ProtocolError
            The head is not one the protocol allows; the message names the fault.
        """
        answer, event = judge_answer(self._connection, head, 206)
        if answer is Answer.CONTENT:
            self._check_content(event.headers)
        return answer

    def _check_content(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        _, offset, length = self.request
        value = single_header(headers, b"content-range")
        if value is None:
            raise ProtocolError("answered without a content-range")
        match = _CONTENT_RANGE.fullmatch(value)
        if match is None:
            raise ProtocolError(f"answered with content-range {quoted(value)}")
        first, last, size = map(int, match.groups())
        if (first, last) != (offset, offset + length - 1) or not last < size <= MAX_OBJECT_SIZE:
            raise ProtocolError(
                f"answered with content-range {quoted(value)}, "
                f"asked for bytes {offset}-{offset + length - 1}"
            )
        announced = content_length(headers)
        if announced != length:
            raise ProtocolError(f"announced {announced} bytes, asked for {length}")


class ServerExchange:
    """One request and its answer, on the answering side.

    Parameters
    ----------
    head : bytes
        The whole head of the request, with the empty line that ends it.

    Attributes
    ----------
    request : RangeRequest
        What is asked for.

    Raises
    ------
    ProtocolError
        The head is not one the protocol allows; answer with `bad_request`.
    """

    def __init__(self, head: bytes) -> None:
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        event = judge_request(self._connection, head, b"GET")
        if not isinstance(_next_event(self._connection), h11.EndOfMessage):
            raise ProtocolError("sent a request with a body")
        target = _TARGET.fullmatch(event.target)
        if target is None:
            raise ProtocolError(f"asked for {quoted(event.target)}")
        value = single_header(event.headers, b"range")
        match = None if value is None else _RANGE.fullmatch(value)
        if match is None:
            raise ProtocolError(f"asked with range {quoted(value or b'')}")
        first, last = map(int, match.groups())
        if not first <= last < MAX_OBJECT_SIZE:
            raise ProtocolError(f"asked with range {quoted(value or b'')}")
        self.request = RangeRequest(bytes.fromhex(target[1].decode()), first, last - first + 1)

    def partial_content(self, size_bytes: int) -> bytes:
        """Return the head after which the bytes asked for follow.

        Parameters
        ----------
        size_bytes : int
            Size of the whole object.
        """
        _, offset, length = self.request
        headers = [
            ("Content-Type", "application/octet-stream"),
            ("Content-Range", f"bytes {offset}-{offset + length - 1}/{size_bytes}"),
            ("Content-Length", str(length)),
        ]
        head = h11.Response(status_code=206, reason=b"Partial Content", headers=headers)
        return encode(self._connection, head)

    def refusal(self, status: int) -> bytes:
        """Return a whole answer that refuses: 403, 404, 416 or 503."""
        return refusal(self._connection, status)


def bad_request() -> bytes:
    """Return the answer to a head that is not a request of ours."""
    return refusal(h11.Connection(h11.SERVER), BAD_REQUEST)


def refusal(connection: h11.Connection, status: int) -> bytes:
    """Return a whole answer that refuses."""
    headers = [("Content-Length", "0")]
    if status in _CLOSING:
        headers.append(("Connection", "close"))
    return encode(
        connection, h11.Response(status_code=status, reason=_REASONS[status], headers=headers)
    )


def judge_answer(
    connection: h11.Connection, head: bytes, content_status: int
) -> tuple[Answer, h11.Response]:
    """Judge what every answer's head must keep to.

    Parameters
    ----------
    connection : h11.Connection
        The asking side of this exchange.
    head : bytes
        The whole head, with the empty line that ends it.
    content_status : int
        The status with which bytes are given.

    Raises
    ------
    ProtocolError
        The head is not one the protocol allows.
    """
    event = _single_event(connection, head)
    if not isinstance(event, h11.Response):
        raise ProtocolError("answered with something other than a final response")
    if event.http_version != b"1.1":
        raise ProtocolError(f"answered in HTTP {quoted(event.http_version)}, not 1.1")
    if connection.trailing_data[0]:
        raise ProtocolError("answered with a head that ends twice")
    for unwanted in (b"transfer-encoding", b"content-encoding"):
        value = single_header(event.headers, unwanted)
        if value is not None:
            raise ProtocolError(f"answered with {unwanted.decode()} {quoted(value)}")
    if event.status_code == content_status:
        return Answer.CONTENT, event
    if event.status_code not in _REFUSALS:
        raise ProtocolError(f"answered with status {event.status_code}")
    if content_length(event.headers) != 0:
        raise ProtocolError(f"answered {event.status_code} with a body")
    return _REFUSALS[event.status_code], event


def judge_request(connection: h11.Connection, head: bytes, method: bytes) -> h11.Request:
    """Judge what every request's head must keep to; see `judge_answer`."""
    event = _single_event(connection, head)
    if not isinstance(event, h11.Request) or event.method != method:
        raise ProtocolError(f"sent a request that is not a {method.decode()}")
    if event.http_version != b"1.1":
        raise ProtocolError(f"asked in HTTP {quoted(event.http_version)}, not 1.1")
    if connection.trailing_data[0]:
        raise ProtocolError("sent a head that ends twice")
    return event


def encode(connection: h11.Connection, event: h11.Event) -> bytes:
    """Return the bytes of a head."""
    encoded = connection.send(event)
    assert encoded is not None  # None stands for a closed connection only
    return encoded


def _single_event(connection: h11.Connection, head: bytes) -> object:
    connection.receive_data(head)
    return _next_event(connection)


def _next_event(connection: h11.Connection) -> object:
    try:
        return connection.next_event()
    except h11.RemoteProtocolError as error:
        raise ProtocolError(f"sent a head that is not HTTP: {error}") from error


def single_header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """Return a header that may occur once, or None; twice is a fault."""
    values = [value for key, value in headers if key == name]
    if len(values) > 1:
        raise ProtocolError(f"sent {name.decode()} {len(values)} times")
    return values[0] if values else None


def content_length(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """Return the length of a body, which an answer must tell."""
    value = single_header(headers, b"content-length")
    if value is None:
        raise ProtocolError("answered without a content-length")
    return int(value)  # h11 has checked that these are at most 20 digits


def quoted(value: bytes) -> str:
    """Return a peer's words for an error message, cut to a bearable length."""
    return repr(value[:MAX_QUOTED].decode("latin-1"))
