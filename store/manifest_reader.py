"""Reading an encoded manifest from anyone: types and counts, and nothing piles up.

What the fields mean is for `manifest` to check. No I/O.
"""

from __future__ import annotations

from typing import Any, NoReturn

import msgpack

from .dtypes import MAX_DIMENSIONS
from .errors import BadInput
from .manifest_rows import (
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    MAX_OBJECTS,
    MAX_PARTS,
    MAX_RECIPE_PARAMETERS,
    MAX_RECIPES,
    MAX_TENSORS,
    VERSION,
    VERSION_WITH_RECIPES,
    FileEntry,
    NamedTensor,
    Recipe,
)
from .manifest_rules import check_objects
from .names import quoted
from .object_table import EncodedRows, ObjectRef, ObjectTable
from .recipes import MAX_INPUTS

_ROW_ITEMS = MAX_DIMENSIONS
"""Longest array inside a row: a tensor's shape. Rows nest no deeper than msgpack's own
limit, so what is allotted before a row is judged stays below 100 kB."""

BLOCK_ROWS = 1024
"""Rows encoded together, and objects taken into a table together."""


def _row_unpacker() -> msgpack.Unpacker:
    return msgpack.Unpacker(
        raw=False,
        use_list=False,
        max_buffer_size=MAX_MANIFEST_BYTES,
        max_array_len=max(_ROW_ITEMS, 4),
        max_map_len=0,
        ext_hook=_refuse_extension,
    )


class Reader:
    """Reads the fields of an encoded manifest, each of the one type it may have.

    The unpacker is never let loose on a long array: headers of those are read and counted
    here, and what it may unpack at once is a scalar or a row. So memory grows with what
    was asked for, and not with what the bytes claim or nest. Tensors are only passed over:
    they are read, and judged, when the manifest is validated.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        unpacker = _row_unpacker()
        unpacker.feed(data)
        self._row: Any = unpacker.unpack
        self._skip: Any = unpacker.skip
        self._tell: Any = unpacker.tell
        self._header: Any = unpacker.read_array_header
        self._parts_left = MAX_PARTS
        self._tensors_left = MAX_TENSORS

    def manifest(self) -> tuple[ObjectTable, tuple[FileEntry, ...], tuple[Recipe, ...]]:
        """Return objects, files and recipes.

        Raises
        ------
        BadInput
            A type, a count, or an object is not as it may be.
        ValueError, msgpack.UnpackException
            It is no msgpack within the limits.
        """
        fields: int = self._header()
        if fields not in (3, 4):
            raise BadInput("a manifest does not have 3 fields, or 4 with recipes")
        version = self._scalar()
        if type(version) is not int or version not in (VERSION, VERSION_WITH_RECIPES):
            raise BadInput(
                f"version {quoted(str(version))}, only {VERSION} and {VERSION_WITH_RECIPES} "
                "are known"
            )
        if fields != (3 if version == VERSION else 4):
            raise BadInput(f"a manifest of version {version} does not have {fields} fields")
        objects = self._objects(self._array(MAX_OBJECTS, "objects"))
        files = tuple([self._file() for _ in range(self._array(MAX_FILES, "files"))])
        if version == VERSION:
            return objects, files, ()
        recipes = tuple([self._recipe() for _ in range(self._array(MAX_RECIPES, "recipes"))])
        return objects, files, recipes

    def _objects(self, count: int) -> ObjectTable:
        table = ObjectTable()
        previous = b""
        for start in range(0, count, BLOCK_ROWS):
            rows = self._object_rows(min(BLOCK_ROWS, count - start))
            previous = check_objects(rows, start, previous)
            table.extend(rows)
        return table

    def _scalar(self) -> object:
        value = self._row()
        if type(value) is tuple or type(value) is dict:
            raise BadInput("an array or map where a single value belongs")
        return value

    def _recipe(self) -> Recipe:
        self._tuple(5, "recipe")
        digest, size_bytes, kind = self._scalar(), self._scalar(), self._scalar()
        if type(digest) is not bytes or type(size_bytes) is not int or type(kind) is not str:
            raise BadInput("a recipe is not a digest, a size and a kind")
        count = self._array(MAX_RECIPE_PARAMETERS, "parameters")
        parameters = self._integers(count, "parameters")
        inputs = self._integers(self._array(MAX_INPUTS, "inputs"), "inputs")
        return Recipe(digest, size_bytes, kind, parameters, inputs)

    def _object_rows(self, count: int) -> list[ObjectRef]:
        """Read objects; what is wrong with one is told by looking at each."""
        row = self._row
        rows = [row() for _ in range(count)]
        if {*map(type, rows)} == {tuple} and {*map(len, rows)} == {3}:
            kinds = [{*map(type, column)} for column in zip(*rows, strict=True)]
            if kinds == [{bytes}, {int}, {bytes}]:
                return rows  # plain tuples do: the table keeps columns
        return list(map(_object, rows))

    def _file(self) -> FileEntry:
        self._tuple(5, "file")
        path, size_bytes, format_name = self._scalar(), self._scalar(), self._scalar()
        if type(path) is not str or type(size_bytes) is not int or type(format_name) is not str:
            raise BadInput("a file is not a path, a size and a format")
        part_count = self._array(self._parts_left, "parts")
        self._parts_left -= part_count
        parts = self._integers(part_count, "parts")
        count = self._array(self._tensors_left, "tensors")
        self._tensors_left -= count
        start = self._tell()
        for _ in range(count):
            self._skip()
        tensors = EncodedRows(self._data, start, self._tell(), count, _row_unpacker, _tensor_of_row)
        return FileEntry(path, size_bytes, format_name, parts, tensors)

    def _tuple(self, length: int, what: str) -> None:
        if self._header() != length:
            raise BadInput(f"a {what} does not have {length} fields")

    def _array(self, limit: int, what: str) -> int:
        count: int = self._header()
        if count > limit:
            raise BadInput(f"too many {what}")
        return count

    def _integers(self, count: int, what: str) -> tuple[int, ...]:
        row = self._row
        values = tuple([row() for _ in range(count)])
        if any(type(value) is not int for value in values):
            raise BadInput(f"{what} that are not integers")
        return values


def _object(row: Any) -> ObjectRef:
    """Return an object as it stands in a manifest."""
    if type(row) is not tuple or len(row) != 3:
        raise BadInput("an object does not have 3 fields")
    if type(row[0]) is not bytes or type(row[1]) is not int or type(row[2]) is not bytes:
        raise BadInput("an object is not a digest, a size and a chunk list")
    return ObjectRef(*row)


def _tensor_of_row(row: Any) -> NamedTensor:
    """Return a tensor as it stands in a manifest."""
    if type(row) is not tuple or len(row) != 4:
        raise BadInput("a tensor does not have 4 fields")
    name, dtype, shape, object_index = row
    if type(name) is not str or type(dtype) is not str or type(object_index) is not int:
        raise BadInput("a tensor is not a name, a dtype, a shape and an object's index")
    if type(shape) is not tuple:
        raise BadInput("dimensions that are not an array")
    for length in shape:
        if type(length) is not int:
            raise BadInput("dimensions that are not integers")
    return NamedTensor(name, dtype, shape, object_index)


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise BadInput("an extension where a single value belongs")
