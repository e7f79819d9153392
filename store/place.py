"""Where a store keeps its files, and how bytes get onto the disk.

Layout of a store directory::

    index.db            the index (SQLite, WAL)
    objects/ab/abcd…    whole objects, one write-once file each, named by digest
    partial/abcd…-ef…   objects in progress: digest, and the start of the chunk list's digest
    tmp/                files being written; whatever lies there is rubbish after a crash

A name here is always made from a digest, never from anything a person or a peer
wrote. Errors of the operating system that mean "full" become `NoRoom`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from .errors import LocalError, NoRoom

FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

COPY_BUFFER_SIZE = 8 << 20
"""Bytes read at a time while hashing and copying: large enough for two hashing threads."""


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Translate OSErrors met while doing `what` into the project's errors."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_ERRNOS:
            raise NoRoom(f"no room on disk: {what}") from error
        raise LocalError(f"{what}: {error.strerror or error}") from error


class Place:
    """Paths and file operations of one store directory.

    Parameters
    ----------
    root : Path
        The store directory; it and its folders are made when missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index = root / "index.db"
        self.objects = root / "objects"
        self.partial = root / "partial"
        self.tmp = root / "tmp"
        with disk_errors(f"cannot make the store directory {root}"):
            for folder in (root, self.objects, self.partial, self.tmp):
                folder.mkdir(parents=True, exist_ok=True)

    def object_path(self, digest: bytes) -> Path:
        """Return where a whole object's file is."""
        name = digest.hex()
        return self.objects / name[:2] / name

    def partial_path(self, digest: bytes, chunk_list: bytes) -> Path:
        """Return where an object in progress is; lists that differ never share a file."""
        return self.partial / f"{digest.hex()}-{chunk_list[:8].hex() or 'whole'}"

    def temporary(self) -> Path:
        """Return a fresh name in the store's own tmp folder."""
        return self.tmp / f"{os.getpid()}-{uuid.uuid4().hex}"

    def promote(self, source: Path, digest: bytes) -> Path:
        """Rename a complete, verified file to its object's place."""
        target = self.object_path(digest)
        target.parent.mkdir(exist_ok=True)
        source.replace(target)
        return target

    def free_bytes(self) -> int:
        """Return how many bytes an ordinary user may still write here."""
        stat = os.statvfs(self.root)
        return stat.f_bavail * stat.f_frsize


def sync_file(path: Path) -> bool:
    """Put a file's bytes onto stable storage; False if it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


def sync_directory(path: Path) -> None:
    """Put a folder's entries onto stable storage."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, offset: int, view: memoryview) -> None:
    """Fill `view` from a file at `offset`.

    Raises
    ------
    OSError
        The file ends before the view is full, or the disk fails.
    """
    filled = 0
    while filled < len(view):
        count = os.preadv(descriptor, [view[filled:]], offset + filled)
        if count == 0:
            raise OSError(errno.EIO, "the file is shorter than it should be")
        filled += count


def write_fully(descriptor: int, offset: int, view: memoryview) -> None:
    """Write all of `view` into a file at `offset`."""
    written = 0
    while written < len(view):
        written += os.pwrite(descriptor, view[written:], offset + written)


def boot_identity() -> str:
    """Return a text that changes when the machine starts anew.

    What was written but not yet synced under another start may be lost or torn,
    and is hashed again before anyone trusts it. Where the system does not tell,
    every process counts as a start of its own.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return uuid.uuid4().hex
