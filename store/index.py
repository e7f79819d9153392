"""The store's index: one SQLite database in WAL mode.

One writer thread makes every change; what waits for it is carried out in one
transaction, so that a burst of chunks costs one commit. Readers have a
connection each per thread and never wait for the writer. Several processes may
open the same index; SQLite's locks order their writers.

This module knows tables and transactions. It knows nothing of files, digests'
meaning or chunks.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from .errors import BadInput, LocalError, NoRoom

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]

SCHEMA_VERSION = 1

BUSY_TIMEOUT_S = 30.0
"""How long a writer waits for another process's transaction. Ours last milliseconds."""

MAX_BATCH = 1024
"""Most operations in one transaction, so that a waiting reader sees news soon."""

MAX_QUEUED = 2048
"""Most operations that wait for the writer: at 64 KiB of inline data each, 128 MiB."""

MAX_SQL_VARIABLES = 500
"""Values bound in one statement; SQLite's own oldest limit is 999."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    digest BLOB PRIMARY KEY,
    size INTEGER NOT NULL,
    place INTEGER NOT NULL,           -- 0 in `data`, 1 a file of its own, 2 in an adopted file
    data BLOB,
    file_id INTEGER REFERENCES adopted_files(id),
    file_offset INTEGER,
    chunk_list BLOB NOT NULL,         -- digest of the chunk list, empty for a single chunk
    boot TEXT                         -- the machine's start it was written under; NULL once durable
);
CREATE INDEX IF NOT EXISTS objects_boot ON objects(boot) WHERE boot IS NOT NULL;
CREATE INDEX IF NOT EXISTS objects_file ON objects(file_id) WHERE file_id IS NOT NULL;
CREATE TABLE IF NOT EXISTS adopted_files (
    id INTEGER PRIMARY KEY,
    path TEXT UNIQUE NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    inode INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS partials (
    digest BLOB NOT NULL,
    chunk_list BLOB NOT NULL,
    size INTEGER NOT NULL,
    bitmap BLOB NOT NULL,
    boot TEXT NOT NULL,
    PRIMARY KEY (digest, chunk_list)
);
CREATE TABLE IF NOT EXISTS manifests (
    digest BLOB PRIMARY KEY,
    name TEXT NOT NULL,
    added INTEGER NOT NULL            -- seconds since 1970
);
CREATE TABLE IF NOT EXISTS pins (digest BLOB PRIMARY KEY);
"""


def translate(error: Exception, what: str) -> Exception:
    """Return the project's error for a SQLite error met while doing `what`."""
    text = str(error)
    if "full" in text or "disk I/O error" in text:
        return NoRoom(f"no room on disk for the store's index ({what}): {text}")
    return LocalError(f"the store's index failed ({what}): {text}")


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
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._readers_lock = threading.Lock()
        self._queue: queue.Queue[tuple[Operation[Any], Future[Any]] | None] = queue.Queue(
            MAX_QUEUED
        )
        self._closed = False
        try:
            self._writer = self._connect()
            self._prepare(self._writer)
        except sqlite3.DatabaseError as error:
            raised = translate(error, "opening it")
            if isinstance(raised, NoRoom):
                raise raised from error
            raise BadInput(f"{path} is not a tensorswarm index: {error}") from error
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode=WAL")
        # NORMAL: a power cut may lose the last commits but never tears the index.
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise BadInput(
                f"the store was written by a newer tensorswarm (index version {version}, "
                f"this one reads {SCHEMA_VERSION}): upgrade, or use another --store"
            )
        if version < SCHEMA_VERSION:
            connection.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
            )

    # ---- writing

    def submit(self, operation: Operation[T]) -> Future[T]:
        """Queue a change; the future is done once it is committed."""
        if self._closed:
            raise LocalError("the store is closed")
        future: Future[T] = Future()
        self._queue.put((operation, future))
        return future

    def write(self, operation: Operation[T]) -> T:
        """Carry out a change and wait until it is committed."""
        return self.submit(operation).result()

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            batch = [item]
            stop = False
            while len(batch) < MAX_BATCH:
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    stop = True
                    break
                batch.append(item)
            self._commit(batch)
            if stop:
                return

    def _commit(self, batch: Sequence[tuple[Operation[Any], Future[Any]]]) -> None:
        """Run a batch as one transaction; alone, each, when the batch fails."""
        try:
            results = self._transact([operation for operation, _ in batch])
        except Exception as error:
            if len(batch) > 1:
                for item in batch:
                    self._commit([item])
                return
            known = translate(error, "writing") if isinstance(error, sqlite3.Error) else error
            batch[0][1].set_exception(known)
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)

    def _transact(self, operations: Sequence[Operation[Any]]) -> list[Any]:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            results = [operation(self._writer) for operation in operations]
            self._writer.execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise
        return results

    # ---- reading

    def _reader(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            if self._closed:
                raise LocalError("the store is closed")
            connection = self._connect()
            self._local.connection = connection
            with self._readers_lock:
                self._readers.append(connection)
        return connection

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of a read-only statement."""
        try:
            return self._reader().execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise translate(error, "reading") from error

    def query_keys(self, sql: str, keys: Sequence[bytes]) -> list[tuple[Any, ...]]:
        """Return the rows of `sql` for many keys; ``{keys}`` in it stands for their list."""
        rows: list[tuple[Any, ...]] = []
        for start in range(0, len(keys), MAX_SQL_VARIABLES):
            part = keys[start : start + MAX_SQL_VARIABLES]
            rows += self.query(sql.format(keys=",".join("?" * len(part))), part)
        return rows

    def data_version(self) -> int:
        """Return a number that changes when another connection committed something."""
        return int(self.query("PRAGMA data_version")[0][0])

    def checkpoint(self) -> None:
        """Move the write-ahead log into the database and onto stable storage."""
        try:
            self._reader().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:
            raise translate(error, "checkpoint") from error

    def close(self) -> None:
        """Finish what is queued, then close every connection."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join(BUSY_TIMEOUT_S)
        with self._readers_lock:
            for connection in self._readers:
                connection.close()
        self._writer.close()
