"""Ending connections: a word of goodbye, and then the cut."""

from __future__ import annotations

from collections.abc import Iterable

import trio
from libp2p.abc import INetConn

from . import guard as host_guard

GOODBYE_S = 0.5
"""Time to tell peers that a connection ends, in seconds; then it is cut."""


async def end_all(conns: Iterable[INetConn]) -> None:
    """Say goodbye to all peers at once: py-libp2p takes 0.2 s for each in turn."""
    with trio.move_on_after(GOODBYE_S):
        async with trio.open_nursery() as nursery:
            for conn in conns:
                nursery.start_soon(host_guard.closed_quietly, conn.close)
            for conn in conns:
                await host_guard.wait_gone(conn)
            nursery.cancel_scope.cancel()  # only libp2p's own sleeping is left


async def end(conn: INetConn) -> None:
    """End one connection."""
    with trio.move_on_after(GOODBYE_S) as goodbye:
        await host_guard.closed_quietly(conn.close)
    if goodbye.cancelled_caught:
        host_guard.cut(conn)
