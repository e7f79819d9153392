"""What a neighbour is to be told, until its stream takes it.

News and offers wait here, each neighbour's by itself, so that one that reads slowly keeps
nobody else from hearing them.

Rules
- Of an object only the latest news is kept: each says all that is held of it.
- Offers and passes go first, for they lapse; of too many the oldest are dropped.
- News of what the neighbour has itself keeps it from offering us that, no more: it goes along
  with the next message, or by itself when it is `KNOWN_NEWS_S` old.
- Nothing here is an answer to a request: those go their own way, at the asker's pace.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import trio

from . import wire
from .holdings import Holdings
from .wire_limits import MAX_SUBSCRIPTIONS

MAX_NOTICES = 32
"""Offers and passes that wait: a neighbour has one offer of ours at a time."""

KNOWN_NEWS_S = 0.3
"""Longest wait of news that the neighbour hardly needs. Simulated swarms (16 and 64 nodes, 64
chunks of 100 ms) need 0.58 and 0.60 as many messages then, and take 0.3 and 1.5 % longer where
messages cost nothing."""


class Outbox:
    """The news and notices for one neighbour."""

    def __init__(self) -> None:
        self._news: dict[bytes, wire.HaveEntry] = {}
        self._models: dict[bytes, Holdings] = {}
        self._notices: deque[wire.Offer | wire.Pass] = deque(maxlen=MAX_NOTICES)
        self._due_at = math.inf  # when news that can wait is to leave
        self._is_filled = trio.Event()
        self._waiting = trio.CancelScope()  # until when `take` waits for something urgent
        self._is_idle = trio.Event()
        self._is_idle.set()

    def add_news(self, entries: Iterable[wire.HaveEntry]) -> None:
        """Queue news, in the place of older news of the same objects."""
        for entry in entries:
            if entry.digest in self._news or len(self._news) < MAX_SUBSCRIPTIONS:
                self._news[entry.digest] = entry
                self._fill()

    def add_model_news(
        self,
        model: bytes,
        count: int,
        told: Iterable[tuple[int, bytes | None]],
        *,
        is_known: bool = False,
    ) -> None:
        """Queue news of objects of a model of `count` objects: index, and bitmap or None.

        `is_known` tells that the neighbour has all of it, and can wait.
        """
        news = self._models.setdefault(model, Holdings(count))
        for index, proved in told:
            news.add(index, proved)
        if is_known:
            self._due_at = min(self._due_at, trio.current_time() + KNOWN_NEWS_S)
            self._waiting.deadline = self._due_at
            self._note_busy()
        else:
            self._fill()

    def add_notice(self, notice: wire.Offer | wire.Pass) -> None:
        """Queue an offer or a pass."""
        self._notices.append(notice)
        self._fill()

    def _fill(self) -> None:
        self._is_filled.set()
        self._note_busy()

    def _note_busy(self) -> None:
        if self._is_idle.is_set():
            self._is_idle = trio.Event()

    async def take(self) -> list[wire.Message]:
        """Wait until there is something, and take all; `sent` is to be called after."""
        with trio.CancelScope(deadline=self._due_at) as self._waiting:
            await self._is_filled.wait()
        self._is_filled, self._due_at = trio.Event(), math.inf
        taken: list[wire.Message] = [*self._notices]
        taken += wire.fit_have(0, self._news.values()) if self._news else ()
        for model, news in self._models.items():
            parts = [wire.ModelPart(*part) for part in sorted(news.parts.items())]
            taken += wire.fit_have_model(0, model, news.runs(), parts)
        self._notices.clear()
        self._news, self._models = {}, {}
        return taken

    def sent(self) -> None:
        """Note that what was taken has left."""
        if not self._is_filled.is_set() and self._due_at == math.inf:
            self._is_idle.set()

    async def wait_sent(self) -> None:
        """Wait until everything has left; nothing waits any longer for company."""
        if self._due_at < math.inf:
            self._is_filled.set()
        await self._is_idle.wait()
