"""A strict reader of the pickles in PyTorch checkpoints, which never runs them.

A pickle is a program for a stack machine, and unpickling lets it call anything. This
reader knows the machine's instructions but calls nothing: a name that the program looks
up becomes a mere `Global`, and the few calls that checkpoints of plain tensors need are
answered here, from the list below. Everything else is refused, with the name that was
asked for.

Allowed: None, booleans, numbers, strings, bytes (which protocol 2 writes as a call of
``_codecs.encode``), tuples, lists, dicts, sets, ordered dicts, ``torch.Size``, and tensors
on storages. An object's attributes (``BUILD``) are
only taken for an ordered dict, where ``state_dict`` keeps version numbers, and dropped.

Source: Python's ``pickletools.py``, which documents every instruction, and PyTorch's
``torch/_utils.py`` and ``torch/serialization.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from ..errors import BadInput
from ..names import quoted

MAX_PICKLE_BYTES = 128 << 20
"""Longest pickle: 250 bytes for each of half a million tensors."""

MAX_INSTRUCTIONS = 4 << 20
"""Most instructions: each can leave some hundred bytes in memory. A tensor takes 40."""

MAX_INTEGER_BYTES = 16
"""Longest integer; sizes, strides and steps have at most 8 bytes."""

_REBUILDERS = {
    "torch._utils._rebuild_tensor": (4, 4),
    "torch._utils._rebuild_tensor_v2": (6, 7),
    "torch._utils._rebuild_tensor_v3": (7, 8),
}
"""Calls that make a tensor, with the fewest and the most arguments."""

_MARK = object()


class Global(NamedTuple):
    """A name that the pickle looked up; nothing was imported."""

    name: str


class Storage(NamedTuple):
    """A storage: the member of the archive that holds it, its type, its elements."""

    key: str
    kind: str
    element_count: int


class Tensor(NamedTuple):
    """A tensor as the pickle describes it; offset and strides in elements.

    `dtype` is empty if it is that of the storage.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class OrderedDict(dict[Any, Any]):
    """What ``collections.OrderedDict`` makes; the only thing that may get attributes."""


