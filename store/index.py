"""The store's index: one SQLite database in WAL mode.

One writer thread makes every change; what waits for it is carried out in one
transaction, so that a burst of chunks costs one commit. Readers never wait for the
writer; a small pool of connections serves all threads, because threads come and go.
Several processes may open the same index; SQLite's locks order their writers, so what
an operation does to files while its transaction is open, no other process does at the
same time.

An operation may be run twice: when a batch fails, each of it is tried again alone.
A future's callbacks run in the writer thread and must not submit operations.

This module knows tables and transactions. It knows nothing of files, digests'
meaning or chunks.
"""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from .errors import BadInput, LocalError, NoRoom, TensorswarmError
from .place import sync_directory, sync_file

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]

SCHEMA_VERSION = 2

BUSY_TIMEOUT_S = 30.0
"""How long a writer waits for another process's transaction. Ours last milliseconds."""

MAX_BATCH = 1024
"""Most operations in one transaction, so that a waiting reader sees news soon."""

MAX_QUEUED = 2048
"""Most operations that wait for the writer: at 64 KiB of inline data each, 128 MiB."""

MAX_READERS = 8
"""Most queries at a time, and connections kept: each holds two files and up to 2 MB."""

CHECKPOINT_PAGES = 32_768
"""Pages of 4 KiB in the log (128 MiB) after which the writer copies them into the database
itself. SQLite's own 1,000 make it wait for the disk every 4 MiB, which costs as much as all
else where many small tensors arrive; `sync` does it every few seconds besides."""

MAX_LOG_BYTES = 16 << 20
"""What the log is cut back to once it was copied."""

MAPPED_BYTES = 256 << 20
"""As much of the index readers map instead of reading it page by page: reading 20,000
small tensors by digest takes 57 ms instead of 220."""

WRITER_CACHE_KIB = 8 << 10
"""Pages that the writer keeps: a transaction of several batches of small tensors fits. With
SQLite's own 2 MB they are written to the log before its end, and read back from there."""

MAX_SQL_VARIABLES = 500
"""Values bound in one statement; SQLite's own oldest limit is 999."""

_SCHEMA = """
CREATE TABLE objects (
    digest BLOB PRIMARY KEY,
    size INTEGER NOT NULL,
    place INTEGER NOT NULL,           -- 0 in `data`, 1 its own file, 2 an adopted file, 3 a pack
    data BLOB,
    file_id INTEGER REFERENCES adopted_files(id),
    file_offset INTEGER,
    chunk_list BLOB NOT NULL,         -- digest of the chunk list, empty for a single chunk
    head INTEGER NOT NULL,            -- from the first chunk's digest, see records.head_of
    boot TEXT,                        -- the machine's start it was written under; NULL once durable
    added_by TEXT                     -- the unfinished `add` that would take it away again
);
CREATE INDEX objects_boot ON objects(boot) WHERE boot IS NOT NULL;
CREATE INDEX objects_file ON objects(file_id) WHERE file_id IS NOT NULL;
CREATE INDEX objects_added_by ON objects(added_by) WHERE added_by IS NOT NULL;
CREATE TABLE adopted_files (
    id INTEGER PRIMARY KEY,
    path BLOB UNIQUE NOT NULL,        -- as the system has it: not every name is Unicode
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL,
    inode INTEGER NOT NULL
);
CREATE TABLE partials (
    digest BLOB NOT NULL,
    chunk_list BLOB NOT NULL,
    size INTEGER NOT NULL,
    bitmap BLOB NOT NULL,
    boot TEXT NOT NULL,
    PRIMARY KEY (digest, chunk_list)
);
CREATE TABLE manifests (
    digest BLOB PRIMARY KEY,
    name TEXT NOT NULL,
    added INTEGER NOT NULL            -- seconds since 1970
);
CREATE TABLE pins (digest BLOB PRIMARY KEY);
CREATE TABLE changes (models INTEGER NOT NULL, objects INTEGER NOT NULL);
INSERT INTO changes VALUES (0, 0);
CREATE TRIGGER object_dropped AFTER DELETE ON objects
    BEGIN UPDATE changes SET objects = objects + 1; END;
CREATE TRIGGER model_added AFTER INSERT ON manifests
    BEGIN UPDATE changes SET models = models + 1; END;
CREATE TRIGGER model_dropped AFTER DELETE ON manifests
    BEGIN UPDATE changes SET models = models + 1; END;
"""

