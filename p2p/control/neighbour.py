"""One neighbour: a peer with whom a control stream is open.

`Neighbour` is the thin shell round `wire`: it reads frames, lets `Conversation`
judge their order, hands answers to whoever asked, and answers requests one at a
time from a bounded queue, so that no neighbour makes us do two things at once.

Every wait has a deadline. A violation ends the stream with a bye and the reason.
"""

from __future__ import annotations

from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from typing import Protocol

import trio

from tensorswarm.store.digest import digest_of
from tensorswarm.store.errors import BadInput, NoSource, ProtocolError, Refused, RemoteError
from tensorswarm.store.object_table import ObjectTable

from ..host.host import Stream
from ..host.lean import QuickLock
from . import wire, wire_limits, wire_models
from .answers import Answers
from .object_set import ObjectSet
from .outbox import Outbox

SEND_TIMEOUT_S = 20.0
"""Time for one frame to leave, in seconds: 1 MiB in that time is 0.4 Mbit/s."""

MAX_QUEUED_REQUESTS = 32
"""A neighbour's requests that wait for their answer; more are refused as too many."""

MAX_PARALLEL_ASKS = 16
"""Our own requests open at one neighbour; others wait their turn."""

BLOB_REQUESTS_AHEAD = 4
"""Such requests on their way to one neighbour: 4,096 chunk lists of ten chunks are 1.3 MB,
which covers 100 ms at 100 Mbit/s, and a neighbour keeps eight times as many waiting."""

WANTS_AHEAD = 2
"""Wants on their way to one neighbour: it looks the next one up while we read the last
answer. More would keep its other answers to us waiting."""

MODELS = "models"
"""Feature in hello: can be asked about models as such."""

MAX_MODELS_ASKED = 256
"""Models remembered that a neighbour was asked about, so that late news is no violation."""

ANSWER_QUEUE_FRAMES = 8
"""Frames of an answer that wait for the asker before reading stops."""


class Owner(Protocol):
    """Who keeps the neighbours: hears of news, and knows other peers."""

    def on_have(self, peer_id: str, entries: Sequence[wire.HaveEntry]) -> None:
        """Note what a neighbour says it holds, answered or unasked."""
        ...

    def on_have_model(self, peer_id: str, message: wire.HaveModel, table: ObjectTable) -> None:
        """Note what a neighbour says it holds of a model that it was asked about."""
        ...

    def on_offer(self, peer_id: str, message: wire.Offer | wire.Pass) -> None:
        """Note an upload that a neighbour offers, or does not take from us."""
        ...

    def on_want(self, peer_id: str) -> None:
        """Note that a neighbour has begun to want something."""
        ...

    def peers_for(self, digest: bytes, asker: str) -> list[wire.PeerEntry]:
        """Return peers that hold or want an object (any peers, for an empty digest)."""
        ...