def read_pickle(data: bytes) -> object:
    """Return what a checkpoint's pickle describes.

    Returns
    -------
    object
        Values as listed in this module's header, tensors as `Tensor`.

    Raises
    ------
    BadInput
        The pickle is damaged, too long, or wants something that is not on the list.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise BadInput(f"a pickle of {len(data)} bytes, at most {MAX_PICKLE_BYTES}")
    machine = _Machine(data)
    try:
        return machine.run()
    except (IndexError, struct.error) as error:
        raise BadInput("a pickle that is damaged or ends too early") from error
    except UnicodeDecodeError as error:
        raise BadInput("a pickle with a name that is not valid Unicode") from error


class _Machine:
    """The stack machine."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        """Run to the end of the program."""
        for _ in range(MAX_INSTRUCTIONS):
            code = self._take(1)[0]
            if code == _STOP:
                if len(self._stack) != 1:
                    raise BadInput("a pickle that leaves other than one value")
                return self._stack[0]
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise BadInput(f"a pickle with the instruction 0x{code:02x}, which is not allowed")
            instruction(self)
        raise BadInput(f"a pickle of more than {MAX_INSTRUCTIONS} instructions")

    # ---- reading

    def _take(self, length: int) -> bytes:
        end = self._at + length
        if length < 0 or end > len(self._data):
            raise BadInput("a pickle that ends too early")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def _unsigned(self, length: int) -> int:
        return int.from_bytes(self._take(length), "little")

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + 1024)
        if end < 0:
            raise BadInput("a pickle with a line that does not end")
        return self._take(end + 1 - self._at)[:-1].decode("utf-8")

    # ---- the stack

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise BadInput("a pickle that takes a mark for a value")
        return value

    def _pop_to_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:  # IndexError: there is none
            at -= 1
            if at < 0:
                raise BadInput("a pickle that lacks a mark")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _top(self) -> Any:
        return self._stack[-1]

    def _remember(self, index: int) -> None:
        value = self._stack[-1]
        if value is _MARK:
            raise BadInput("a pickle that remembers a mark")
        self._memo[index] = value

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            raise BadInput("a pickle that recalls what it never had")
        self._push(self._memo[index])

    # ---- instructions

    def skip_protocol(self) -> None:
        version = self._unsigned(1)
        if version > 5:
            raise BadInput(f"a pickle of the unknown protocol {version}")

    def skip_frame(self) -> None:
        self._take(8)

    def push_mark(self) -> None:
        self._stack.append(_MARK)

    def drop(self) -> None:
        self._stack.pop()

    def drop_to_mark(self) -> None:
        self._pop_to_mark()

    def push_long(self) -> None:
        length = self._unsigned(1)
        if length > MAX_INTEGER_BYTES:
            raise BadInput(f"a pickle with an integer of {length} bytes")
        self._push(int.from_bytes(self._take(length), "little", signed=True))

    def push_float(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    def push_text(self, length_bytes: int) -> None:
        self._push(self._take(self._unsigned(length_bytes)).decode("utf-8", "surrogatepass"))

    def push_old_text(self, length_bytes: int) -> None:
        self._push(self._take(self._unsigned(length_bytes)).decode("latin-1"))

    def push_bytes(self, length_bytes: int) -> None:
        self._push(self._take(self._unsigned(length_bytes)))

    def push_tuple(self, length: int) -> None:
        items = tuple(self._pop() for _ in range(length))
        self._push(items[::-1])

    def push_marked_tuple(self) -> None:
        self._push(tuple(self._pop_to_mark()))

    def push_marked_list(self) -> None:
        self._push(self._pop_to_mark())

    def push_marked_dict(self) -> None:
        items = self._pop_to_mark()
        self._push({})
        self._set_items(items)

    def append(self) -> None:
        item = self._pop()
        self._list().append(item)

    def append_marked(self) -> None:
        items = self._pop_to_mark()
        self._list().extend(items)

    def _list(self) -> list[Any]:
        target = self._top()
        if type(target) is not list:
            raise BadInput("a pickle that appends to what is no list")
        return target

    def set_item(self) -> None:
        value = self._pop()
        key = self._pop()
        self._set_items([key, value])

    def set_marked_items(self) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise BadInput("a pickle that sets items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_scalar(key)] = value

    def add_marked(self) -> None:
        items = self._pop_to_mark()
        target = self._top()
        if not isinstance(target, set):
            raise BadInput("a pickle that adds to what is no set")
        target.update(map(_scalar, items))

    def push_frozen_set(self) -> None:
        self._push(set(map(_scalar, self._pop_to_mark())))

    def push_global(self) -> None:
        module, name = self._line(), self._line()
        self._push(Global(f"{module}.{name}"))

    def push_stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise BadInput("a pickle that looks up what is no name")
        self._push(Global(f"{module}.{name}"))

    def push_storage(self) -> None:
        """Read a persistent id: ``("storage", type, key, device, elements)``."""
        item = self._pop()
        if type(item) is not tuple or len(item) != 5 or item[0] != "storage":
            raise BadInput("a pickle that refers to something other than a storage")
        _, kind, key, _, count = item
        if type(kind) is not Global or type(key) is not str or type(count) is not int:
            raise BadInput("a pickle with a storage that is not described as usual")
        self._push(Storage(key, kind.name, count))

    def call(self) -> None:
        arguments = self._pop()
        target = self._pop()
        if type(target) is not Global or type(arguments) is not tuple:
            raise BadInput("a pickle that calls what is no name")
        self._push(_answer(target.name, arguments))

    def build(self) -> None:
        """Drop an ordered dict's attributes."""
        self._pop()
        target = self._top()
        if type(target) is not OrderedDict:
            raise BadInput("a pickle that gives attributes to something other than a dict")


def _scalar(key: object) -> object:
    """Return a key if it is a plain value: others could nest too deeply to be hashed."""
    if key is None or type(key) in (str, int, float, bool, bytes):
        return key
    raise BadInput("a pickle with a key that is neither a string nor a number")


def _refuse_call(name: str) -> NoReturn:
    raise BadInput(
        f"its pickle calls {quoted(name)}, which is never run here: only plain tensors, dicts, "
        "lists, numbers and strings are read (convert it to safetensors, or keep it unread "
        "with --verbatim)"
    )


def _answer(name: str, arguments: tuple[Any, ...]) -> object:
    """Return what an allowed call gives."""
    if name == "collections.OrderedDict" and len(arguments) <= 1:
        made = OrderedDict()
        pairs = arguments[0] if arguments else []
        if type(pairs) is not list:
            raise BadInput("a pickle with an ordered dict that is not made of pairs")
        for pair in pairs:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise BadInput("a pickle with an ordered dict that is not made of pairs")
            made[_scalar(pair[0])] = pair[1]
        return made
    if name == "_codecs.encode" and len(arguments) == 2:
        return _encoded(*arguments)
    if name in ("__builtin__.set", "builtins.set") and len(arguments) == 1:
        if type(arguments[0]) is not list:
            raise BadInput("a pickle with a set that is not made of a list")
        return set(map(_scalar, arguments[0]))
    if name == "torch.Size" and len(arguments) == 1:
        return _integers(arguments[0])
    if name == "torch._utils._rebuild_parameter" and len(arguments) == 3:
        if type(arguments[0]) is not Tensor:
            raise BadInput("a pickle with a parameter that is no tensor")
        return arguments[0]
    if name in _REBUILDERS:
        return _tensor(name, arguments)
    return _refuse_call(name)


