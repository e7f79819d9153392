"""The simulated decay of provider records: against closed forms, and its own rules."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tensorswarm.simulations import provider_records
from tensorswarm.simulations.provider_records import Churn, Policy
from tensorswarm.store.errors import BadInput

CALM = Churn(shape=1.0, scale_h=90_000.0)


def test_without_churn_records_last_until_they_expire() -> None:
    again, once = provider_records.run(2_000, seed=1, keys=200, hours=60, churn=CALM)
    assert again.findable.min() == 1
    assert once.at(47.9) == 1
    assert once.at(48.0) == 0


def test_one_copy_under_exponential_sessions_decays_as_computed() -> None:
    """Found if its keeper stayed, and everyone closer that was away still is."""
    online, scale_h = 0.5, 4.0
    churn = Churn(shape=1.0, scale_h=scale_h, online_share=online)
    (once,) = provider_records.run(
        50_000, 2, keys=10_000, hours=12, churn=churn, policies=(Policy(1, math.inf, 48),)
    )
    for hour in (1.0, 4.0, 12.0):
        stayed = math.exp(-hour / scale_h)
        rate = 1 / scale_h + 1 / churn.absence_scale_h
        still_away = (1 - online) + online * math.exp(-rate * hour)
        expected = stayed * online / (1 - (1 - online) * still_away)
        assert once.at(hour) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("shape", [0.34, 0.59, 1.0])
def test_the_network_begins_in_its_steady_state(shape: int) -> None:
    churn = Churn(shape=shape, online_share=0.3)
    rng = np.random.Generator(np.random.PCG64(1))
    steps = provider_records.network(40_000, np.array([0.0, 1.0, 20.0]), churn, rng)
    shares = [float(online.mean()) for _, online, _ in steps]
    assert shares == pytest.approx([0.3] * 3, abs=0.015)


def test_records_kept_on_disk_come_back_with_their_nodes() -> None:
    lost, kept = (
        provider_records.run(3_000, 1, keys=300, hours=40, churn=Churn(forgets=forgets))[1]
        for forgets in (1.0, 0.0)
    )
    assert kept.at(40) > lost.at(40)
    assert kept.copies[-1] > 2 * lost.copies[-1]


@pytest.mark.parametrize("shape", [0.34, 0.45, 0.59])
def test_announcing_again_never_harms_and_makes_whole(shape: float) -> None:
    again, once = provider_records.run(3_000, 5, keys=300, churn=Churn(shape=shape))
    assert (again.findable >= once.findable).all()
    assert (again.copies >= once.copies).all()
    assert [again.at(hour) for hour in (0, 22, 44, 66, 88)] == [1.0] * 5
    assert once.findable[once.hours >= 48].max() == 0


def test_heavier_tails_keep_records_longer() -> None:
    heavy, light = (
        provider_records.run(3_000, 1, keys=300, hours=21, churn=Churn(shape=shape))[1].at(21)
        for shape in (0.34, 0.59)
    )
    assert heavy > light


def test_the_seed_replays_a_run() -> None:
    digests = [
        [decay.digest() for decay in provider_records.run(500, seed, keys=50, hours=30)]
        for seed in (1, 1, 2)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_fewer_nodes_than_copies_are_all_asked() -> None:
    again, _ = provider_records.run(5, seed=1, keys=10, hours=2, churn=CALM)
    assert again.copies[0] <= 5


@pytest.mark.parametrize(
    ("churn", "keys", "policy"),
    [
        (Churn(shape=0.1), 10, Policy()),
        (Churn(scale_h=0.0), 10, Policy()),
        (Churn(online_share=1.0), 10, Policy()),
        (Churn(forgets=1.5), 10, Policy()),
        (Churn(), 0, Policy()),
        (Churn(), 10**9, Policy()),
        (Churn(), 10, Policy(copies=0)),
        (Churn(), 10, Policy(republish_h=0.0)),
    ],
)
def test_senseless_parameters_are_refused(churn: Churn, keys: int, policy: Policy) -> None:
    with pytest.raises(BadInput):
        provider_records.run(1_000, 1, keys=keys, churn=churn, policies=(policy,))
