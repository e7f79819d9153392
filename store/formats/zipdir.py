"""The directory of a ZIP archive, read by range: where each member's bytes lie.

Only what NumPy and PyTorch write: one disk, no encryption, stored or deflated members,
with ZIP64 where needed. The central directory at the end is believed for sizes and
methods; each member's local header is read too, because only that says where its bytes
begin, and it must agree on the name's length. Members must not overlap.

Source: PKWARE, "APPNOTE.TXT - .ZIP File Format Specification", 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ..errors import BadInput
from ..manifest import MAX_TENSORS
from ..names import quoted
from .layout import ReadAt, read_exactly

STORED = 0
DEFLATED = 8

MAX_DIRECTORY_BYTES = 128 << 20
"""Largest central directory: 250 bytes for each of half a million tensors."""

MAX_MEMBERS = MAX_TENSORS
"""Most members: one for each tensor."""

_MAX_COMMENT = 0xFFFF
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL_32 = 0xFFFFFFFF


class Member(NamedTuple):
    """A member of an archive.

    Attributes
    ----------
    name : str
        Its name there.
    method : int
        STORED, DEFLATED, or another method's number; -1 for an encrypted member.
    offset : int
        Where its bytes begin in the archive.
    packed_bytes : int
        How many there are.
    size_bytes : int
        How many they stand for.
    """

    name: str
    method: int
    offset: int
    packed_bytes: int
    size_bytes: int


def is_zip(size_bytes: int, read_at: ReadAt) -> bool:
    """Tell whether a file begins as an archive with members does."""
    return size_bytes >= _END.size and read_at(0, 4) == b"PK\x03\x04"


def read_directory(size_bytes: int, read_at: ReadAt) -> list[Member]:
    """Return an archive's members, in the order of their bytes.

    Raises
    ------
    BadInput
        It is no archive, is damaged, or breaks a limit.
    """
    count, start, length = _find_directory(size_bytes, read_at)
    if count > MAX_MEMBERS or length > MAX_DIRECTORY_BYTES:
        raise BadInput(f"an archive of {count} members, at most {MAX_MEMBERS}")
    if start + length > size_bytes:
        raise BadInput("the archive's directory is not inside the file")
    if count * _ENTRY.size > length:
        raise BadInput("the archive's directory is too short for its members")
    data = read_exactly(read_at, start, length)
    members = []
    position = 0
    for _ in range(count):
        entry, position = _read_entry(data, position)
        members.append(entry)
    located = [_locate(member, start, read_at) for member in members]
    located.sort(key=lambda member: member.offset)
    end = 0
    for member in located:
        if member.offset < end:
            raise BadInput(f"member {quoted(member.name)} overlaps another one")
        end = member.offset + member.packed_bytes
    if end > start:
        raise BadInput("an archive's members overlap its directory")
    return located


def _find_directory(size_bytes: int, read_at: ReadAt) -> tuple[int, int, int]:
    """Return how many members there are, and the directory's place and length."""
    if size_bytes < _END.size:
        raise BadInput("too short for an archive")
    tail_bytes = min(size_bytes, _END.size + _MAX_COMMENT)
    tail_start = size_bytes - tail_bytes
    tail = read_exactly(read_at, tail_start, tail_bytes)
    at = tail.rfind(b"PK\x05\x06", 0, len(tail) - _END.size + 4)
    if at < 0:
        raise BadInput("not a complete archive: its directory is missing")
    _, disk, first_disk, _, count, length, start, _ = _END.unpack_from(tail, at)
    locator_at = tail_start + at - _LOCATOR_64.size
    if locator_at >= 0:
        signature, disk_64, end_64, _ = _LOCATOR_64.unpack(
            read_exactly(read_at, locator_at, _LOCATOR_64.size)
        )
        if signature == b"PK\x06\x07":
            if end_64 + _END_64.size > size_bytes:
                raise BadInput("the archive's 64-bit directory is not inside the file")
            fields = _END_64.unpack(read_exactly(read_at, end_64, _END_64.size))
            if fields[0] != b"PK\x06\x06":
                raise BadInput("the archive's 64-bit directory is damaged")
            disk, first_disk, count, length, start = fields[4], fields[5], *fields[7:10]
            disk |= disk_64
    if disk or first_disk:
        raise BadInput("an archive of several parts")
    return count, start, length


def _read_entry(data: bytes, position: int) -> tuple[Member, int]:
    """Read one entry of the directory; the member's offset is its local header's."""
    if position + _ENTRY.size > len(data):
        raise BadInput("the archive's directory ends too early")
    fields = _ENTRY.unpack_from(data, position)
    if fields[0] != b"PK\x01\x02":
        raise BadInput("the archive's directory is damaged")
    flags, method = fields[3], fields[4]
    packed, size, name_bytes, extra_bytes, comment_bytes = fields[8:13]
    local = fields[16]
    name_at = position + _ENTRY.size
    extra_at = name_at + name_bytes
    end = extra_at + extra_bytes + comment_bytes
    if end > len(data):
        raise BadInput("the archive's directory ends too early")
    raw = data[name_at:extra_at]
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = raw.decode("cp437")
    if _FULL_32 in (packed, size, local):
        wide = _extra_64(data[extra_at : extra_at + extra_bytes])
        values = [size, packed, local]
        for index, value in enumerate(values):
            if value == _FULL_32:
                if len(wide) < 8:
                    raise BadInput(f"member {quoted(name)} lacks its 64-bit sizes")
                values[index], wide = int.from_bytes(wide[:8], "little"), wide[8:]
        size, packed, local = values
    if flags & 1:
        method = -1
    return Member(name, method, local, packed, size), end


def _extra_64(extra: bytes) -> bytes:
    """Return the ZIP64 field among an entry's extra fields."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            return extra[position + 4 : position + 4 + length]
        position += 4 + length
    return b""


def _locate(member: Member, directory: int, read_at: ReadAt) -> Member:
    """Return a member with the place of its bytes, which its local header tells."""
    if member.offset + _LOCAL.size > directory:
        raise BadInput(f"member {quoted(member.name)} lies outside the archive")
    fields = _LOCAL.unpack(read_exactly(read_at, member.offset, _LOCAL.size))
    if fields[0] != b"PK\x03\x04":
        raise BadInput(f"member {quoted(member.name)} has no header where it should begin")
    offset = member.offset + _LOCAL.size + fields[9] + fields[10]
    if offset + member.packed_bytes > directory:
        raise BadInput(f"member {quoted(member.name)} lies outside the archive")
    if member.method == STORED and member.packed_bytes != member.size_bytes:
        raise BadInput(f"member {quoted(member.name)} is stored, with two sizes")
    return member._replace(offset=offset)
