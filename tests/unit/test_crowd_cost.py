"""What deciding costs per chunk among other members: counted in steps, not measured."""

from __future__ import annotations

import random
from collections import deque

import pytest

from tensorswarm.p2p.swarm import origin_duty
from tensorswarm.p2p.swarm.chunk_map import BLOCK_CHUNKS
from tensorswarm.p2p.swarm.planner import Ask, Planner, PlannerLimits, SourceKind
from tensorswarm.p2p.swarm.source import Request
from tensorswarm.store.digest import CHUNK_SIZE
from tests.support.swarm_driver import chunks_of

MEMBERS = [f"member-{i}" for i in range(8)]
PEERS = MEMBERS[1:5]


TENSOR_CHUNKS = 1024
"""Chunks of an object, 1 GiB; the last one has what is left."""

ALWAYS_SHARED = PlannerLimits(duty_gain=float("inf"))
"""However fast the origin is beside the peers: else it is asked freely, which is cheaper."""


def steps_per_chunk(chunk_count: int, *, chunks_per_change: int = 0) -> float:
    """Return the steps of one member's whole download: an origin, and peers that gain chunks.

    What we prove, the next peer announces a chunk of soon as well, in an order of its own.
    With `chunks_per_change`, a peer goes and comes back after so many chunks, again and again.
    """
    rng = random.Random(chunk_count)
    counts = [
        min(TENSOR_CHUNKS, chunk_count - first) for first in range(0, chunk_count, TENSOR_CHUNKS)
    ]
    sizes = [count * CHUNK_SIZE for count in counts]
    planner = Planner(sizes, rng=rng, limits=ALWAYS_SHARED)
    planner.set_members(0.0, b"key", MEMBERS[0], MEMBERS[1:])
    planner.add_source(0.0, "origin", SourceKind.ORIGIN)
    planner.source_holds_all(0.0, "origin")
    held = {name: bytearray(chunk_count // 8 + 1) for name in PEERS}
    # Peers get the chunks in a shuffled order, each a part of its own first.
    orders = {name: rng.sample(range(chunk_count), chunk_count) for name in PEERS}
    for name in PEERS:
        planner.add_source(0.0, name, SourceKind.PEER, makes_offers=name == PEERS[0])
    open_requests: deque[Request] = deque()
    now = 0.0
    turn = done = 0
    while not planner.is_done():
        now += 0.01
        turn += 1
        name = PEERS[turn % len(PEERS)]
        for _ in range(2):
            if orders[name]:
                chunk = orders[name].pop()
                held[name][chunk // 8] |= 1 << chunk % 8
                tensor, place = divmod(chunk, TENSOR_CHUNKS)
                bitmap = bytes(place // 8) + bytes([1 << place % 8])
                planner.source_holds(now, name, tensor, bitmap)
                planner.source_offers(now, PEERS[0], tensor, place)
        for action in planner.actions(now):
            if isinstance(action, Ask):
                open_requests.append(action.request)
        for _ in range(min(4, len(open_requests))):
            request = open_requests.popleft()
            for chunk in chunks_of(request):
                planner.progress(now, request.source, request.request_id, CHUNK_SIZE)
                planner.chunk_proved(now, request.source, *chunk, CHUNK_SIZE)
                done += 1
            planner.request_done(now, request.source, request.request_id)
        if chunks_per_change and done >= chunks_per_change:
            done = 0
            goer = rng.choice(PEERS)
            planner.remove_source(now, goer)
            planner.add_source(now, goer, SourceKind.PEER)
            for tensor in range(len(counts)):
                begin = tensor * TENSOR_CHUNKS // 8
                bitmap = bytes(held[goer][begin : begin + TENSOR_CHUNKS // 8])
                planner.source_holds(now, goer, tensor, bitmap)
    return planner.decision_steps / chunk_count


@pytest.mark.parametrize("chunks_per_change", [0, 500])
def test_the_cost_of_a_chunk_in_a_crowd_does_not_grow_with_their_number(
    chunks_per_change: int,
) -> None:
    small = steps_per_chunk(1_000, chunks_per_change=chunks_per_change)
    large = steps_per_chunk(10_000, chunks_per_change=chunks_per_change)
    assert small < 10
    assert large <= 1.5 * small
    # What is looked at once more when somebody goes need not be worked out anew.
    assert origin_duty.MAX_RANKED_BLOCKS * BLOCK_CHUNKS >= 1_000_000


def test_who_goes_and_comes_back_costs_no_look_at_every_block() -> None:
    rare = steps_per_chunk(20_000, chunks_per_change=1_000)
    often = steps_per_chunk(20_000, chunks_per_change=20)
    assert often <= 1.5 * rare
