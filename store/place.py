"""Where a store keeps its files, and how bytes get onto the disk.

Layout of a store directory::

    index.db            the index (SQLite, WAL)
    objects/ab/abcd…    whole objects, one write-once file each, named by digest
    packs/<session>.<n> small objects, many in a file, named by the session that wrote it
    partial/abcd…-ef…   objects in progress: digest, and the chunk list's digest
    tmp/<session>.<n>   files being written
    tmp/<session>.lock  locked while the session that writes them lives

A name here is always made from a digest, never from anything a person or a peer
wrote. Errors of the operating system that mean "full" become `NoRoom`.

A *session* is one open store. Whether its files in ``tmp`` are still wanted is told
by its lock, not by its process id: ids are used again, and processes in containers do
not see each other's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from .digest import DIGEST_SIZE
from .errors import LocalError, NoRoom

WRITE_SLICE = 128 << 10
"""Bytes in one write. A larger one makes Linux take large pieces of free memory for its
cache, which on virtual machines are the ones the host has taken back: 1 GiB written in
slices of 1 MiB cost 0.2 to 2.5 s of CPU, in slices of 128 KiB always 0.2 s."""

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
        self.packs = root / "packs"
        self.partial = root / "partial"
        self.tmp = root / "tmp"
        self._numbers = itertools.count()
        with disk_errors(f"cannot make the store directory {root}"):
            for folder in (root, self.objects, self.packs, self.partial, self.tmp):
                folder.mkdir(parents=True, exist_ok=True)
            self._session, self._lock = _begin_session(self.tmp)

    def close(self) -> None:
        """End the session: what is left of it in ``tmp`` is rubbish from now on."""
        if self._lock >= 0:
            with contextlib.suppress(OSError):  # whoever opens the store next removes it
                _lock_path(self.tmp, self._session).unlink()
            os.close(self._lock)
            self._lock = -1

    def object_path(self, digest: bytes) -> Path:
        """Return where a whole object's file is."""
        name = digest.hex()
        return self.objects / name[:2] / name

    def partial_path(self, digest: bytes, chunk_list: bytes) -> Path:
        """Return where an object in progress is, given its chunk list's digest.

        Lists that differ never share a file, not even by design of whoever wrote them: a
        chunk true to a false list could then overwrite one that was verified.
        """
        return self.partial / partial_name(digest, chunk_list)

    def partial_files(self) -> Iterator[tuple[Path, bytes]]:
        """Yield the files of objects in progress, with the objects' digests."""
        for path in self.partial.iterdir():
            try:
                digest = bytes.fromhex(path.name.partition("-")[0])
            except ValueError:
                continue  # not ours
            if len(digest) == DIGEST_SIZE:
                yield path, digest

    def object_names(self) -> set[str]:
        """Return the names of the files of whole objects."""
        names: set[str] = set()
        for folder in os.listdir(self.objects):
            with contextlib.suppress(NotADirectoryError, FileNotFoundError):
                names.update(os.listdir(self.objects / folder))
        return names

    def partial_names(self) -> set[str]:
        """Return the names of the files of objects in progress."""
        return set(os.listdir(self.partial))

    def unique_name(self) -> str:
        """Return a name that no other call, in any process, will return."""
        return f"{self._session}.{next(self._numbers)}"

    def temporary(self) -> Path:
        """Return a fresh name in the store's own tmp folder."""
        return self.tmp / self.unique_name()

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

    def living_sessions(self) -> set[str]:
        """Return the sessions, of all processes, that have not ended."""
        self.clear_tmp()
        names = (path.name for path in self.tmp.iterdir())
        return {name.removesuffix(_LOCK_SUFFIX) for name in names if name.endswith(_LOCK_SUFFIX)}

    def clear_tmp(self) -> None:
        """Remove the temporary files of sessions that ended without removing them."""
        names = [path.name for path in self.tmp.iterdir()]
        for session in set(map(session_of, names)) - {self._session}:
            with _if_ended(_lock_path(self.tmp, session)) as ended:
                if not ended:
                    continue
                for name in names:
                    if session_of(name) == session and not name.endswith(_LOCK_SUFFIX):
                        remove_file(self.tmp / name)


def session_of(name: str) -> str:
    """Return the session that made a unique name."""
    return name.partition(".")[0]


def partial_name(digest: bytes, chunk_list: bytes) -> str:
    """Return the name of the file of an object in progress; see `Place.partial_path`."""
    return f"{digest.hex()}-{chunk_list.hex()}"


_LOCK_SUFFIX = ".lock"


def _lock_path(folder: Path, session: str) -> Path:
    return folder / f"{session}{_LOCK_SUFFIX}"


def _begin_session(folder: Path) -> tuple[str, int]:
    """Return a new session's name and the descriptor of its locked file."""
    while True:
        session = uuid.uuid4().hex
        path = _lock_path(folder, session)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return session, descriptor
        except (BlockingIOError, FileNotFoundError):
            pass  # another process took the file for a leftover before it was locked
        except OSError:
            return session, descriptor  # no locks here: then nobody finds ours unlocked
        os.close(descriptor)


@contextlib.contextmanager
def _if_ended(lock: Path) -> Iterator[bool]:
    """Tell whether a session has ended; if so, its lock file is gone afterwards."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True  # a session makes its lock first and removes it last
        return
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False  # it lives; or there are no locks here, and nobody can tell
            return
        yield True
        remove_file(lock)
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> None:
    """Remove a file if it is there and can be removed; what is left costs only room."""
    with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
        path.unlink()


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
    """Write all of `view` into a file at `offset`, `WRITE_SLICE` bytes at a time."""
    written = 0
    while written < len(view):
        part = view[written : written + WRITE_SLICE]
        written += os.pwrite(descriptor, part, offset + written)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a new file; nothing is left of it when that fails.

    Raises
    ------
    NoRoom, LocalError
        The disk is full, or does not take it.
    """
    try:
        with disk_errors("cannot write to the store"), path.open("xb", buffering=0) as file:
            write_fully(file.fileno(), 0, memoryview(data))
    except BaseException:
        remove_file(path)
        raise


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
