"""The narrow seam to libp2p: a stream of bytes to one peer, safe to cancel.

Purpose
-------
py-libp2p's streams must not be cancelled at will: a cancelled `write` may leave
half an encrypted frame on the wire, and so may a cancelled `read`, which sends
window updates; after that the whole connection is lost, not one stream. Deadlines
are cancellations, and we put one round every wait. So each operation on libp2p
runs to its end in a background task, as an `Errand`, and only the waiting for it
is cancelled.

Rules
-----
- `Stream.receive_some` may be cancelled: nothing is lost, the next call returns
  what has come meanwhile.
- `Stream.send` may be cancelled: bytes not sent yet will still be sent, in order,
  and the stream stays usable. Cancelling does not take them back.
- `Stream.aclose` may be cancelled; the closing goes on.
- One task receives at a time. Several may send: each call's bytes stay together.
- Errors of libp2p come out as `RemoteError`. A clean end is ``b""``; a reset and
  the death of the connection are errors, not ends (in libp2p they look alike).
- Bytes that had arrived but were not received when the connection died are lost
  with it (libp2p drops them): never send something that matters and disconnect.
- A peer that stops reading fails our `send` after about 5 s (libp2p's own limit).

What it does not do: deadlines (put `trio.fail_after` round it), or closing one
direction alone.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio
from libp2p.abc import IMuxedConn
from libp2p.network.stream.exceptions import StreamClosed, StreamEOF, StreamReset
from libp2p.network.stream.net_stream import NetStream

from tensorswarm.store.errors import LocalError, NoSource

from .lean import QuickLock

log = logging.getLogger(__name__)

READ_SIZE = 1 << 20
"""Most bytes taken from libp2p at once: one window update answers them all."""

LINGER_S = 10.0
"""After we closed, time for the peer to close its side before the stream is reset."""

CLOSE_WAIT_S = 1.0
"""Longest that `aclose` waits for its own closing to be sent."""

T = TypeVar("T")


class Errand(Generic[T]):
    """One operation that runs to its end in the background, waited for or not.

    Parameters
    ----------
    nursery : trio.Nursery
        Where it runs.
    operation : callable
        What to do. Errors are kept for whoever waits.
    """

    def __init__(self, nursery: trio.Nursery, operation: Callable[[], Awaitable[T]]) -> None:
        self._done = trio.Event()
        self._wake = trio.Event()
        self._values: list[T] = []
        self._error: Exception | None = None
        self._unclaimed: Callable[[T], object] | None = None
        try:
            nursery.start_soon(self._run, operation)
        except RuntimeError as error:  # the nursery has ended
            raise NoSource("this node is closing") from error

    async def _run(self, operation: Callable[[], Awaitable[T]]) -> None:
        try:
            self._values.append(await operation())
            if self._unclaimed is not None:
                self._unclaimed(self._values.pop())
        except Exception as error:
            self._error = error
        except BaseException:
            self._error = NoSource("this node is closing")
            raise
        finally:
            self._done.set()
            self._wake.set()

    async def wait(self) -> T:
        """Return the result, or raise the error. Cancelling stops the waiting alone."""
        if not self._wake.is_set():
            await self._wake.wait()
        if not self._done.is_set():
            raise NoSource("closed while waiting")
        return await self.wait_done()

    async def wait_done(self) -> T:
        """Do the same, whether or not `interrupt` is called."""
        if not self._done.is_set():
            await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._values[0]

    def interrupt(self) -> None:
        """Make `wait` raise `NoSource`; the operation goes on."""
        self._wake.set()

    def abandon(self, unclaimed: Callable[[T], object]) -> None:
        """Hand the result, now or whenever it comes, to `unclaimed` instead."""
        if self._values:
            unclaimed(self._values.pop())
        else:
            self._unclaimed = unclaimed


def is_ending(muxed_conn: IMuxedConn) -> bool:
    """Tell whether a connection has ended, or is about to."""
    if muxed_conn.is_closed:
        return True
    ending: trio.Event | None = getattr(muxed_conn, "event_shutting_down", None)
    return ending is not None and ending.is_set()


class Stream:
    """A stream to one peer, for one protocol. Made by `Host`.

    Attributes
    ----------
    peer_id : str
        Who is at the other end, proved by the connection's handshake.
    """

    def __init__(
        self,
        net_stream: NetStream,
        nursery: trio.Nursery,
        heard: Callable[[str], None] = lambda _peer_id: None,
    ) -> None:
        self.peer_id = str(net_stream.muxed_conn.peer_id)
        self._net = net_stream
        self._nursery = nursery
        self._heard = heard
        self._reading: Errand[bytes] | None = None
        self._writing: Errand[None] | None = None
        self._send_lock = QuickLock()
        self._has_reader = False
        self._ended = False
        self._closed = False

    @property
    def muxed_conn(self) -> IMuxedConn:
        """libp2p's connection, for its handlers that ask for it."""
        return self._net.muxed_conn

    @property
    def is_over(self) -> bool:
        """Whether either side has ended it, as far as that is known without asking."""
        muxed = self._net.muxed_stream
        has_peer_ended = any(getattr(muxed, name, False) for name in ("recv_closed", "closed"))
        return self._closed or self._ended or has_peer_ended or self._is_lost()

    async def receive_some(self) -> bytes:
        """Return bytes as soon as there are any, at most `READ_SIZE`.

        Cancel-safe: nothing is lost.

        Returns
        -------
        bytes
            ``b""`` when the peer has closed its side, and ever after.

        Raises
        ------
        RemoteError
            The peer reset the stream, the connection was lost, or the stream was
            closed on our side (while waiting, too).
        LocalError
            Another task is receiving from it.
        """
        if self._has_reader:
            raise LocalError("two tasks receive from one stream")
        self._has_reader = True
        try:
            self._check_open()
            if self._ended:
                return b""
            if self._reading is None:
                self._reading = Errand(self._nursery, self._read)
            data = await self._reading.wait()
            self._reading = None
            self._ended = not data
            self._heard(self.peer_id)
            return data
        finally:
            self._has_reader = False

    async def send(self, data: bytes) -> None:
        """Send bytes; returns when the last of them is on its way.

        When cancelled, bytes not sent yet still go out (none of them, if another
        task's bytes were being waited for); the stream stays usable.

        Raises
        ------
        RemoteError
            The peer closed or reset the stream, does not read, or was lost; or the
            stream was closed on our side.
        """
        async with self._send_lock:
            if self._writing is not None:  # left behind by a cancelled send
                await self._writing.wait()
            self._check_open()
            self._writing = Errand(self._nursery, lambda: self._write(data))
            await self._writing.wait()
            self._writing = None

    async def aclose(self) -> None:
        """Say that nothing more will be sent, and receive nothing more.

        What was sent before reaches the peer. Cancel-safe, never raises, waits at
        most `CLOSE_WAIT_S` seconds.
        """
        if self._closed:
            return
        self._closed = True
        if self._reading is not None:
            self._reading.interrupt()
        sent = trio.Event()
        try:
            Errand(self._nursery, lambda: self._close(sent))
        except NoSource:
            return  # the node is closing, and its connections with it
        with trio.move_on_after(CLOSE_WAIT_S):
            await sent.wait()

    def abort(self) -> None:
        """Reset the stream without waiting: both sides end at once, with an error."""
        self._closed = True
        if self._reading is not None:
            self._reading.interrupt()
        try:
            Errand(self._nursery, self._net.reset)
        except NoSource:
            return

    def _check_open(self) -> None:
        if self._closed:
            raise NoSource(f"the stream to {self.peer_id} is closed")

    async def _read(self) -> bytes:
        try:
            return bytes(await self._net.read(READ_SIZE))
        except (StreamEOF, StreamReset) as error:
            if self._is_lost():
                raise NoSource(f"lost the connection to {self.peer_id}") from error
            # yamux forgets a reset stream before it wakes the reader, who then takes
            # the reset for an end; the flag tells.
            was_reset = getattr(self._net.muxed_stream, "reset_received", False)
            if was_reset or isinstance(error, StreamReset):
                raise NoSource(f"the stream was reset by {self.peer_id}") from error
            return b""
        except Exception as error:  # libp2p, noise and the muxer each have their own
            raise NoSource(f"cannot receive from {self.peer_id}: {error}") from error

    async def _write(self, data: bytes) -> None:
        try:
            await self._net.write(data)
        except (StreamClosed, StreamReset) as error:
            if self._is_lost():
                raise NoSource(f"lost the connection to {self.peer_id}") from error
            raise NoSource(f"{self.peer_id} does not take what is sent") from error
        except Exception as error:
            raise NoSource(f"cannot send to {self.peer_id}: {error}") from error

    def _is_lost(self) -> bool:
        return is_ending(self._net.muxed_conn)

    async def _close(self, sent: trio.Event) -> None:
        """Send what is still to be sent, then the end; drop what the peer still sends."""
        try:
            try:
                if self._writing is not None:
                    await self._writing.wait_done()
                await self._net.close()
            finally:
                sent.set()
            with trio.move_on_after(LINGER_S):
                while not self._ended:
                    await self._drop_some()
                return
        except Exception as error:  # ours, or libp2p's: the stream is of no use either way
            log.debug("closing a stream to %s: %r", self.peer_id, error)
        await self._net.reset()

    async def _drop_some(self) -> None:
        """Receive and drop bytes, first those that a cancelled `receive_some` asked for."""
        if self._reading is None:
            self._reading = Errand(self._nursery, self._read)
        self._ended = not await self._reading.wait_done()
        self._reading = None
