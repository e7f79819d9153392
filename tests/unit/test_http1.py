"""The HTTP of the bulk plane: what is taken, and the name of every fault."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorswarm.p2p.bulk import http1
from tensorswarm.p2p.bulk.http1 import Answer, ClientExchange, RangeRequest, ServerExchange
from tensorswarm.store.errors import ProtocolError
from tests.support.bulk_fakes import content_head

DIGEST = bytes(range(32))
ASKED = RangeRequest(DIGEST, 100, 50)


def client() -> ClientExchange:
    return ClientExchange(ASKED, "12D3KooWpeer")


def request_head(
    *, method: str = "GET", target: str = "", range_: str = "bytes=0-9", extra: str = ""
) -> bytes:
    target = target or f"/tensor/{DIGEST.hex()}"
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\nRange: {range_}\r\n{extra}\r\n".encode()


@given(
    digest=st.binary(min_size=32, max_size=32),
    offset=st.integers(0, 1 << 43),
    length=st.integers(1, 1 << 43),
    rest=st.integers(0, 1 << 20),
)
def test_what_is_asked_is_understood_and_what_is_answered_is_accepted(
    digest: bytes, offset: int, length: int, rest: int
) -> None:
    asked = RangeRequest(digest, offset, length)
    asking = ClientExchange(asked, "12D3KooWpeer")
    answering = ServerExchange(asking.encoded)
    assert answering.request == asked
    size = min(offset + length + rest, 1 << 44)
    assert asking.read_head(answering.partial_content(size)) is Answer.CONTENT


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (http1.FORBIDDEN, Answer.DENIED),
        (http1.NOT_FOUND, Answer.LACKS),
        (http1.RANGE_NOT_SATISFIABLE, Answer.LACKS),
        (http1.UNAVAILABLE, Answer.BUSY),
    ],
)
def test_refusals_are_understood(status: int, answer: Answer) -> None:
    asking = client()
    refusal = ServerExchange(asking.encoded).refusal(status)
    assert asking.read_head(refusal) is answer


def test_an_empty_range_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        ClientExchange(RangeRequest(DIGEST, 0, 0), "x")


@pytest.mark.parametrize(
    ("head", "fault"),
    [
        (content_head(100, 148, 500, length=50), "content-range 'bytes 100-148/500', asked for"),
        (content_head(0, 49, 500), "content-range 'bytes 0-49/500', asked for bytes 100-149"),
        (content_head(100, 149, 149), "content-range 'bytes 100-149/149'"),
        (content_head(100, 149, 1 << 45), "content-range"),
        (content_head(100, 149, 500, length=49), "announced 49 bytes, asked for 50"),
        (content_head(100, 149, 500, length=51), "announced 51 bytes, asked for 50"),
        (content_head(100, 149, 500, "Content-Encoding: gzip"), "content-encoding 'gzip'"),
        (
            b"HTTP/1.1 206 x\r\nContent-Range: bytes 100-149/500\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n",
            "transfer-encoding 'chunked'",
        ),
        (
            content_head(100, 149, 500, "Content-Range: bytes 100-149/500"),
            "content-range 2 times",
        ),
        (b"HTTP/1.1 206 x\r\nContent-Length: 50\r\n\r\n", "without a content-range"),
        (b"HTTP/1.1 206 x\r\nContent-Range: bytes 100-149/500\r\n\r\n", "without a content-length"),
        (
            b"HTTP/1.1 206 x\r\nContent-Length: 50\r\nContent-Range: bytes 100-149/*\r\n\r\n",
            r"content-range 'bytes 100-149/\*'",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n", "status 200"),
        (b"HTTP/1.1 302 x\r\nLocation: /\r\n\r\n", "status 302"),
        (b"HTTP/1.1 404 x\r\nContent-Length: 5\r\n\r\n", "404 with a body"),
        (b"HTTP/1.1 404 x\r\n\r\n", "without a content-length"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "other than a final response"),
        (b"HTTP/1.0 404 x\r\nContent-Length: 0\r\n\r\n", "HTTP '1.0'"),
        (b"HTTP/1.1 404 x\nContent-Length: 0\n\nmore: x\r\n\r\n", "ends twice"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not HTTP"),
        (b"\r\n\r\n", "not HTTP|other than a final response"),
    ],
)
def test_every_fault_of_an_answer_is_named(head: bytes, fault: str) -> None:
    with pytest.raises(ProtocolError, match=fault):
        client().read_head(head)


@pytest.mark.parametrize(
    ("head", "fault"),
    [
        (request_head(method="POST"), "not a GET"),
        (request_head(extra="Content-Length: 3\r\n"), "with a body"),
        (request_head(extra="Transfer-Encoding: chunked\r\n"), "with a body"),
        (request_head(target="/tensor/abc"), "asked for '/tensor/abc'"),
        (request_head(target=f"/tensor/{DIGEST.hex().upper()}"), "asked for"),
        (request_head(target=f"/tensor/{DIGEST.hex()}/../x"), "asked for"),
        (request_head(range_="bytes=5-4"), "range 'bytes=5-4'"),
        (request_head(range_="bytes=5-"), "range 'bytes=5-'"),
        (request_head(range_="bytes=-5"), "range 'bytes=-5'"),
        (request_head(range_="bytes=0-1,3-4"), "range"),
        (request_head(range_=f"bytes=0-{1 << 44}"), "range"),
        (request_head(range_="bytes=0-" + 40 * "9"), "range"),
        (request_head(extra="Range: bytes=0-9\r\n"), "range 2 times"),
        (request_head().replace(b"Range: bytes=0-9\r\n", b""), "range ''"),
        (request_head().replace(b"HTTP/1.1", b"HTTP/1.0"), "HTTP '1.0'"),
        (request_head().replace(b"Host: x\r\n", b""), "not HTTP"),
        (b"\x16\x03\x01\r\n\r\n", "not HTTP"),
    ],
)
def test_every_fault_of_a_request_is_named(head: bytes, fault: str) -> None:
    with pytest.raises(ProtocolError, match=fault):
        ServerExchange(head)


def test_a_bad_request_is_answered_with_400() -> None:
    assert http1.bad_request().startswith(b"HTTP/1.1 400 ")
    with pytest.raises(ProtocolError, match="status 400"):
        client().read_head(http1.bad_request())


@given(noise=st.binary(max_size=300), place=st.integers(0, 200))
def test_no_bytes_cause_another_error(noise: bytes, place: int) -> None:
    def damaged(head: bytes) -> list[bytes]:
        return [noise, head[:place] + noise + head[place + len(noise) :]]

    for head in damaged(content_head(100, 149, 500)):
        with suppress(ProtocolError):
            client().read_head(head)
    for head in damaged(request_head()):
        with suppress(ProtocolError):
            ServerExchange(head)


def test_a_head_is_found_wherever_it_is_cut() -> None:
    head = client().encoded
    buffer = bytearray(b"..." + head + b"body")
    for end in range(3, 3 + len(head)):
        assert http1.find_head(buffer, 3, end) is None
    assert http1.find_head(buffer, 3, len(buffer)) == 3 + len(head)


def test_a_head_is_at_most_so_long() -> None:
    longest = bytearray(b"x" * (http1.MAX_HEAD_BYTES - 4) + b"\r\n\r\n")
    assert http1.find_head(longest, 0, len(longest)) == http1.MAX_HEAD_BYTES
    for too_long in (b"x" + longest, bytearray(b"x" * http1.MAX_HEAD_BYTES)):
        with pytest.raises(ProtocolError, match="more than 8192 bytes"):
            http1.find_head(bytearray(too_long), 0, len(too_long))
