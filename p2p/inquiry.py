"""Asking the network one thing until somebody knows, or nobody can.

This is where "not found" and "nobody reachable" are told apart: a network that
answers and does not know is `NotFound`, after a few rounds; one that does not
answer is `NoSource`, when the time is up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio

from tensorswarm.store.errors import NoSource, NotFound, ProtocolError, Refused, RemoteError

from .control.neighbour import Neighbour
from .dht.search import MAX_KEYS_PER_ROUND, Search
from .services import Services

T = TypeVar("T")

SEARCH_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Pauses between the rounds of a search, in seconds; then the last one repeats."""

FRUITLESS_ROUNDS = 5
"""Rounds after which a network that answers is believed not to have it: about 4 s,
in which a provider that has just started gets its announcement through."""


def pause_s(round_number: int) -> float:
    """Return the pause after a round, in seconds."""
    return SEARCH_PAUSES_S[min(round_number, len(SEARCH_PAUSES_S) - 1)]


def in_turn(keys: Sequence[bytes], round_number: int) -> list[bytes]:
    """Return the keys to look up in a round: the first always, the others in turn."""
    first, rest = list(keys[:1]), list(keys[1:])
    start = round_number * (MAX_KEYS_PER_ROUND - 1) % max(1, len(rest))
    return first + rest[start:] + rest[:start]


class Inquiry:
    """Asks neighbours, and looks for more of them, with a deadline.

    Parameters
    ----------
    services : Services
        The node's parts.
    search : Search
        Finds more neighbours.
    timeout_s : float
        When to give up on a network that does not answer.

    Attributes
    ----------
    distrusted : set of str
        Peers that lied in this inquiry, and are not asked again.
    """

    def __init__(self, services: Services, search: Search, timeout_s: float) -> None:
        self._services = services
        self._search = search
        self._timeout_s = timeout_s
        self.distrusted: set[str] = set()
        self._refused = False

    def network_answers(self) -> bool:
        """Tell whether anybody at all has been reached."""
        return bool(
            self._services.neighbours.all() or self._services.discovery.routing_table_size()
        )

    async def until_found(
        self, keys: Sequence[bytes], ask: Callable[[Neighbour], Awaitable[T | None]], what: str
    ) -> T:
        """Ask every neighbour, old and new, until one answers with something.

        Parameters
        ----------
        keys : sequence of bytes
            Digests under which the DHT is asked for more peers: the first in every
            round, the others in turn.
        ask : callable
            Asks one neighbour; None means that it does not know.
        what : str
            What is looked for, for messages.

        Raises
        ------
        NotFound
            Peers were reached, and none of them has it.
        Refused
            The same, and some of them refused to say.
        NoSource
            Nobody was reached in time.
        """
        deadline = trio.current_time() + self._timeout_s
        number = fruitless = 0
        while True:
            answer = await self._ask_all(ask)
            if answer is not None:
                return answer
            with trio.move_on_at(deadline):
                is_whole = await self._search.round(in_turn(keys, number), widely=number > 0)
                answer = await self._ask_all(ask)
                if answer is not None:
                    return answer
                fruitless += is_whole
            self._consider_giving_up(fruitless, deadline, what)
            with trio.move_on_at(deadline):
                await trio.sleep(pause_s(number))
            number += 1

    async def ask_each(
        self, ask: Callable[[Neighbour], Awaitable[T | None]], patience_s: float
    ) -> list[T]:
        """Ask every neighbour and return all answers that come within `patience_s`."""
        answers: list[T] = []

        async def ask_one(neighbour: Neighbour) -> None:
            try:
                answer = await ask(neighbour)
            except RemoteError as error:
                self._search.note_failure(neighbour.peer_id, error)
                return
            if answer is not None:
                answers.append(answer)

        with trio.move_on_after(patience_s):
            async with trio.open_nursery() as nursery:
                for neighbour in self._services.neighbours.all():
                    if neighbour.peer_id not in self.distrusted:
                        nursery.start_soon(ask_one, neighbour)
        return answers

    async def _ask_all(self, ask: Callable[[Neighbour], Awaitable[T | None]]) -> T | None:
        """Ask all neighbours at once; the first answer ends the others' turn."""
        answers: list[T] = []

        async def ask_one(neighbour: Neighbour, scope: trio.CancelScope) -> None:
            try:
                answer = await ask(neighbour)
            except ProtocolError as error:
                self.distrusted.add(neighbour.peer_id)
                self._search.note_failure(neighbour.peer_id, error)
                await neighbour.close()
            except RemoteError as error:
                self._search.note_failure(neighbour.peer_id, error)
                if isinstance(error, Refused):
                    self._refused = True
            else:
                if answer is not None:
                    answers.append(answer)
                    scope.cancel()

        async with trio.open_nursery() as nursery:
            for neighbour in self._services.neighbours.all():
                if neighbour.peer_id not in self.distrusted:
                    nursery.start_soon(ask_one, neighbour, nursery.cancel_scope)
        return answers[0] if answers else None

    def _consider_giving_up(self, fruitless: int, deadline: float, what: str) -> None:
        reasons = self._search.failure_text()
        tail = f" ({reasons})" if reasons else ""
        late = trio.current_time() >= deadline
        if self.network_answers():
            if late or fruitless >= FRUITLESS_ROUNDS:
                if self._refused:
                    raise Refused(
                        f"{what} was refused: the peers that could be asked do not have it, or "
                        f"not for this node{tail}"
                    )
                raise NotFound(f"{what} was not found: no peer that could be asked has it{tail}")
        elif not self._services.bootstrap:
            raise NoSource(
                f"{what} is not in the store, and there is nobody to ask: give --bootstrap "
                "with the address of a peer, or start a node on this store"
            )
        elif late:
            raise NoSource(f"nobody could be reached within {self._timeout_s:g} s{tail}")
