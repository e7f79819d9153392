"""The two scenarios of the DHT, as the command `sim` runs them."""

from __future__ import annotations

import pytest

from tensorswarm.simulations import scenario
from tensorswarm.store.errors import BadInput


def test_kademlia_lists_sizes_up_to_the_one_asked_for() -> None:
    outcome = scenario.find("kademlia").run(1, {"lookups": "6000", "k": "4"}, nodes=20_000)
    rows = [(row["nodes"], row["k"]) for row in outcome.tables["hops"]]
    assert rows == [(size, k) for size in (1_000, 10_000, 20_000) for k in (1, 4, 8, 20)]
    assert outcome.failures == []
    assert outcome.summary["k"] == 4
    assert outcome.summary["published_hops"] is None
    assert outcome.summary["worst_deviation"] < 0.05  # type: ignore[operator]


def test_kademlia_says_when_a_mean_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorswarm.simulations import kademlia

    monkeypatch.setitem(kademlia.PUBLISHED_HOPS, (1_000, 8), 3.0)
    outcome = scenario.find("kademlia").run(1, {}, nodes=1_000)
    (failure,) = outcome.failures
    assert failure.startswith("1000 nodes, k = 8: 2.3")
    few = scenario.find("kademlia").run(1, {"lookups": "100"}, nodes=1_000)
    assert few.failures == []  # too few to tell


def test_provider_decay_has_both_curves_and_keeps_its_rules() -> None:
    settings = {"keys": "200", "hours": "60"}
    outcome = scenario.find("provider_decay").run(3, settings, nodes=2_000)
    assert outcome.failures == []
    assert outcome.summary["findable_at_end_without"] == 0
    assert outcome.tables["decay"][0]["findable_without"] == 1
    assert [len(plot.curves) for plot in outcome.plots] == [2, 2]
    again = scenario.find("provider_decay").run(3, settings, nodes=2_000)
    assert again == outcome


def test_a_parameter_out_of_its_limits_is_told_in_one_line() -> None:
    for name, settings in (("kademlia", {"k": "0"}), ("provider_decay", {"shape": "0"})):
        with pytest.raises(BadInput) as caught:
            scenario.find(name).run(1, settings, nodes=100)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["kademlia", "provider_decay"])
def test_a_negative_seed_is_a_seed(name: str) -> None:
    settings = {"lookups": "50"} if name == "kademlia" else {"keys": "20", "hours": "2"}
    one, same, other = (
        scenario.find(name).run(seed, settings, nodes=500).summary["trace_digest"]
        for seed in (-5, -5, 5)
    )
    assert one == same != other


def test_a_key_that_nobody_was_online_to_take_breaks_no_rule() -> None:
    for seed in range(4):
        outcome = scenario.find("provider_decay").run(seed, {"keys": "5", "hours": "2"}, nodes=1)
        assert outcome.failures == []
