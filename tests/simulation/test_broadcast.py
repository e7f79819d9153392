"""The broadcast scenario: its bounds, its replay, and that its checkers would notice."""

from __future__ import annotations

import math
import random

import pytest

from tensorswarm.p2p.control import wire
from tensorswarm.simulations import scenario
from tensorswarm.simulations.engine import Engine
from tensorswarm.simulations.network import Link, Network
from tensorswarm.simulations.peer import Nature
from tensorswarm.simulations.world import Setup, World
from tensorswarm.store.digest import CHUNK_SIZE


def broadcast(seed: int, nodes: int, **settings: object) -> scenario.Outcome:
    chosen = {name: str(value) for name, value in settings.items()}
    return scenario.find("broadcast").run(seed, chosen, nodes)


@pytest.mark.parametrize("seed", [1, 101, 205, None])
@pytest.mark.parametrize(
    ("nodes", "chunks", "ratio", "copies"),
    [(16, 64, 1.25, 1.15), (64, 64, 1.25, 1.15), (16, 256, 1.10, 1.05)],
)
def test_the_last_receiver_is_near_the_optimum(
    nodes: int, chunks: int, ratio: float, copies: float, seed: int | None
) -> None:
    if seed is None:
        seed = random.Random().randrange(1 << 32)  # shown when the test fails
    print(f"tensorswarm sim broadcast --nodes {nodes} --set chunks={chunks} --seed {seed}")
    outcome = broadcast(seed, nodes, chunks=chunks)
    assert not outcome.failures
    assert 1.0 < outcome.summary["ratio"] <= ratio  # type: ignore[operator]
    assert 1.0 <= outcome.summary["origin_copies"] <= copies  # type: ignore[operator]


def test_the_same_seed_gives_the_same_trace_and_another_another() -> None:
    first, again, other = (broadcast(seed, 8, chunks=32).summary for seed in (3, 3, 4))
    assert first == again
    assert first["trace_digest"] != other["trace_digest"]


def test_sharing_origin_duty_saves_copies() -> None:
    shared = broadcast(1, 8, chunks=32).summary
    alone = broadcast(1, 8, chunks=32, shared_duty="false").summary
    assert shared["origin_copies"] < 1.3 < alone["origin_copies"]  # type: ignore[operator]
    assert shared["last_s"] < alone["last_s"]  # type: ignore[operator]


def test_the_checkers_notice_what_they_are_there_for() -> None:
    rate = 10.0 * CHUNK_SIZE
    world = World(Setup(8, origin_bytes_per_s=rate), [Nature(rate, math.inf)] * 3, seed=1)
    world.engine.run(0.6, lambda: False)
    first = max(world.peers, key=lambda peer: len(peer.in_flight))
    assert not world.checker.failures
    world.checker.shown(first, world.everything)
    world.checker.serves(first, [(0, 7)])
    world.checker.acted(first, None)
    world.checker.ended()
    text = "\n".join(world.checker.failures)
    for words in ("shows what", "is asked for chunk 7", "waits for", "have not finished"):
        assert words in text


def test_a_message_is_what_its_frame_says() -> None:
    rate = 10.0 * CHUNK_SIZE
    world = World(Setup(8), [Nature(rate, math.inf, has_everything=True)] * 2, seed=1)
    heard: list[wire.Message] = []
    world.peers[1].receive = lambda sender, message: heard.append(message)  # type: ignore[method-assign]
    sent = wire.Offer(world.digest, 5)
    world.deliver(world.peers[0], [world.peers[1]], sent)
    world.engine.run(1.0, lambda: bool(heard))
    assert heard == [sent] and heard[0] is not sent
    assert world.engine.now == world.setup.latency_s


# links


def finish_times(flows: list[tuple[Link, Link, int]]) -> list[float]:
    engine = Engine()
    network = Network(engine)
    times = [math.inf] * len(flows)
    for i, (uplink, downlink, size) in enumerate(flows):

        def done(i: int = i) -> None:
            times[i] = engine.now

        network.send(uplink, downlink, size, done)
    engine.run(1e9, lambda: False)
    return times


def test_an_uplink_is_shared_equally_and_freed_bandwidth_goes_to_those_left() -> None:
    uplink, free = Link(10.0), Link(math.inf)
    assert finish_times([(uplink, free, 10), (uplink, free, 30)]) == pytest.approx([2.0, 4.0])


def test_rates_are_max_min_fair() -> None:
    # a: 10 up; b: 4 down shared by two flows; the third takes what the first cannot use.
    up_a, up_b = Link(10.0), Link(10.0)
    down_slow, down_free = Link(4.0), Link(math.inf)
    times = finish_times([(up_a, down_slow, 200), (up_b, down_slow, 200), (up_a, down_free, 800)])
    assert times == pytest.approx([100.0, 100.0, 100.0])