_SCHEMA_OF_PACKS = """
ALTER TABLE objects ADD COLUMN pack INTEGER;  -- which one, of place 3; `file_offset` says where
CREATE TABLE packs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT UNIQUE NOT NULL,        -- the file's
    size_bytes INTEGER NOT NULL,      -- the end of what rows may name
    durable_bytes INTEGER NOT NULL,   -- the end of what is on stable storage
    boot TEXT NOT NULL,               -- the machine's start that the rest was written under
    is_open INTEGER NOT NULL          -- whether its session, while it lives, may append
);
-- What is small begins with nobody else's first chunk of 1 MiB. The places without it:
DROP INDEX IF EXISTS objects_head;
CREATE INDEX objects_head ON objects(head) WHERE place IN (1, 2);
-- Packs take many at a time, and count them themselves.
DROP TRIGGER IF EXISTS object_added;
CREATE TRIGGER object_added AFTER INSERT ON objects WHEN NEW.place<>3
    BEGIN UPDATE changes SET objects = objects + 1; END;
"""
"""What version 2 adds to version 1: a store of that is brought up to date when it is opened."""

_FULL_CODES = frozenset(
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR_WRITE,
        sqlite3.SQLITE_IOERR_SHMSIZE,
        sqlite3.SQLITE_IOERR_TRUNCATE,
    }
)
"""What SQLite says when a disk, a quota or a limit on file sizes is full."""


def translate(error: sqlite3.Error, what: str) -> TensorswarmError:
    """Return the project's error for a SQLite error met while doing `what`."""
    if getattr(error, "sqlite_errorcode", None) in _FULL_CODES:
        return NoRoom(f"no room on disk for the store's index ({what}): {error}")
    return LocalError(f"the store's index failed ({what}): {error}")


