"""Two messages of the control protocol: what is held of a model, told by its manifest.

Both sides know the model's manifest, so an object is named by its index in it, and many by a
run of indices: "everything" takes ten bytes, where naming digests takes 43 bytes an object.
They are part of `wire`, which reads and writes them with all others; a node of a version
without them skips them.

Rules
- Runs rise, and there is a gap between one and the next; so do the indices of parts. No
  object is told of in both ways in one frame.
- A part is one by the chunk list that the manifest names. Whoever holds chunks by another
  list does not tell of them here.
- What only the manifest can tell is checked by `check_model`: that the indices exist, and
  that each bitmap has the length of its object.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.errors import ProtocolError
from tensorswarm.store.manifest_rows import MAX_OBJECTS

from . import wire_limits as limits
from .wire_limits import Fields

MAX_RUN_ITEMS = limits.MAX_ARRAY_ITEMS
"""Numbers in one frame that name runs, two for each: 4,096 runs."""

MAX_MODEL_PARTS = limits.MAX_ARRAY_ITEMS
"""Objects held in part, in one frame."""

_HEAD_BYTES = 64  # array heads, kind, a request id of nine bytes, a digest, last
_NUMBER_BYTES = 5  # an index or a count: below 2^20
_PART_BYTES = 11  # array head, index, a bitmap's head


class ModelPart(NamedTuple):
    """An object of a model that the sender holds in part.

    Attributes
    ----------
    object_index : int
        Its index in the manifest.
    bitmap : bytes
        Its proved chunks, as in `wire_limits.HaveEntry`.
    """

    object_index: int
    bitmap: bytes


@dataclass(frozen=True, slots=True)
class WantModel:
    """Asks what the other holds of a model's objects, now and (as news) later.

    Attributes
    ----------
    request_id : int
        Named by the answer.
    model : bytes
        The manifest's digest.
    wanted : tuple of int
        Start and length of each run of objects that are wanted.
    """

    kind: ClassVar[int] = 15
    request_id: int
    model: bytes
    wanted: tuple[int, ...]

    @classmethod
    def _parse(cls, raw: Fields) -> WantModel:
        request_id, model, wanted = limits.take_fields(raw, 3, "want_model")
        return cls(
            limits.take_request_id(request_id, "want_model"),
            limits.take_digest(model, "want_model.model"),
            _take_runs(wanted, "want_model.wanted"),
        )

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield the runs: the first object of each, and the one after its last."""
        return _pairs(self.wanted)


@dataclass(frozen=True, slots=True)
class HaveModel:
    """Answers a want_model, in one frame or several, or brings news (request id 0).

    Attributes
    ----------
    request_id : int
        The want_model that it answers.
    model : bytes
        The manifest's digest.
    whole : tuple of int
        Start and length of each run of objects that the sender holds whole.
    parts : tuple of ModelPart
        Those that it holds in part.
    last : bool
        Whether the answer ends here. What no frame of it names is not held.
    """

    kind: ClassVar[int] = 16
    request_id: int
    model: bytes
    whole: tuple[int, ...]
    parts: tuple[ModelPart, ...]
    last: bool

    @classmethod
    def _parse(cls, raw: Fields) -> HaveModel:
        request_id, model, whole, parts, last = limits.take_fields(raw, 5, "have_model")
        return cls(
            limits.take_int(request_id, "have_model.request_id"),
            limits.take_digest(model, "have_model.model"),
            _take_runs(whole, "have_model.whole"),
            _take_parts(parts, "have_model.part"),
            limits.take_bool(last, "have_model.last"),
        )

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield the runs of objects held whole, as `WantModel.runs` does."""
        return _pairs(self.whole)


def flat_runs(runs: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Return runs, each as its first object and the one after its last, as messages have them."""
    return tuple([number for start, stop in runs for number in (start, stop - start)])


