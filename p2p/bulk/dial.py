"""Connecting to a peer's bulk plane by whichever of its addresses answers first.

Purpose: race the addresses as RFC 8305 ("Happy Eyeballs") does: each attempt has a little
head start over the next, the first TLS connection with the right peer at its end wins,
the others are cut.

Rules
- One deadline for all of it, `RACE_TIMEOUT_S`, below the 3 s after which the planner takes
  a silent source for stalled: a peer that cannot be reached this way is known as such, and
  asked over a libp2p stream, before it is given up.
- An address that fails lets the next one start at once.
- `Race.abort` ends everything, from any thread.

Not here: which addresses there are, and in which order (`routes`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from tensorswarm.store.errors import RemoteError

from .client import STALL_TIMEOUT_S, BulkConnection, Unreachable
from .tls import BulkIdentity

RACE_TIMEOUT_S = 2.5
"""Seconds for all addresses together. Enough for TCP and TLS over a round trip of 0.5 s,
with one lost SYN (sent again after 1 s)."""

STAGGER_S = 0.25
"""Head start of each address over the next, in seconds (RFC 8305, section 5)."""

MAX_ADDRESSES = 8
"""Addresses tried: each costs a thread for as long as the race lasts."""


class Abortable(Protocol):
    """What can be cut from another thread."""

    def abort(self) -> None:
        """End it; whoever waits on it gets an error."""
        ...


class Race:
    """One attempt to connect. `run` is called once.

    Parameters
    ----------
    addresses : sequence of (str, int)
        Where the peer may be, best first; numeric hosts. The first `MAX_ADDRESSES` count.
    identity : BulkIdentity
        Our certificate.
    peer_id : str
        Who must be there.
    timeout_s, stagger_s : float, optional
        Seconds for everything, and between the starts.
    stall_timeout_s, max_receive_bytes : optional
        For the connection that comes of it.
    """

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        identity: BulkIdentity,
        peer_id: str,
        *,
        timeout_s: float = RACE_TIMEOUT_S,
        stagger_s: float = STAGGER_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        max_receive_bytes: int | None = None,
    ) -> None:
        self._addresses = list(addresses)[:MAX_ADDRESSES]
        self._identity = identity
        self._peer_id = peer_id
        self._timeout_s = timeout_s
        self._stagger_s = stagger_s
        self._stall_timeout_s = stall_timeout_s
        self._max_receive_bytes = max_receive_bytes
        self._changed = threading.Condition()
        self._running: dict[int, BulkConnection | None] = {}
        self._winner: BulkConnection | None = None
        self._faults: list[str] = []
        self._over = False

    def run(self) -> BulkConnection:
        """Return the connection that was made first; the others are cut.

        Raises
        ------
        Unreachable
            None was made in time; says why.
        """
        deadline = time.monotonic() + self._timeout_s
        if len(self._addresses) == 1:
            self._attempt(0, deadline)  # no thread where there is nothing to race
        else:
            self._stagger(deadline)
        with self._changed:
            self._changed.wait_for(self._is_decided, max(0.0, deadline - time.monotonic()))
            self._over = True
            losers = [each for each in self._running.values() if each is not self._winner]
        for loser in losers:
            if loser is not None:
                loser.abort()
        if self._winner is not None:
            return self._winner
        raise Unreachable("; ".join(self._faults[:3]) or self._excuse())

    def abort(self) -> None:
        """End the race, from any thread; `run` raises, or returns a cut connection."""
        with self._changed:
            self._over = True
            connections = list(self._running.values())
            self._changed.notify_all()
        for connection in connections:
            if connection is not None:
                connection.abort()

    def _excuse(self) -> str:
        if not self._addresses:
            return "no address is known"
        return f"no answer within {self._timeout_s:g} s"

    def _is_decided(self) -> bool:
        return self._winner is not None or self._over or not self._running

    def _stagger(self, deadline: float) -> None:
        for number in range(len(self._addresses)):
            with self._changed:
                if self._winner is not None or self._over:
                    return
                self._running[number] = None
                failures = len(self._faults)
            threading.Thread(
                target=self._attempt,
                args=(number, deadline),
                name=f"bulk-dial-{self._peer_id[-6:]}-{number}",
                daemon=True,
            ).start()
            with self._changed:
                self._changed.wait_for(
                    lambda failures=failures: (  # type: ignore[misc]
                        self._winner is not None or self._over or len(self._faults) > failures
                    ),
                    min(self._stagger_s, max(0.0, deadline - time.monotonic())),
                )

    def _attempt(self, number: int, deadline: float) -> None:
        try:
            made = BulkConnection.connect(
                self._addresses[number],
                self._identity,
                self._peer_id,
                timeout_s=max(0.001, deadline - time.monotonic()),
                stall_timeout_s=self._stall_timeout_s,
                max_receive_bytes=self._max_receive_bytes,
                watch=self._watcher(number),
            )
        except RemoteError as error:  # somebody else at the address included
            with self._changed:
                self._running.pop(number, None)
                self._faults.append(str(error))
                self._changed.notify_all()
            return
        with self._changed:
            is_first = self._winner is None and not self._over
            if is_first:
                self._winner = made
            else:
                self._running.pop(number, None)
            self._changed.notify_all()
        if not is_first:
            made.close()

    def _watcher(self, number: int) -> Callable[[BulkConnection], None]:
        def watch(connection: BulkConnection) -> None:
            with self._changed:
                self._running[number] = connection
                is_over = self._over
            if is_over:
                connection.abort()

        return watch
