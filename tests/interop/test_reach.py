"""Nodes that cannot reach each other's bulk plane, and nodes on IPv6."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import tensorswarm
from tensorswarm.p2p import node as node_module
from tensorswarm.p2p.node import Node
from tensorswarm.store.digest import CHUNK_SIZE
from tests.support.hosts import run
from tests.support.model_files import write_safetensors


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model of one large tensor and a small one, in a store of its own."""
    rng = np.random.default_rng(5)
    tensors = {
        "large": rng.integers(0, 256, 3 * CHUNK_SIZE + 5, np.uint8),
        "small": rng.integers(0, 256, 999, np.uint8),
    }
    (tmp_path / "files").mkdir()
    write_safetensors(tmp_path / "files" / "model.safetensors", tensors)
    return tensorswarm.add(tmp_path / "files", store=tmp_path / "seed")


def fetch_once(model: str, tmp_path: Path, listen: str = "127.0.0.1:0") -> dict[str, object]:
    """Fetch the model from one node to another; return the fetch's one source."""
    sources: list[dict[str, object]] = []

    async def main() -> None:
        async with (
            Node(tmp_path / "seed", listen=[listen]) as seed,
            Node(tmp_path / "new", bootstrap=[seed.addrs[0]], server=False) as new,
        ):
            result = await new.fetch(model)
            assert result.bytes_peers == result.bytes_total
            sources.extend(source.as_json() for source in result.sources)

    run(main)
    assert len(sources) == 1
    return sources[0]


def bulk_planes_at(monkeypatch: pytest.MonkeyPatch, places: Sequence[tuple[str, int]]) -> None:
    monkeypatch.setattr(node_module, "bulk_candidates", lambda told, seen_at: list(places))


def test_the_bulk_plane_is_used_where_it_answers(model: str, tmp_path: Path) -> None:
    source = fetch_once(model, tmp_path)
    assert (source["kind"], source["via"], source["dropped"]) == ("peer", "bulk", False)


def test_without_a_bulk_address_a_stream_is_used(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bulk_planes_at(monkeypatch, [])
    source = fetch_once(model, tmp_path)
    assert (source["via"], source["dropped"]) == ("stream", False)


def test_a_bulk_plane_that_refuses_or_is_silent_costs_seconds_and_not_the_source(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        socket.create_server(("127.0.0.1", 0)) as dead,
    ):
        refusing = dead.getsockname()
        dead.close()
        bulk_planes_at(monkeypatch, [refusing, silent.getsockname()])
        source = fetch_once(model, tmp_path)
    assert (source["via"], source["dropped"]) == ("stream", False)


def test_a_node_listens_on_ipv6_where_asked(model: str, tmp_path: Path) -> None:
    source = fetch_once(model, tmp_path, listen="[::1]:0")
    assert (source["via"], source["dropped"]) == ("bulk", False)
