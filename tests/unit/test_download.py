"""One download: whom it asks for parts of an object, and what it tells of its own.

Stores, the planner and the bulk plane are real, on the loopback interface; the
neighbours are not: they say what a test has them say, in real frames.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tensorswarm.p2p import download as download_module
from tensorswarm.p2p.bulk.server import BulkServer
from tensorswarm.p2p.control import wire
from tensorswarm.p2p.control.answers import Answers
from tensorswarm.p2p.control.neighbours import (
    HaveListener,
    HaveModelListener,
    Neighbours,
    OfferListener,
)
from tensorswarm.p2p.download import Download
from tensorswarm.p2p.fetch import one_error
from tensorswarm.p2p.host.host import Stream
from tensorswarm.p2p.results import SourceReport
from tensorswarm.p2p.routes import Routes
from tensorswarm.store.digest import chunk_list_of, digest_of
from tensorswarm.store.errors import HashMismatch, NoSource, NotFound
from tensorswarm.store.incoming import Incoming
from tensorswarm.store.manifest import ObjectRef
from tensorswarm.store.reader import ObjectReader
from tensorswarm.store.store import Store
from tests.support.bulk_fakes import identity
from tests.support.store_world import (
    DEADLINE_S,
    MIB,
    begin,
    bytes_of,
    chunk_of,
    random_bytes,
    receive_all,
)

DATA = random_bytes(3 * MIB + 17, 1)
OTHER_DATA = random_bytes(2 * MIB, 2)
SMALL = random_bytes(1000, 3)
FALSE = random_bytes(len(DATA), 4)
"""What a false manifest puts under the digest of DATA."""

DIGEST = digest_of(DATA)
LIST = digest_of(chunk_list_of(DATA))
FALSE_LIST = digest_of(chunk_list_of(FALSE))
PEER = identity(100).peer_id


@dataclass
class FakeNeighbours:
    """Neighbours that say what a test has them say, and note what they are told."""

    have_listeners: list[HaveListener] = field(default_factory=list)
    have_model_listeners: list[HaveModelListener] = field(default_factory=list)
    offer_listeners: list[OfferListener] = field(default_factory=list)
    told: list[wire.HaveEntry] = field(default_factory=list)
    passed: list[bytes] = field(default_factory=list)
    told_more: trio.Event = field(default_factory=trio.Event)

    def say(self, peer_id: str, entries: Iterable[wire.HaveEntry]) -> None:
        """Let a neighbour tell what it holds, as it would come off the wire."""
        reader = wire.FrameReader()
        for frame in wire.fit_have(1, entries):
            reader.feed(wire.encode(frame))
            message = reader.next_message()
            assert isinstance(message, wire.Have)
            for listener in self.have_listeners:
                listener(peer_id, message.entries)

    def offer(self, digest: bytes, chunk: int) -> None:
        """Let PEER offer a chunk."""
        for listener in self.offer_listeners:
            listener(PEER, wire.Offer(digest, chunk))

    def get(self, peer_id: str) -> FakeNeighbours:
        return self

    def notify(self, notice: wire.Offer | wire.Pass) -> None:
        assert isinstance(notice, wire.Pass)
        self.passed.append(notice.digest)

    def has_given(self, peer_id: str) -> None:
        pass

    def tell(self, entries: Sequence[wire.HaveEntry]) -> None:
        for frame in wire.fit_have(0, entries):
            wire.encode(frame)  # raises what a neighbour would hold against us
            self.told += frame.entries
        self.told_more.set()

    async def wait_told(self, condition: Callable[[wire.HaveEntry], bool]) -> None:
        """Wait until something is told of which the condition is true."""
        with trio.fail_after(DEADLINE_S):
            while not any(map(condition, self.told)):
                self.told_more = trio.Event()
                await self.told_more.wait()

    def told_of(self, digest: bytes) -> list[wire.HaveEntry]:
        return [entry for entry in self.told if entry.digest == digest]

    def all(self) -> list[str]:
        return [PEER]

    def is_neighbour(self, peer_id: str) -> bool:
        return True

    def somebody_listens(self) -> bool:
        return True


@contextmanager
def serving(store: Store) -> Iterator[tuple[BulkServer, list[bytes]]]:
    """Serve a store as PEER; give the server, and the digests that it is asked for."""
    asked_for: list[bytes] = []

    def open_reader(digest: bytes) -> ObjectReader | None:
        asked_for.append(digest)
        return store.open_reader(digest)

    server = BulkServer(identity(100), open_reader, lambda peer_id: True, host="127.0.0.1")
    server.start()
    try:
        yield server, asked_for
    finally:
        server.close()


def download_of(
    store: Store,
    incoming: Sequence[Incoming],
    neighbours: FakeNeighbours,
    *servers: BulkServer,
    routes: Routes | None = None,
) -> Download:
    """Return a download that finds every peer at these servers, unless it has other routes."""
    download = Download(
        store.wanted_of(incoming),
        neighbours=cast(Neighbours, neighbours),
        routes=routes
        or Routes(
            identity(1),
            lambda peer_id: [server.address for server in servers] or [("127.0.0.1", 9)],
            no_stream,
            trio.lowlevel.spawn_system_task,
        ),
        origins=[],
        rng=random.Random(0),
        on_progress=lambda byte_count: None,
        urgency={},
    )
    download.open()
    return download


async def no_stream(peer_id: str) -> Stream:
    raise NoSource(f"{peer_id} is not there")


def begin_all(ours: Store, theirs: Store) -> list[Incoming]:
    """Begin to receive everything that another store is given here."""
    for data in (DATA, OTHER_DATA, SMALL):
        theirs.put_blob(data)
    return [begin(ours, data) for data in (DATA, OTHER_DATA, SMALL)]


def begin_poisoned(store: Store) -> Incoming:
    """Begin to receive DATA by the false list."""
    return store.receive(ObjectRef(DIGEST, len(DATA), FALSE_LIST), chunk_list_of(FALSE))


def prove(incoming: Incoming, data: bytes, *chunks: int) -> Incoming:
    for chunk in chunks:
        incoming.write_chunk(chunk, chunk_of(data, chunk))
    return incoming


def part(bits: int, chunk_list: bytes) -> list[wire.HaveEntry]:
    return [wire.HaveEntry(DIGEST, len(DATA), bytes([bits]), chunk_list)]


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    """Our store, and that of the peer."""
    with Store(tmp_path / "ours") as ours, Store(tmp_path / "theirs") as theirs:
        yield ours, theirs


# ---- parts that others hold


def test_part_by_a_false_list_is_not_asked_for_and_its_holder_is_no_liar(
    stores: tuple[Store, Store],
) -> None:
    """A false manifest fooled the peer. Later it has the whole, and gives it."""
    ours, theirs = stores
    poisoned = prove(begin_poisoned(theirs), FALSE, 0, 1)
    incoming = prove(begin(ours, DATA), DATA, 2, 3)

    async def main() -> None:
        neighbours = FakeNeighbours()
        download = download_of(ours, [incoming], neighbours, server)
        told = Answers(theirs).holdings([DIGEST])
        assert told == part(0b0011, FALSE_LIST)
        neighbours.say(PEER, told)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(download.run, DEADLINE_S)
            await wait_all_tasks_blocked()  # now everybody was asked who is to be asked
            assert download.lacking() == [0]
            assert asked_for == []
            receive_all(theirs, DATA)
            neighbours.say(PEER, Answers(theirs).holdings([DIGEST]))
        reports, wasted_bytes = download.reports()
        assert reports == [SourceReport("peer", PEER, 2 * MIB, dropped=False, via="bulk")]
        assert wasted_bytes == 0

    with serving(theirs) as (server, asked_for):
        trio.run(main)
    assert asked_for
    assert bytes_of(ours, DIGEST) == DATA
    assert poisoned.is_missing(2), "alive until here: it was what the peer told of"


def test_an_offer_may_overtake_the_news_and_is_answered_in_any_case(
    stores: tuple[Store, Store],
) -> None:
    """Who offers something has it; but of several chunks the news tells by which list."""
    ours, theirs = stores
    incoming = begin_all(ours, theirs)

    async def main() -> None:
        neighbours = FakeNeighbours()
        download = download_of(ours, incoming, neighbours, server)
        neighbours.offer(DIGEST, 0)
        assert neighbours.passed == [DIGEST]  # it is no source yet
        async with trio.open_nursery() as nursery:
            nursery.start_soon(download.run, DEADLINE_S)
            neighbours.say(PEER, Answers(theirs).holdings([DIGEST]))
            neighbours.offer(digest_of(OTHER_DATA), 1)
            assert neighbours.passed == [DIGEST, digest_of(OTHER_DATA)]
            neighbours.offer(digest_of(SMALL), 0)
            await neighbours.wait_told(lambda entry: entry.digest == digest_of(SMALL))
            neighbours.offer(digest_of(SMALL), 7)  # there is no such chunk
            neighbours.say(PEER, Answers(theirs).holdings([digest_of(OTHER_DATA)]))
        assert neighbours.passed == [DIGEST, digest_of(OTHER_DATA)]

    with serving(theirs) as (server, _):
        trio.run(main)


def test_without_another_source_it_is_not_found_rather_than_false(
    stores: tuple[Store, Store],
) -> None:
    ours, theirs = stores
    prove(poisoned := begin_poisoned(theirs), FALSE, 0, 1, 2)

    async def main() -> None:
        neighbours = FakeNeighbours()
        download = download_of(ours, [begin(ours, DATA)], neighbours, server)
        download.search_is_over = True
        neighbours.say(PEER, Answers(theirs).holdings([DIGEST]))
        with pytest.raises(NotFound):
            async with one_error():
                await download.run(DEADLINE_S)
        assert download.reports() == ([], 0)

    with serving(theirs) as (server, asked_for):
        trio.run(main)
    assert asked_for == []
    assert theirs.holdings([DIGEST])[DIGEST].chunk_list == poisoned.chunk_list_digest


def test_who_goes_by_the_same_list_gets_the_part(stores: tuple[Store, Store]) -> None:
    ours, theirs = stores
    kept = prove(begin(theirs, DATA), DATA, 1, 3)
    incoming = prove(begin(ours, DATA), DATA, 0, 2)

    async def main() -> None:
        neighbours = FakeNeighbours()
        download = download_of(ours, [incoming], neighbours, server)
        neighbours.say(PEER, Answers(theirs).holdings([DIGEST]))
        assert download.lacking() == []
        await download.run(DEADLINE_S)

    with serving(theirs) as (server, _):
        trio.run(main)
    assert bytes_of(ours, DIGEST) == DATA
    assert kept.is_missing(0)


def test_an_entry_replaces_what_the_peer_said_before(stores: tuple[Store, Store]) -> None:
    incoming = begin(stores[0], DATA)
    whole = [wire.HaveEntry(DIGEST, len(DATA), None, b"")]

    async def main() -> None:
        neighbours = FakeNeighbours()
        download = download_of(stores[0], [incoming], neighbours)
        for said in (whole, part(0b1111, LIST)):
            for useless in (
                part(0b1111, FALSE_LIST),
                [wire.HaveEntry(DIGEST, len(DATA) - 1, None, b"")],
            ):
                neighbours.say(PEER, said)
                assert download.lacking() == []
                neighbours.say(PEER, useless)
                assert download.lacking() == [0]
        download.close()

    trio.run(main)


# ---- peers behind a relay


@dataclass
class Relayed:
    """The ways to a peer that is behind a relay at first, and held back until `held_until`."""

    server: BulkServer
    is_relayed: bool = True
    held_until: float = 0.0
    opened: trio.Event = field(default_factory=trio.Event)

    async def open_stream(self, _peer_id: str) -> Stream:
        self.opened.set()
        await trio.sleep_forever()
        raise AssertionError("nobody wakes it")

    def routes(self) -> Routes:
        return Routes(
            identity(1),
            lambda _peer_id: [] if self.is_relayed else [self.server.address],
            self.open_stream,
            trio.lowlevel.spawn_system_task,
            is_relayed=lambda _peer_id: self.is_relayed,
            held_until=lambda _peer_id: self.held_until,
        )


def test_bytes_wait_for_a_direct_connection_to_who_is_behind_a_relay(
    stores: tuple[Store, Store],
) -> None:
    ours, theirs = stores
    receive_all(theirs, DATA)

    async def main() -> None:
        way = Relayed(server, held_until=trio.current_time() + DEADLINE_S)
        neighbours, routes = FakeNeighbours(), way.routes()
        download = download_of(ours, [begin(ours, DATA)], neighbours, routes=routes)
        download.search_is_over = True  # what is held back is a source all the same
        async with trio.open_nursery() as nursery:
            nursery.start_soon(download.run, DEADLINE_S)
            neighbours.say(PEER, Answers(theirs).holdings([DIGEST]))
            await wait_all_tasks_blocked(0.01)
            assert not way.opened.is_set()
            way.is_relayed, way.held_until = False, 0.0
            routes.tell_changed(PEER)
        (report,), wasted_bytes = download.reports()
        assert (report.via, report.bytes, wasted_bytes) == ("bulk", len(DATA), 0)
        assert not way.opened.is_set()

    with serving(theirs) as (server, _):
        trio.run(main)
    assert bytes_of(ours, DIGEST) == DATA


def test_a_peer_that_stays_behind_its_relay_is_asked_through_it(
    stores: tuple[Store, Store],
) -> None:
    ours, theirs = stores
    receive_all(theirs, DATA)

    async def main() -> None:
        way = Relayed(server, held_until=trio.current_time() + DEADLINE_S)
        neighbours, routes = FakeNeighbours(), way.routes()
        download = download_of(ours, [begin(ours, DATA)], neighbours, routes=routes)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(download.run, DEADLINE_S)
            neighbours.say(PEER, Answers(theirs).holdings([DIGEST]))
            way.held_until = 0.0
            routes.tell_changed(PEER)
            await way.opened.wait()
            routes.tell_changed(PEER)  # once more, and it changes nothing
            nursery.cancel_scope.cancel()
        assert download.reports() == ([], 0)

    with serving(theirs) as (server, _):
        trio.run(main)


def test_a_download_moves_to_the_direct_connection(stores: tuple[Store, Store]) -> None:
    """What was asked through the relay is asked anew: it gave nothing, and it is no failure."""
    ours, theirs = stores
    receive_all(theirs, DATA)

    async def main() -> None:
        way = Relayed(server)
        neighbours, routes = FakeNeighbours(), way.routes()
        download = download_of(ours, [begin(ours, DATA)], neighbours, routes=routes)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(download.run, DEADLINE_S)
            neighbours.say(PEER, Answers(theirs).holdings([DIGEST]))
            await way.opened.wait()
            way.is_relayed = False
            routes.tell_changed(PEER)
            routes.tell_changed("somebody else")
        (report,), _ = download.reports()
        assert report == SourceReport("peer", PEER, len(DATA), dropped=False, via="bulk")

    with serving(theirs) as (server, _):
        trio.run(main)
    assert bytes_of(ours, DIGEST) == DATA


# ---- what we tell


def test_a_part_is_not_given_as_a_blob_though_every_chunk_matched(
    stores: tuple[Store, Store],
) -> None:
    """By a false list it would not match the digest, and the asker would drop us."""
    ours, _ = stores
    may_hash = threading.Event()
    ours._receiver._finisher.submit(may_hash.wait, DEADLINE_S)
    poisoned = prove(begin_poisoned(ours), FALSE, 0, 1, 2, 3)
    try:
        assert Answers(ours).holdings([DIGEST]) == part(0b1111, FALSE_LIST)
        request = wire.GetBlobs(1, (wire.BlobItem(DIGEST, 0),))
        assert list(Answers(ours).blob_frames(request)) == [wire.Blobs(1, (), last=True)]
    finally:
        may_hash.set()
    with pytest.raises(HashMismatch):
        poisoned.finished.result(DEADLINE_S)


@pytest.mark.parametrize("false_first", [False, True], ids=["alone", "a false one is shown"])
def test_what_is_told_is_what_the_store_gives_out(
    stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch, false_first: bool
) -> None:
    """Parts with their list, unless another list's part is served; wholes in any case."""
    monkeypatch.setattr(download_module, "TELL_INTERVAL_S", 0.001)
    ours, theirs = stores
    poisoned = prove(begin_poisoned(ours), FALSE, 1) if false_first else None
    incoming = begin_all(ours, theirs)

    async def main() -> None:
        neighbours = FakeNeighbours()
        download = download_of(ours, incoming, neighbours, server)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(download.run, DEADLINE_S)
            if not false_first:
                neighbours.say(PEER, part(0b0100, LIST))
                await neighbours.wait_told(lambda entry: entry == part(0b0100, LIST)[0])
            neighbours.say(PEER, Answers(theirs).holdings([DIGEST, digest_of(SMALL)]))
            for data in (DATA, SMALL):
                whole = wire.HaveEntry(digest_of(data), len(data), None, b"")
                await neighbours.wait_told(whole.__eq__)
            neighbours.say(PEER, Answers(theirs).holdings([digest_of(OTHER_DATA)]))
        parts = [entry for entry in neighbours.told_of(DIGEST) if entry.bitmap is not None]
        assert bool(parts) != false_first
        assert all(entry.chunk_list == LIST for entry in parts)
        assert [entry.bitmap for entry in neighbours.told_of(digest_of(SMALL))] == [None]

    with serving(theirs) as (server, _):
        trio.run(main)
    assert poisoned is None or not poisoned.is_missing(1)


