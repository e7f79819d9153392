"""Receive windows of streams, told by halves as go-yamux does.

py-libp2p 0.8.1 answers every read with a window update, however few bytes were read. Each
is a frame of its own, encrypted and sent by itself: on a stream of short messages, such as
the control stream, more than the messages cost. `tell_by_halves` leaves it out until half
of the window is used up, which is when go-yamux sends one; the sender always has the other
half left.

Reaches into py-libp2p's insides, as `guard` does.
"""

from __future__ import annotations

from functools import wraps

from libp2p.stream_muxer.yamux.yamux import YamuxStream

_NAME = "_auto_tune_and_send_window_update"


def tell_by_halves() -> None:
    """Have all yamux streams of this process tell their windows by halves; once is enough."""
    told = getattr(YamuxStream, _NAME)
    if hasattr(told, "__wrapped__"):
        return

    @wraps(told)
    async def tell_half(self: YamuxStream, *, bytes_read: int = 0) -> None:
        unread = len(self.conn.stream_buffers.get(self.stream_id, b""))
        used = self.target_recv_window - (self.recv_window + unread)
        if used >= self._grow_threshold():
            await told(self)

    setattr(YamuxStream, _NAME, tell_half)