class Index:
    """Connections and the writer thread of one store's database.

    Parameters
    ----------
    path : Path
        The database file; it is made when missing.

    Raises
    ------
    BadInput
        The file is not an index, or one of a newer version.
    NoRoom, LocalError
        The disk does not take it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[sqlite3.Connection] = []
        self._idle_lock = threading.Lock()
        self._reader_slots = threading.BoundedSemaphore(MAX_READERS)
        self._queue: queue.Queue[tuple[Operation[Any], Future[Any]] | None] = queue.Queue(
            MAX_QUEUED
        )
        self._gate = threading.Lock()
        self._closed = False
        self._writer = self._open_writer()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )

    def _open_writer(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = None
        try:
            connection = self._connect()
            _use_wal(connection)
            # NORMAL: a power cut may lose the last commits but never tears the index.
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute(f"PRAGMA cache_size=-{WRITER_CACHE_KIB}")
            connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
            connection.execute(f"PRAGMA journal_size_limit={MAX_LOG_BYTES}")
            self._prepare(connection)
            return connection
        except BaseException as error:
            if connection is not None:
                connection.close()
            if not isinstance(error, sqlite3.Error):
                raise
            if _primary_code(error) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise BadInput(f"{self._path} is not a tensorswarm index: {error}") from error
            raise translate(error, "opening it") from error

    def _prepare(self, connection: sqlite3.Connection) -> None:
        if self._is_prepared(connection):
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            if not self._is_prepared(connection):  # another process may just have done it
                self._bring_up_to_date(connection)
                connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _bring_up_to_date(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if not version:
            (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if tables:
                raise BadInput(f"{self._path} is not a tensorswarm index: it has other tables")
            for statement in _statements(_SCHEMA):
                connection.execute(statement)
        for statement in _statements(_SCHEMA_OF_PACKS):
            connection.execute(statement)

    def _is_prepared(self, connection: sqlite3.Connection) -> bool:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise BadInput(
                f"the store was written by a newer tensorswarm (index version {version}, "
                f"this one reads {SCHEMA_VERSION}): upgrade, or use another --store"
            )
        return bool(version == SCHEMA_VERSION)

    # ---- writing

    def submit(self, operation: Operation[T]) -> Future[T]:
        """Queue a change; the future is done once it is committed."""
        future: Future[T] = Future()
        with self._gate:
            if self._closed:
                raise LocalError("the store is closed")
            self._queue.put((operation, future))
        return future

    def write(self, operation: Operation[T]) -> T:
        """Carry out a change and wait until it is committed."""
        return self.submit(operation).result()

    def _run(self) -> None:
        # In a method of its own, so that what was written is not kept until the next comes.
        while self._run_batch():
            pass
        self._writer.close()

    def _run_batch(self) -> bool:
        """Wait for something to write, and write all that waits; False at the end."""
        batch = []
        item = self._queue.get()
        while item is not None:
            # False if the caller cancelled it. From here on nobody can.
            if item[1].set_running_or_notify_cancel():
                batch.append(item)
            if len(batch) == MAX_BATCH or self._queue.empty():
                break
            item = self._queue.get()
        if batch:
            self._commit(batch)
        return item is not None

    def _commit(self, batch: Sequence[tuple[Operation[Any], Future[Any]]]) -> bool:
        """Run a batch as one transaction; alone, each, when one of it fails.

        Returns
        -------
        bool
            False if no transaction could be begun: then it is not one operation's fault.
        """
        try:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")  # it failed before; without it nothing goes on
            self._writer.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            _fail(batch, translate(error, "writing"))
            return False
        try:
            results = self._transact([operation for operation, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                known = translate(error, "writing") if isinstance(error, sqlite3.Error) else error
                _fail(batch, known)
                return True
            for position, item in enumerate(batch):
                if not self._commit([item]):
                    _fail(batch[position + 1 :], LocalError("the store's index is locked"))
                    return False
            return True
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
        return True

    def _transact(self, operations: Sequence[Operation[Any]]) -> list[Any]:
        try:
            results = [operation(self._writer) for operation in operations]
            self._writer.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # tried again before the next transaction
                if self._writer.in_transaction:  # a full disk may have ended it already
                    self._writer.execute("ROLLBACK")
            raise
        return results

    # ---- reading

    @contextlib.contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        if not self._reader_slots.acquire(timeout=BUSY_TIMEOUT_S):
            raise LocalError("the store's index is busy: no reader came free in time")
        try:
            with self._idle_lock:
                if self._closed:
                    raise LocalError("the store is closed")
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = self._connect()
                connection.execute("PRAGMA query_only=ON")
                connection.execute(f"PRAGMA mmap_size={MAPPED_BYTES}")
            try:
                yield connection
            finally:
                self._put_back(connection)
        finally:
            self._reader_slots.release()

    def _put_back(self, connection: sqlite3.Connection) -> None:
        with self._idle_lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of a read-only statement."""
        try:
            with self._reader() as connection:
                return connection.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise translate(error, "reading") from error

    def query_keys(self, sql: str, keys: Sequence[bytes]) -> list[tuple[Any, ...]]:
        """Return the rows of `sql` for many keys; ``{keys}`` in it stands for their list."""
        rows: list[tuple[Any, ...]] = []
        for part, text in in_parts(sql, keys):
            rows += self.query(text, part)
        return rows

    def sync(self) -> None:
        """Put every commit so far onto stable storage."""
        # The log alone is enough. The database file must not be opened and closed here:
        # that would release the locks SQLite holds on it for this process (POSIX).
        sync_file(self._path.with_name(self._path.name + "-wal"))
        sync_directory(self._path.parent)
        try:
            with self._reader() as connection:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:
            raise translate(error, "checkpoint") from error

    def close(self) -> None:
        """Finish what is queued, then close every connection."""
        with self._gate:
            if self._closed:
                return
            with self._idle_lock:
                self._closed = True
                idle, self._idle = self._idle, []
            self._queue.put(None)
        for connection in idle:
            connection.close()
        self._thread.join(2 * BUSY_TIMEOUT_S)  # a batch waits for another process once


def in_parts(sql: str, keys: Sequence[bytes]) -> Iterator[tuple[Sequence[bytes], str]]:
    """Yield portions of many keys, each with the statement that takes it."""
    for start in range(0, len(keys), MAX_SQL_VARIABLES):
        part = keys[start : start + MAX_SQL_VARIABLES]
        yield part, sql.format(keys=",".join("?" * len(part)))


def _fail(batch: Sequence[tuple[Operation[Any], Future[Any]]], error: Exception) -> None:
    for _, future in batch:
        future.set_exception(error)


def _primary_code(error: sqlite3.Error) -> int:
    """Return SQLite's result code without what extends it; 0 for an error of the binding."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to WAL; two processes that do so at once are told "locked" without a wait."""
    give_up_at = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if _primary_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_at:
                raise
            time.sleep(0.01)


def _statements(script: str) -> Iterator[str]:
    """Yield a script's statements: `executescript` would commit before the first."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
