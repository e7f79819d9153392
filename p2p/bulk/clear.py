"""Bulk connections that leave TLS once it has proved who is there: ``--bulk clear``.

Purpose: between two nodes on one machine, encryption protects against nobody and costs a
third of the processor time. In a private network it is for its owner to say whether the
wires are his own. There the bytes may go in the clear, straight from the page cache into
the socket (``sendfile``).

Rules
- Off by default. Each side must have opted in, and either have a private network's key, or
  see both ends of the connection at a loopback address. A side that has not, or does not,
  offers nothing else than TLS.
- Every connection begins with the whole TLS handshake, so both peer ids are proved as
  always. Both sides name `CLEAR_PROTOCOL` in it (ALPN), which the handshake protects: an
  attacker on the way can neither add nor remove it.
- Then, inside TLS, each side tells a mark. In a private network it is a digest of the key
  and of both peer ids (`network_mark`); elsewhere of the machine's start, and of both ends'
  addresses and ports (`place_mark`). Only if both are the same do they leave TLS, with a
  close-notify each, and go on with the same requests and answers on the same TCP
  connection. If they are not, the connection stays in TLS: the two are not of one network,
  or there is a forwarder between them, and perhaps a network.
- A connection never returns to TLS, and none begins without it.

What it does not do: hide bytes from this machine's administrator, who alone can read or
change loopback traffic, and could read the store; or, in a private network, from whoever
can listen to its wires. Verification is the receiver's, as always.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import ssl
import time

from tensorswarm.store.digest import digest_of
from tensorswarm.store.errors import LocalError, ProtocolError
from tensorswarm.store.place import boot_identity
from tensorswarm.store.reader import FileReader, ObjectReader

from .tls import CLEAR_PROTOCOL, BulkIdentity

LEAST_FILE_BYTES = 64 << 10
"""Shorter ranges are collected in the buffer, where several cost one system call."""

FILE_SLICE_BYTES = 512 << 10
"""Bytes given to the kernel at once: more than a socket's buffer takes saves nothing."""

_SHORTEST_WAIT_S = 0.001  # a timeout of 0 would mean "do not wait at all"


def context_for(
    identity: BulkIdentity, sock: socket.socket, *, server_side: bool
) -> ssl.SSLContext:
    """Return the TLS context for a connected socket: one that offers to leave TLS, or not."""
    if identity.may_clear and (identity.network_key is not None or is_on_loopback(sock)):
        return identity.clear_server_context if server_side else identity.clear_client_context
    return identity.server_context if server_side else identity.client_context


def is_on_loopback(sock: socket.socket) -> bool:
    """Tell whether both ends of a connected socket are at loopback addresses."""
    try:
        return all(_address(end).is_loopback for end in (sock.getsockname(), sock.getpeername()))
    except (OSError, ValueError):
        return False


def agree(
    secured: ssl.SSLSocket,
    identity: BulkIdentity,
    peer_id: str,
    deadline: float,
    *,
    server_side: bool,
) -> bool:
    """Settle, inside TLS, whether this connection leaves it; both sides come to the same.

    Parameters
    ----------
    secured : ssl.SSLSocket
        After the handshake.
    identity : BulkIdentity
        Ours.
    peer_id : str
        Of the other side, as it was proved.
    deadline : float
        As of `time.monotonic`.
    server_side : bool
        Which end this is.

    Raises
    ------
    ProtocolError
        The peer closed the connection instead.
    OSError
        The connection broke, or the time is over.
    """
    if secured.selected_alpn_protocol() != CLEAR_PROTOCOL:
        return False
    mine = _mark(secured, identity, peer_id, server_side=server_side)
    secured.settimeout(max(_SHORTEST_WAIT_S, deadline - time.monotonic()))
    secured.sendall(mine)
    theirs = b""
    while len(theirs) < len(mine):
        secured.settimeout(max(_SHORTEST_WAIT_S, deadline - time.monotonic()))
        received = secured.recv(len(mine) - len(theirs))
        if not received:
            raise ProtocolError("closed the connection before it told its place")
        theirs += received
    return theirs == mine


def _mark(
    secured: ssl.SSLSocket, identity: BulkIdentity, peer_id: str, *, server_side: bool
) -> bytes:
    turn = -1 if server_side else 1  # the client comes first
    if identity.network_key is not None:
        return network_mark(identity.network_key, *[identity.peer_id, peer_id][::turn])
    return place_mark(*[secured.getsockname(), secured.getpeername()][::turn])


def network_mark(key: bytes, client_id: str, server_id: str) -> bytes:
    """Return what two members of a private network have in common, and nobody else."""
    return digest_of(f"tensorswarm network\n{key.hex()}\n{client_id}\n{server_id}".encode())


def place_mark(client: tuple[str, int], server: tuple[str, int]) -> bytes:
    """Return what both ends of an unforwarded connection on one machine have in common.

    Parameters
    ----------
    client, server : tuple
        The two ends, as `socket.getsockname` and `socket.getpeername` tell them.

    Returns
    -------
    bytes
        A digest. Where the system does not tell its start, a mark that no other
        process has.
    """
    ends = [f"{_address(end)}/{end[1]}" for end in (client, server)]
    return digest_of("\n".join(["tensorswarm place", boot_identity(), *ends]).encode())


def end_tls(secured: ssl.SSLSocket, deadline: float) -> None:
    """End TLS in good order on both sides; `detach` is next.

    Raises
    ------
    OSError
        The peer did not end it too; ssl.SSLError and TimeoutError are such.
    """
    secured.settimeout(max(_SHORTEST_WAIT_S, deadline - time.monotonic()))
    secured.unwrap()


def detach(secured: ssl.SSLSocket) -> socket.socket:
    """Return the same TCP connection as a plain socket; never waits.

    `secured` must not be used afterwards: its descriptor has changed hands.
    """
    return socket.socket(fileno=secured.detach())


def sendable(reader: ObjectReader, length: int) -> FileReader | None:
    """Return the reader if its bytes may go from the file straight into the socket.

    Not those of adopted files: that such a file is unchanged is known only after reading
    it, and what `send_file` took is gone by then.
    """
    if length >= LEAST_FILE_BYTES and isinstance(reader, FileReader) and not reader.is_adopted:
        return reader
    return None


def send_file(sock: socket.socket, reader: FileReader, offset: int, count: int) -> int:
    """Send bytes of an object, as many of `count` as go without waiting; return how many.

    `sock` does not block, and whether the bytes are proved the caller has checked.

    Raises
    ------
    LocalError
        The disk failed.
    OSError
        The connection failed.
    """
    position, end = reader.start + offset, reader.start + offset + count
    while position < end:
        try:
            sent = os.sendfile(sock.fileno(), reader.descriptor, position, end - position)
        except BlockingIOError:
            break
        except OSError as error:
            if error.errno != errno.EIO:  # then it is the socket's
                raise
            raise LocalError(f"cannot read an object that it asked for: {error}") from error
        if not sent:
            raise LocalError("the file of an object that it asked for is too short")
        position += sent
    return position - reader.start - offset


def _address(end: tuple[str, int]) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an end's address; a server for both families sees IPv4 ones as IPv6."""
    address = ipaddress.ip_address(end[0])
    mapped = address.ipv4_mapped if address.version == 6 else None
    return mapped or address
