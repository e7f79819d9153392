"""The library as a program uses it: everything that may fetch takes the same options."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import trio

import tensorswarm
from tensorswarm.p2p.host.pnet import write_new_key
from tensorswarm.store.digest import digest_of
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
