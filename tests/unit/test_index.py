"""The index: batches, failures, closing, and connections that do not pile up."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path

import pytest

from tensorswarm.store import index as index_module
from tensorswarm.store.errors import BadInput, LocalError, NoRoom
from tensorswarm.store.index import MAX_QUEUED, MAX_READERS, SCHEMA_VERSION, Index

WAIT_S = 60.0


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    opened = Index(tmp_path / "index.db")
    yield opened
    opened.close()


def add_pin(number: int) -> Callable[[sqlite3.Connection], int]:
    def operation(db: sqlite3.Connection) -> int:
        db.execute("INSERT INTO pins VALUES(?)", (number.to_bytes(4, "big"),))
        return number

    return operation


def pins(index: Index) -> list[int]:
    rows = index.query("SELECT digest FROM pins ORDER BY digest")
    return [int.from_bytes(row[0], "big") for row in rows]


class Held:
    """Keeps the writer busy, so that what is submitted meanwhile becomes one batch."""

    def __init__(self, index: Index, then: Callable[[sqlite3.Connection], object]) -> None:
        self._go = threading.Event()
        began = threading.Event()

        def operation(db: sqlite3.Connection) -> None:
            then(db)
            began.set()
            assert self._go.wait(WAIT_S)

        self.future = index.submit(operation)
        assert began.wait(WAIT_S)

    def release(self) -> None:
        self._go.set()


def test_what_waits_is_one_transaction(index: Index) -> None:
    statements: list[str] = []
    held = Held(index, lambda db: db.set_trace_callback(statements.append))
    futures = [index.submit(add_pin(i)) for i in range(50)]
    held.release()
    assert [future.result(WAIT_S) for future in futures] == list(range(50))
    assert statements.count("COMMIT") == 2, "the one that held the writer, and the batch"
    assert pins(index) == list(range(50))


def test_one_bad_operation_fails_alone_and_leaves_nothing(index: Index) -> None:
    def bad(db: sqlite3.Connection) -> None:
        add_pin(99)(db)
        raise ZeroDivisionError

    held = Held(index, lambda db: None)
    before, failing, after = index.submit(add_pin(1)), index.submit(bad), index.submit(add_pin(2))
    held.release()
    assert (before.result(WAIT_S), after.result(WAIT_S)) == (1, 2)
    with pytest.raises(ZeroDivisionError):
        failing.result(WAIT_S)
    assert pins(index) == [1, 2]


def test_bad_sql_is_our_error(index: Index) -> None:
    with pytest.raises(LocalError, match="index failed"):
        index.write(lambda db: db.execute("INSERT INTO nowhere VALUES(1)"))
    with pytest.raises(LocalError, match="index failed"):
        index.query("SELECT nothing FROM nowhere")
    index.write(add_pin(1))


def test_cancelled_operation_is_left_out_and_harms_nobody(index: Index) -> None:
    held = Held(index, lambda db: None)
    first, second = index.submit(add_pin(1)), index.submit(add_pin(2))
    assert first.cancel()
    held.release()
    assert second.result(WAIT_S) == 2
    with pytest.raises(CancelledError):
        first.result()
    assert pins(index) == [2]


def test_reader_cannot_write(index: Index) -> None:
    with pytest.raises(LocalError):
        index.query("INSERT INTO pins VALUES(x'00')")
    assert pins(index) == []


def test_query_takes_any_number_of_keys(index: Index) -> None:
    futures = [index.submit(add_pin(i)) for i in range(1700)]
    futures[-1].result(WAIT_S)
    keys = [i.to_bytes(4, "big") for i in range(0, 1700, 1)]
    assert len(index.query_keys("SELECT digest FROM pins WHERE digest IN ({keys})", keys)) == 1700
    assert index.query_keys("SELECT digest FROM pins WHERE digest IN ({keys})", []) == []


def test_full_index_is_no_room_and_recovers(index: Index) -> None:
    def shrink(db: sqlite3.Connection) -> None:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count={pages + 2}")

    index.submit(shrink).result(WAIT_S)
    with pytest.raises(NoRoom):
        index.write(lambda db: db.execute("INSERT INTO pins VALUES(zeroblob(100000))"))
    index.write(add_pin(1))  # a small one still fits
    index.submit(lambda db: db.execute("PRAGMA max_page_count=100000")).result(WAIT_S)
    index.write(lambda db: db.execute("INSERT INTO pins VALUES(zeroblob(100000))"))
    assert len(pins(index)) == 2


def test_full_index_fails_only_what_does_not_fit(index: Index) -> None:
    def shrink(db: sqlite3.Connection) -> None:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count={pages + 2}")

    held = Held(index, shrink)
    small = index.submit(add_pin(1))
    large = index.submit(lambda db: db.execute("INSERT INTO pins VALUES(zeroblob(100000))"))
    other = index.submit(add_pin(2))
    held.release()
    assert (small.result(WAIT_S), other.result(WAIT_S)) == (1, 2)
    with pytest.raises(NoRoom):
        large.result(WAIT_S)


def test_index_locked_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole batch waits once for the lock, not each of its operations."""
    monkeypatch.setattr(index_module, "BUSY_TIMEOUT_S", 0.05)
    index = Index(tmp_path / "index.db")
    other = sqlite3.connect(tmp_path / "index.db", isolation_level=None, check_same_thread=False)
    try:
        statements: list[str] = []
        held = Held(index, lambda db: db.set_trace_callback(statements.append))
        futures = [index.submit(add_pin(i)) for i in range(20)]
        # Called in the writer's thread, after the first commit and before the batch.
        held.future.add_done_callback(lambda _: other.execute("BEGIN IMMEDIATE"))
        held.release()
        for future in futures:
            with pytest.raises(LocalError, match="locked"):
                future.result(WAIT_S)
        assert statements.count("BEGIN IMMEDIATE") <= 1, "each operation waited on its own"
        assert pins(index) == [], "readers are not kept waiting"
        other.execute("ROLLBACK")
        assert index.write(add_pin(7)) == 7
    finally:
        other.close()
        index.close()


