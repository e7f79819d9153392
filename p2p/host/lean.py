"""Leaner ways through py-libp2p for short messages, such as those of the control stream.

py-libp2p 0.8.1 takes ten locks for a message that is sent and received, and each is a turn
of trio's loop, free or not; it reads the two bytes of a message's length by a system call
of their own; and it looks up its settings in the environment for every frame. A short
message costs more for these than for its encryption. `make_lean` has

- locks that are free taken without a turn (`QuickLock`);
- TCP streams take what has arrived, up to `READ_AHEAD_BYTES`, and serve the next reads
  from that;
- settings of the environment read once.

Rules
- Whoever holds no lock gets it at once; whoever waits gets it in the order of asking.
- As before, a read returns at least one byte, at most what was asked for, and ``b""`` at
  the end only. A read for more than is taken ahead goes straight to the socket, behind
  what is here.
- Loops still give way to others where they send, and where nothing has arrived.

Reaches into py-libp2p's insides, as `guard` and `window` do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import trio
from libp2p.io.trio import TrioTCPStream
from libp2p.network.stream.net_stream import NetStream
from libp2p.stream_muxer.yamux import yamux

READ_AHEAD_BYTES = 16 << 10
"""Most bytes taken ahead: hundreds of short messages, a quarter of a long one."""

_BUFFER = "_read_ahead"

_SETTINGS = (
    "_perf_yamux_debug_enabled",
    "_yamux_batch_threshold_divisor",
    "_yamux_data_read_timeout",
    "_yamux_disable_hysteresis",
    "_yamux_release_on_read",
)


class QuickLock:
    """A lock that is taken without a turn of the loop when it is free.

    Stands for `trio.Lock`, and for the writer's side of py-libp2p's `ReadWriteLock`, of
    which yamux uses no other.
    """

    def __init__(self) -> None:
        self._is_held = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def acquire(self) -> None:
        """Take it, or wait for it."""
        if self._is_held:
            await self._waiting.park()  # `release` hands it on
        else:
            self._is_held = True

    def release(self) -> None:
        """Hand it to the first who waits, or let it be free."""
        if self._waiting:
            self._waiting.unpark()
        else:
            self._is_held = False

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *error: object) -> None:
        self.release()

    def write_lock(self) -> QuickLock:
        """Return what a writer enters."""
        return self


def make_lean() -> None:
    """Have all connections of this process that are made from now on go the leaner ways.

    Once is enough.
    """
    if hasattr(TrioTCPStream.read, "__wrapped__"):
        return
    TrioTCPStream.read = _reading_ahead(TrioTCPStream.read)  # type: ignore[method-assign]
    _with_quick_locks(TrioTCPStream, "read_lock", "write_lock")
    _with_quick_locks(NetStream, "_state_lock")
    _with_quick_locks(yamux.Yamux, "streams_lock", "_write_lock")
    _with_quick_locks(yamux.YamuxStream, "window_lock", "rw_lock")
    for name in _SETTINGS:
        setattr(yamux, name, cache(getattr(yamux, name)))


def _with_quick_locks(kind: type[Any], *names: str) -> None:
    begin = kind.__init__

    @wraps(begin)
    def begin_quick(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        for name in names:
            getattr(self, name)  # a name that is not there any more must not go unnoticed
            setattr(self, name, QuickLock())

    kind.__init__ = begin_quick


def _reading_ahead(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    async def read(self: TrioTCPStream, n: int | None = None) -> bytes:
        if n == 0:
            return b""
        buffer: bytearray | None = self.__dict__.get(_BUFFER)
        if buffer is None:
            buffer = self.__dict__[_BUFFER] = bytearray()
        if not buffer:
            if n is not None and n >= READ_AHEAD_BYTES:
                return bytes(await plain(self, n))
            buffer += await plain(self, READ_AHEAD_BYTES)
        part = bytes(buffer if n is None else buffer[:n])
        del buffer[: len(part)]
        return part

    return read
