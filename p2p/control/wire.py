"""The control protocol `/tensorswarm/1`: bytes in, messages out, and back.

Two neighbours keep one libp2p stream between them and talk in frames: a length of
four bytes, big-endian, then a msgpack array ``[kind, field, ...]``. This module
turns messages into frames (`encode`), a stream of bytes into messages
(`FrameReader`), cuts long answers into frames (`fit_have`, `fit_blobs`) and says
what may come when (`Conversation`). ``docs/protocol.md`` is the same for
implementers in other languages.

Rules
-----
- What a peer sends is checked whole before it becomes a message: types, lengths,
  ranges (`wire_limits`). Whatever fails raises ProtocolError; the peer is dropped.
- The same checks run before anything is sent; there they raise BadInput.
- Fields after the known ones are ignored, and a frame of an unknown kind becomes
  `Unknown`: so a later version can add both.

What it does not do: no I/O, no clock, no answers. Who may ask, how often, and how
long an answer may take is the shell's business, and so are the digests of blobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from enum import Enum
from operator import attrgetter
from typing import ClassVar, TypeAlias

import msgpack

from tensorswarm.store.errors import BadInput, ProtocolError

from . import wire_limits as limits
from .wire_hints import ChunkListIs as ChunkListIs
from .wire_hints import GetChunkList as GetChunkList
from .wire_hints import GetPeers as GetPeers
from .wire_hints import Peers as Peers
from .wire_limits import BlobItem as BlobItem
from .wire_limits import BlobPiece as BlobPiece
from .wire_limits import Fields
from .wire_limits import HaveEntry as HaveEntry
from .wire_limits import PeerEntry as PeerEntry
from .wire_models import HaveModel as HaveModel
from .wire_models import ModelPart as ModelPart
from .wire_models import WantModel as WantModel
from .wire_models import fit_have_model as fit_have_model
from .wire_models import flat_runs as flat_runs
from .wire_offers import Offer as Offer
from .wire_offers import Pass as Pass

_LENGTH_BYTES = 4
_HAVE_HEAD_BYTES = 32  # array heads, kind, a request id of nine bytes, last
_HAVE_ENTRY_BYTES = 96  # array head, two digests of 34 bytes, a size of nine, a bitmap's head


@dataclass(frozen=True, slots=True)
class Hello:
    """Who the sender is: the first message, both ways.

    Attributes
    ----------
    version : int
        Highest version spoken; the lower of both sides' rules apply.
    agent : str
        Name and version of the program, for people.
    bulk : tuple[str, ...]
        Bulk-plane addresses; see `wire_limits.split_bulk_address`.
    addrs : tuple[str, ...]
        Multiaddrs at which its libp2p host listens.
    features : tuple[str, ...]
        Names of what it can do beyond this version.
    """

    kind: ClassVar[int] = 1
    version: int
    agent: str
    bulk: tuple[str, ...]
    addrs: tuple[str, ...]
    features: tuple[str, ...]

    @classmethod
    def _parse(cls, raw: Fields) -> Hello:
        version, agent, bulk, addrs, features = limits.take_fields(raw, 5, "hello")
        most = limits.MAX_HELLO_ADDRS
        return cls(
            limits.take_int(version, "hello.version", low=1),
            limits.take_words(agent, "hello.agent", limits.MAX_AGENT_CHARS),
            limits.take_items(bulk, "hello.bulk", most, limits.take_bulk_address),
            limits.take_items(addrs, "hello.addrs", most, limits.take_multiaddr),
            limits.take_items(features, "hello.features", limits.MAX_FEATURES, limits.take_feature),
        )


@dataclass(frozen=True, slots=True)
class Bye:
    """The sender closes the stream, and why; nothing follows."""

    kind: ClassVar[int] = 2
    code: int
    text: str

    @classmethod
    def _parse(cls, raw: Fields) -> Bye:
        code, text = limits.take_fields(raw, 2, "bye")
        return cls(
            limits.take_int(code, "bye.code", 0, limits.MAX_CODE),
            limits.take_words(text, "bye.text", limits.MAX_REASON_CHARS),
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """No answer to a request, and why; request id 0 means no request in particular."""

    kind: ClassVar[int] = 3
    request_id: int
    code: int
    text: str

    @classmethod
    def _parse(cls, raw: Fields) -> Refusal:
        request_id, code, text = limits.take_fields(raw, 3, "refusal")
        return cls(
            limits.take_int(request_id, "refusal.request_id"),
            limits.take_int(code, "refusal.code", 0, limits.MAX_CODE),
            limits.take_words(text, "refusal.text", limits.MAX_REASON_CHARS),
        )


@dataclass(frozen=True, slots=True)
class Want:
    """Asks what the other holds of these objects, now and (as news) later."""

    kind: ClassVar[int] = 4
    request_id: int
    digests: tuple[bytes, ...]

    @classmethod
    def _parse(cls, raw: Fields) -> Want:
        request_id, digests = limits.take_fields(raw, 2, "want")
        return cls(limits.take_request_id(request_id, "want"), _digests(digests, "want.digests"))


@dataclass(frozen=True, slots=True)
class Have:
    """Answers a want, in one frame or several, or brings news (request id 0).

    What a want asked for and no entry mentions up to the frame with `last` is not held.
    A part that was proved against another chunk list than the reader's is of no use to
    it, and no lie: false lists fool honest peers.
    """

    kind: ClassVar[int] = 5
    request_id: int
    entries: tuple[HaveEntry, ...]
    last: bool

    @classmethod
    def _parse(cls, raw: Fields) -> Have:
        request_id, entries, last = limits.take_fields(raw, 3, "have")
        return cls(
            limits.take_int(request_id, "have.request_id"),
            limits.take_items(
                entries, "have.entry", limits.MAX_HAVE_ENTRIES, limits.take_have_entry
            ),
            limits.take_bool(last, "have.last"),
        )


@dataclass(frozen=True, slots=True)
class Unwant:
    """Ends the subscription to these objects."""

    kind: ClassVar[int] = 6
    digests: tuple[bytes, ...]

    @classmethod
    def _parse(cls, raw: Fields) -> Unwant:
        (digests,) = limits.take_fields(raw, 1, "unwant")
        return cls(_digests(digests, "unwant.digests"))


@dataclass(frozen=True, slots=True)
class GetBlobs:
    """Asks for blobs, each from an offset on."""

    kind: ClassVar[int] = 7
    request_id: int
    items: tuple[BlobItem, ...]

    @classmethod
    def _parse(cls, raw: Fields) -> GetBlobs:
        request_id, items = limits.take_fields(raw, 2, "get_blobs")
        return cls(
            limits.take_request_id(request_id, "get_blobs"),
            limits.take_items(
                items, "get_blobs.item", limits.MAX_BLOB_ITEMS, limits.take_blob_item
            ),
        )


@dataclass(frozen=True, slots=True)
class Blobs:
    """Answers get_blobs, in one frame or several.

    A blob of which no piece came up to the frame with `last` is not held.
    """

    kind: ClassVar[int] = 8
    request_id: int
    pieces: tuple[BlobPiece, ...]
    last: bool

    @classmethod
    def _parse(cls, raw: Fields) -> Blobs:
        request_id, raw_pieces, last = limits.take_fields(raw, 3, "blobs")
        pieces = limits.take_items(
            raw_pieces, "blobs.piece", limits.MAX_BLOB_ITEMS, limits.take_blob_piece
        )
        if sum(len(piece.data) for piece in pieces) > limits.MAX_BLOB_DATA_PER_FRAME:
            raise ProtocolError(f"blobs: over {limits.MAX_BLOB_DATA_PER_FRAME} bytes of data")
        return cls(
            limits.take_request_id(request_id, "blobs"),
            pieces,
            limits.take_bool(last, "blobs.last"),
        )


@dataclass(frozen=True, slots=True)
class Unknown:
    """A message of a kind this version does not know: to be skipped, and counted."""

    kind: int


Request: TypeAlias = Want | WantModel | GetBlobs | GetChunkList | GetPeers
Answer: TypeAlias = Have | HaveModel | Blobs | ChunkListIs | Peers | Refusal
Message: TypeAlias = Hello | Bye | Unwant | Offer | Pass | Unknown | Request | Answer


def _digests(value: object, what: str) -> tuple[bytes, ...]:
    return limits.take_items(value, what, limits.MAX_WANT_DIGESTS, limits.take_digest)


_PARSERS: dict[int, Callable[[Fields], Message]] = {
    cls.kind: cls._parse
    for cls in (
        *(Hello, Bye, Refusal, Want, Have, Unwant, GetBlobs, Blobs),
        *(GetChunkList, ChunkListIs, GetPeers, Peers, Offer, Pass, WantModel, HaveModel),
    )
}


def _getter(names: list[str]) -> Callable[[Message], tuple[object, ...]]:
    """Return what gives these fields of a message, as a tuple."""
    get = attrgetter(*names)
    return get if len(names) > 1 else lambda message: (get(message),)


_FIELDS: dict[int, Callable[[Message], tuple[object, ...]]] = {
    kind: _getter([field.name for field in fields(parse.__self__)])  # type: ignore[attr-defined]
    for kind, parse in _PARSERS.items()
}

_PACKER = msgpack.Packer(use_bin_type=True)


def encode(message: Message) -> bytes:
    """Return the frame of a message, its length included.

    Raises
    ------
    BadInput
        The message breaks a rule that the receiver would hold against us.
    """
    if isinstance(message, Unknown):
        raise BadInput(f"a message of the unknown kind {message.kind} cannot be sent")
    values = _FIELDS[message.kind](message)
    try:
        _PARSERS[message.kind](values)
    except ProtocolError as error:
        raise BadInput(f"not to be sent: {error}") from error
    payload: bytes = _PACKER.pack((message.kind, *values))
    if len(payload) > limits.MAX_FRAME_BYTES:
        raise BadInput(f"a frame of {len(payload)} bytes, at most {limits.MAX_FRAME_BYTES}")
    return len(payload).to_bytes(_LENGTH_BYTES, "big") + payload


def _opaque_extension(code: int, data: bytes) -> object:
    """Stand in for a msgpack extension: no field of ours, whatever it holds."""
    return Ellipsis


def _decode(payload: memoryview) -> Message:
    try:
        raw = msgpack.unpackb(
            payload,
            use_list=False,
            strict_map_key=True,  # text keys only: their hashes cannot be made to collide
            max_array_len=limits.MAX_ARRAY_ITEMS,
            max_map_len=limits.MAX_MAP_ITEMS,
            ext_hook=_opaque_extension,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"frame: not msgpack in our limits ({type(error).__name__})") from error
    (raw_kind,) = limits.take_fields(raw, 1, "frame")
    kind = limits.take_int(raw_kind, "frame.kind", 0, limits.MAX_KIND)
    parse = _PARSERS.get(kind)
    return Unknown(kind) if parse is None else parse(raw[1:])


class FrameReader:
    """Cuts one peer's stream into messages.

    Feed what was read, then take messages until there is none:

    >>> reader = FrameReader()
    >>> reader.feed(encode(Bye(0, "leaving")))
    >>> reader.next_message()
    Bye(code=0, text='leaving')

    Drained like this it takes at least 1 MiB a feed. It never holds more than
    `wire_limits.MAX_BUFFERED_BYTES` unread bytes, allots nothing because a length says
    so, and copies each byte a constant number of times.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._start = 0
        self._violation = ""

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes as they were read; after a violation they are dropped.

        Raises
        ------
        BadInput
            More unread bytes than the reader may hold: the caller did not drain it.
        """
        if self._violation:
            return
        unread = len(self._buffer) - self._start + len(data)
        if unread > limits.MAX_BUFFERED_BYTES:
            raise BadInput(f"{unread} bytes unread, at most {limits.MAX_BUFFERED_BYTES}")
        if self._start > len(self._buffer) // 2:  # so that what is moved was paid for by reading
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def next_message(self) -> Message | None:
        """Return the next whole message, or None until more bytes are fed.

        Raises
        ------
        ProtocolError
            The peer broke the protocol. The reader is of no use after that: it
            raises the same again.
        """
        if self._violation:
            raise ProtocolError(self._violation)
        try:
            return self._next_frame()
        except ProtocolError as error:
            self._violation = str(error)
            self._buffer = bytearray()
            self._start = 0
            raise

    def _next_frame(self) -> Message | None:
        begin = self._start + _LENGTH_BYTES
        if len(self._buffer) < begin:
            return None
        length = int.from_bytes(self._buffer[self._start : begin], "big")
        if length > limits.MAX_FRAME_BYTES:
            raise ProtocolError(f"frame: {length} bytes, at most {limits.MAX_FRAME_BYTES}")
        end = begin + length
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as view, view[begin:end] as payload:
            message = _decode(payload)
        self._start = end
        return message


def fit_have(request_id: int, entries: Iterable[HaveEntry]) -> Iterator[Have]:
    """Cut an answer to a want, or news (`request_id` 0), into frames below the limit.

    An entry whose bitmap is longer than `wire_limits.MAX_BITMAP_BYTES` is left out:
    it cannot be told. News without entries are no frame; an empty answer is one.
    """
    batch: list[HaveEntry] = []
    room = limits.MAX_FRAME_BYTES - _HAVE_HEAD_BYTES
    for entry in entries:
        bitmap_bytes = len(entry.bitmap or b"")
        if bitmap_bytes > limits.MAX_BITMAP_BYTES:
            continue
        needed = _HAVE_ENTRY_BYTES + bitmap_bytes
        if needed > room or len(batch) == limits.MAX_HAVE_ENTRIES:
            yield Have(request_id, tuple(batch), last=False)
            batch, room = [], limits.MAX_FRAME_BYTES - _HAVE_HEAD_BYTES
        batch.append(entry)
        room -= needed
    if batch or request_id:
        yield Have(request_id, tuple(batch), last=True)


def fit_blobs(request_id: int, pieces: Iterable[BlobPiece]) -> Iterator[Blobs]:
    """Cut an answer to get_blobs into frames below the limit.

    `pieces` may be of any length (a piece is split where a frame is full) and are
    taken one at a time, so that they can be read from disk as they are sent.
    """
    batch: list[BlobPiece] = []
    room = limits.MAX_BLOB_DATA_PER_FRAME
    for digest, size_bytes, offset, data in pieces:
        taken = 0
        while True:
            if room == 0 or len(batch) == limits.MAX_BLOB_ITEMS:
                yield Blobs(request_id, tuple(batch), last=False)
                batch, room = [], limits.MAX_BLOB_DATA_PER_FRAME
            part = data[taken : taken + room]
            batch.append(BlobPiece(digest, size_bytes, offset + taken, part))
            taken += len(part)
            room -= len(part)
            if taken == len(data):
                break
    yield Blobs(request_id, tuple(batch), last=True)


class State(Enum):
    """How far a conversation is, on one side."""

    SILENT = "silent"
    OPEN = "open"
    CLOSED = "closed"


_ANSWER_KINDS: dict[int, int] = {
    Want.kind: Have.kind,
    WantModel.kind: HaveModel.kind,
    GetBlobs.kind: Blobs.kind,
    GetChunkList.kind: ChunkListIs.kind,
    GetPeers.kind: Peers.kind,
}
_NOT_SENT = 0  # stands for the kind of the answer until the request is on its way


class Conversation:
    """What may come when: the order of messages on one stream, both ways.

    Each side says hello first and once, and nothing after its bye. An answer fits an
    open request of ours, by id and kind; one that comes after `give_up` is late, not
    wrong; one to an id never given out is a violation.

    Attributes
    ----------
    ours, theirs : State
        How far each side is.
    """

    def __init__(self) -> None:
        self.ours = State.SILENT
        self.theirs = State.SILENT
        self._open: dict[int, int] = {}
        self._highest_id = 0

    def next_request_id(self) -> int:
        """Return a fresh request id, to be sent with a request or given up.

        Raises
        ------
        BadInput
            `wire_limits.MAX_OPEN_REQUESTS` are open already.
        """
        if len(self._open) == limits.MAX_OPEN_REQUESTS:
            raise BadInput(f"{limits.MAX_OPEN_REQUESTS} requests are open already")
        self._highest_id += 1
        self._open[self._highest_id] = _NOT_SENT
        return self._highest_id

    def sent(self, message: Message) -> None:
        """Note a message of ours, before it is sent.

        Raises
        ------
        BadInput
            Not its turn, or the request's id is not a fresh one.
        """
        try:
            after = _step(self.ours, message)
        except ProtocolError as error:
            raise BadInput(f"not to be sent: {error}") from error
        if isinstance(message, Request):
            if self._open.get(message.request_id) != _NOT_SENT:
                raise BadInput(f"request id {message.request_id} is not a fresh one")
            self._open[message.request_id] = _ANSWER_KINDS[message.kind]
        self.ours = after

    def received(self, message: Message) -> bool:
        """Note a message of the peer's, and tell whether to act on it.

        Returns
        -------
        bool
            False for an answer that came too late.

        Raises
        ------
        ProtocolError
            Not its turn, or an answer to nothing we asked.
        """
        self.theirs = _step(self.theirs, message)
        if not isinstance(message, Answer) or message.request_id == 0:
            return True
        request_id = message.request_id
        expected = self._open.get(request_id)
        if expected == _NOT_SENT or request_id > self._highest_id:
            raise ProtocolError("an answer to a request that was never made")
        if expected is None:
            return False
        if message.kind not in (expected, Refusal.kind):
            raise ProtocolError("an answer of another kind than the request's")
        if not isinstance(message, Have | HaveModel | Blobs) or message.last:
            del self._open[request_id]
        return True

    def give_up(self, request_id: int) -> None:
        """Stop waiting for an answer; what still comes of it is late."""
        self._open.pop(request_id, None)


def _step(state: State, message: Message) -> State:
    """Return the state of the side that said `message`, after it."""
    if state is State.CLOSED:
        raise ProtocolError("a message after bye")
    if isinstance(message, Hello) != (state is State.SILENT):
        raise ProtocolError("a second hello" if isinstance(message, Hello) else "no hello first")
    return State.CLOSED if isinstance(message, Bye) else State.OPEN
