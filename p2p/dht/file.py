"""What a DHT node keeps on disk: records of others, its own announcements, peers met.

Purpose
-------
A restart, or a kill, must cost nobody anything: a server that came back without its
records would not get them again for 22 hours, and a node that forgot what it has
announced would announce all of it again.

Rules
-----
- One SQLite file (WAL). Changes are written together in one transaction, so that a
  kill leaves all of a batch or nothing of it. After a power cut the last seconds may
  be missing; they are announced again some day.
- What cannot be read is moved aside with a warning, and the node starts without it:
  nothing here is worth refusing to start.
- Times are wall clock, in seconds since 1970: they outlive the process.

Every method blocks on the disk and may be called in any thread.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from tensorswarm.store.errors import LocalError

from ..host.addresses import PeerAddress
from .provider_table import Changes, Record

FILE_NAME = "dht.db"
"""The file's name in the store's directory."""

BUSY_TIMEOUT_S = 5.0
"""Time to wait for another process that writes, in seconds."""

MAX_PEERS_KEPT = 64
"""Peers remembered for the next start: more than enough to find the others again."""

_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS provider (key BLOB, peer BLOB, added_at REAL,
    PRIMARY KEY (key, peer)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS provider_peer (peer BLOB PRIMARY KEY, grp TEXT, addrs BLOB)
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS own (digest BLOB PRIMARY KEY, confirmed_at REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS identity (who BLOB);
CREATE TABLE IF NOT EXISTS met (peer TEXT PRIMARY KEY, addrs BLOB, met_at REAL) WITHOUT ROWID;
"""

log = logging.getLogger("tensorswarm.dht")


class DhtFile:
    """The file.

    Parameters
    ----------
    path : Path
        Where it is; made if it is missing.

    Raises
    ------
    LocalError
        The disk refuses to be written to.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            try:
                self._database = _open(path)
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                aside = path.with_name(f"{path.name}.damaged")
                log.warning("%s cannot be read (%s); moved to %s", path, error, aside.name)
                for suffix in ("-wal", "-shm"):
                    path.with_name(path.name + suffix).unlink(missing_ok=True)
                path.replace(aside)
                self._database = _open(path)
        except (OSError, sqlite3.Error) as error:
            raise LocalError(f"cannot keep the DHT's records in {path}: {error}") from error

    def close(self) -> None:
        """Close the file; safe to call twice."""
        with self._lock:
            self._database.close()

    # ---- records of others

    def load_records(self) -> tuple[list[Record], dict[bytes, tuple[str, tuple[bytes, ...]]]]:
        """Return all provider records, and group and addresses of each provider."""
        records = [Record(*row) for row in self._read("SELECT key, peer, added_at FROM provider")]
        peers = {
            peer: (group, tuple(msgpack.unpackb(addrs)))
            for peer, group, addrs in self._read("SELECT peer, grp, addrs FROM provider_peer")
        }
        return records, peers

    def write_records(self, changes: Changes) -> None:
        """Write what changed in the table of provider records."""
        with self._writing() as database:
            database.executemany(
                "INSERT OR REPLACE INTO provider VALUES (?, ?, ?)",
                [(key, peer, at) for (key, peer), at in changes.added.items()],
            )
            database.executemany(
                "DELETE FROM provider WHERE key = ? AND peer = ?", list(changes.removed)
            )
            database.executemany(
                "INSERT OR REPLACE INTO provider_peer VALUES (?, ?, ?)",
                [(peer, grp, msgpack.packb(addrs)) for peer, (grp, addrs) in changes.peers.items()],
            )

    def tidy(self) -> None:
        """Forget the addresses of peers without records."""
        with self._writing() as database:
            database.execute(
                "DELETE FROM provider_peer WHERE peer NOT IN (SELECT peer FROM provider)"
            )

    # ---- what we announce

    def load_own(self, who: Sequence[str]) -> dict[bytes, float]:
        """Return what we have announced, and when; nothing if we are not who we were.

        A record carries our id and our addresses (`who`). If they are others now, every
        record is to be sent again, and none counts as announced.
        """
        rows = self._read("SELECT who FROM identity")
        if [tuple(msgpack.unpackb(row[0])) for row in rows] != [tuple(sorted(who))]:
            with self._writing() as database:
                database.execute("DELETE FROM own")
                database.execute("DELETE FROM identity")
                database.execute("INSERT INTO identity VALUES (?)", (msgpack.packb(sorted(who)),))
        return dict(self._read("SELECT digest, confirmed_at FROM own"))

    def write_own(self, confirmed: Mapping[bytes, float], gone: Iterable[bytes]) -> None:
        """Note keys as announced at a time, and others as announced no more."""
        with self._writing() as database:
            database.executemany("DELETE FROM own WHERE digest = ?", [(d,) for d in gone])
            database.executemany("INSERT OR REPLACE INTO own VALUES (?, ?)", confirmed.items())

    # ---- peers met

    def load_peers(self) -> list[PeerAddress]:
        """Return the peers met in earlier runs, latest first."""
        rows = self._read("SELECT peer, addrs FROM met ORDER BY met_at DESC")
        return [PeerAddress(peer, tuple(msgpack.unpackb(addrs))) for peer, addrs in rows]

    def write_peers(self, peers: Iterable[PeerAddress], now: float) -> None:
        """Remember peers; of all remembered, the `MAX_PEERS_KEPT` met last stay."""
        with self._writing() as database:
            database.executemany(
                "INSERT OR REPLACE INTO met VALUES (?, ?, ?)",
                [(peer.peer_id, msgpack.packb(peer.addrs), now) for peer in peers],
            )
            database.execute(
                "DELETE FROM met WHERE peer NOT IN "
                "(SELECT peer FROM met ORDER BY met_at DESC LIMIT ?)",
                (MAX_PEERS_KEPT,),
            )

    # ---- the database

    def _read(self, query: str) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._database.execute(query).fetchall()
            except sqlite3.Error as error:
                raise LocalError(f"cannot read the DHT's records: {error}") from error

    def _writing(self) -> _Writing:
        return _Writing(self._lock, self._database)


class _Writing:
    """A transaction: all of it is written, or nothing."""

    def __init__(self, lock: threading.Lock, database: sqlite3.Connection) -> None:
        self._lock = lock
        self._database = database

    def __enter__(self) -> sqlite3.Connection:
        self._lock.acquire()
        return self._database

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            if error is None:
                self._database.commit()
            else:
                self._database.rollback()
        except sqlite3.Error as failure:
            raise LocalError(f"cannot write the DHT's records: {failure}") from failure
        finally:
            self._lock.release()
        if isinstance(error, sqlite3.Error):
            raise LocalError(f"cannot write the DHT's records: {error}") from error


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"it is of version {version}, which is not known here")
        database.executescript(_SCHEMA)
        database.execute(f"PRAGMA user_version={_VERSION}")
        database.commit()
        (fine,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if fine != "ok":
            raise sqlite3.DatabaseError(str(fine))
    except BaseException:
        database.close()
        raise
    return database
