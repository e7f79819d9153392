"""Twenty nodes in one process with a thousand keys; a crash, and a day and night of churn.

The same at a hundred nodes, with figures, is ``scripts/bench discovery``.
"""

from __future__ import annotations

import random

import pytest
import trio

from benchmarks.discovery import PATIENCE_S, measure_announcing, measure_crash, network
from tensorswarm.p2p.dht import announce_round, discovery, server, walker
from tensorswarm.p2p.host import guard

KEYS = 1_000


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give nodes all the time they need for an answer: here they share one processor."""
    for module, name in (
        (walker, "PEER_TIMEOUT_S"),
        (walker, "SLOW_S"),
        (discovery, "LOOKUP_TIMEOUT_S"),
        (announce_round, "OPEN_TIMEOUT_S"),
        (announce_round, "PROGRESS_TIMEOUT_S"),
        (server, "IDLE_TIMEOUT_S"),
        (server, "WRITE_TIMEOUT_S"),
        (guard, "UPGRADE_TIMEOUT_S"),
    ):
        monkeypatch.setattr(module, name, PATIENCE_S)


@pytest.mark.deadline(180)
def test_a_thousand_keys_among_twenty_nodes() -> None:
    async def main() -> None:
        rng = random.Random(1)
        keys = [rng.randbytes(32) for _ in range(KEYS)]
        async with network(20) as net:
            outcome = await measure_announcing(net, keys, 20)
            assert outcome["confirmed"] == outcome["readable"] == 1
            # 19 receivers, and one question to read each key back; not a message more.
            assert outcome["messages_per_key"] <= 20.1
            assert outcome["look_ups"] == 0
            for _, receiver, _ in list(net.nodes.values())[1:]:
                assert receiver.dht.records.size() == KEYS

    trio.run(main)


@pytest.mark.deadline(180)
def test_a_third_of_the_nodes_crash_and_then_all_are_replaced() -> None:
    async def main() -> None:
        rng = random.Random(2)
        keys = [rng.randbytes(32) for _ in range(40)]
        async with network(12) as net:
            peer_id = next(iter(net.nodes))
            await measure_announcing(net, keys, 10)
            left = await measure_crash(net, keys, peer_id, steps=2)
            assert left["after_crash"] >= 0.99
            assert left["after_replacement"] >= 0.99

    trio.run(main)
