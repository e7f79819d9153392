"""Whom a model is for, and what others may know of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorswarm.p2p.control import wire
from tensorswarm.p2p.control.access import Access
from tensorswarm.p2p.control.answers import Answers
from tensorswarm.p2p.dht.announcer import announceable
from tensorswarm.store.access import ACCESS_FILE, Rule, read_rules, write_rules
from tensorswarm.store.errors import BadInput
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.store import Store
from tests.support.model_files import make_random_model

MIB = 1 << 20
ALICE, BOB, EVE = "12D3KooWAlice", "12D3KooWBob", "12D3KooWEve"


def models(store: Store, tmp_path: Path) -> tuple[bytes, bytes, set[bytes], set[bytes]]:
    """Add two models that share their first tensor; return ids, and what only each has."""
    digests, contents = [], []
    for name, sizes in (("one", {"a": 2 * MIB, "b": 3 * MIB}), ("two", {"a": 2 * MIB, "c": 100})):
        folder = make_random_model(tmp_path / name, sizes, seed=1)
        manifest = add_paths(store, [folder]).manifest
        digests.append(manifest.digest)
        lists = {ref.chunk_list for ref in manifest.objects if ref.chunk_list}
        contents.append({manifest.digest, *lists, *(ref.digest for ref in manifest.objects)})
    one, two = contents
    assert one & two, "they share nothing"
    return digests[0], digests[1], one - two, two - one


def test_a_model_for_some_is_not_there_for_others(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        one, two, only_one, only_two = models(store, tmp_path)
        access = Access(store)
        assert not access.is_guarded and access.is_announced(one)
        write_rules(store.place, {one: Rule(frozenset({ALICE, BOB}))})
        assert access.refresh() and not access.refresh()
        assert access.is_guarded
        for digest in only_one:
            assert access.may_have(ALICE, digest) and access.may_have(BOB, digest)
            assert not access.may_have(EVE, digest) and not access.is_public(digest)
        shared = {ref.digest for ref in store.manifest(two).objects} - only_two  # type: ignore[union-attr]
        assert shared
        for digest in shared | only_two | {bytes(32)}:
            assert access.may_have(EVE, digest) and access.is_public(digest)


def test_two_lists_are_one_for_what_both_models_contain(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        one, two, only_one, only_two = models(store, tmp_path)
        write_rules(store.place, {one: Rule(frozenset({ALICE})), two: Rule(frozenset({BOB}))})
        access = Access(store)
        shared = {ref.digest for ref in store.manifest(two).objects} - only_two  # type: ignore[union-attr]
        for digest in shared:
            assert access.may_have(ALICE, digest) and access.may_have(BOB, digest)
            assert not access.may_have(EVE, digest)
        assert all(not access.may_have(BOB, digest) for digest in only_one)


def test_what_is_private_is_never_announced(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        one, two, only_one, _ = models(store, tmp_path)
        public = announceable(store, Access(store))
        assert {one, two} <= set(public) and len(public) == 4
        write_rules(store.place, {one: Rule()})
        access = Access(store)
        announced = announceable(store, access)
        assert not only_one & set(announced) and two in announced and len(announced) == 2
        assert all(access.may_have(EVE, digest) for digest in only_one)


def test_a_refusal_is_the_same_for_what_is_missing_and_what_is_not_for_the_asker(
    tmp_path: Path,
) -> None:
    with Store(tmp_path / "store") as store:
        one, two, only_one, _ = models(store, tmp_path)
        answers = Answers(store, Access(store))
        assert not answers.to(EVE).refuses([bytes(32)])  # without lists nobody is refused
        write_rules(store.place, {one: Rule(frozenset({ALICE}))})
        answers = Answers(store, Access(store))
        hidden = sorted(only_one)
        for digests in ([one], [bytes(32)], hidden, []):
            assert answers.to(EVE).refuses(digests)
        assert not answers.to(EVE).refuses([two]) and not answers.to(EVE).refuses([one, two])
        assert not answers.to(ALICE).refuses([one])
        assert answers.to(EVE).holdings(hidden) == []
        assert len(answers.to(ALICE).holdings(hidden)) == len(hidden)
        question = wire.GetChunkList(1, one)
        assert answers.to(EVE).chunk_list(question).size_bytes == -1
        blobs = wire.GetBlobs(1, (wire.BlobItem(one, 0),))
        (frame,) = answers.to(EVE).blob_frames(blobs)
        assert frame.pieces == ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"models": {"ab": {"only": null}}}',
        b'{"models": {"%s": {}}}' % (b"ab" * 32),
        b'{"models": {"%s": {"only": [1]}}}' % (b"ab" * 32),
        b"[" * 100_000,
    ],
)
def test_rules_that_cannot_be_read_are_never_taken_for_none(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(tmp_path / "store") as store:
        rules = {bytes(32): Rule(frozenset({ALICE}))}
        write_rules(store.place, rules)
        assert read_rules(store.root) == rules
        access = Access(store)
        (store.root / ACCESS_FILE).write_bytes(content)
        with pytest.raises(BadInput, match="cannot be understood"):
            Access(store)
        access.refresh()  # a running node goes on with those it has
        assert "stay in force" in caplog.text
        assert not access.may_have(EVE, bytes(32))
