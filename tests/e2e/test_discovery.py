"""Discovery among real processes: what is announced, kept through a kill, and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.conftest import Model, assert_one_error, copy_of
from tests.support.swarm_processes import Node, Processes

MIB = 1 << 20


def dht_of(processes: Processes, store: Path, node: Node) -> dict[str, Any]:
    shown = processes.run("peers", "--dht", "--store", store, "--json", "--bootstrap", node.addr)
    document: dict[str, Any] = shown.document["dht"]
    return document


def announced(line: str) -> bool:
    return "announced 4 of 4 keys" in line or "4 keys are announced" in line


def test_records_survive_the_kill_of_their_server(
    processes: Processes, small: Model, tmp_path: Path
) -> None:
    """A hub that is killed and comes back still knows who provides what."""
    hub_store = tmp_path / "hub"
    hub = processes.node(hub_store)
    seeder_store = copy_of(small, tmp_path / "seeder")
    seeder = processes.node(seeder_store, bootstrap=[hub.addr])
    # The model, and its three tensors of 1 MiB and more; not the two smaller ones.
    assert seeder.stderr.wait_for(announced), seeder.stderr.all()
    seeder.kill()
    hub.kill()
    dead = processes.run("peers", "--dht", "--store", hub_store, "--json", "--bootstrap", hub.addr)
    assert_one_error(dead, 4)
    hub = processes.node(hub_store)
    shown = dht_of(processes, hub_store, hub)
    assert (shown["records_kept"], shown["keys"]) == (4, 0)
