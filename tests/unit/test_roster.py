"""Who counts as a member of a download: who wants the same, and gets somewhere."""

from __future__ import annotations

from tensorswarm.p2p import roster
from tensorswarm.p2p.roster import LONGEST_PATIENCE_S, PATIENCE_CHUNKS, PATIENCE_S, Roster


def test_who_wants_the_same_is_a_member_until_it_does_no_more() -> None:
    crowd = Roster()
    assert crowd.update(0.0, ["a", "b"], ())
    assert crowd.members == {"a", "b"}
    assert not crowd.update(0.1, ["b", "a"], ())
    assert crowd.update(0.2, ["b"], ())
    assert crowd.members == {"b"}


def test_who_only_says_so_counts_no_more_and_cannot_begin_anew() -> None:
    crowd = Roster()
    crowd.update(0.0, ["idle", "busy"], ())
    crowd.heard(PATIENCE_S - 1, "busy")
    crowd.proved(PATIENCE_CHUNKS)
    assert crowd.update(PATIENCE_S, ["idle", "busy"], ())
    assert crowd.members == {"busy"}
    crowd.update(PATIENCE_S + 1, ["busy"], ())
    crowd.update(PATIENCE_S + 2, ["idle", "busy"], ())
    assert crowd.members == {"busy"}
    crowd.heard(PATIENCE_S + 3, "idle")
    crowd.update(PATIENCE_S + 3, ["idle", "busy"], ())
    assert crowd.members == {"idle", "busy"}


def test_who_failed_as_a_source_is_no_member() -> None:
    crowd = Roster()
    crowd.update(0.0, ["a", "b"], ["a"])
    assert crowd.members == {"b"}


def test_news_of_others_and_too_many_of_them_are_not_kept() -> None:
    crowd = Roster()
    crowd.heard(0.0, "stranger")
    crowd.update(0.0, map(str, range(2 * roster.MAX_MEMBERS)), ())
    assert len(crowd.members) == roster.MAX_MEMBERS


def test_where_everybody_is_slow_nobody_is_taken_for_gone() -> None:
    crowd = Roster()
    crowd.update(0.0, ["slow"], ())
    crowd.proved(PATIENCE_CHUNKS - 1)
    assert not crowd.update(2 * PATIENCE_S, ["slow"], ())
    crowd.heard(2 * PATIENCE_S, "slow")  # in chunks it is as fast as we are
    crowd.proved(PATIENCE_CHUNKS - 1)
    assert not crowd.update(4 * PATIENCE_S, ["slow"], ())
    crowd.proved()
    assert crowd.update(4 * PATIENCE_S, ["slow"], ())
    assert not crowd.members


def test_who_keeps_us_waiting_does_not_do_so_for_ever() -> None:
    crowd = Roster()
    crowd.update(0.0, ["idle"], ())
    assert not crowd.update(LONGEST_PATIENCE_S - 1, ["idle"], ())
    assert crowd.update(LONGEST_PATIENCE_S, ["idle"], ())
    assert not crowd.members
