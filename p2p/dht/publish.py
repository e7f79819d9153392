"""Announcing on the DHT, and making sure of it.

Purpose
-------
Have the nodes closest to each of our keys keep a record that we provide it, and
count a key as announced only when a node other than ourselves, asked for its
providers, names us. (py-libp2p's own `provide` says True for 60 keys of which the
receivers keep 10.)

Rules
-----
- Keys are swept in the order of the key space. Where the nodes closest to a key are
  known, no look-up is made: in a network of at most `K` nodes, never; in larger ones,
  once per region.
- How nodes are told, and asked what they were told, is `announce_round.Teller`'s affair.
- When a key is due again is `announce_schedule.Schedule`'s affair. What has been
  announced is kept on file, so that a restart does not announce it all again.
- A node that is new, or was away and may have lost its records, is asked for a sample
  of those it should keep, and is told all of them again if any is missing.
- A sample of what is announced is looked for at intervals; what is gone is announced
  again, and everything if most of it is gone.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import trio

from tensorswarm.store.cid import dht_key
from tensorswarm.store.errors import LocalError

from ..host.host import Host
from .announce_round import Round, Teller
from .announce_schedule import REPUBLISH_S, Schedule
from .file import DhtFile
from .lookup import K, Regions, closest, kad_id, peer_kad_id
from .walker import Walker

log = logging.getLogger(__name__)

KEYS_PER_ROUND = 2_000
"""Keys announced in one go by the background task, before others get their turn."""

WAIT_FOR_NODES_S = 11.0
"""How often it is looked whether there is any DHT node to tell, in seconds."""

NEWCOMER_PAUSE_S = 2.0
"""Wait after a node was met before it is told: others often come along with it."""

MAX_NEWCOMERS = 256
"""Nodes that wait to be told; who does not fit in is told at the next republishing."""

SAMPLE = 16
"""Keys looked for in one sample."""

SAMPLE_INTERVAL_S = 1800.0
"""How often a sample of the announced keys is looked for, in seconds."""

KEYS_PER_CHECKPOINT = 500
"""Keys compared with a node before other tasks get their turn: about 5 ms."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What became of announcing some keys.

    Attributes
    ----------
    asked : int
        How many keys were to be announced, without those too many.
    confirmed : frozenset of bytes
        The digests that another node names us as a provider of.
    nodes : int
        How many DHT nodes were told.
    """

    asked: int
    confirmed: frozenset[bytes]
    nodes: int = 0


class Publisher:
    """Keeps our keys announced.

    Parameters
    ----------
    host : Host
        Ours.
    walker : Walker
        Knows the DHT nodes of the moment.
    look_up : callable
        Finds the nodes closest to a key.
    clock : callable
        Gives the time in seconds since 1970.
    rng : random.Random, optional
        Source of all random choices.
    file : DhtFile, optional
        Where it is kept what has been announced.

    Attributes
    ----------
    counters : Counters
        What it has cost and come to.
    on_round : callable
        Called when a round of announcements or of questions has ended.
    """

    def __init__(
        self,
        host: Host,
        walker: Walker,
        look_up: Callable[[bytes], Awaitable[list[str]]],
        *,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        file: DhtFile | None = None,
    ) -> None:
        self._host = host
        self._walker = walker
        self._look_up = look_up
        self._clock = clock
        self._rng = rng or random.Random()
        self._file = file
        self._schedule = Schedule()
        self._turn = trio.Lock()
        self._wake = trio.Event()
        self._newcomers: dict[str, None] = {}
        self._teller = Teller(host, walker.streams, clock)
        self.counters = self._teller.counters
        self.on_round: Callable[[], None] = lambda: None
        if file is not None:
            self._schedule.restore(file.load_own((host.peer_id, *host.advertised_addrs())))

    def add(self, digests: Iterable[bytes]) -> list[bytes]:
        """Take digests to be announced; return those taken, each once."""
        taken = self._schedule.add(self._clock(), digests)
        self.wake()
        return taken

    def remove(self, digests: Iterable[bytes]) -> None:
        """Announce these no more; records of them run out by themselves."""
        gone = list(digests)
        self._schedule.remove(gone)
        if self._file is not None and gone:
            file = self._file
            self._host.start_soon(lambda: trio.to_thread.run_sync(file.write_own, {}, gone))

    def node_has_come(self, node: str) -> None:
        """Tell a node what it should keep, and try unconfirmed keys again soon."""
        self._schedule.nodes_have_come(self._clock())
        if len(self._newcomers) < MAX_NEWCOMERS:
            self._newcomers[node] = None
        self.wake()

    def announce_again(self) -> None:
        """Send every record anew: they carry our addresses, and these have changed."""
        self._schedule.make_due(self._clock(), self._schedule.confirmed())
        self.wake()

    def wake(self) -> None:
        """Look at once whether anything is due: the clock or the network has changed."""
        self._wake.set()

    def statistics(self) -> dict[str, int | float]:
        """Return counters, and how many keys are in which state."""
        confirmed = len(self._schedule.confirmed())
        due = self._schedule.next_due()
        return {
            "keys": len(self._schedule),
            "announced": confirmed,
            "not_announced": len(self._schedule) - confirmed,
            "next_due_s": round(max(0.0, due - self._clock()), 1) if due is not None else 0.0,
            **asdict(self.counters),
        }

    # ---- what is due

    async def publish(self, digests: Sequence[bytes]) -> Announcement:
        """Announce digests taken before, unless they are, and schedule what is to follow."""
        nodes: set[str] = set()
        in_order = sorted(digests, key=lambda digest: kad_id(dht_key(digest)))
        for start in range(0, len(in_order), KEYS_PER_ROUND):
            batch = in_order[start : start + KEYS_PER_ROUND]
            nodes |= await self._publish_round(partial(self._unconfirmed, batch))
        confirmed = frozenset(filter(self._schedule.is_confirmed, digests))
        return Announcement(len(digests), confirmed, len(nodes))

    def _unconfirmed(self, digests: Sequence[bytes]) -> list[bytes]:
        return [digest for digest in digests if not self._schedule.is_confirmed(digest)]

    async def _publish_round(self, choose: Callable[[], Sequence[bytes]]) -> set[str]:
        """Announce digests; return the nodes that were told.

        They are chosen when it is our turn: the round before may have announced them.
        """
        async with self._turn:
            digests = choose()
            if not digests:
                return set()
            try:
                done = await self._round([dht_key(digest) for digest in digests])
            except BaseException:
                self._schedule.report(self._clock(), digests, set(), set())
                raise
            now = self._clock()
            confirmed = {digest for digest in digests if dht_key(digest) in done.confirmed}
            crowded = {digest for digest in digests if dht_key(digest) in done.crowded}
            late = self._schedule.report(now, digests, confirmed, crowded)
            self.wake()
            await self._keep(dict.fromkeys(confirmed, now))
        if late:
            self.counters.announced_late += late
            left = self._schedule.failed()
            log.info("%d keys are announced that could not be before; %d are left", late, left)
        self.on_round()
        return {node for nodes in done.nodes_of.values() for node in nodes} - done.unusable

    async def _keep(self, confirmed: dict[bytes, float]) -> None:
        if self._file is None or not confirmed:
            return
        try:
            await trio.to_thread.run_sync(self._file.write_own, confirmed, [])
        except LocalError as error:
            log.warning("%s", error)

    async def run(self) -> None:
        """Announce again whatever is due, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_newcomers)
            nursery.start_soon(self._sample_regularly)
            while True:
                self._wake = trio.Event()
                now = self._clock()
                pause_s = WAIT_FOR_NODES_S
                if self._walker.known_nodes():
                    upcoming = self._schedule.next_due()
                    if upcoming is not None and upcoming <= now:
                        await self._publish_round(partial(self._schedule.due, now, KEYS_PER_ROUND))
                        continue
                    pause_s = REPUBLISH_S if upcoming is None else max(upcoming - now, 0.01)
                with trio.move_on_after(pause_s):
                    await self._wake.wait()

    # ---- making sure

    async def _tell_newcomers(self) -> None:
        """Tell nodes that are new, or may have lost their records, what they should keep."""
        while True:
            await trio.sleep(NEWCOMER_PAUSE_S)
            newcomers, self._newcomers = self._newcomers, {}
            for node in newcomers:
                nodes = self._walker.known_nodes()
                if node not in nodes:
                    continue  # it has left again
                keys = await self._keys_of(node, nodes)
                if keys and not await self._has_all(node, keys):
                    async with self._turn:
                        this = Round({key: [node] for key in keys})
                        await self._teller.tell(this, node, keys, [])
                    self.counters.newcomers_told += 1
                    self.on_round()

    async def _keys_of(self, node: str, nodes: Sequence[str]) -> list[bytes]:
        """Return those of our announced keys that a node is among the closest to."""
        ours = [dht_key(digest) for digest in self._schedule.confirmed()]
        if len(nodes) <= K:
            return ours
        places = [peer_kad_id(other) for other in nodes]
        found = []
        for start in range(0, len(ours), KEYS_PER_CHECKPOINT):
            for key in ours[start : start + KEYS_PER_CHECKPOINT]:
                point = kad_id(key)
                distance = peer_kad_id(node) ^ point
                if sum(place ^ point < distance for place in places) < K:
                    found.append(key)
            await trio.lowlevel.checkpoint()
        return found

    async def _has_all(self, node: str, keys: Sequence[bytes]) -> bool:
        """Ask a node for a sample of keys; tell whether it names us for each."""
        sample = self._rng.sample(keys, min(SAMPLE, len(keys)))
        this = Round({key: [node] for key in sample})
        await self._teller.tell(this, node, [], sample)
        self.on_round()
        return this.confirmed | this.crowded >= set(sample)

    async def _sample_regularly(self) -> None:
        """Look for a sample of what is announced; announce again what is gone."""
        while True:
            await trio.sleep(SAMPLE_INTERVAL_S)
            await self.check_sample()

    async def check_sample(self) -> int:
        """Look for a sample of what is announced; return how many of it are gone."""
        ours = self._schedule.confirmed()
        sample = self._rng.sample(ours, min(SAMPLE, len(ours)))
        this = Round(await self._nodes_for([dht_key(digest) for digest in sample]))
        await self._teller.read_back(this)
        known = this.confirmed | this.crowded
        gone = [digest for digest in sample if dht_key(digest) not in known]
        self.counters.samples += len(sample)
        self.counters.samples_missing += len(gone)
        if gone and self._walker.known_nodes():
            most_are_gone = 2 * len(gone) > len(sample)
            log.info("%d of %d announced keys are gone from the DHT", len(gone), len(sample))
            self._schedule.make_due(self._clock(), ours if most_are_gone else gone)
            self.wake()
        return len(gone)

    # ---- one round

    async def _round(self, keys: Sequence[bytes]) -> Round:
        this = Round(await self._nodes_for(keys))
        await self._teller.announce(this)
        return this

    async def _nodes_for(self, keys: Sequence[bytes]) -> dict[bytes, list[str]]:
        """Return, for each key, the nodes to keep its record."""
        nodes = self._walker.known_nodes()
        if len(nodes) <= K:
            return dict.fromkeys(keys, nodes) if nodes else {}
        regions = Regions(self._walker.is_crowd)
        found: dict[bytes, list[str]] = {}
        for key in sorted(keys, key=kad_id):
            point = kad_id(key)
            chosen = regions.peers_for(point)
            if chosen is None:
                self.counters.look_ups += 1
                chosen = await self._look_up(key) or closest(point, nodes)
                regions.learn(point, chosen)
            found[key] = chosen
        return found
