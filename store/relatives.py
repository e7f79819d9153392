"""Chunks of a tensor to come that an older form of it has already.

A vocabulary that grows appends rows to its embedding. The grown tensor has a digest of
its own, but its chunks, counted from its first byte, are those of the old one up to
where that ended. So before anything is asked of others, the objects that begin with the
same chunk are looked at (the index knows them by `records.head_of`), and every chunk
that both lists name is copied from one file to the other.

Rules
- What is copied is verified like what comes from a stranger. A relative whose file has
  changed, or whose bytes were never what its list says, costs time and nothing else.
- Only whole objects are relatives, and of one tensor at most `MAX_RELATIVES` are read.

Not here: chunks that objects share which begin differently. To find those, every chunk
would need a row in the index, and among published models they are rare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .digest import CHUNK_SIZE, DIGEST_SIZE, chunk_count, chunk_length
from .errors import HashMismatch
from .incoming import Incoming
from .objects import WholeObjects
from .records import head_of

MAX_RELATIVES = 4
"""Objects read for one that is wanted: somebody may keep a hundred stages of one training
run, whose embeddings all begin alike, and the latest ones have the most in common."""

_HEADS_PER_QUERY = 500
"""Values in one query: SQLite takes 32,766 since 3.32, and 999 before."""


def copy_from_relatives(objects: WholeObjects, incoming: Sequence[Incoming]) -> int:
    """Fill objects on their way in with what their older forms have.

    Parameters
    ----------
    objects : WholeObjects
        The store.
    incoming : sequence of Incoming
        What is being received into it.

    Returns
    -------
    int
        Bytes copied.

    Raises
    ------
    NoRoom, LocalError
        The disk does not take them.
    """
    wanted = [each for each in incoming if each.chunk_list and each.missing_bytes()]
    copied = 0
    relatives = find_relatives(objects, {head_of(each.digest, each.chunk_list) for each in wanted})
    for each in wanted:
        for digest in relatives.get(head_of(each.digest, each.chunk_list), ()):
            if digest != each.digest and each.missing_bytes():
                copied += _copy(objects, digest, each)
    return copied


def find_relatives(objects: WholeObjects, heads: Iterable[int]) -> dict[int, list[bytes]]:
    """Return the objects with each head, the latest first."""
    found: dict[int, list[bytes]] = {}
    for part in _parts(sorted(heads)):
        marks = ",".join("?" * len(part))
        rows = objects.index.query(
            f"SELECT head, digest FROM objects WHERE head IN ({marks}) AND place IN (1, 2) "
            "ORDER BY rowid DESC",
            part,
        )
        for head, digest in rows:
            of_head = found.setdefault(head, [])
            if len(of_head) < MAX_RELATIVES:
                of_head.append(digest)
    return found


def _parts(heads: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(heads), _HEADS_PER_QUERY):
        yield heads[start : start + _HEADS_PER_QUERY]


def _copy(objects: WholeObjects, digest: bytes, incoming: Incoming) -> int:
    """Copy the chunks that `incoming` still lacks from one relative."""
    record = objects.records([digest]).get(digest)
    if record is None:
        return 0
    limit = DIGEST_SIZE * chunk_count(record.size_bytes)
    chunk_list = objects.get_blob(record.chunk_list, limit) if record.chunk_list else digest
    reader = objects.open_whole(digest)
    if reader is None:
        return 0
    copied = 0
    buffer = memoryview(bytearray(CHUNK_SIZE))
    try:
        for chunk, its_chunk in _common(incoming, chunk_list or b""):
            view = buffer[: chunk_length(incoming.size_bytes, chunk)]
            reader.read_into(its_chunk * CHUNK_SIZE, view)
            if incoming.write_chunk(chunk, view):
                copied += len(view)
    except (HashMismatch, OSError):
        return copied  # it is not, or no longer, what its list says: no relative
    finally:
        reader.close()
    return copied


def _common(incoming: Incoming, chunk_list: bytes) -> Iterator[tuple[int, int]]:
    """Yield the chunks that are wanted, each with its place in the other list."""
    places = {digest: place for place, digest in enumerate(_digests(chunk_list))}
    for chunk, digest in enumerate(_digests(incoming.chunk_list)):
        if digest in places and incoming.is_missing(chunk):
            yield chunk, places[digest]


def _digests(chunk_list: bytes) -> Iterator[bytes]:
    for start in range(0, len(chunk_list), DIGEST_SIZE):
        yield chunk_list[start : start + DIGEST_SIZE]