def _pairs(numbers: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    for start, count in zip(numbers[::2], numbers[1::2], strict=True):
        yield start, start + count


def _take_runs(value: object, what: str) -> tuple[int, ...]:
    numbers = limits.take_array(value, what, MAX_RUN_ITEMS)
    if len(numbers) % 2:
        raise ProtocolError(f"{what}: a start without a length")
    taken: list[int] = []
    least = 0
    for start, count in zip(numbers[::2], numbers[1::2], strict=True):
        if type(start) is not int or type(count) is not int:
            raise ProtocolError(f"{what}: not integers")
        if start < least or count < 1 or start + count > MAX_OBJECTS:
            raise ProtocolError(f"{what}: not rising runs of at most {MAX_OBJECTS} objects")
        least = start + count + 1
        taken += start, count
    return tuple(taken)


def _take_parts(value: object, what: str) -> tuple[ModelPart, ...]:
    parts = limits.take_items(value, what, MAX_MODEL_PARTS, _take_part)
    if any(
        one.object_index >= other.object_index for one, other in zip(parts, parts[1:], strict=False)
    ):
        raise ProtocolError(f"{what}: indices that do not rise")
    return parts


def _take_part(value: object, what: str) -> ModelPart:
    index, bitmap = limits.take_fields(value, 2, what)
    return ModelPart(
        limits.take_int(index, what, 0, MAX_OBJECTS - 1),
        limits.take_bytes(bitmap, what, limits.MAX_BITMAP_BYTES),
    )


def check_runs(numbers: tuple[int, ...], count: int) -> None:
    """Hold runs against a manifest of `count` objects; `ProtocolError` if they are not in it."""
    if numbers and numbers[-2] + numbers[-1] > count:
        raise ProtocolError("runs of objects beyond the end of the manifest")


def check_model(message: HaveModel, sizes: Sequence[int]) -> None:
    """Hold a message against the manifest that it is about.

    Parameters
    ----------
    message : HaveModel
        What a peer said.
    sizes : sequence of int
        Sizes in bytes of the manifest's objects, by index.

    Raises
    ------
    ProtocolError
        It tells of an object that is not there, of one in two ways, or of chunks that an
        object does not have.
    """
    check_runs(message.whole, len(sizes))
    runs = message.runs()
    start = stop = 0
    for index, bitmap in message.parts:
        if index >= len(sizes):
            raise ProtocolError("have_model: a part beyond the end of the manifest")
        if sizes[index] <= CHUNK_SIZE:
            raise ProtocolError("have_model: a part of an object of one chunk")
        limits.take_bitmap(bitmap, "have_model.part", sizes[index])
        while stop <= index and (run := next(runs, None)) is not None:
            start, stop = run
        if start <= index < stop:
            raise ProtocolError("have_model: a part of an object that is whole")


def fit_have_model(
    request_id: int,
    model: bytes,
    runs: Iterable[tuple[int, int]],
    parts: Iterable[ModelPart],
) -> Iterator[HaveModel]:
    """Cut an answer to a want_model, or news (`request_id` 0), into frames below the limit.

    Parameters
    ----------
    request_id : int
        The want_model's, or 0.
    model : bytes
        The manifest's digest.
    runs : iterable of (int, int)
        First and one-after-the-last of each run of objects held whole, in order, with a gap
        between one and the next.
    parts : iterable of ModelPart
        Those held in part, in order. A bitmap that is too long for a frame is left out.

    Yields
    ------
    HaveModel
        News without anything are no frame; an empty answer is one.
    """
    numbers: list[int] = []
    for start, stop in runs:
        if len(numbers) == MAX_RUN_ITEMS:
            yield HaveModel(request_id, model, tuple(numbers), (), last=False)
            numbers = []
        numbers += start, stop - start
    room = limits.MAX_FRAME_BYTES - _HEAD_BYTES - len(numbers) * _NUMBER_BYTES
    batch: list[ModelPart] = []
    for part in parts:
        if len(part.bitmap) > limits.MAX_BITMAP_BYTES:
            continue
        needed = _PART_BYTES + len(part.bitmap)
        if needed > room or len(batch) == MAX_MODEL_PARTS:
            yield HaveModel(request_id, model, tuple(numbers), tuple(batch), last=False)
            numbers, batch = [], []
            room = limits.MAX_FRAME_BYTES - _HEAD_BYTES
        batch.append(part)
        room -= needed
    if numbers or batch or request_id:
        yield HaveModel(request_id, model, tuple(numbers), tuple(batch), last=True)
