"""Neighbours that tell each other by manifest what they hold of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tensorswarm.p2p.control import wire, wire_limits
from tensorswarm.p2p.control.neighbour import MAX_MODELS_ASKED, Neighbour
from tensorswarm.store import bitmap
from tensorswarm.store.access import Rule, write_rules
from tensorswarm.store.digest import chunk_list_of, digest_of
from tensorswarm.store.errors import NoSource, Refused
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.manifest import Manifest
from tensorswarm.store.store import Store
from tests.support.control_world import PEER, World, in_world
from tests.support.store_world import MIB, chunk_of, random_bytes, random_model

SIZES = [100, 5, 3 * MIB, 70_000, 2 * MIB + 1, 9]
OTHER = "12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"


def add_model(world: World, folder: Path) -> Manifest:
    return add_paths(world.store, [random_model(folder / "m.safetensors", SIZES)]).manifest


def everything(manifest: Manifest) -> list[tuple[int, int]]:
    return [(0, len(manifest.objects))]


async def know_manifest_only(world: World, folder: Path) -> Manifest:
    """Let our node know a model of which it holds nothing but its manifest."""
    with Store(folder / "elsewhere") as elsewhere:
        path = random_model(folder / "elsewhere.safetensors", SIZES)
        manifest = add_paths(elsewhere, [path]).manifest
    world.store.put_manifest(manifest, "")
    return manifest


async def heard(world: World) -> wire.HaveModel:
    """Wait for one message about a model, and take it."""
    while not world.heard.models:
        await trio.lowlevel.checkpoint()
    return world.heard.models.pop(0)


def test_everything_is_told_in_one_short_frame(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        manifest = add_model(world, tmp_path)
        end = await world.dial()
        await end.want_model(manifest.digest, manifest.table, everything(manifest))
        (told,) = world.heard.models
        assert list(told.runs()) == everything(manifest) and not told.parts
        assert world.ours.wanting(manifest.digest) == [PEER]
        assert all(world.ours.wanting(ref.digest) == [PEER] for ref in manifest.objects)
        await end.unwant([manifest.digest])
        await end.get_peers(b"")
        assert not world.ours.wanting(manifest.digest) and not world.ours.somebody_listens()

    in_world(tmp_path / "store", test)


def test_what_comes_later_is_told_by_index_and_a_part_by_the_manifests_list_only(
    tmp_path: Path,
) -> None:
    async def test(world: World) -> None:
        manifest = await know_manifest_only(world, tmp_path)
        end = await world.dial()
        await end.want_model(manifest.digest, manifest.table, everything(manifest))
        assert [(told.whole, told.parts) for told in world.heard.models] == [((), ())]
        world.heard.models.clear()
        index = next(i for i, ref in enumerate(manifest.objects) if ref.size_bytes == 3 * MIB)
        digest, size, chunk_list = manifest.objects[index]
        other = digest_of(b"another list")
        world.ours.tell([wire.HaveEntry(digest, size, b"\1", other)])  # nothing that can be told
        world.ours.tell([wire.HaveEntry(digest, size, b"\5", chunk_list)])
        told = await heard(world)
        assert (told.request_id, told.whole) == (0, ())
        assert told.parts == (wire.ModelPart(index, b"\5"),)
        world.ours.tell([wire.HaveEntry(digest, size, None, b"")])
        told = await heard(world)
        assert (told.whole, told.parts) == ((index, 1), ())
        assert not world.heard.entries  # by digest nobody asked

    in_world(tmp_path / "store", test)


def test_a_part_in_the_store_is_told_with_its_bitmap(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        manifest = await know_manifest_only(world, tmp_path)
        data = {size: random_bytes(size, i) for i, size in enumerate(SIZES)}[3 * MIB]
        index = manifest.table.find(digest_of(data))
        incoming = world.store.receive(manifest.objects[index], chunk_list_of(data))
        incoming.write_chunk(1, chunk_of(data, 1))
        end = await world.dial()
        await end.want_model(manifest.digest, manifest.table, everything(manifest))
        (told,) = world.heard.models
        assert not told.whole and told.parts == (wire.ModelPart(index, b"\2"),)

    in_world(tmp_path / "store", test)


def test_only_what_was_asked_for_is_told(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        manifest = add_model(world, tmp_path)
        end = await world.dial()
        await end.want_model(manifest.digest, manifest.table, [(1, 3)])
        assert [list(told.runs()) for told in world.heard.models] == [[(1, 3)]]
        world.heard.models.clear()
        refs = manifest.objects
        world.ours.tell([wire.HaveEntry(refs[i][0], refs[i][1], None, b"") for i in (0, 2, 4)])
        assert (await heard(world)).whole == (2, 1)
        await end.want_model(manifest.digest, manifest.table, [(4, 5)])
        world.heard.models.clear()
        world.ours.tell([wire.HaveEntry(refs[i][0], refs[i][1], None, b"") for i in (0, 2, 4)])
        assert (await heard(world)).whole == (2, 1, 4, 1)

    in_world(tmp_path / "store", test)


def test_a_model_that_is_not_known_is_refused_and_its_objects_are_told_by_digest(
    tmp_path: Path,
) -> None:
    async def test(world: World) -> None:
        manifest = add_model(world, tmp_path)
        unknown = digest_of(b"the id of another model")
        end = await world.dial()
        with pytest.raises(NoSource, match="not known here"):
            await end.want_model(unknown, manifest.table, everything(manifest))
        assert not world.ours.wanting(unknown)
        tensor = manifest.objects[0].digest
        with pytest.raises(NoSource, match="not known here"):  # a digest, but of no manifest
            await end.want_model(tensor, manifest.table, everything(manifest))
        await end.want([tensor])
        assert [entry.digest for entry in world.heard.entries] == [tensor]

    in_world(tmp_path / "store", test)


def test_a_neighbour_of_an_earlier_version_is_not_asked_like_this(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        manifest = add_model(world, tmp_path)
        end = await world.dial()
        end.hello = wire.Hello(1, "old", (), (), ())
        with pytest.raises(NoSource, match="as such"):
            await end.want_model(manifest.digest, manifest.table, everything(manifest))
        assert not end.asked

    in_world(tmp_path / "store", test)


def test_more_models_than_a_neighbour_may_want_are_refused(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        manifest = add_model(world, tmp_path)
        end = await world.dial()
        await end.get_peers(b"")  # answered: so it is in the table
        ours = world.ours.get(PEER)
        assert ours is not None
        for number in range(wire_limits.MAX_MODEL_SUBSCRIPTIONS):
            ours.interests.part_of(number.to_bytes(32, "big"), manifest.table)
        with pytest.raises(NoSource, match="too many"):
            await end.want_model(manifest.digest, manifest.table, everything(manifest))
        assert not world.ours.wanting(manifest.digest)

    in_world(tmp_path / "store", test)


def test_objects_beyond_the_manifest_end_the_conversation(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        manifest = add_model(world, tmp_path)
        end = await world.dial()
        with pytest.raises(NoSource, match="left"):
            await end.want_model(manifest.digest, manifest.table, [(0, 50)])
        assert end.is_closed

    in_world(tmp_path / "store", test)


@pytest.mark.parametrize("is_given_up", [False, True])
def test_news_of_a_model_that_nobody_asked_about_is_a_violation(
    tmp_path: Path, is_given_up: bool
) -> None:
    async def test(world: World) -> None:
        manifest = add_model(world, tmp_path)
        end = await world.dial()
        if is_given_up:
            await end.want_model(manifest.digest, manifest.table, everything(manifest))
            await end.unwant([manifest.digest])
            world.heard.models.clear()
        await end.get_peers(b"")
        ours = world.ours.get(PEER)
        assert ours is not None
        ours.tell_model(manifest.digest, len(manifest.table), [(0, None)], is_known=False)
        await ours.wait_told()
        if is_given_up:
            await end.get_peers(b"")  # behind the news: it is still there
        else:
            await end._closed.wait()
        assert not world.heard.models

    in_world(tmp_path / "store", test)


def test_what_was_asked_on_one_stream_may_be_told_on_another(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        manifest = await know_manifest_only(world, tmp_path)
        first = await world.dial()
        await first.want_model(manifest.digest, manifest.table, everything(manifest))
        world.heard.models.clear()
        second = await world.dial()
        second.asked = first.asked  # as the table of neighbours has it
        await second.get_peers(b"")
        digest, size, _ = manifest.objects[1]
        world.ours.tell([wire.HaveEntry(digest, size, None, b"")])
        assert (await heard(world)).whole == (1, 1)
        assert not second.is_closed

    in_world(tmp_path / "store", test)


def test_who_may_not_have_a_model_does_not_learn_that_it_is_here(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        manifest = add_model(world, tmp_path)
        write_rules(world.store.place, {manifest.digest: Rule(frozenset({PEER}))})
        assert world.answers._access is not None and world.answers._access.refresh()
        friend, stranger = await world.dial(), await world.dial(OTHER)
        await friend.want_model(manifest.digest, manifest.table, everything(manifest))
        assert [list(told.runs()) for told in world.heard.models] == [everything(manifest)]
        unknown = digest_of(b"no model at all")
        reasons = []
        for model in (manifest.digest, unknown):
            with pytest.raises(Refused) as caught:
                await stranger.want_model(model, manifest.table, everything(manifest))
            reasons.append(str(caught.value))
        assert reasons[0] == reasons[1]

    in_world(tmp_path / "store", test)


def test_what_was_given_up_is_not_remembered_for_ever(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        manifest = add_model(world, tmp_path)
        end: Neighbour = await world.dial()
        end.asked[manifest.digest] = manifest.table
        for number in range(2 * MAX_MODELS_ASKED):
            model = number.to_bytes(32, "big")
            end.asked[model] = manifest.table
            end._give_up_models([model])
        assert len(end.asked) == MAX_MODELS_ASKED
        assert end.asked[manifest.digest] is manifest.table

    in_world(tmp_path / "store", test)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 100])
def test_runs_of_a_bitmap(count: int) -> None:
    for start in range(count):
        for stop in range(start + 1, count + 1):
            bits = bitmap.empty(count)
            bitmap.set_range(bits, start, stop)
            assert [i for i in range(count) if bitmap.is_set(bits, i)] == list(range(start, stop))
            assert list(bitmap.runs_of_set(bits)) == [(start, stop)]
            if start > 1:
                bitmap.set_bit(bits, 0)
                assert list(bitmap.runs_of_set(bits)) == [(0, 1), (start, stop)]