def test_an_object_that_proved_false_is_not_told_of(
    stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "TELL_INTERVAL_S", 0.001)
    ours, theirs = stores
    kept = prove(begin_poisoned(theirs), FALSE, 0, 1, 2)
    theirs.put_blob(OTHER_DATA)
    poisoned = prove(begin_poisoned(ours), FALSE, 3)
    incoming = [poisoned, begin(ours, OTHER_DATA)]

    async def main() -> None:
        neighbours = FakeNeighbours()
        download = download_of(ours, incoming, neighbours, server)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(download.run, DEADLINE_S)
            neighbours.say(PEER, Answers(theirs).holdings([DIGEST]))
            await trio.to_thread.run_sync(poisoned.finished.exception)
            other = digest_of(OTHER_DATA)
            other_list = digest_of(chunk_list_of(OTHER_DATA))
            first_chunk = wire.HaveEntry(other, len(OTHER_DATA), b"\1", other_list)
            neighbours.say(PEER, [first_chunk])
            await neighbours.wait_told(first_chunk.__eq__)  # and the other news with it
            assert {entry.chunk_list for entry in neighbours.told_of(DIGEST)} <= {FALSE_LIST}
            neighbours.say(PEER, Answers(theirs).holdings([other]))

    with serving(theirs) as (server, _), pytest.RaisesGroup(HashMismatch):
        trio.run(main)
    assert kept.is_missing(3)
