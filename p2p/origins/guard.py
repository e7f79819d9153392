"""Deadlines that a blocking read cannot outlast, and the way to stop one.

A socket's own timeout bounds one read, so a server that sends a byte now and then
can hold a thread for as long as it likes, out of reach inside an HTTP library. A
`Guard` is one small thread that watches over the threads of a source: when one is
late it shuts its sockets down, and the blocked read returns at once. The same
stops all of them when the source is closed.

It knows nothing of HTTP. Looking up a name is not covered: that blocks in the C
library, where no socket is open yet.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

NEVER = float("inf")
"""The deadline of a thread that is not waiting for anybody."""


class Guard:
    """Shuts down the sockets of threads that are late, and of all at the end.

    Deadlines mostly move on before they are reached, so its thread sleeps until
    the nearest one it knew of, and seldom finds anything to do.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watches: list[Watch] = []
        self._wakes_at = NEVER
        self._closed = False
        self._thread: threading.Thread | None = None

    def watch(self) -> Watch:
        """Return the watch over one more thread. Ready from its first deadline on."""
        with self._changed:
            watch = Watch(self)
            self._watches.append(watch)
            if self._closed:
                watch.cut(for_good=True)
            elif self._thread is None:
                self._thread = threading.Thread(target=self._run, name="origin-guard", daemon=True)
                self._thread.start()
            return watch

    def set_deadline(self, watch: Watch, deadline: float) -> None:
        """Move a watch's deadline, in seconds of the monotonic clock."""
        with self._changed:
            watch.due_at = deadline
            if deadline < self._wakes_at:
                self._changed.notify()

    def close(self) -> None:
        """Shut down all sockets for good and end the guard's thread."""
        with self._changed:
            self._closed = True
            for watch in self._watches:
                watch.cut(for_good=True)
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                for watch in self._watches:
                    if watch.due_at <= now:
                        watch.due_at = NEVER
                        watch.cut()
                self._wakes_at = min(watch.due_at for watch in self._watches)
                self._changed.wait(min(self._wakes_at - now, threading.TIMEOUT_MAX))


class Watch:
    """One thread's deadline and its open sockets. Made by `Guard.watch`.

    Attributes
    ----------
    due_at : float
        The deadline. Changed under the guard's lock only.
    is_cut : bool
        The sockets were shut down since the last `renew`.
    """

    def __init__(self, guard: Guard) -> None:
        self.due_at = NEVER
        self.is_cut = False
        self._guard = guard
        self._for_good = False
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []

    def add(self, new: socket.socket) -> None:
        """Take in a new socket; it is shut down at once if the cut came before it."""
        with self._lock:
            self._sockets = [old for old in self._sockets if old.fileno() >= 0]
            self._sockets.append(new)
            if self.is_cut:
                _shut_down(new)

    def renew(self) -> None:
        """Let new sockets live again after a missed deadline."""
        with self._lock:
            self.is_cut = self._for_good

    def cut(self, *, for_good: bool = False) -> None:
        """Shut down all sockets, so that a blocked read returns."""
        with self._lock:
            self.is_cut = True
            self._for_good = self._for_good or for_good
            for each in self._sockets:
                _shut_down(each)

    def extend(self, timeout_s: float) -> None:
        """Let the present block take `timeout_s` seconds more, from now on."""
        self._guard.set_deadline(self, time.monotonic() + timeout_s)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time in the block."""
        left_s = self.due_at - time.monotonic()
        self._guard.set_deadline(self, NEVER)
        try:
            yield
        finally:
            self._guard.set_deadline(self, time.monotonic() + left_s)

    @contextlib.contextmanager
    def deadline(self, timeout_s: float) -> Iterator[None]:
        """Cut the thread's sockets if the block takes longer than `timeout_s` seconds."""
        self._guard.set_deadline(self, time.monotonic() + timeout_s)
        try:
            yield
        finally:
            self._guard.set_deadline(self, NEVER)


def _shut_down(each: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        # Not SSLSocket.shutdown: that drops the TLS state under the reader's feet.
        socket.socket.shutdown(each, socket.SHUT_RDWR)
