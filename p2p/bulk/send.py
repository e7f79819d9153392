"""Sending on a bulk connection: in turn with the others, and with a slow reader's patience.

Purpose: give bytes to a socket as fast as it takes them without waiting, and wait for the
reader outside of the gate, so that a slow one keeps nobody else from sending.

Not here: limits on the rate, and what is sent.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress

from tensorswarm.store.errors import ProtocolError
from tensorswarm.store.reader import FileReader

from ..limits.patience import Patience
from ..limits.rates import FairGate
from .clear import send_file

# Unlike the best of each system, these cost no file descriptor.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class Sender:
    """The sending side of one connection.

    Parameters
    ----------
    sock : socket.socket
        In TLS or in the clear. It is left so that it does not block.
    name : str
        Whose turn it is at the gate: the peer id.
    gate : FairGate
        Lets few send at a time.
    patience : Patience
        How long the reader may keep us waiting.
    """

    def __init__(self, sock: socket.socket, name: str, gate: FairGate, patience: Patience) -> None:
        self._socket = sock
        self._name = name
        self._gate = gate
        self._patience = patience

    def send(self, data: memoryview) -> None:
        """Send bytes from memory.

        Raises
        ------
        ProtocolError
            The reader has used up its patience.
        OSError
            The connection failed.
        """
        self._push(len(data), lambda done: self._send_now(data[done:]))

    def send_file(self, reader: FileReader, offset: int, count: int) -> None:
        """Send an object's bytes from its file; in the clear only.

        Raises
        ------
        ProtocolError, OSError
            As for `send`.
        LocalError
            The disk failed.
        """
        self._push(count, lambda done: send_file(self._socket, reader, offset + done, count - done))

    def _push(self, count: int, push_on: Callable[[int], int]) -> None:
        """Send `count` bytes; `push_on` takes how many are done, and returns how many went."""
        self._socket.settimeout(0.0)
        done = 0
        while done < count:
            with self._gate.turn(self._name, count - done):
                sent = push_on(done)
            self._patience.note(sent, 0.0)
            done += sent
            if done < count:
                self._wait_for_reader()

    def _send_now(self, data: memoryview) -> int:
        """Send as much as goes without waiting."""
        sent = 0
        # After an attempt that would block, TLS wants the same bytes again: so it gets them.
        with suppress(ssl.SSLWantWriteError, BlockingIOError):
            while sent < len(data):
                sent += self._socket.send(data[sent:])
        return sent

    def _wait_for_reader(self) -> None:
        begun = time.monotonic()
        with _Selector() as selector:
            selector.register(self._socket, selectors.EVENT_WRITE)
            if not selector.select(max(0.0, self._patience.left_s)):
                raise ProtocolError("took too little of its answer for too long")
        self._patience.note(0, time.monotonic() - begun)


def shut_down(sock: socket.socket, how: int) -> None:
    """Shut the TCP connection down, below TLS.

    `ssl.SSLSocket.shutdown` would drop the TLS state as well, and a thread still using
    the socket would go on in the clear.
    """
    socket.socket.shutdown(sock, how)
