"""Uploads between nodes: who is offered what, and how requests wait for a slot."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from tensorswarm.p2p.control import wire
from tensorswarm.p2p.control.neighbours import Neighbours
from tensorswarm.p2p.control.object_set import ObjectSet
from tensorswarm.p2p.swarm.upload_slots import OFFER_S
from tensorswarm.p2p.uploads import MAX_AHEAD, OFFERS, Upload, Uploads
from tensorswarm.store.digest import CHUNK_SIZE, chunk_list_of, digest_of
from tensorswarm.store.manifest import ObjectRef
from tensorswarm.store.store import Store
from tests.support.store_world import DEADLINE_S, random_bytes

DATA = random_bytes(5 * CHUNK_SIZE, 7)
DIGEST = digest_of(DATA)
LIST = digest_of(chunk_list_of(DATA))
MODEL = b"m" * 32


@dataclass
class FakeNeighbour:
    """A neighbour that notes what it is offered."""

    hello: wire.Hello
    interests: ObjectSet
    offers: list[wire.Offer] = field(default_factory=list)

    def notify(self, notice: wire.Offer | wire.Pass) -> None:
        assert isinstance(notice, wire.Offer)
        self.offers.append(notice)


class FakeNeighbours:
    """A table of neighbours that a test fills."""

    def __init__(self) -> None:
        self.table: dict[str, FakeNeighbour] = {}

    def has_given(self, peer_id: str) -> None:
        pass

    def add(self, name: str, *, features: Sequence[str] = (OFFERS,)) -> FakeNeighbour:
        hello = wire.Hello(1, "test", (), (), tuple(features))
        self.table[name] = FakeNeighbour(hello, ObjectSet())
        self.table[name].interests.add([MODEL, DIGEST])
        return self.table[name]

    def get(self, name: str) -> FakeNeighbour | None:
        return self.table.get(name)

    def wanting(self, digest: bytes) -> list[str]:
        return [name for name, each in self.table.items() if digest in each.interests]


class World:
    """Uploads of a node that has all but the last chunk of one object."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.neighbours = FakeNeighbours()
        self.forbidden: set[str] = set()
        self.uploads = Uploads(
            cast(Neighbours, self.neighbours),
            lambda peer_id, _digest: peer_id not in self.forbidden,
            random.Random(1),
            clock=lambda: self.now,
        )
        self.store = Store(folder)
        incoming = self.store.receive(ObjectRef(DIGEST, len(DATA), LIST), chunk_list_of(DATA))
        for chunk in range(4):
            part = memoryview(DATA)[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE]
            incoming.write_chunk(chunk, part)
        self.wanted = self.store.wanted_of([incoming])

    def open(self) -> None:
        self.uploads.open(MODEL, self.wanted, {})

    def offered(self) -> dict[str, list[int]]:
        return {
            name: [offer.chunk for offer in each.offers]
            for name, each in self.neighbours.table.items()
        }