def _encoded(text: object, encoding: object) -> bytes:
    """Return bytes, which protocols before 3 write as text in Latin-1."""
    if type(text) is not str or encoding != "latin1":
        raise BadInput("a pickle with bytes that are not written as usual")
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError as error:
        raise BadInput("a pickle with bytes that are none") from error


def _tensor(name: str, arguments: tuple[Any, ...]) -> Tensor:
    fewest, most = _REBUILDERS[name]
    if not fewest <= len(arguments) <= most:
        raise BadInput(f"a pickle that calls {name} with {len(arguments)} arguments")
    storage, offset = arguments[:2]
    if type(storage) is not Storage or type(offset) is not int:
        raise BadInput("a pickle with a tensor that has no storage")
    shape, strides = _integers(arguments[2]), _integers(arguments[3])
    if len(shape) != len(strides):
        raise BadInput("a pickle with a tensor that has other strides than dimensions")
    dtype = ""
    if name.endswith("_v3"):
        if type(arguments[6]) is not Global:
            raise BadInput("a pickle with a tensor that has no dtype")
        dtype = arguments[6].name
    extra = arguments[most - 1] if len(arguments) == most and most > 4 else None
    if extra:
        raise BadInput("a pickle with a tensor that is to be conjugated or negated when read")
    return Tensor(storage, dtype, offset, shape, strides)


def _integers(value: object) -> tuple[int, ...]:
    if type(value) not in (tuple, list):
        raise BadInput("a pickle with a tensor whose shape is none")
    assert isinstance(value, tuple | list)
    if any(type(each) is not int for each in value):
        raise BadInput("a pickle with a tensor whose shape is none")
    return tuple(value)


_STOP = ord(".")

_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine.skip_protocol,
    0x95: _Machine.skip_frame,
    ord("("): _Machine.push_mark,
    ord("0"): _Machine.drop,
    ord("1"): _Machine.drop_to_mark,
    ord("2"): lambda m: m._push(m._top()),
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    ord("J"): lambda m: m._push(struct.unpack("<i", m._take(4))[0]),
    ord("K"): lambda m: m._push(m._unsigned(1)),
    ord("M"): lambda m: m._push(m._unsigned(2)),
    0x8A: _Machine.push_long,
    ord("G"): _Machine.push_float,
    ord("X"): lambda m: m.push_text(4),
    0x8C: lambda m: m.push_text(1),
    0x8D: lambda m: m.push_text(8),
    ord("U"): lambda m: m.push_old_text(1),
    ord("T"): lambda m: m.push_old_text(4),
    ord("C"): lambda m: m.push_bytes(1),
    ord("B"): lambda m: m.push_bytes(4),
    0x8E: lambda m: m.push_bytes(8),
    ord(")"): lambda m: m._push(()),
    0x85: lambda m: m.push_tuple(1),
    0x86: lambda m: m.push_tuple(2),
    0x87: lambda m: m.push_tuple(3),
    ord("t"): _Machine.push_marked_tuple,
    ord("]"): lambda m: m._push([]),
    ord("l"): _Machine.push_marked_list,
    ord("a"): _Machine.append,
    ord("e"): _Machine.append_marked,
    ord("}"): lambda m: m._push({}),
    ord("d"): _Machine.push_marked_dict,
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_marked_items,
    0x8F: lambda m: m._push(set()),
    0x90: _Machine.add_marked,
    0x91: _Machine.push_frozen_set,
    ord("q"): lambda m: m._remember(m._unsigned(1)),
    ord("r"): lambda m: m._remember(m._unsigned(4)),
    0x94: lambda m: m._remember(len(m._memo)),
    ord("h"): lambda m: m._recall(m._unsigned(1)),
    ord("j"): lambda m: m._recall(m._unsigned(4)),
    ord("c"): _Machine.push_global,
    0x93: _Machine.push_stack_global,
    ord("Q"): _Machine.push_storage,
    ord("R"): _Machine.call,
    ord("b"): _Machine.build,
}
