"""The bulk plane's requests over libp2p streams: both halves, on real hosts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from tensorswarm.p2p.bulk import http1, http1_small
from tensorswarm.p2p.bulk.stream_server import BULK_STREAM_PROTOCOL, StreamServer
from tensorswarm.p2p.bulk.stream_source import StreamSource
from tensorswarm.p2p.host.host import Host, Stream
from tensorswarm.p2p.swarm.source import Failure, Outcome, Request, Span
from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.errors import NoSource, RemoteError
from tests.support.bulk_fakes import (
    MemoryShelf,
    MemorySink,
    RecordingGate,
    RecordingReport,
    make_object,
)
from tests.support.hosts import HERE, run, two_hosts

OBJECT = make_object(5 * CHUNK_SIZE + 17, 1)
SMALL = make_object(1000, 2)


class Scene:
    """A server's host, a client's host, and what the client wants."""

    def __init__(self, client: Host, server: Host) -> None:
        self.client, self.server = client, server
        self.shelf = MemoryShelf(OBJECT, SMALL)
        self.sink, self.report = MemorySink(OBJECT, SMALL), RecordingReport()
        self.allowed = True

    def serve(self, **options: object) -> StreamServer:
        server = StreamServer(self.shelf.open_reader, lambda _peer: self.allowed, **options)  # type: ignore[arg-type]
        self.server.set_handler(BULK_STREAM_PROTOCOL, server.handle)
        return server

    def answer_with(self, answer: Callable[[Stream], object]) -> None:
        async def handle(_peer_id: str, stream: Stream) -> None:
            await answer(stream)  # type: ignore[misc]

        self.server.set_handler(BULK_STREAM_PROTOCOL, handle)

    async def open_stream(self) -> Stream:
        return await self.client.open_stream(self.server.peer_id, BULK_STREAM_PROTOCOL)

    def source(self, **options: float) -> StreamSource:
        return StreamSource(
            self.server.peer_id,
            self.open_stream,
            self.client.start_soon,
            self.sink,
            self.report,
            **options,
        )

    async def failure(self) -> tuple[int | None, Failure, str]:
        return await trio.to_thread.run_sync(self.report.wait_failure)

    async def done(self, *numbers: int) -> None:
        await trio.to_thread.run_sync(partial(self.report.wait_done, *numbers))


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    async with two_hosts() as (client, server):
        yield Scene(client, server)


def request(number: int, *spans: tuple[int, int, int]) -> Request:
    return Request("peer", number, tuple(Span(*span) for span in spans))


async def exchange(stream: Stream, head: bytes) -> bytes:
    """Send a head and return all that comes back until the stream ends."""
    await stream.send(head)
    got = b""
    while data := await stream.receive_some():
        got += data
    return got


def get(first: int, last: int) -> bytes:
    asked = http1.RangeRequest(OBJECT.digest, first, last - first + 1)
    return http1.ClientExchange(asked, "peer").encoded


def test_everything_comes_once_and_whole() -> None:
    async def main() -> None:
        async with scene() as it:
            server = it.serve()
            source = it.source()
            source.submit(request(1, (0, 0, 3), (1, 0, 1)))
            source.submit(request(2, (0, 3, 3)))
            await it.done(1, 2)
            assert it.sink.data_of(0) == OBJECT.data
            assert it.sink.data_of(1) == SMALL.data
            assert [outcome for *_, outcome, _ in it.report.chunks] == [Outcome.PROVED] * 7
            assert sum(count for _, count in it.report.progressed) == len(OBJECT.data) + 1000
            assert server.statistics().bytes_sent == len(OBJECT.data) + 1000
            assert it.report.failures == []
            source.close()

    run(main)


MANY = [make_object(10 + i, 100 + i) for i in range(700)]


class ManyScene(Scene):
    """The same with many small objects."""

    def __init__(self, client: Host, server: Host) -> None:
        super().__init__(client, server)
        self.shelf = MemoryShelf(*MANY)
        self.sink = MemorySink(*MANY)


@asynccontextmanager
async def many_scene() -> AsyncIterator[ManyScene]:
    async with two_hosts() as (client, server):
        yield ManyScene(client, server)


def all_of_many(number: int) -> Request:
    return request(number, *((i, 0, 1) for i in range(len(MANY))))


def test_many_small_objects_come_together() -> None:
    async def main() -> None:
        async with many_scene() as it:
            server = it.serve()
            source = it.source()
            source.submit(all_of_many(1))
            await it.done(1)
            assert [it.sink.data_of(i) for i in range(len(MANY))] == [each.data for each in MANY]
            assert server.statistics().requests == -(-len(MANY) // http1_small.MAX_SMALL_OBJECTS)
            size_bytes = sum(len(each.data) for each in MANY)
            assert server.statistics().bytes_sent == size_bytes
            assert sum(count for _, count in it.report.progressed) == size_bytes
            source.close()

    run(main)


def test_what_is_asked_on_a_stream_waits_at_the_gate_too() -> None:
    async def main() -> None:
        async with scene() as it:
            gate = RecordingGate()
            it.serve(gate=gate)
            source = it.source()
            source.submit(request(1, (0, 0, 3), (1, 0, 1)))
            await it.done(1)
            source.close()
            assert OBJECT.digest in gate.asked
            assert gate.ended == len(gate.asked)
            assert set(gate.asked) | set(gate.given) == {OBJECT.digest, SMALL.digest}

    run(main)


def test_small_objects_that_the_peer_lacks_are_told_of_as_lacking() -> None:
    async def main() -> None:
        async with many_scene() as it:
            it.shelf = MemoryShelf(*MANY[5:])
            it.serve()
            source = it.source()
            source.submit(all_of_many(1))
            number, failure, _ = await it.failure()
            assert (number, failure) == (1, Failure.LACKS)
            assert it.sink.data_of(5) == MANY[5].data
            source.close()

    run(main)


def test_a_false_small_object_ends_the_source_and_true_ones_are_kept() -> None:
    async def main() -> None:
        async with many_scene() as it:
            false = make_object(len(MANY[3].data), 1)._replace(digest=MANY[3].digest)
            it.shelf = MemoryShelf(*MANY[:3], false, *MANY[4:])
            it.serve()
            source = it.source()
            source.submit(all_of_many(1))
            number, failure, _ = await it.failure()
            assert (number, failure) == (None, Failure.BAD_BYTES)
            assert it.sink.data_of(4) == MANY[4].data
            assert not it.sink.data_of(3)

    run(main)


@pytest.mark.parametrize("size_bytes", [0, http1_small.MAX_SMALL_BYTES + 1])
def test_a_bad_request_for_small_objects_is_answered_so(size_bytes: int) -> None:
    async def main() -> None:
        async with many_scene() as it:
            it.serve()
            stream = await it.open_stream()
            body = MANY[0].digest + size_bytes.to_bytes(8, "big")
            head = b"POST /small HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n"
            assert (await exchange(stream, head + body)).startswith(b"HTTP/1.1 400 ")

    run(main)


def test_small_objects_that_others_may_have_are_not_given() -> None:
    async def main() -> None:
        async with many_scene() as it:
            server = it.serve()
            server.may_have = lambda _peer, digest: digest != MANY[0].digest
            source = it.source()
            source.submit(all_of_many(1))
            number, failure, _ = await it.failure()
            assert (number, failure) == (1, Failure.LACKS)
            assert not it.sink.data_of(0)
            source.close()

    run(main)


def test_what_came_meanwhile_is_not_asked_for() -> None:
    async def main() -> None:
        async with scene() as it:
            server = it.serve()
            it.sink.unwanted |= {(0, 0), (0, 2), (0, 5)}
            source = it.source()
            source.submit(request(1, (0, 0, 6)))
            await it.done(1)
            assert sorted(chunk for _, chunk in it.sink.kept) == [1, 3, 4]
            assert server.statistics().bytes_sent == 3 * CHUNK_SIZE
            source.close()

    run(main)


def test_bytes_that_are_not_proved_or_not_there_end_the_request_alone() -> None:
    async def main() -> None:
        async with scene() as it:
            it.serve()
            it.shelf.proved[OBJECT.digest] = frozenset({0})
            source = it.source()
            source.submit(request(1, (0, 0, 1)))
            source.submit(request(2, (0, 1, 2)))
            source.submit(request(3, (1, 0, 1)))
            both = {1, 3}
            await trio.to_thread.run_sync(
                it.report.wait_for, lambda: both <= set(it.report.finished)
            )
            assert (await it.failure())[:2] == (2, Failure.LACKS)
            source.close()

    run(main)


def test_a_stranger_gets_nothing() -> None:
    async def main() -> None:
        async with scene() as it:
            it.serve()
            it.allowed = False
            it.source().submit(request(1, (0, 0, 1)))
            assert (await it.failure())[:2] == (None, Failure.REFUSED_ACCESS)
            assert it.shelf.opened == []

    run(main)


def test_streams_of_one_peer_are_bounded() -> None:
    async def main() -> None:
        async with scene() as it:
            server = it.serve(max_streams_per_peer=1)
            holder = await it.open_stream()
            await holder.send(get(0, 0))
            assert await holder.receive_some()
            it.source().submit(request(1, (0, 0, 1)))
            assert (await it.failure())[:2] == (None, Failure.UNREACHABLE)
            assert server.statistics().turned_away == 1

    run(main)


@pytest.mark.parametrize(
    "head",
    [
        b"POST /tensor/" + OBJECT.digest.hex().encode() + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /tensor/00 HTTP/1.1\r\nHost: x\r\nRange: bytes=0-1\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
)
def test_what_is_no_request_is_told_so(head: bytes) -> None:
    async def main() -> None:
        async with scene() as it:
            it.serve()
            assert (await exchange(await it.open_stream(), head)).startswith(b"HTTP/1.1 400 ")
            it.source().submit(request(1, (0, 0, 1)))  # and others are served as before
            await it.done(1)

    run(main)


def test_an_endless_head_ends_the_stream() -> None:
    async def main() -> None:
        async with scene() as it:
            it.serve()
            assert await exchange(await it.open_stream(), b"GET " + b"x" * 9000) == b""

    run(main)


def test_whoever_asks_nothing_is_let_go() -> None:
    async def main() -> None:
        async with scene() as it:
            server = it.serve(first_request_timeout_s=0.05, idle_timeout_s=0.05)
            assert await exchange(await it.open_stream(), b"") == b""
            got = await exchange(await it.open_stream(), get(0, 9))
            assert got.endswith(OBJECT.data[:10])
            assert server.statistics().requests == 1

    run(main)


def content(first: int, last: int, size: int, body: bytes) -> bytes:
    return (
        f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{size}\r\n"
        f"Content-Length: {last - first + 1}\r\n\r\n"
    ).encode() + body


FALSE_BYTES = content(0, 999, 1000, bytes(1000))
FALSE_RANGE = content(1, 1000, 1001, SMALL.data)


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (FALSE_BYTES, Failure.BAD_BYTES),
        (FALSE_RANGE, Failure.PROTOCOL),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", Failure.PROTOCOL),
        (b"HTTP/1.1 206 " + b"x" * 10_000, Failure.PROTOCOL),
        (content(0, 999, 1000, SMALL.data[:500]), Failure.STALLED),
        (b"", Failure.STALLED),
    ],
)
def test_a_peer_that_answers_wrongly_is_given_up(answer: bytes, failure: Failure) -> None:
    async def misbehave(stream: Stream) -> None:
        await stream.receive_some()
        await stream.send(answer)
        await stream.receive_some()  # until the other side lets go

    async def main() -> None:
        async with scene() as it:
            it.answer_with(misbehave)
            it.source(stall_timeout_s=0.3).submit(request(1, (1, 0, 1)))
            assert (await it.failure())[:2] == (None, failure)
            assert it.sink.kept == {}

    run(main)


def test_a_cut_stream_costs_what_was_on_it_and_a_second_one_the_source() -> None:
    async def cut(stream: Stream) -> None:
        await stream.receive_some()
        stream.abort()

    async def main() -> None:
        async with scene() as it:
            it.answer_with(cut)
            source = it.source()
            source.submit(request(1, (1, 0, 1)))
            assert (await it.failure())[:2] == (1, Failure.CLOSED)
            source.submit(request(2, (1, 0, 1)))
            while len(it.report.failures) < 2:
                await trio.lowlevel.checkpoint()
            assert it.report.failures[1][:2] == (None, Failure.CLOSED)

    run(main)


def test_a_peer_without_the_protocol_is_unreachable() -> None:
    async def main() -> None:
        async with Host(listen=[HERE]) as server, Host() as client:
            await client.connect(server.addrs()[0])
            it = Scene(client, server)
            it.source().submit(request(1, (1, 0, 1)))
            assert (await it.failure())[:2] == (None, Failure.UNREACHABLE)

    run(main)


def test_nothing_is_reported_after_close() -> None:
    async def main() -> None:
        async with scene() as it:
            asked = trio.Event()

            async def hold(stream: Stream) -> None:
                await stream.receive_some()
                asked.set()
                with pytest.raises(RemoteError):
                    await stream.receive_some()  # the client resets it
                raise NoSource("gone")

            it.answer_with(hold)
            source = it.source()
            source.submit(request(1, (1, 0, 1)))
            await asked.wait()
            source.close()
            source.submit(request(2, (1, 0, 1)))
            await trio.testing.wait_all_tasks_blocked()
            assert it.report.failures == [] and it.report.finished == []

    run(main)