def test_who_wants_the_same_and_knows_offers_gets_them(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.neighbours.add("new")
    world.neighbours.add("old", features=())
    world.neighbours.add("barred")
    world.forbidden.add("barred")
    world.neighbours.add("elsewhere").interests.discard([MODEL, DIGEST])
    world.open()
    world.uploads.look()
    offered = world.offered()
    assert len(offered.pop("new")) == 1
    assert not any(offered.values())


def test_offers_are_of_what_we_have_and_the_other_lacks(tmp_path: Path) -> None:
    world = World(tmp_path)
    one = world.neighbours.add("one")
    world.uploads.open(MODEL, world.wanted, {"one": {0: b"\x03"}})
    news = wire.HaveEntry(DIGEST, len(DATA), b"\x04", LIST)
    world.uploads._on_have("one", [news])
    world.uploads.look()
    assert [offer.chunk for offer in one.offers] == [3]  # not the fifth, which we lack, too
    upload = world.uploads.ask("one", DIGEST, 3 * CHUNK_SIZE)
    world.uploads.end(upload)
    world.now += 10 * OFFER_S
    world.uploads.look()
    assert len(one.offers) == 1


def test_an_offer_lapses_or_is_passed_on_and_another_gets_one(tmp_path: Path) -> None:
    world = World(tmp_path)
    names = ("a", "b", "c", "d")
    for name in names:
        world.neighbours.add(name)
    world.open()
    world.uploads.look()
    first = {name for name, chunks in world.offered().items() if chunks}
    assert len(first) == 2  # one to serve, and one ahead
    world.now += OFFER_S
    world.uploads.look()
    later = {name for name, chunks in world.offered().items() if chunks} - first
    assert len(later) == 2
    for name in later:
        world.uploads._on_offer(name, wire.Pass(DIGEST))
    world.now += OFFER_S
    world.uploads.look()
    assert sum(map(len, world.offered().values())) > 4


def test_a_request_waits_for_its_slot_and_goes_on_when_it_is_free(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.neighbours.add("a")
    world.neighbours.add("b")
    world.open()
    world.uploads.look()
    first = world.uploads.ask("a", DIGEST, 0)
    assert first is not None and first.has_begun.is_set()
    got: list[object] = []
    other = threading.Thread(target=lambda: got.append(world.uploads.ask("b", DIGEST, 0)))
    other.start()
    world.uploads.end(first)
    other.join(DEADLINE_S)
    assert isinstance(got[0], Upload)
    assert got[0].begun_at is not None
    assert world.uploads.ask("stranger", DIGEST, 0) is None
    assert world.uploads.ask("a", b"x" * 32, 0) is None


def test_more_offers_are_open_where_answers_take_long(tmp_path: Path) -> None:
    world = World(tmp_path)
    for number in range(40):
        world.neighbours.add(f"peer-{number}")
    world.open()
    for _ in range(20):
        world.uploads.look()
        offered = [name for name, chunks in world.offered().items() if chunks]
        world.now += 0.5
        upload = world.uploads.ask(offered[-1], DIGEST, 0)
        world.now += 0.001
        world.uploads.end(upload)
    before = sum(map(len, world.offered().values()))
    world.now += 2 * OFFER_S
    world.uploads.look()
    opened = sum(map(len, world.offered().values())) - before
    assert MAX_AHEAD <= opened <= MAX_AHEAD + 1


def test_offers_end_when_we_are_through_and_nobody_is_left(tmp_path: Path) -> None:
    world = World(tmp_path)
    one = world.neighbours.add("one")
    world.open()
    world.uploads.leave(MODEL)
    world.uploads.look()
    assert world.uploads.is_open(MODEL)
    assert one.offers
    one.interests.discard([MODEL, DIGEST])
    world.uploads.look()
    assert not world.uploads.is_open(MODEL)


def test_what_is_on_its_way_into_the_index_is_offered_when_it_is_there(tmp_path: Path) -> None:
    """It is proved once, and nobody says it again."""
    world = World(tmp_path)
    small = b"of one chunk"
    ref = ObjectRef(digest_of(small), len(small), b"")
    world.wanted = world.store.wanted_of([world.store.receive(ref, b"")])
    one = world.neighbours.add("one")
    one.interests.add([ref.digest])
    world.open()
    world.uploads.proved(MODEL, 0, 0)
    world.uploads._swarms[MODEL].slots.held = 0  # as if it had not been there yet
    world.uploads.look()
    assert not one.offers
    world.wanted.write_chunk(0, 0, memoryview(small))
    world.wanted.wait_ended()
    world.uploads.look()
    assert len(one.offers) == 1


def test_small_objects_given_together_answer_an_offer(tmp_path: Path) -> None:
    """They wait for no slot; but whoever got them is free for the next offer at once."""
    world = World(tmp_path)
    digests = [digest_of(bytes([number])) for number in range(2)]
    world.wanted = world.store.wanted_of(
        [world.store.receive(ObjectRef(each, 1, b""), b"") for each in digests]
    )
    peer = world.neighbours.add("one")
    peer.interests.add(digests)
    world.open()
    world.uploads._swarms[MODEL].slots.held = 0b11
    for expected in (1, 1, 2):
        if expected == 2:
            world.uploads.gave("one", [peer.offers[0].digest])
        world.uploads.look()
        assert len(peer.offers) == expected
    assert {offer.digest for offer in peer.offers} == set(digests)
    assert world.uploads.concerns("one", digests[0])
    assert not world.uploads.concerns("stranger", digests[0])