class Neighbour:
    """A peer and the control stream to it.

    Attributes
    ----------
    peer_id : str
        Who it is, proved by the stream's connection.
    hello : wire.Hello
        What it said of itself; set by `greet`.
    interests : ObjectSet
        What it asked about and wants to hear news of.
    asked : dict of bytes to ObjectTable or None
        The models that it was asked about; None for those given up since.
    earlier : Neighbour or None
        The same peer on an earlier stream, for when this one ends.
    """

    def __init__(self, peer_id: str, stream: Stream, answers: Answers, owner: Owner) -> None:
        self.peer_id = peer_id
        self.hello = wire.Hello(1, "", (), (), ())
        self.interests = ObjectSet()
        self.asked: dict[bytes, ObjectTable | None] = {}
        self.earlier: Neighbour | None = None
        self._stream = stream
        self._answers = answers
        self._owner = owner
        self._conversation = wire.Conversation()
        self._reader = wire.FrameReader()
        self._send_lock = QuickLock()
        self._asks = trio.CapacityLimiter(MAX_PARALLEL_ASKS)
        self._waiting: dict[int, trio.MemorySendChannel[wire.Answer]] = {}
        self._requests_in, self._requests_out = trio.open_memory_channel[wire.Request](
            MAX_QUEUED_REQUESTS
        )
        self._outbox = Outbox()
        self._closed = trio.Event()

    # ---- the life of the stream

    async def greet(self, hello: wire.Hello) -> None:
        """Exchange hellos.

        Raises
        ------
        RemoteError
            No proper hello came in time.
        """
        try:
            with trio.fail_after(wire_limits.HELLO_TIMEOUT_S):
                await self._send(hello)
                theirs = await self._receive()
        except trio.TooSlowError as error:
            raise NoSource(
                f"peer {self.peer_id} did not say hello within {wire_limits.HELLO_TIMEOUT_S:g} s"
            ) from error
        if theirs is None:
            raise NoSource(f"peer {self.peer_id} closed the stream before it said hello")
        if isinstance(theirs, wire.Bye):
            raise NoSource(f"peer {self.peer_id} said goodbye: {theirs.text}")
        assert isinstance(theirs, wire.Hello)  # the conversation lets nothing else come first
        self.hello = theirs

    async def run(self) -> None:
        """Read and answer until the stream ends; returns then, whatever ended it."""
        reason = wire.Bye(wire_limits.CODE_LEAVING, "")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve)
                nursery.start_soon(self._speak)
                try:
                    await self._read_all()
                finally:
                    nursery.cancel_scope.cancel()
        except* ProtocolError as group:
            text = wire_limits.printable(str(group.exceptions[0]), wire_limits.MAX_REASON_CHARS)
            reason = wire.Bye(wire_limits.CODE_BAD_REQUEST, text)
        except* RemoteError:
            pass  # the stream broke; the neighbour is simply gone
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await self.close(reason)

    async def close(self, bye: wire.Bye | None = None) -> None:
        """End the stream; those who wait for an answer get an error."""
        if self._closed.is_set():
            return
        self._closed.set()
        for channel in self._waiting.values():
            channel.close()
        if bye is not None:
            # It may be gone already, or was never greeted: nobody to say goodbye to.
            with suppress(RemoteError, BadInput), trio.move_on_after(1):
                await self._send(bye)
        await self._stream.aclose()

    @property
    def is_closed(self) -> bool:
        """Whether the stream has ended."""
        return self._closed.is_set()

    async def _read_all(self) -> None:
        while True:
            message = await self._receive()
            if message is None or isinstance(message, wire.Bye):
                return
            await self._take(message)

    async def _receive(self) -> wire.Message | None:
        while True:
            message = self._reader.next_message()
            if message is not None:
                if self._conversation.received(message):
                    return message
                continue
            data = await self._stream.receive_some()
            if not data:
                return None
            self._reader.feed(data)

    async def _send(self, *messages: wire.Message) -> None:
        """Send messages, together: each by itself costs as much as all of them, if short."""
        async with self._send_lock:
            if self._closed.is_set() and not isinstance(messages[0], wire.Bye):
                raise NoSource(f"peer {self.peer_id} has left")
            for message in messages:
                self._conversation.sent(message)
            try:
                with trio.fail_after(SEND_TIMEOUT_S):
                    await self._stream.send(b"".join(map(wire.encode, messages)))
            except trio.TooSlowError as error:
                raise NoSource(f"peer {self.peer_id} does not take what we send") from error

    # ---- what comes in

    async def _take(self, message: wire.Message) -> None:
        match message:
            case wire.Have(request_id=0):
                self._owner.on_have(self.peer_id, message.entries)
            case wire.HaveModel() if not self._is_asked(message):
                pass
            case wire.HaveModel(request_id=0):
                self._hear_of_model(message)
            case wire.Offer() | wire.Pass():
                self._owner.on_offer(self.peer_id, message)
            case wire.Refusal(request_id=0) | wire.Unknown():
                pass
            case (
                wire.Have()
                | wire.HaveModel()
                | wire.Blobs()
                | wire.ChunkListIs()
                | wire.Peers()
                | wire.Refusal()
            ):
                channel = self._waiting.get(message.request_id)
                if channel is not None:
                    # Who asked may have gone meanwhile; then nobody needs the answer.
                    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        await channel.send(message)
            case wire.Unwant():
                self.interests.discard(message.digests)
            case (
                wire.Want()
                | wire.WantModel()
                | wire.GetBlobs()
                | wire.GetChunkList()
                | wire.GetPeers()
            ):
                try:
                    self._requests_in.send_nowait(message)
                except trio.WouldBlock:
                    code, text = wire_limits.CODE_TOO_MANY, "too many requests"
                    await self._send(wire.Refusal(message.request_id, code, text))
            case _:
                raise ProtocolError("a message that makes no sense here")

    async def _serve(self) -> None:
        async for request in self._requests_out:
            match request:
                case wire.Want():
                    await self._answer_want(request)
                case wire.WantModel():
                    await self._answer_want_model(request)
                case wire.GetBlobs() if await self._refuses([item[0] for item in request.items]):
                    await self._refuse(request.request_id)
                case wire.GetChunkList() if await self._refuses([request.digest]):
                    await self._refuse(request.request_id)
                case wire.GetBlobs():
                    frames = self._answers.blob_frames(request)
                    while (frame := await trio.to_thread.run_sync(next, frames, None)) is not None:
                        await self._send(frame)
                case wire.GetChunkList():
                    await self._send(
                        await trio.to_thread.run_sync(self._answers.chunk_list, request)
                    )
                case wire.GetPeers():
                    entries = self._owner.peers_for(request.digest, self.peer_id)
                    await self._send(
                        wire.Peers(request.request_id, tuple(entries[: wire_limits.MAX_PEERS]))
                    )

    async def _refuses(self, digests: Sequence[bytes]) -> bool:
        return await trio.to_thread.run_sync(self._answers.refuses, digests)

    async def _refuse(self, request_id: int) -> None:
        """Refuse in the same words whether it is missing or not for this peer."""
        code, text = wire_limits.CODE_NOT_ALLOWED, "not here, or not for you"
        await self._send(wire.Refusal(request_id, code, text))

    async def _answer_want(self, want: wire.Want) -> None:
        if self.interests.count_with(want.digests) > wire_limits.MAX_SUBSCRIPTIONS:
            code, text = wire_limits.CODE_TOO_MANY, "too many subscriptions"
            await self._send(wire.Refusal(want.request_id, code, text))
            return
        # Subscribed before the look, so that nothing proved in between is missed.
        self.interests.add(want.digests)
        self._owner.on_want(self.peer_id)
        entries = await trio.to_thread.run_sync(self._answers.holdings, want.digests)
        for frame in wire.fit_have(want.request_id, entries):
            await self._send(frame)

    async def _answer_want_model(self, want: wire.WantModel) -> None:
        request_id, model, interests = want.request_id, want.model, self.interests
        table = await trio.to_thread.run_sync(self._answers.objects_of, model)
        if table is None:
            if await self._refuses([model]):
                await self._refuse(request_id)
                return
            code, text = wire_limits.CODE_UNKNOWN_MODEL, "that model is not known here"
            await self._send(wire.Refusal(request_id, code, text))
            return
        wire_models.check_runs(want.wanted, len(table))
        most = wire_limits.MAX_MODEL_SUBSCRIPTIONS
        if interests.of_model(model) is None and interests.model_count >= most:
            code, text = wire_limits.CODE_TOO_MANY, "too many subscriptions to models"
            await self._send(wire.Refusal(request_id, code, text))
            return
        chosen = interests.part_of(model, table)  # before the look, as above
        runs = list(want.runs())
        for start, stop in runs:
            chosen.add_run(start, stop)
        self._owner.on_want(self.peer_id)
        held = await trio.to_thread.run_sync(self._answers.model_holdings, table, runs)
        parts = [wire.ModelPart(*part) for part in sorted(held.parts.items())]
        for frame in wire.fit_have_model(request_id, model, held.runs(), parts):
            await self._send(frame)

    def _is_asked(self, message: wire.HaveModel) -> bool:
        """Tell whether what is said of a model is of interest.

        Raises
        ------
        ProtocolError
            Nobody asked, or it does not fit the model's manifest.
        """
        if message.model not in self.asked:
            raise ProtocolError("have_model: about a model that was not asked about")
        table = self.asked[message.model]
        if table is not None:
            wire_models.check_model(message, table.sizes)
        return table is not None

    def _hear_of_model(self, message: wire.HaveModel) -> None:
        table = self.asked.get(message.model)
        if table is not None:
            self._owner.on_have_model(self.peer_id, message, table)

    # ---- what we ask

    @asynccontextmanager
    async def _asking(
        self, make: Callable[[int], wire.Request]
    ) -> AsyncIterator[Callable[[], AsyncIterator[wire.Answer]]]:
        """Send a request; gives a function that yields the frames of its answer."""
        async with self._asks:
            if self._closed.is_set():
                raise NoSource(f"peer {self.peer_id} has left")
            request_id = self._conversation.next_request_id()
            send, receive = trio.open_memory_channel[wire.Answer](ANSWER_QUEUE_FRAMES)
            self._waiting[request_id] = send
            try:
                await self._send(make(request_id))
                yield lambda: self._frames(receive)
            finally:
                self._conversation.give_up(request_id)
                del self._waiting[request_id]
                receive.close()

    async def _frames(
        self, receive: trio.MemoryReceiveChannel[wire.Answer]
    ) -> AsyncIterator[wire.Answer]:
        while True:
            try:
                with trio.fail_after(wire_limits.ANSWER_TIMEOUT_S):
                    frame = await receive.receive()
            except trio.TooSlowError as error:
                raise NoSource(f"peer {self.peer_id} did not answer in time") from error
            except (trio.EndOfChannel, trio.ClosedResourceError) as error:
                raise NoSource(f"peer {self.peer_id} left before it answered") from error
            if isinstance(frame, wire.Refusal) and frame.code == wire_limits.CODE_NOT_ALLOWED:
                raise Refused(f"peer {self.peer_id} refused: {frame.text}")
            if isinstance(frame, wire.Refusal):
                raise NoSource(f"peer {self.peer_id} refused: {frame.text}")
            yield frame
            if not isinstance(frame, wire.Have | wire.HaveModel | wire.Blobs) or frame.last:
                return

    async def want(self, digests: Collection[bytes]) -> None:
        """Ask what the neighbour holds of `digests`, now and later.

        The answers go to the owner's `on_have`, as the news do.
        """

        async def ask(part: Sequence[bytes]) -> None:
            async with self._asking(lambda i: wire.Want(i, tuple(part))) as frames:
                async for frame in frames():
                    assert isinstance(frame, wire.Have)
                    self._owner.on_have(self.peer_id, frame.entries)

        await self._ask_in_parts(list(digests), wire_limits.MAX_WANT_DIGESTS, WANTS_AHEAD, ask)

    async def want_model(
        self, model: bytes, table: ObjectTable, runs: Sequence[tuple[int, int]]
    ) -> None:
        """Ask what the neighbour holds of objects of a model, now and later.

        The answers go to the owner's `on_have_model`, as the news do.

        Parameters
        ----------
        model : bytes
            The manifest's digest.
        table : ObjectTable
            The manifest's objects.
        runs : sequence of (int, int)
            Which ones: the first of each run, and the one after its last.

        Raises
        ------
        NoSource, Refused
            It cannot be asked like this: it does not know the manifest, or takes no such
            questions, or the runs are too many. Ask by digests.
        """
        if MODELS not in self.hello.features or 2 * len(runs) > wire_models.MAX_RUN_ITEMS:
            raise NoSource(f"peer {self.peer_id} cannot be asked about this model as such")
        self.asked[model] = table
        flat = wire.flat_runs(runs)
        try:
            async with self._asking(lambda i: wire.WantModel(i, model, flat)) as frames:
                async for frame in frames():
                    assert isinstance(frame, wire.HaveModel)
                    if frame.model != model:
                        raise ProtocolError(f"peer {self.peer_id} answered about another model")
                    self._hear_of_model(frame)
        except RemoteError:
            self._give_up_models([model])
            raise

    def _give_up_models(self, models: Iterable[bytes]) -> None:
        """Note that nothing more is to be heard of models; news of them may be on the way."""
        for model in models:
            if model in self.asked:
                del self.asked[model]  # so that it is the youngest
                self.asked[model] = None
        for old in [model for model, table in self.asked.items() if table is None]:
            if len(self.asked) <= MAX_MODELS_ASKED:
                break
            del self.asked[old]

    async def unwant(self, digests: Collection[bytes]) -> None:
        """Ask for no more news of `digests`, and of models that have one of them."""
        wanted = list(digests)
        self._give_up_models(wanted if self.asked else ())
        for start in range(0, len(wanted), wire_limits.MAX_WANT_DIGESTS):
            await self._send(
                wire.Unwant(tuple(wanted[start : start + wire_limits.MAX_WANT_DIGESTS]))
            )

    def tell(self, entries: Iterable[wire.HaveEntry]) -> None:
        """Tell news of what we hold now, as soon as the stream takes it."""
        self._outbox.add_news(entries)

    def tell_model(
        self, model: bytes, count: int, told: Iterable[tuple[int, bytes | None]], *, is_known: bool
    ) -> None:
        """Tell news of objects of a model: index, and bitmap or None; it may have all of it."""
        self._outbox.add_model_news(model, count, told, is_known=is_known)

    def notify(self, notice: wire.Offer | wire.Pass) -> None:
        """Offer an upload, or pass on an offer, as soon as the stream takes it."""
        self._outbox.add_notice(notice)

    async def wait_told(self) -> None:
        """Wait until all news has left, or the stream has ended."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait_closed, nursery.cancel_scope)
            await self._outbox.wait_sent()
            nursery.cancel_scope.cancel()

    async def _wait_closed(self, scope: trio.CancelScope) -> None:
        await self._closed.wait()
        scope.cancel()

    async def _speak(self) -> None:
        while True:
            messages = await self._outbox.take()
            short = sum(not isinstance(message, wire.Have) for message in messages)
            await self._send(*messages[: short + 1])
            for message in messages[short + 1 :]:
                await self._send(message)
            self._outbox.sent()

    async def get_blobs(self, limits_bytes: Mapping[bytes, int]) -> dict[bytes, bytes]:
        """Ask for blobs and verify them.

        Parameters
        ----------
        limits_bytes : mapping of bytes to int
            The digests wanted, and the most bytes taken for each.

        Returns
        -------
        dict of bytes to bytes
            Those the neighbour holds, whole and verified.

        Raises
        ------
        ProtocolError
            A blob was too long, out of order, or not what its digest names.
        """
        found: dict[bytes, bytes] = {}

        async def ask(part: Sequence[bytes]) -> None:
            items = tuple([wire.BlobItem(digest, 0) for digest in part])
            parts: dict[bytes, bytearray] = {}
            async with self._asking(lambda i: wire.GetBlobs(i, items)) as frames:
                async for frame in frames():
                    assert isinstance(frame, wire.Blobs)
                    for piece in frame.pieces:
                        self._take_piece(piece, parts, limits_bytes, found)

        wanted = list(limits_bytes)
        await self._ask_in_parts(wanted, wire_limits.MAX_BLOB_ITEMS, BLOB_REQUESTS_AHEAD, ask)
        return found

    async def _ask_in_parts(
        self,
        digests: Sequence[bytes],
        most: int,
        ahead: int,
        ask: Callable[[Sequence[bytes]], Awaitable[None]],
    ) -> None:
        """Ask about many digests, at most so many in a request, some requests at a time.

        Raises
        ------
        RemoteError
            What went wrong with the first request that failed; the others are given up.
        """
        failures: list[RemoteError] = []
        turns = trio.Semaphore(ahead)

        async def ask_part(part: Sequence[bytes], nursery: trio.Nursery) -> None:
            try:
                await ask(part)
            except RemoteError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()
            finally:
                turns.release()

        async with trio.open_nursery() as nursery:
            for start in range(0, len(digests), most):
                await turns.acquire()
                nursery.start_soon(ask_part, digests[start : start + most], nursery)
        if failures:
            raise failures[0]

    def _take_piece(
        self,
        piece: wire.BlobPiece,
        parts: dict[bytes, bytearray],
        limits_bytes: Mapping[bytes, int],
        found: dict[bytes, bytes],
    ) -> None:
        limit = limits_bytes.get(piece.digest)
        part = parts.setdefault(piece.digest, bytearray())
        if limit is None or piece.size_bytes > limit or piece.offset != len(part):
            raise ProtocolError(f"peer {self.peer_id} sent a blob that was not asked for like this")
        part += piece.data
        if len(part) == piece.size_bytes:
            if digest_of(part) != piece.digest:
                raise ProtocolError(f"peer {self.peer_id} sent a blob that does not match its hash")
            found[piece.digest] = bytes(parts.pop(piece.digest))

    async def get_chunk_list(self, digest: bytes) -> wire.ChunkListIs | None:
        """Ask for an object's size and chunk list digest: a hint, not a proof."""
        async with self._asking(lambda i: wire.GetChunkList(i, digest)) as frames:
            async for frame in frames():
                assert isinstance(frame, wire.ChunkListIs)
                if frame.digest != digest:
                    raise ProtocolError(f"peer {self.peer_id} answered about another object")
                return frame if frame.size_bytes >= 0 else None
        return None

    async def get_peers(self, digest: bytes) -> tuple[wire.PeerEntry, ...]:
        """Ask for peers that hold or want an object, or for any peers (empty digest)."""
        async with self._asking(lambda i: wire.GetPeers(i, digest)) as frames:
            async for frame in frames():
                assert isinstance(frame, wire.Peers)
                return frame.entries
        return ()
