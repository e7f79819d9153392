"""What a simulated chunk costs, counted: so that swarms of thousands stay within reach.

Counts are the same on any machine. Where one has grown for a good reason, the figure here
and those in `simulations/README.md` are to be measured again.
"""

from __future__ import annotations

import math
import sys
from types import FrameType

import pytest

from tensorswarm.simulations.nature import Nature
from tensorswarm.simulations.world import Setup, World
from tensorswarm.store.digest import CHUNK_SIZE

CHUNKS = 32


def broadcast(nodes: int) -> World:
    rate = 10.0 * CHUNK_SIZE
    natures = [Nature(rate, math.inf, starts_at=0.1 * i / nodes) for i in range(nodes)]
    return World(Setup(CHUNKS, origin_bytes_per_s=rate), natures, seed=1)


@pytest.mark.parametrize("nodes", [24, 96])
def test_events_messages_and_neighbours_do_not_grow_with_the_swarm(nodes: int) -> None:
    world = broadcast(nodes)
    most = 0
    seen = world.on_finished

    def count_neighbours(_: object) -> None:
        nonlocal most
        most = max(most, *(len(peer.neighbours) for peer in world.peers))

    seen.append(count_neighbours)
    world.run()
    assert not world.checker.failures
    chunks = nodes * CHUNKS
    assert world.engine.event_count < 25 * chunks
    assert world.message_count < 30 * chunks
    # Twice as many as are kept otherwise, for those who are on duty together.
    assert 0 < most <= 2 * world.setup.membership.max_neighbours


def test_a_chunk_takes_some_hundred_calls() -> None:
    world = broadcast(48)
    calls = 0

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        world.run()
    finally:
        sys.setprofile(None)
    assert calls < 700 * 48 * CHUNKS
