"""The library as a program uses it: everything that may fetch takes the same options."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import trio

import tensorswarm
from tensorswarm import streaming
from tensorswarm.p2p.host.pnet import write_new_key
from tensorswarm.refs import parse_ref
from tensorswarm.store.digest import digest_of
from tensorswarm.store.errors import NotFound
from tensorswarm.store.records import ObjectRecord
from tensorswarm.store.store import Store
from tests.e2e.conftest import Model, add
from tests.support.http_origin import HttpOrigin
from tests.support.model_files import WEIGHTS, make_random_model, sha256_of_files
from tests.support.swarm_processes import Processes

pytestmark = pytest.mark.e2e

SIZES = {"large": 3 << 20, "small": 300}


@pytest.fixture
def model(processes: Processes, tmp_path: Path) -> Model:
    folder = make_random_model(tmp_path / "model", SIZES, seed=9)
    return add(processes, folder, tmp_path / "holder")


def test_a_private_network(processes: Processes, model: Model, tmp_path: Path) -> None:
    key = tmp_path / "network.key"
    write_new_key(key)
    node = processes.node(model.store, "--network", key)
    known = {"bootstrap": [node.addr], "network": key}
    folder = tensorswarm.fetch(model.id, store=tmp_path / "1", near_first=True, **known)
    assert sha256_of_files(folder) == sha256_of_files(model.folder)
    loaded = tensorswarm.load(model.id, store=tmp_path / "2", **known)
    streamed = dict(tensorswarm.stream(model.id, store=tmp_path / "3", **known))
    assert loaded.keys() == streamed.keys() == SIZES.keys()
    assert all(np.array_equal(loaded[name], streamed[name]) for name in SIZES)
    with pytest.raises(tensorswarm.TensorswarmError):
        tensorswarm.load(model.id, store=tmp_path / "4", bootstrap=[node.addr], timeout_s=1)


def test_a_url(model: Model, tmp_path: Path) -> None:
    with HttpOrigin(model.folder) as origin:
        url = f"{origin.url}{WEIGHTS}"
        folder = tensorswarm.fetch(url, store=tmp_path / "1")
        loaded = tensorswarm.load(url, store=tmp_path / "2")
    assert sha256_of_files(folder)[WEIGHTS] == sha256_of_files(model.folder)[WEIGHTS]
    assert loaded.keys() == SIZES.keys()


def test_a_bare_tensor(processes: Processes, model: Model, tmp_path: Path) -> None:
    node = processes.node(model.store)
    data = tensorswarm.load(model.id, store=model.store)["large"].tobytes()
    digest = digest_of(data).hex()
    folder = tensorswarm.fetch(digest, store=tmp_path / "1", bootstrap=[node.addr])
    (file,) = folder.iterdir()
    assert file.read_bytes() == data


def test_inside_an_event_loop(model: Model, tmp_path: Path) -> None:
    """In trio's loop it says what to do instead; in another library's it just waits."""
    with HttpOrigin(model.folder) as origin:
        missing = {"store": tmp_path / "1", "origins": [origin.url], "timeout_s": 1.0}

        async def in_trio() -> None:
            with pytest.raises(tensorswarm.TensorswarmError, match="inside trio's loop"):
                tensorswarm.fetch(model.id, **missing)

        async def in_asyncio() -> None:
            with pytest.raises(tensorswarm.TensorswarmError, match="nobody to ask|nobody"):
                tensorswarm.fetch(model.id, **missing)

        trio.run(in_trio)
        asyncio.run(in_asyncio())
        assert tensorswarm.fetch(model.id, store=model.store).is_dir()


def test_one_text_is_as_good_as_a_list_of_one(
    processes: Processes, model: Model, tmp_path: Path
) -> None:
    node = processes.node(model.store)
    stream = tensorswarm.stream(
        model.id, store=tmp_path / "1", bootstrap=node.addr, include="*.safetensors", first="small"
    )
    assert [name for name, _ in stream] == ["small", "large"]
    loaded = tensorswarm.load(model.id, store=tmp_path / "2", bootstrap=node.addr, include="small")
    assert loaded.keys() == {"small"}

    async def main() -> int:
        own = tensorswarm.Node(tmp_path / "3", bootstrap=node.addr, listen="127.0.0.1:0")
        async with own as running:
            return (await running.fetch(model.id)).bytes_peers

    assert trio.run(main) > SIZES["large"]


@pytest.mark.parametrize("is_here", [True, False])
def test_a_stream_ends_with_the_download_though_it_was_not_told_of_all(
    model: Model, is_here: bool
) -> None:
    """Another process may bring a tensor into the store meanwhile, or take one out."""
    news: queue.SimpleQueue[streaming.News] = queue.SimpleQueue()
    with Store(model.store) as store:
        manifest = store.manifest(parse_ref(model.id).digest)
        assert manifest is not None
        large = next(ref for ref in manifest.objects if ref.size_bytes == SIZES["large"])
        records = store.records
        told: list[int] = []

        def records_later(digests: Sequence[bytes]) -> dict[bytes, ObjectRecord]:
            found = records(digests)
            if not (told and is_here):
                found.pop(large.digest, None)
            told.append(len(found))
            return found

        store.records = records_later  # type: ignore[method-assign, assignment]
        news.put(manifest)
        news.put(None)
        got = streaming._as_they_come(store, news, (), ("large",))
        if is_here:
            assert [name for name, _ in got] == ["large", "small"]
        else:
            with pytest.raises(NotFound, match="'large' went out of the store"):
                next(got)
