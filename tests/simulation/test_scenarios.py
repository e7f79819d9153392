"""Every scenario of a swarm, small: it runs, its checkers are content, its figures hold.

The last test takes a new seed each time and prints it.
"""

from __future__ import annotations

import random
import time

import pytest

from tensorswarm.simulations import scenario
from tensorswarm.store.errors import BadInput

SMALL = {
    "rules": {"nodes": "8", "chunks": "32"},
    "flash_crowd": {"nodes": "12", "chunks": "16"},
    "uplinks": {"nodes": "8", "chunks": "32"},
    "churn": {"nodes": "8", "chunks": "32", "passing": "12"},
    "nat": {"nodes": "10", "chunks": "32"},
    "partition": {"nodes": "8", "chunks": "64", "parts_at_s": "2", "heals_at_s": "5"},
    "stallers": {"nodes": "10", "chunks": "32"},
    "seed_leaves": {"nodes": "8", "chunks": "32"},
    "arrivals": {"nodes": "20", "chunks": "16"},
    "fine_tunes": {"nodes": "10", "chunks": "32", "models": "3"},
}


@pytest.mark.parametrize("name", SMALL)
def test_everybody_finishes_and_no_rule_is_broken(name: str) -> None:
    outcome = scenario.find(name).run(1, SMALL[name])
    assert not outcome.failures
    assert float(str(outcome.summary["last_s"])) < 1000


def test_seed_leaves_after_little_more_than_one_copy() -> None:
    summary = scenario.find("seed_leaves").run(1, SMALL["seed_leaves"]).summary
    assert float(str(summary["seed_copies"])) < 1.3


def test_tensors_shared_by_models_leave_the_origin_in_fewer_copies() -> None:
    by_tensor, by_file = (
        scenario.find("fine_tunes").run(1, SMALL["fine_tunes"]).tables["fine_tunes"]
    )
    assert float(str(by_tensor["origin_models"])) < float(str(by_file["origin_models"]))


@pytest.mark.parametrize("seed", range(5))
def test_with_a_third_of_liars_the_honest_finish_within_twice_the_time(seed: int) -> None:
    outcome = scenario.find("liars").run(seed, {"nodes": "12", "chunks": "48"})
    assert not outcome.failures
    row = outcome.tables["liars"][-1]
    assert float(str(row["ratio"])) <= 2.0
    assert int(str(row["liars_met"])) > 0


def test_a_lie_in_the_last_moment_needs_no_ban() -> None:
    # The last chunk comes from elsewhere before the planner has acted upon the lie.
    settings = {"nodes": "4", "chunks": "2", "latency_s": "0.2", "dials": "4"}
    assert not scenario.find("liars").run(2646817834, settings).failures


def test_many_swarms_with_liars_are_summed_up_by_the_slowest() -> None:
    outcome = scenario.find("liars").run(1, {"nodes": "8", "chunks": "16", "seeds": "3"})
    rows = outcome.tables["liars"]
    assert [row["seed"] for row in rows] == [1, 2, 3]
    assert outcome.summary["ratio"] == max(float(str(row["ratio"])) for row in rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"chunks": "1000000000"}, {"chunks": "0"}, {"chunks": "-1"}, {"chunk_s": "0"},
        {"chunk_s": "-1"}, {"chunk_s": "nan"}, {"origin": "-1"}, {"dials": "0"}, {"slots": "0"},
        {"nodes": "0"}, {"nodes": "-3"}, {"chunks": "1e3"}, {"no_such": "1"},
        {"nodes": "100000", "chunks": "100000"},
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_one_line(settings: dict[str, str]) -> None:
    with pytest.raises(BadInput) as caught:
        scenario.find("broadcast").run(1, settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("flash_crowd", {"origin": "0"}, "origin: it cannot be 0"),
        ("uplinks", {"origin": "0"}, "origin: it cannot be 0"),
        ("fine_tunes", {"origin": "0"}, "origin: it cannot be 0"),
        ("fine_tunes", {"shared": "2"}, "shared: from"),
        ("fine_tunes", {"models": "2000000"}, "chunks: at most"),
        ("churn", {"shape": "0.001"}, "shape: at least 0.1"),
        ("churn", {"passing": "2000000"}, "nodes in a swarm: at most"),
        ("liars", {"share": "0.999999999"}, "nodes in a swarm: at most"),
        ("stallers", {"share": "1"}, "share: from 0 to below 1"),
        ("nat", {"share": "1.5"}, "share: from"),
        ("broadcast", {"nodes": "2000000", "chunks": "1"}, "nodes in a swarm: at most"),
        ("arrivals", {"nodes": "2000000", "chunks": "1"}, "nodes in a swarm: at most"),
    ],
)
def test_what_no_swarm_can_be_is_refused_before_it_is_built(
    name: str, settings: dict[str, str], told: str
) -> None:
    with pytest.raises(BadInput, match=told):
        scenario.find(name).run(1, settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("nat", {"share": "1", "nodes": "4"}), ("arrivals", {"stays_s": "0", "nodes": "4"})],
)
def test_the_edge_of_what_can_be_runs(name: str, settings: dict[str, str]) -> None:
    assert not scenario.find(name).run(1, settings | {"chunks": "8"}).failures


def test_the_plot_shows_the_optimum_beside_the_run() -> None:
    outcome = scenario.find("broadcast").run(1, {"nodes": "2", "chunks": "4"})
    (plot,) = outcome.plots
    assert plot.is_stepped
    assert [point[0] for point in plot.curves[1].points] == [outcome.summary["optimum_s"]] * 2


NOT_BY_CHANCE = {"rules", "partition"}
"""Scenarios of many runs; and one in which, right after the parts have met again, a node may
rightly ask the origin for what it does not know yet that others can give in time."""


def test_random_swarms_with_a_new_seed_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    # Some 20 seconds of chance: as many swarms as fit, whatever the machine.
    seed = random.SystemRandom().randrange(1 << 32)
    dice = random.Random(seed)
    with capsys.disabled():
        print(f" random swarms, seed {seed} ", end="")
    until = time.monotonic() + 15.0
    while time.monotonic() < until:
        name = dice.choice(sorted(SMALL.keys() - NOT_BY_CHANCE) + ["liars", "broadcast"])
        settings = {
            "nodes": str(dice.randint(2, 14)),
            "chunks": str(dice.choice([1, 2, 7, 16, 33])),
            "latency_s": str(dice.choice([0.001, 0.02, 0.2])),
            "dials": str(dice.choice([2, 4, 6])),
        }
        each = dice.randrange(1 << 32)
        words = " ".join(f"--set {key}={value}" for key, value in settings.items())
        command = f"tensorswarm sim {name} --seed {each} {words}"
        try:
            assert not scenario.find(name).run(each, settings).failures
        except Exception as error:
            raise AssertionError(f"seed {seed}; to see it again: {command}") from error
