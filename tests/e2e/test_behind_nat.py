"""Nodes that nobody can dial, in network namespaces: they serve and are served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Model, add
from tests.support.model_files import make_random_model
from tests.support.namespaces import Network, NodeIn, Place, network
from tests.support.swarm_processes import Completed, Processes


@pytest.fixture
def net() -> Iterator[Network]:
    with network() as made:
        yield made


def make_model(processes: Processes, tmp_path: Path, name: str) -> Model:
    folder = tmp_path / name
    make_random_model(folder, {"large": 3 << 20, "small": 5000}, seed=len(name))
    return add(processes, folder, tmp_path / f"{name}-store")


def wait_relayed(node: NodeIn, relay: NodeIn) -> None:
    """Wait until a node has found out that it cannot be dialled, and has a relay."""
    line = node.stderr.wait_for(lambda line: "reachable at" in line)
    assert line is not None and f"/p2p/{relay.peer_id}/p2p-circuit" in line


def fetch(place: Place, model: Model, store: Path, bootstrap: str) -> Completed:
    done = place.run("fetch", model.id, "--store", store, "--json", "--bootstrap", bootstrap)
    assert done.exit_code == 0, done
    assert done.document["bytes_peers"] == done.document["bytes_total"]
    return done


def test_a_node_behind_nat_serves_and_is_served(
    processes: Processes, net: Network, tmp_path: Path
) -> None:
    hidden, relay, public = net.place("a", hidden=True), net.place("r"), net.place("b")
    hidden_model = make_model(processes, tmp_path, "hidden")
    public_model = make_model(processes, tmp_path, "open")
    relay_node = relay.start_node(tmp_path / "relay", "--relay")
    bootstrap = ["--bootstrap", relay_node.addr]
    hidden_node = hidden.start_node(hidden_model.store, *bootstrap)
    wait_relayed(hidden_node, relay_node)

    served = fetch(public, hidden_model, tmp_path / "b1", relay_node.addr)
    assert served.sources()[hidden_node.peer_id]["via"] == "relay"

    public_node = public.start_node(public_model.store, *bootstrap)
    got = fetch(hidden, public_model, tmp_path / "a1", relay_node.addr)
    assert got.sources()[public_node.peer_id]["via"] == "bulk"  # it may dial out

    other = net.place("c", hidden=True)
    both = fetch(other, hidden_model, tmp_path / "c1", relay_node.addr)
    assert both.sources()[hidden_node.peer_id]["via"] == "relay"

    peers = hidden.run("peers", "--store", hidden_model.store, "--json", *bootstrap).document
    assert peers["reachability"] == "private"
    assert peers["relays"] == [relay_node.peer_id]
