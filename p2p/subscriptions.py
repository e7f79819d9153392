"""What one fetch asks its neighbours about, and how.

A neighbour that knows the model is asked by its manifest: one short question, one short
answer. Any other is asked by digests, of which it may hold some because of other models: the
first at once, enough to begin with, and the rest while it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from tensorswarm.store.errors import NoSource, ProtocolError, Refused, RemoteError
from tensorswarm.store.wanted import Wanted

from .control.neighbour import Neighbour
from .control.neighbours import Neighbours

FIRST_DIGESTS = 4096
"""Objects that a neighbour is asked about by digest before the download begins; of the others
it tells while it gives."""


class Subscriptions:
    """What a fetch wants to hear of.

    Parameters
    ----------
    neighbours : Neighbours
        Everybody who can be asked.
    key : bytes
        What others are known by who fetch the same: the model's digest, or the object's.
    wanted : Wanted
        The objects.
    is_model : bool
        Whether `key` names a manifest, of which the objects are some.
    note_failure : callable
        Hears which neighbour failed, and why.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        key: bytes,
        wanted: Wanted,
        *,
        is_model: bool,
        note_failure: Callable[[str, RemoteError], None],
    ) -> None:
        self._neighbours = neighbours
        self._key = key
        self._wanted = wanted
        self._runs = wanted.runs() if is_model else []
        self._note_failure = note_failure
        self._by_digests: set[str] = set()

    async def ask(self, neighbour: Neighbour, later: trio.Nursery) -> bool:
        """Ask a neighbour what it holds, now and later; False if it failed.

        Of many digests most are asked for in a task of `later`.
        """
        if self._runs:
            try:
                await neighbour.want_model(self._key, self._wanted.table, self._runs)
                return True
            except ProtocolError as error:
                self._note_failure(neighbour.peer_id, error)
                await neighbour.close()
                return False
            except (NoSource, Refused):
                pass  # it does not know the model, or has left, which is noticed at once
        self._by_digests.add(neighbour.peer_id)
        digests = self._wanted.digests
        if not await self._want(neighbour, [self._key, *digests[:FIRST_DIGESTS]]):
            return False
        if len(digests) > FIRST_DIGESTS:
            later.start_soon(self._want, neighbour, digests[FIRST_DIGESTS:])
        return True

    async def _want(self, neighbour: Neighbour, digests: Sequence[bytes]) -> bool:
        try:
            await neighbour.want(digests)
        except RemoteError as error:
            self._note_failure(neighbour.peer_id, error)
            return False
        return True

    async def end(self) -> None:
        """Ask for no more news."""
        for neighbour in self._neighbours.all():
            is_by_digests = neighbour.peer_id in self._by_digests
            digests = [self._key, *self._wanted.digests] if is_by_digests else [self._key]
            try:
                await neighbour.unwant(digests)
            except RemoteError:
                continue  # it is gone, and its subscriptions with it
