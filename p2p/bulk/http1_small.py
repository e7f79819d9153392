"""Many small objects in one request: ``POST /small`` of the bulk plane.

Purpose: a model of many small tensors must not cost a head, a look-up and a decision for
each. One request names whole objects by digest and size, one answer has their bytes.

Rules
- The request's body has 40 bytes for each object: its digest, then its size as 8 bytes,
  big-endian. At least one object and at most `MAX_SMALL_OBJECTS`, each of 1 byte to
  `MAX_SMALL_BYTES`, together at most `MAX_ANSWER_BYTES`.
- The answer is 200 with a ``Content-Length`` and no other framing. Its body begins with a
  bitmap of the objects given (bit i % 8 of byte i // 8 for object i of the request, spare
  bits zero); their bytes follow in the order of the request, with nothing between.
- An object that the server does not hold whole, or holds with another size, is not given.
  That is no refusal: 403, 503 and 400 are, as for any request (see `http1`).
- The length of the answer must be that of the bitmap and the objects it names.

Not here: sockets, time, and the question whether the bytes are the right ones.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from itertools import starmap
from typing import NamedTuple

import h11

from tensorswarm.store import bitmap
from tensorswarm.store.digest import DIGEST_SIZE
from tensorswarm.store.errors import ProtocolError

from ..swarm.source import WantedObject
from . import http1

MAX_SMALL_BYTES = 64 << 10
"""Largest object that is asked for in company: a larger one is worth its own head."""

MAX_SMALL_OBJECTS = 256
"""Objects in one request: its body of 10 KiB then fits the buffers for requests."""

MAX_ANSWER_BYTES = 1 << 20
"""Bytes of objects in one answer, as in one chunk: both sides hold it in memory."""

MAX_BODY_BYTES = MAX_SMALL_OBJECTS * (DIGEST_SIZE + 8)
"""Longest body of a request."""

TARGET = "/small"

_ITEM = struct.Struct(f">{DIGEST_SIZE}sQ")
_ITEM_BYTES = _ITEM.size
_LENGTH = re.compile(rb"[0-9]{1,8}")


class SmallRequest(NamedTuple):
    """Whole objects asked for together.

    Attributes
    ----------
    objects : sequence of WantedObject
        Digest and size of each.
    length : int
        Their bytes together.
    """

    objects: Sequence[WantedObject]
    length: int


class SmallClientExchange:
    """One request and the judgement of its answer, on the asking side.

    Parameters
    ----------
    request : SmallRequest
        What to ask for, within the limits above.
    host : str
        For the ``Host`` header: the peer id asked.

    Attributes
    ----------
    request : SmallRequest
        What was asked for.
    encoded : bytes
        Head and body of the request, to be sent.
    body_bytes : int
        Length of the answer's body, once its head was read.
    """

    def __init__(self, request: SmallRequest, host: str) -> None:
        body = b"".join(starmap(_ITEM.pack, request.objects))
        if not body or len(body) > MAX_BODY_BYTES or request.length > MAX_ANSWER_BYTES:
            raise ValueError("a request for small objects has limits")
        self.request = request
        self.body_bytes = 0
        self._connection = h11.Connection(
            h11.CLIENT, max_incomplete_event_size=http1.MAX_HEAD_BYTES
        )
        head = h11.Request(
            method="POST",
            target=TARGET,
            headers=[("Host", host), ("Content-Length", str(len(body)))],
        )
        self.encoded = http1.encode(self._connection, head) + body

    def read_head(self, head: bytes) -> http1.Answer:
        """Judge the head of the answer; see `http1.ClientExchange.read_head`."""
        answer, event = http1.judge_answer(self._connection, head, 200)
        if answer is http1.Answer.LACKS:
            raise ProtocolError(f"answered with status {event.status_code}")
        if answer is http1.Answer.CONTENT:
            least = bitmap_bytes(len(self.request.objects))
            length = http1.content_length(event.headers)
            if not least <= length <= least + self.request.length:
                raise ProtocolError(
                    f"announced {length} bytes, asked for {self.request.length} at most"
                )
            self.body_bytes = length
        return answer

    def read_bitmap(self, given: bytes | bytearray) -> list[int]:
        """Return which objects of the request follow, by their position in it.

        Parameters
        ----------
        given : bytes
            The first `bitmap_bytes` bytes of the answer's body.

        Raises
        ------
        ProtocolError
            It names objects beyond the end, or others than the length announced allows.
        """
        count = len(self.request.objects)
        if int.from_bytes(given, "little") >> count:
            raise ProtocolError("gave an object that nobody asked for")
        if bitmap.count_set(given) == count:
            positions = list(range(count))
            total = self.request.length
        else:
            positions = [i for i in range(count) if bitmap.is_set(given, i)]
            total = sum(self.request.objects[i].size_bytes for i in positions)
        if len(given) + total != self.body_bytes:
            raise ProtocolError(
                f"announced {self.body_bytes} bytes and gives objects of {total} bytes"
            )
        return positions


class SmallServerExchange:
    """One request and its answer, on the answering side.

    Parameters
    ----------
    head : bytes
        The whole head of the request, with the empty line that ends it.

    Attributes
    ----------
    body_bytes : int
        Length of the request's body, which follows the head.

    Raises
    ------
    ProtocolError
        The head is not one the protocol allows; answer with `http1.bad_request`.
    """

    def __init__(self, head: bytes) -> None:
        self._connection = h11.Connection(
            h11.SERVER, max_incomplete_event_size=http1.MAX_HEAD_BYTES
        )
        event = http1.judge_request(self._connection, head, b"POST")
        if event.target != TARGET.encode():
            raise ProtocolError(f"asked for {http1.quoted(event.target)}")
        if http1.single_header(event.headers, b"transfer-encoding") is not None:
            raise ProtocolError("sent a request with a transfer-encoding")
        value = http1.single_header(event.headers, b"content-length")
        if value is None or _LENGTH.fullmatch(value) is None:
            raise ProtocolError("sent a request without the length of its body")
        self.body_bytes = int(value)
        if not 0 < self.body_bytes <= MAX_BODY_BYTES or self.body_bytes % _ITEM_BYTES:
            raise ProtocolError(f"sent a request with a body of {self.body_bytes} bytes")

    def read_body(self, body: bytes) -> SmallRequest:
        """Return what is asked for.

        Raises
        ------
        ProtocolError
            A size, or the sum of all, is beyond the limits.
        """
        objects = list(map(WantedObject._make, _ITEM.iter_unpack(body)))
        sizes = [size_bytes for _, size_bytes in objects]
        if min(sizes) < 1 or max(sizes) > MAX_SMALL_BYTES or sum(sizes) > MAX_ANSWER_BYTES:
            raise ProtocolError("asked for small objects that are not small")
        return SmallRequest(objects, sum(sizes))

    def answer(self, found: Sequence[bytes | None]) -> tuple[bytes, bytes]:
        """Return head and body of the answer.

        Parameters
        ----------
        found : sequence of bytes or None
            For each object asked for its bytes, or None if it is not given.
        """
        if None in found:
            given = bitmap.empty(len(found))
            for position, data in enumerate(found):
                if data is not None:
                    bitmap.set_bit(given, position)
        else:
            given = bitmap.full(len(found))
        body = b"".join([bytes(given), *filter(None, found)])
        headers = [
            ("Content-Type", "application/octet-stream"),
            ("Content-Length", str(len(body))),
        ]
        head = h11.Response(status_code=200, reason=b"OK", headers=headers)
        return http1.encode(self._connection, head), body

    def refusal(self, status: int) -> bytes:
        """Return a whole answer that refuses: 403 or 503."""
        return http1.refusal(self._connection, status)


def bitmap_bytes(count: int) -> int:
    """Return the length of the bitmap that begins an answer."""
    return (count + 7) // 8


def read_request(head: bytes) -> http1.ServerExchange | SmallServerExchange:
    """Read the head of any request of the bulk plane.

    Raises
    ------
    ProtocolError
        The head is not one the protocol allows; answer with `http1.bad_request`.
    """
    if head.startswith(b"POST "):
        return SmallServerExchange(head)
    return http1.ServerExchange(head)