class Locked:
    """A connection on which no transaction can be begun any more after some have been."""

    def __init__(self, real: sqlite3.Connection, transactions: int) -> None:
        self._real = real
        self._left = transactions
        self.attempts = 0

    def execute(self, sql: str, *rest: object) -> sqlite3.Cursor:
        if sql == "BEGIN IMMEDIATE":
            self.attempts += 1
            if self.attempts > self._left:
                raise sqlite3.OperationalError("database is locked")
        return self._real.execute(sql, *rest)

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)


def test_lock_that_comes_while_a_batch_is_tried_one_by_one(index: Index) -> None:
    """Each might wait half a minute for the lock: the first that cannot get it speaks for all."""
    held = Held(index, lambda db: None)
    futures = [index.submit(add_pin(1)), index.submit(lambda db: db.execute("nonsense"))]
    futures += [index.submit(add_pin(i)) for i in range(2, 12)]
    locked = Locked(index._writer, transactions=2)
    index._writer = locked  # type: ignore[assignment]
    held.release()
    assert futures[0].result(WAIT_S) == 1
    for future in futures[1:]:
        with pytest.raises(LocalError, match="locked"):
            future.result(WAIT_S)
    assert locked.attempts == 3
    assert pins(index) == [1]


def test_close_finishes_what_is_queued(tmp_path: Path) -> None:
    index = Index(tmp_path / "index.db")
    futures = [index.submit(add_pin(i)) for i in range(300)]
    index.close()
    assert all(future.done() for future in futures)
    again = Index(tmp_path / "index.db")
    assert pins(again) == list(range(300))
    again.close()


def test_closed_index_says_so(index: Index) -> None:
    index.close()
    index.close()
    with pytest.raises(LocalError, match="closed"):
        index.submit(add_pin(1))
    with pytest.raises(LocalError, match="closed"):
        index.query("SELECT 1")


def test_close_under_load_leaves_nobody_waiting(index: Index) -> None:
    """Whoever was let in gets an answer; the others are told that it is closed."""
    futures: list[Future[int]] = []
    begun = threading.Barrier(9)
    strange: list[BaseException] = []

    def work(first: int) -> None:
        begun.wait()
        try:
            for i in range(first, first + MAX_QUEUED):
                futures.append(index.submit(add_pin(i)))
                index.query("SELECT COUNT(*) FROM pins")
        except LocalError as error:
            if "closed" not in str(error):
                strange.append(error)
        except BaseException as error:
            strange.append(error)

    threads = [threading.Thread(target=work, args=(i * 10_000,)) for i in range(8)]
    for thread in threads:
        thread.start()
    begun.wait()
    index.close()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert not strange
    assert all(future.done() for future in futures)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_connections_do_not_pile_up_with_threads(index: Index, tmp_path: Path) -> None:
    """Pools of threads come and go; connections must not stay with them."""
    for _ in range(10):
        threads = [
            threading.Thread(target=index.query, args=("SELECT COUNT(*) FROM pins",))
            for _ in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    name = str(tmp_path / "index.db")
    open_files = [os.readlink(f"/proc/self/fd/{fd}") for fd in _descriptors()]
    assert open_files.count(name) <= MAX_READERS + 1


def test_connections_are_used_again(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening one takes longer than most queries."""
    made: list[int] = []
    real = Index._connect

    def connect(self: Index) -> sqlite3.Connection:
        made.append(1)
        return real(self)

    monkeypatch.setattr(Index, "_connect", connect)
    for _ in range(20):
        index.query("SELECT 1")
        with pytest.raises(LocalError):
            index.query("SELECT nothing FROM nowhere")
    assert len(made) <= 1


def _descriptors() -> list[str]:
    """Return the descriptors that are open, without the one that lists them."""
    names = os.listdir("/proc/self/fd")
    return [name for name in names if os.path.lexists(f"/proc/self/fd/{name}")]


def test_newer_version_is_refused(tmp_path: Path) -> None:
    Index(tmp_path / "index.db").close()
    connection = sqlite3.connect(tmp_path / "index.db")
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(BadInput, match="newer"):
        Index(tmp_path / "index.db")


def test_foreign_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "text.db"
    path.write_text("this is no database, though it is long enough to be one" * 20)
    before = path.read_bytes()
    with pytest.raises(BadInput, match="not a tensorswarm index"):
        Index(path)
    assert path.read_bytes() == before

    path = tmp_path / "other.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bookmarks(url)")
    connection.commit()
    connection.close()
    with pytest.raises(BadInput, match="other tables"):
        Index(path)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("bookmarks",)]
    connection.close()


def test_folder_in_place_of_the_index(tmp_path: Path) -> None:
    (tmp_path / "index.db").mkdir()
    with pytest.raises(LocalError, match="opening"):
        Index(tmp_path / "index.db")
