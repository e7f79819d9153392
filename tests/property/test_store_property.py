"""The store against a model of it: a dict of what is whole, and sets of what is proved.

Whatever order things happen in - chunks true and false, false chunk lists, puts, drops,
reopening, power cuts - the store shows what the model says, and nothing else.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tensorswarm.store import bitmap
from tensorswarm.store.digest import CHUNK_SIZE, chunk_count, chunk_list_of, digest_of
from tensorswarm.store.errors import HashMismatch
from tensorswarm.store.incoming import ChunkMismatch, Incoming
from tensorswarm.store.manifest import ObjectRef
from tensorswarm.store.store import Store
from tests.support.store_world import (
    DEADLINE_S,
    begin,
    bytes_of,
    chunk_of,
    cut_the_power,
    random_bytes,
    ref_of,
)

SIZES = (1, 65_536, 65_537, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 4097)
DATA = tuple(random_bytes(size, size) for size in SIZES)
DIGESTS = tuple(digest_of(data) for data in DATA)
LISTS = {digest_of(chunk_list_of(data)) for data in DATA if len(data) > CHUNK_SIZE}
LARGE = tuple(i for i, size in enumerate(SIZES) if size > CHUNK_SIZE)

which = st.sampled_from(range(len(SIZES)))
which_large = st.sampled_from(LARGE)
fraction = st.floats(0, 1, exclude_max=True)


class StoreMachine(RuleBasedStateMachine):
    """Holds a store and what it should show."""

    @initialize()
    def open_first(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="store-property-"))
        self.store = Store(self.folder)
        self.whole: set[int] = set()
        self.durable: set[int] = set()
        self.proved: dict[int, set[int]] = {i: set() for i in range(len(SIZES))}
        self.held: dict[int, Incoming] = {}

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)

    # ---- what happens

    @rule(i=which)
    def put(self, i: int) -> None:
        assert self.store.put_blob(DATA[i]) == DIGESTS[i]
        self.whole.add(i)

    @rule(i=which)
    def receive(self, i: int) -> None:
        incoming = begin(self.store, DATA[i])
        if i in self.whole:
            if i not in self.held:
                assert incoming.missing_bytes() == 0
                assert incoming.finished.result(0) is None
            return
        assert self.held.setdefault(i, incoming) is incoming
        shown = {c for c in range(chunk_count(SIZES[i])) if not incoming.is_missing(c)}
        assert shown == self.proved[i]

    @rule(i=which, at=fraction)
    def true_chunk(self, i: int, at: float) -> None:
        if i not in self.held:
            return
        chunk = int(at * chunk_count(SIZES[i]))
        is_new = self.held[i].write_chunk(chunk, chunk_of(DATA[i], chunk))
        assert is_new is (chunk not in self.proved[i])
        self.proved[i].add(chunk)
        if len(self.proved[i]) == chunk_count(SIZES[i]):
            self.held.pop(i).finished.result(DEADLINE_S)
            self.whole.add(i)
            self.proved[i] = set()

    @rule(i=which, at=fraction, seed=st.integers(0, 3))
    def false_chunk(self, i: int, at: float, seed: int) -> None:
        if i not in self.held:
            return
        chunk = int(at * chunk_count(SIZES[i]))
        false = bytearray(chunk_of(DATA[i], chunk))
        false[seed % len(false)] ^= 1 << seed
        with pytest.raises(ChunkMismatch):
            self.held[i].write_chunk(chunk, memoryview(false))

    @rule(i=which_large)
    def false_list(self, i: int) -> None:
        """All chunks match a list that is not the object's."""
        if i in self.whole:
            return
        false = DATA[i][::-1]
        chunk_list = chunk_list_of(false)
        ref = ObjectRef(DIGESTS[i], SIZES[i], digest_of(chunk_list))
        incoming = self.store.receive(ref, chunk_list)
        for chunk in range(incoming.chunk_count):
            incoming.write_chunk(chunk, chunk_of(false, chunk))
        with pytest.raises(HashMismatch):
            incoming.finished.result(DEADLINE_S)

    @rule(i=which)
    def forget(self, i: int) -> None:
        self.store.forget([DIGESTS[i]])
        self.whole.discard(i)
        self.durable.discard(i)

    @rule()
    def let_go(self) -> None:
        """Give up every download; what was proved stays."""
        self.held.clear()

    @rule()
    def sync(self) -> None:
        self.store.sync()
        self.durable = set(self.whole)

    @rule()
    def reopen(self) -> None:
        self.close()
        self.store = Store(self.folder)

    @rule(torn=st.sets(which))
    def power_cut(self, torn: set[int]) -> None:
        """What was not durable may be torn; what was in part is, now and then."""
        self.close()
        cut_the_power(self.folder)
        for i in torn:
            if i in self.whole - self.durable and SIZES[i] > 65_536:
                os.truncate(self.store.place.object_path(DIGESTS[i]), SIZES[i] // 2)
                self.whole.discard(i)
            elif self.proved[i]:
                path = self.store.place.partial_path(DIGESTS[i], ref_of(DATA[i]).chunk_list)
                last = max(self.proved[i])
                os.truncate(path, last * CHUNK_SIZE + 100)
                self.proved[i] = {chunk for chunk in self.proved[i] if chunk < last}
        self.store = Store(self.folder)

    def close(self) -> None:
        self.held.clear()
        self.store.close()
        for i in self.whole:
            self.proved[i] = set()  # of no use any more, and removed

    # ---- what must be so

    @invariant()
    def shows_exactly_what_is_whole(self) -> None:
        if not hasattr(self, "store"):
            return
        expected = {DIGESTS[i] for i in self.whole}
        listed = set(self.store.all_digests())
        assert listed - LISTS == expected
        assert set(self.store.records(DIGESTS)) == expected
        for i, digest in enumerate(DIGESTS):
            data = bytes_of(self.store, digest)
            assert data == (DATA[i] if i in self.whole else None)
            if i in self.whole and SIZES[i] > CHUNK_SIZE:
                assert ref_of(DATA[i]).chunk_list in listed

    @invariant()
    def shows_of_parts_only_what_is_proved(self) -> None:
        if not hasattr(self, "store"):
            return
        for digest, holding in self.store.holdings(DIGESTS).items():
            i = DIGESTS.index(digest)
            assert (holding.proved is None) == (i in self.whole)
            if holding.proved is not None and holding.chunk_list == ref_of(DATA[i]).chunk_list:
                shown = {
                    c for c in range(chunk_count(SIZES[i])) if bitmap.is_set(holding.proved, c)
                }
                assert shown <= self.proved[i]
                if shown:
                    self.check_chunks(i, shown)

    def check_chunks(self, i: int, shown: set[int]) -> None:
        """What is shown can be read, and is true."""
        reader = self.store.open_reader(DIGESTS[i])
        assert reader is not None
        for chunk in shown:
            expected = chunk_of(DATA[i], chunk)
            assert reader.covers(chunk * CHUNK_SIZE, len(expected))
            data = bytearray(len(expected))
            reader.read_into(chunk * CHUNK_SIZE, memoryview(data))
            assert data == expected
        reader.close()

    @precondition(lambda self: hasattr(self, "store") and not self.held)
    @invariant()
    def keeps_no_temporary_files(self) -> None:
        names = os.listdir(self.store.place.tmp)
        assert [name for name in names if not name.endswith(".lock")] == []


# Half the usual number: each example does thirty things to a store on a disk.
StoreMachine.TestCase.settings = settings(
    max_examples=settings().max_examples // 2, stateful_step_count=30
)
test_store_against_its_model = StoreMachine.TestCase
