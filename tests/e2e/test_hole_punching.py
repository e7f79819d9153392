"""Two nodes behind a NAT each, which meet through a relay, in network namespaces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Model, add
from tests.support.model_files import make_random_model
from tests.support.namespaces import (
    KEEPS_PORTS,
    PUBLIC_NETS,
    RANDOM_PORTS,
    Network,
    NodeIn,
    network,
)
from tests.support.swarm_processes import Processes

MODEL_BYTES = 8 << 20

MAY_BE_RELAYED_BYTES = MODEL_BYTES // 2
"""What a relay may carry of a fetch that gets a direct connection: at the rate given to it
here that is a minute's worth, and the upgrade takes a second or two."""

SLOW = ["--upload-limit", "64kB/s"]


@pytest.fixture
def net() -> Iterator[Network]:
    with network(PUBLIC_NETS) as made:
        yield made


@pytest.fixture
def model(processes: Processes, tmp_path: Path) -> Model:
    make_random_model(tmp_path / "model", {"large": MODEL_BYTES, "small": 5000}, seed=3)
    return add(processes, tmp_path / "model", tmp_path / "seed")


def wait_relayed(node: NodeIn, relay: NodeIn) -> None:
    line = node.stderr.wait_for(lambda line: "reachable at" in line)
    assert line is not None and f"/p2p/{relay.peer_id}/p2p-circuit" in line


def test_two_natted_nodes_get_a_direct_connection(
    net: Network, model: Model, tmp_path: Path
) -> None:
    relay, a, b = net.place("r"), net.place("a", nat=KEEPS_PORTS), net.place("b", nat=KEEPS_PORTS)
    relay_node = relay.start_node(tmp_path / "relay", "--relay", *SLOW)
    seed = a.start_node(model.store, "--bootstrap", relay_node.addr)
    wait_relayed(seed, relay_node)

    before = relay.received_bytes()
    fetch = ["fetch", model.id, "--json", "--bootstrap", relay_node.addr]
    done = b.run(*fetch, "--store", tmp_path / "new")
    assert done.exit_code == 0, done
    assert done.document["bytes_peers"] == done.document["bytes_total"] > MODEL_BYTES
    assert done.sources()[seed.peer_id]["via"] == "punched"
    assert relay.received_bytes() - before < MAY_BE_RELAYED_BYTES
    assert b.run("verify", "--store", tmp_path / "new", "--json").exit_code == 0

    public = net.place("c")  # who can be dialled is dialled, and nothing has to be punched
    done = public.run(*fetch, "--store", tmp_path / "public")
    assert done.exit_code == 0, done
    assert done.sources()[seed.peer_id]["via"] == "stream"
    assert relay.received_bytes() - before < MAY_BE_RELAYED_BYTES

    peers = b.run("peers", "--store", tmp_path / "new", "--json", "--bootstrap", relay_node.addr)
    via = {peer["peer_id"]: peer["via"] for peer in peers.document["peers"]}
    assert via == {relay_node.peer_id: "direct", seed.peer_id: "punched"}


def test_where_no_hole_can_be_punched_the_relay_carries_it(
    net: Network, model: Model, tmp_path: Path
) -> None:
    relay, a, b = net.place("r"), net.place("a", nat=RANDOM_PORTS), net.place("b", nat=KEEPS_PORTS)
    relay_node = relay.start_node(tmp_path / "relay", "--relay")
    seed = a.start_node(model.store, "--bootstrap", relay_node.addr)
    wait_relayed(seed, relay_node)

    fetch = ["fetch", model.id, "--json", "--bootstrap", relay_node.addr]
    done = b.run(*fetch, "--store", tmp_path / "new")
    assert done.exit_code == 0, done
    assert done.document["bytes_peers"] == done.document["bytes_total"] > MODEL_BYTES
    assert done.sources()[seed.peer_id]["via"] == "relay"
