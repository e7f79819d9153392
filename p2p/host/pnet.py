"""Private networks: only who holds the key gets as far as a handshake.

Purpose
-------
libp2p's pre-shared key networks (specification: pnet). Below Noise and everything else,
each direction of a connection begins with a random nonce of 24 bytes and is encrypted
with XSalsa20. To whoever lacks the key it is noise, so neither the DHT nor anything else
answers strangers. Peers admitted here are the only ones that can say hello, and the bulk
plane gives bytes to nobody else.

The key file is that of Kubo (``swarm.key``)::

    /key/swarm/psk/1.0.0/
    /base16/
    <64 hexadecimal digits>

py-libp2p 0.8.1 has a pnet of its own that uses Salsa20 with a nonce of 8 bytes, which
no other implementation speaks; `host.guard` puts this one in its place.

What it does not do: authenticate bytes (Noise inside does), hide that there is a node,
or make the bulk plane's certificates secret.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import struct
from pathlib import Path

from Crypto.Cipher import Salsa20
from libp2p.abc import IRawConnection
from libp2p.io.exceptions import IncompleteReadError
from libp2p.network.connection.raw_connection import RawConnection

from tensorswarm.store.errors import BadInput, LocalError

NONCE_BYTES = 24
KEY_BYTES = 32

MAX_KEY_FILE_BYTES = 1024
"""Longest key file read; it has 95 bytes."""

_FORM = re.compile(rb"\s*/key/swarm/psk/1\.0\.0/\s+/base16/\s+([0-9a-fA-F]{64})\s*")
_ROUNDS = 20
_MASK = 0xFFFFFFFF
_SIGMA = struct.unpack("<4I", b"expand 32-byte k")


def read_key(path: Path) -> bytes:
    """Read a network's key.

    Raises
    ------
    BadInput
        The file cannot be read, or holds no such key.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_FILE_BYTES)
    except OSError as error:
        raise BadInput(f"cannot read the network's key {path}: {error.strerror}") from error
    form = _FORM.fullmatch(data)
    if form is None:
        raise BadInput(
            f"{path} is not the key of a network; `tensorswarm network-key FILE` makes one"
        )
    return bytes.fromhex(form[1].decode())


def write_new_key(path: Path) -> bytes:
    """Make a key and write it to a new file, readable by its owner alone.

    Raises
    ------
    BadInput
        There is a file of that name already.
    LocalError
        It cannot be written.
    """
    key = secrets.token_bytes(KEY_BYTES)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"/key/swarm/psk/1.0.0/\n/base16/\n{key.hex()}\n")
    except FileExistsError as error:
        raise BadInput(f"{path} exists; a network's key is never overwritten") from error
    except OSError as error:
        raise LocalError(f"cannot write {path}: {error.strerror}") from error
    return key


def fingerprint(key: bytes) -> str:
    """Return a short name of a network that does not give its key away."""
    return hashlib.sha256(b"tensorswarm network " + key).hexdigest()[:16]


def hsalsa20(key: bytes, nonce: bytes) -> bytes:
    """Derive the key of 32 bytes that XSalsa20 uses, from 16 bytes of nonce.

    D. J. Bernstein, "Extending the Salsa20 nonce" (2011), section 2.
    """
    k, n = struct.unpack("<8I", key), struct.unpack("<4I", nonce)
    s = _SIGMA
    x = [s[0], *k[:4], s[1], *n, s[2], *k[4:], s[3]]

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for target, one, other, shift in ((b, a, d, 7), (c, b, a, 9), (d, c, b, 13), (a, d, c, 18)):
            total = (x[one] + x[other]) & _MASK
            x[target] ^= (total << shift & _MASK) | total >> (32 - shift)

    for _ in range(_ROUNDS // 2):
        for column in ((0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11)):
            quarter(*column)
        for row in ((0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14)):
            quarter(*row)
    return struct.pack("<8I", *(x[i] for i in (0, 5, 10, 15, 6, 7, 8, 9)))


def xsalsa20(key: bytes, nonce: bytes) -> Salsa20.Salsa20Cipher:
    """Return the stream cipher for one direction of a connection."""
    return Salsa20.new(key=hsalsa20(key, nonce[:16]), nonce=nonce[16:])


class ProtectedConnection(RawConnection):
    """A connection under the network's key. Takes the place of py-libp2p's."""

    def __init__(self, conn: RawConnection | IRawConnection, psk: str) -> None:
        self._conn = conn
        self._key = bytes.fromhex(psk)
        self._reading: Salsa20.Salsa20Cipher | None = None
        self._writing: Salsa20.Salsa20Cipher | None = None
        self.is_initiator = conn.is_initiator
        if isinstance(conn, RawConnection):
            self.stream = conn.stream
            self._connection_type = conn._connection_type
            self._actual_addresses = conn._actual_addresses

    async def write(self, data: bytes) -> None:
        """Encrypt and send; the first time, the nonce before it."""
        prefix = b""
        if self._writing is None:
            prefix = secrets.token_bytes(NONCE_BYTES)
            self._writing = xsalsa20(self._key, prefix)
        await self._conn.write(prefix + self._writing.encrypt(data))

    async def read(self, n: int | None = None) -> bytes:
        """Receive up to `n` bytes and decrypt them; ``b""`` at the end."""
        if self._reading is None:
            nonce = b""
            while len(nonce) < NONCE_BYTES:
                part = await self._conn.read(NONCE_BYTES - len(nonce))
                if not part:
                    raise IncompleteReadError("the connection ended within its nonce")
                nonce += part
            self._reading = xsalsa20(self._key, nonce)
        data = await self._conn.read(n)
        return self._reading.decrypt(data) if data else b""

    async def close(self) -> None:
        """Close the connection beneath."""
        await self._conn.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return who is at the other end, as far as the connection beneath knows."""
        return self._conn.get_remote_address()
