"""When a node announces what is new: at once, and together what follows closely."""

from __future__ import annotations

from tensorswarm.p2p.dht.announcer import GATHER_FIRST_S, GATHER_LONGEST_S, Gathering


def announcements(new_each_second: int, seconds: int) -> list[int]:
    """Return when something is announced, if something is new in each of the first seconds."""
    gathering, waiting, made = Gathering(), False, []
    for now in range(seconds):
        waiting |= now < new_each_second
        if waiting and gathering.is_due(now):
            gathering.announced(now)
            waiting = False
            made.append(now)
    return made


def test_the_first_news_is_announced_at_once() -> None:
    assert announcements(1, 100) == [0]


def test_news_that_keeps_coming_is_gathered_ever_longer_and_all_of_it_announced() -> None:
    made = announcements(600, 700)
    assert len(made) < 600 / GATHER_LONGEST_S + 5
    pauses = [later - earlier for earlier, later in zip(made, made[1:], strict=False)]
    assert pauses == sorted(pauses)
    assert pauses[0] == GATHER_FIRST_S and pauses[-1] == GATHER_LONGEST_S
    assert made[-1] >= 599


def test_after_a_pause_news_is_announced_at_once_again() -> None:
    gathering = Gathering()
    for now in (0.0, 2.0, 8.0, 26.0):
        assert gathering.is_due(now)
        gathering.announced(now)
    assert not gathering.is_due(27.0)
    assert gathering.is_due(1000.0)
    gathering.announced(1000.0)
    assert not gathering.is_due(1001.0)
    assert gathering.is_due(1000.0 + GATHER_FIRST_S)


def test_what_a_download_brings_is_announced_together_and_the_last_of_it_when_it_ends() -> None:
    gathering = Gathering()
    assert gathering.is_due(0.0, more_is_coming=True)  # the model's own key
    gathering.announced(0.0)
    assert not gathering.is_due(GATHER_LONGEST_S - 1.0, more_is_coming=True)
    assert gathering.is_due(GATHER_LONGEST_S - 1.0)  # the download has ended
    assert gathering.is_due(GATHER_LONGEST_S, more_is_coming=True)
