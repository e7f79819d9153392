"""A node's identity: the Ed25519 key whose hash is its peer id.

Purpose
-------
Keep one key per store, so that a node is the same peer after a restart, and see
to it that no two live nodes share it: with two of one id, every peer would talk
now to the one and now to the other.

Rules
-----
- The key lies in ``identity.key`` in the store's directory, as py-libp2p writes it
  (a protobuf of key type and 32-byte seed), readable by its owner alone.
- It is written whole or not at all (temporary file, fsync, link under its name),
  and never overwritten: a file that is not a key is an error for a person to see
  to, because whoever deletes it changes who the node is.
- Whoever uses the kept key holds a lock on ``identity.lock``. A second process on
  the same store gets a new key that lives as long as the process.

What it does not do: encrypt the key, or accept key types other than Ed25519.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

from libp2p.crypto.ed25519 import Ed25519PrivateKey, create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.serialization import deserialize_private_key

from tensorswarm.store.errors import BadInput, LocalError

KEY_FILE = "identity.key"
LOCK_FILE = "identity.lock"

_MAX_KEY_FILE = 1024  # bytes: ours has 36, an RSA key (which we refuse by name) about 600
_OWNER_ONLY = 0o600


class IdentityLock:
    """The right to use a store's kept identity; held until `release`.

    Made by `acquire`. Also a context manager. The lock is the kernel's
    (``flock``): it ends with the process, however that ends.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, store_dir: Path) -> IdentityLock | None:
        """Take the lock, or return None if somebody holds it.

        Raises
        ------
        LocalError
            The directory cannot be written to.
        """
        try:
            store_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(
                store_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _OWNER_ONLY
            )
        except OSError as error:
            raise LocalError(f"cannot lock the identity in {store_dir}: {error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise LocalError(f"cannot lock the identity in {store_dir}: {error}") from error
        return cls(descriptor)

    def release(self) -> None:
        """Give the identity free; safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> IdentityLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def identity_for(store_dir: Path) -> tuple[KeyPair, IdentityLock | None]:
    """Return the key a process on this store is to use.

    Parameters
    ----------
    store_dir : Path
        The store's directory; made if it is missing.

    Returns
    -------
    KeyPair, IdentityLock or None
        The kept key and the lock that the caller holds while using it; or a new
        key and None, if another process uses the kept one.

    Raises
    ------
    BadInput
        The key file is not a key.
    LocalError
        The directory cannot be written to.
    """
    lock = IdentityLock.acquire(store_dir)
    if lock is None:
        return create_new_key_pair(), None
    try:
        return load_or_create_key(store_dir / KEY_FILE), lock
    except BaseException:
        lock.release()
        raise


def load_or_create_key(path: Path) -> KeyPair:
    """Return the Ed25519 key kept in a file, made at first use.

    Raises
    ------
    BadInput
        The file is there and is not an Ed25519 key. It is left as it is.
    LocalError
        The file can neither be read nor written.
    """
    try:
        key_pair = _load(path)
        if key_pair is None:
            _write_new(path, create_new_key_pair().private_key.serialize())
            key_pair = _load(path)  # read back: another process may have been first
    except OSError as error:
        raise LocalError(f"cannot keep the node's key in {path}: {error}") from error
    if key_pair is None:
        raise LocalError(f"the node's key vanished from {path} while it was being made")
    return key_pair


def _load(path: Path) -> KeyPair | None:
    """Read the key, or return None if there is no file."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(_MAX_KEY_FILE + 1)
            if status.st_mode & 0o077 and status.st_uid == os.geteuid():
                os.fchmod(file.fileno(), _OWNER_ONLY)
    except FileNotFoundError:
        return None
    try:
        if len(data) > _MAX_KEY_FILE:
            raise ValueError("it is too long")
        private_key = deserialize_private_key(data)
        if not isinstance(private_key, Ed25519PrivateKey):
            raise ValueError("it holds a key of another type")
        if private_key.serialize() != data:
            raise ValueError("it holds more than a key")
        return KeyPair(private_key, private_key.get_public_key())
    except Exception as error:  # protobuf, nacl and libp2p each raise their own kinds
        raise BadInput(
            f"{path} is not an Ed25519 key ({error}); move it away to get a new identity"
        ) from error


def _write_new(path: Path, data: bytes) -> None:
    """Write a file whole under its name, unless the name is taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return  # somebody else made it in the meantime: theirs stands
        except OSError:
            if path.exists():
                return
            temporary.rename(path)  # a file system without hard links (FAT, some shares)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
