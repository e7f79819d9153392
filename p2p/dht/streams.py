"""Streams to DHT nodes, kept for the next question.

Purpose
-------
Opening a stream costs 5 ms of CPU, asking on one that is open 0.3 ms. A look-up asks 20
nodes, mostly the same ones as the look-up before.

Rules
-----
- A stream carries one question at a time. Up to `MAX_IDLE_PER_NODE` are kept for each
  node, `MAX_IDLE` in all; those not used for longest are closed.
- A kept stream may have been closed by the node meanwhile: then a new one is opened.
- Who gives up waiting leaves the answer to come: the stream is kept when it has.
- A stream that is lent (`lend`) carries what its borrower likes, and is kept after it.
- At most `MAX_PARALLEL` questions are open at once. The time for a question runs from its
  turn: a machine that is slow must not take its own slowness for the nodes'.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message

from tensorswarm.store.errors import NoSource, ProtocolError, RemoteError

from ..host.host import Host, Stream
from .rpc import KAD_PROTOCOL, DhtStream, Question

MAX_IDLE_PER_NODE = 2
"""Streams kept to one node."""

MAX_IDLE = 128
"""Streams kept in all; each is a few kilobytes here and there."""

MAX_PARALLEL = 64
"""Questions open at once: those of a fetch that looks for four keys, and again for
as many that some have made crowded."""


class DhtStreams:
    """Asks DHT nodes, on streams that are kept.

    Parameters
    ----------
    host : Host
        Ours.

    Attributes
    ----------
    asked, opened : int
        Questions asked, and streams opened for them.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._idle: OrderedDict[Stream, tuple[str, DhtStream]] = OrderedDict()
        self._limiter = trio.CapacityLimiter(MAX_PARALLEL)
        self.asked = 0
        self.opened = 0

    async def ask(self, node: str, question: Question, timeout_s: float) -> Message:
        """Ask a node one question. Cancel-safe.

        Raises
        ------
        RemoteError
            It cannot be reached, does not answer in time, or sends nonsense.
        """
        answers: list[Message | RemoteError] = []
        done = trio.Event()

        async def exchange() -> None:
            try:
                with trio.move_on_after(timeout_s):
                    answers.append(await self._exchange(node, question, timeout_s))
            except RemoteError as error:
                answers.append(error)
            finally:
                self._limiter.release_on_behalf_of(done)
                done.set()

        await self._limiter.acquire_on_behalf_of(done)
        self.asked += 1
        try:
            self._host.start_soon(exchange)
        except BaseException:
            self._limiter.release_on_behalf_of(done)
            raise
        await done.wait()
        if not answers:
            raise NoSource(f"DHT node {node} did not answer within {timeout_s:g} s")
        answer = answers[0]
        if isinstance(answer, RemoteError):
            raise answer
        return answer

    @asynccontextmanager
    async def lend(self, node: str, timeout_s: float) -> AsyncIterator[DhtStream]:
        """Lend a stream for the length of the block: one that is kept, or a new one.

        Raises
        ------
        RemoteError
            The node cannot be reached in that time.
        """
        while (kept := self._take(node)) is not None and kept[0].is_over:
            kept[0].abort()
        if kept is None:
            stream = await self._host.open_stream(node, KAD_PROTOCOL, timeout_s)
            self.opened += 1
            kept = stream, DhtStream(stream)
        try:
            yield kept[1]
        except BaseException:
            kept[0].abort()
            raise
        self._keep(node, *kept)

    async def _exchange(self, node: str, question: Question, timeout_s: float) -> Message:
        while (kept := self._take(node)) is not None:
            try:
                return await self._ask_on(*kept, node, question)
            except NoSource:
                continue  # the node has closed it meanwhile
        stream = await self._host.open_stream(node, KAD_PROTOCOL, timeout_s)
        self.opened += 1
        return await self._ask_on(stream, DhtStream(stream), node, question)

    async def _ask_on(
        self, stream: Stream, messages: DhtStream, node: str, question: Question
    ) -> Message:
        try:
            await messages.send(question.data)
            answer = await messages.receive()
            if answer.type != question.kind:
                raise ProtocolError(f"DHT node {node} answered something else")
        except BaseException:
            stream.abort()
            raise
        self._keep(node, stream, messages)
        return answer

    def _take(self, node: str) -> tuple[Stream, DhtStream] | None:
        for stream, (owner, messages) in reversed(self._idle.items()):
            if owner == node:
                del self._idle[stream]
                return stream, messages
        return None

    def _keep(self, node: str, stream: Stream, messages: DhtStream) -> None:
        of_node = [each for each, (owner, _) in self._idle.items() if owner == node]
        if len(of_node) >= MAX_IDLE_PER_NODE:
            self._idle.pop(of_node[0])
            of_node[0].abort()
        self._idle[stream] = (node, messages)
        if len(self._idle) > MAX_IDLE:
            self._idle.popitem(last=False)[0].abort()
