"""How long provider records can be found while the nodes that keep them come and go.

Purpose
-------
A provider leaves a record with the *k* nodes closest to a key that are online. They go
offline, come back, or never do; others, closer to the key, come online and know nothing.
This tells the share of keys that can still be found, hour by hour, with and without the
provider's announcing again.

Rules
-----
- Each node alternates between sessions and absences. Session lengths follow a Weibull
  distribution of shape 0.34 to 0.59 (Stutzbach & Rejaie 2006, section 4.2; the defaults
  are their fit for the Debian swarm: shape 0.38, scale 42.4 minutes). Absences have the
  same shape, and a mean that gives the share of time online that is asked for.
- At the beginning everything is in its steady state: who is online is in the middle of a
  session, and long sessions are met more often than short ones (length-biased sampling;
  Feller, vol. II, section XI.4).
- A node that goes offline loses its records with the probability `forgets`: it has left
  for good and another takes its place (1), or kept them on its disk (0).
- Records are announced at the start and every `republish_h`, and expire `expire_h` after
  they were received last (IPFS: 22 h and 48 h). The provider itself stays.
- A look-up asks the *k* closest nodes online at that moment, and finds a key if one of
  them has a record.

All curves of one run see the same nodes, keys and churn. Time goes in steps of `step_h`;
what happens inside a step is drawn exactly, but seen at its end.

What it does not do: lost messages, receivers that refuse records, look-ups that miss a
node (see `kademlia` for those that do not).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensorswarm.store.errors import BadInput

from .kademlia import Ids, Indices, closest_to, generator, random_ids

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

CANDIDATES = 5
"""Nodes looked at around a key, as a multiple of those among which k are online on
average; five times as many are never too few."""

MAX_RECORDS = 20_000_000
"""Pairs of a key and a node around it: with 40 bytes for each, 800 MB."""


@dataclass(frozen=True, slots=True)
class Churn:
    """How nodes come and go.

    Attributes
    ----------
    shape : float
        Shape of the Weibull distribution of sessions and absences; 1 is exponential.
    scale_h : float
        Scale of the sessions, in hours.
    online_share : float
        Share of the time that a node is online, above 0 and below 1.
    forgets : float
        Probability that an absence costs a node its records.
    """

    shape: float = 0.38
    scale_h: float = 42.4 / 60
    online_share: float = 0.5
    forgets: float = 1.0

    @property
    def absence_scale_h(self) -> float:
        """Scale of the absences, in hours."""
        return self.scale_h * (1 - self.online_share) / self.online_share

    @property
    def mean_session_h(self) -> float:
        """Mean length of a session, in hours."""
        return self.scale_h * math.gamma(1 + 1 / self.shape)

    def check(self) -> None:
        """Raise BadInput if a number is out of its limits."""
        if not (0.2 <= self.shape <= 5 and 0.01 <= self.scale_h <= 100_000):
            raise BadInput("shape: from 0.2 to 5; scale: from 0.6 minutes to 100,000 hours")
        if not (0.05 <= self.online_share <= 0.99 and 0 <= self.forgets <= 1):
            raise BadInput("online_share: from 0.05 to 0.99; forgets: from 0 to 1")


@dataclass(frozen=True, slots=True)
class Policy:
    """What a provider and the keepers of its records do; times in hours.

    Attributes
    ----------
    copies : int
        Nodes that are given a record, and that a look-up asks: k.
    republish_h : float
        Time between announcements; infinite for a single one.
    expire_h : float
        How long a record is kept.
    """

    copies: int = 20
    republish_h: float = 22.0
    expire_h: float = 48.0

    def once(self) -> Policy:
        """Return the same without announcing again."""
        return Policy(self.copies, math.inf, self.expire_h)


@dataclass(frozen=True, slots=True)
class Decay:
    """What became of the records.

    Attributes
    ----------
    hours : array of float64, shape (steps,)
        When it was looked.
    findable : array of float64, shape (steps,)
        Share of keys that were found.
    copies : array of float64, shape (steps,)
        Mean number of records that a look-up met.
    announced : float
        Share of keys that somebody was online to take the first time: less than all in
        networks of few nodes.
    """

    hours: Floats
    findable: Floats
    copies: Floats
    announced: float = 1.0

    def at(self, hour: float) -> float:
        """Return the share found at the last look not later than an hour."""
        return float(self.findable[np.searchsorted(self.hours, hour, side="right") - 1])

    def digest(self) -> str:
        """Return a hash of all figures: equal runs have equal ones."""
        both = np.concatenate([self.findable, self.copies])
        return hashlib.sha256(both.astype("<f8").tobytes()).hexdigest()


def run(
    nodes: int,
    seed: int,
    *,
    keys: int = 2_000,
    hours: float = 96.0,
    step_h: float = 0.5,
    churn: Churn | None = None,
    policies: tuple[Policy, ...] = (Policy(), Policy().once()),
) -> list[Decay]:
    """Simulate one network, and what each policy makes of it.

    Parameters
    ----------
    nodes : int
        Nodes there are, online or not.
    seed : int
        Replays the run.
    keys : int
        Keys that are announced at the beginning.
    hours, step_h : float
        How long, and how often it is looked, in hours.
    churn : Churn, optional
        How nodes come and go.
    policies : tuple of Policy
        Each sees the same network.

    Returns
    -------
    list of Decay
        One for each policy.

    Raises
    ------
    BadInput
        A parameter is out of its limits.
    """
    churn = churn or Churn()
    churn.check()
    if not (nodes > 0 and 0 < step_h <= hours <= 10_000 * step_h):
        raise BadInput("at least 1 node and 1 step, at most 10,000 steps")
    if any(policy.copies < 1 or policy.republish_h <= 0 for policy in policies):
        raise BadInput("k: at least 1; republish_h: above 0")
    slots = sum(_candidates(nodes, policy, churn) for policy in policies)
    if not 0 < keys * slots <= MAX_RECORDS:
        raise BadInput(f"keys: from 1 to {MAX_RECORDS // slots} with these parameters")
    rng = generator(seed, nodes)
    ids = random_ids(nodes, rng)
    wanted = random_ids(keys, rng)
    times = np.arange(int(hours / step_h) + 1, dtype=np.float64) * step_h
    records = [_Records(policy, _around(ids, wanted, policy, churn)) for policy in policies]
    for now, online, losses in network(nodes, times, churn, rng):
        for record in records:
            record.step(now, online, losses)
    return [record.decay(times) for record in records]


def _around(ids: Ids, keys: Ids, policy: Policy, churn: Churn) -> Indices:
    """Return the nodes around each key, nearest first, shape (keys, candidates)."""
    count = _candidates(len(ids), policy, churn)
    return np.array([closest_to(ids, key, count) for key in keys])


def _candidates(nodes: int, policy: Policy, churn: Churn) -> int:
    return min(math.ceil(CANDIDATES * policy.copies / churn.online_share), nodes)


def network(
    nodes: int, times: Floats, churn: Churn, rng: np.random.Generator
) -> Iterator[tuple[float, Flags, Indices]]:
    """Yield, at each time, who is online and how often each node has lost its records."""
    online = rng.random(nodes) < churn.online_share
    losses = np.zeros(nodes, np.int64)
    scale = np.where(online, churn.scale_h, churn.absence_scale_h)
    # What is left of the period in which each node is found: a uniform part of one that
    # was met with a probability proportional to its length.
    met = rng.standard_gamma(1 + 1 / churn.shape, nodes) ** (1 / churn.shape)
    changes = scale * met * rng.random(nodes)
    for now in times:
        due = np.flatnonzero(changes <= now)
        while len(due):
            leaving = online[due]
            losses[due] += leaving & (rng.random(len(due)) < churn.forgets)
            online[due] = ~leaving
            scale = np.where(leaving, churn.absence_scale_h, churn.scale_h)
            changes[due] += scale * rng.weibull(churn.shape, len(due))
            due = due[changes[due] <= now]
        yield float(now), online, losses


class _Records:
    """The records of all keys under one policy: who has one, and since when."""

    def __init__(self, policy: Policy, around: Indices) -> None:
        self._policy = policy
        self._around = around
        self._received = np.full(around.shape, -math.inf)
        self._losses_then = np.zeros(around.shape, np.int64)
        self._next_announcement = 0.0
        self._findable: list[float] = []
        self._copies: list[float] = []
        self._announced: float | None = None

    def step(self, now: float, online: Flags, losses: Indices) -> None:
        """Announce if it is time, then look every key up."""
        online, losses = online[self._around], losses[self._around]
        asked = online & (np.cumsum(online, axis=1) <= self._policy.copies)
        if now >= self._next_announcement:
            self._received[asked] = now
            if self._announced is None:
                self._announced = float(asked.any(axis=1).mean())
            self._losses_then[asked] = losses[asked]
            self._next_announcement += self._policy.republish_h
        is_kept = (now - self._received < self._policy.expire_h) & (losses == self._losses_then)
        met = (asked & is_kept).sum(axis=1)
        self._findable.append(float((met > 0).mean()))
        self._copies.append(float(met.mean()))

    def decay(self, hours: Floats) -> Decay:
        taken = 1.0 if self._announced is None else self._announced
        return Decay(hours, np.array(self._findable), np.array(self._copies), taken)
