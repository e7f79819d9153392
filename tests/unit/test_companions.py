"""Whom a download with an origin counts as members, and whom of them it meets."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import cast

import trio
import trio.testing

from tensorswarm.p2p.companions import GRACE_S, LIMITS, Companions
from tensorswarm.p2p.control.neighbours import Neighbours
from tensorswarm.p2p.host.addresses import PeerAddress

KEY = b"k" * 32


class Known:
    """The neighbours of a test: who is here, who wants the same, who holds something."""

    me = "me"

    def __init__(self) -> None:
        self.here: set[str] = set()
        self.wants: set[str] = set()
        self.holds: set[str] = set()

    def is_neighbour(self, peer_id: str) -> bool:
        return peer_id in self.here

    def wanting(self, key: bytes) -> list[str]:
        assert key == KEY
        return sorted(self.wants & self.here)

    def holds_anything(self, peer_id: str) -> bool:
        return peer_id in self.holds


def run(test: Callable[[Known, Companions], None]) -> None:
    """Run a test in virtual time."""

    async def main() -> None:
        known = Known()
        test(known, Companions(KEY, cast(Neighbours, known), random.Random(3)))

    trio.run(main, clock=trio.testing.MockClock())


def peers(count: int) -> list[PeerAddress]:
    return [PeerAddress(f"peer-{number}", ("/ip4/192.0.2.1/tcp/1",)) for number in range(count)]


def names(found: list[PeerAddress]) -> set[str]:
    return {peer.peer_id for peer in found}


def test_whoever_is_named_is_a_member_before_anybody_is_met() -> None:
    def test(known: Known, companions: Companions) -> None:
        assert not companions.is_anybody_there()
        companions.choose("teller", [*peers(3), PeerAddress("me", ("/ip4/192.0.2.1/tcp/1",))])
        assert companions.unmet(trio.current_time()) == names(peers(3))
        assert companions.is_anybody_there()

    run(test)


def test_of_many_a_few_are_dialled_and_others_only_in_the_place_of_those_that_fail() -> None:
    def test(known: Known, companions: Companions) -> None:
        dialled = companions.choose("teller", peers(40))
        most = LIMITS.dials + LIMITS.on_duty  # those on duty keep each other besides
        assert 0 < len(dialled) <= most
        assert companions.choose("another", peers(40)) == []
        for peer in dialled[1:]:
            known.here.add(peer.peer_id)
            known.wants.add(peer.peer_id)
            assert companions.after(peer.peer_id) == []
        instead = companions.after(dialled[0].peer_id)  # it could not be reached
        assert len(instead) == 1 and not names(instead) & names(dialled)
        members = companions.unmet(trio.current_time())
        assert dialled[0].peer_id not in members and not known.wants & members

    run(test)


def test_seeders_are_met_without_a_bound_and_count_as_members_for_a_moment_only() -> None:
    async def main() -> None:
        known = Known()
        companions = Companions(KEY, cast(Neighbours, known), random.Random(3))
        waiting = companions.choose("teller", peers(40))
        met = 0
        while waiting:
            peer_id = waiting.pop().peer_id
            known.here.add(peer_id)
            known.holds.add(peer_id)
            met += 1
            waiting += companions.after(peer_id)
        assert met == 40
        await trio.sleep(GRACE_S)
        assert not companions.unmet(trio.current_time())
        assert not companions.is_anybody_there()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.0))
