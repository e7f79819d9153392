"""The kept key: made once, private, never overwritten, never used by two nodes at once."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from libp2p.crypto.rsa import create_new_key_pair as create_rsa_key_pair
from libp2p.crypto.secp256k1 import create_new_key_pair as create_secp256k1_key_pair

from tensorswarm.p2p.host.identity import (
    KEY_FILE,
    LOCK_FILE,
    IdentityLock,
    identity_for,
    load_or_create_key,
)
from tensorswarm.store.errors import BadInput, LocalError


def test_the_key_is_made_once_and_then_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / KEY_FILE
    first = load_or_create_key(path)
    written = path.read_bytes()
    assert load_or_create_key(path) == first
    assert path.read_bytes() == written
    assert os.listdir(path.parent) == [KEY_FILE]  # nothing temporary is left


def test_two_stores_have_two_keys(tmp_path: Path) -> None:
    assert load_or_create_key(tmp_path / "a") != load_or_create_key(tmp_path / "b")


def test_only_the_owner_may_read_the_key(tmp_path: Path) -> None:
    path = tmp_path / KEY_FILE
    before = os.umask(0)
    try:
        load_or_create_key(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_that_others_could_read_is_made_private(tmp_path: Path) -> None:
    path = tmp_path / KEY_FILE
    key_pair = load_or_create_key(path)
    path.chmod(0o644)
    assert load_or_create_key(path) == key_pair
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def _ed25519_file(tmp_path: Path) -> bytes:
    load_or_create_key(tmp_path / "good")
    return (tmp_path / "good").read_bytes()


@pytest.mark.parametrize(
    "make",
    [
        lambda good: b"",
        lambda good: good[:-1],
        lambda good: good + b"\n",
        lambda good: good + b"\x1a\x01x",  # a protobuf field too many
        lambda good: b"\0" * 36,
        lambda good: good * 1000,
        lambda good: create_rsa_key_pair(2048).private_key.serialize(),
        lambda good: create_secp256k1_key_pair().private_key.serialize(),
    ],
    ids=["empty", "short", "long", "extra field", "zeros", "huge", "rsa", "secp256k1"],
)
def test_a_file_that_is_not_a_key_is_refused_and_left_alone(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / KEY_FILE
    bad = make(_ed25519_file(tmp_path))
    path.write_bytes(bad)
    with pytest.raises(BadInput, match="move it away"):
        load_or_create_key(path)
    assert path.read_bytes() == bad


def test_a_key_that_appeared_in_the_meantime_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / KEY_FILE
    other = load_or_create_key(tmp_path / "other")
    make_link = os.link

    def link_after_somebody_else(source: Path, target: Path) -> None:
        (tmp_path / "other").rename(path)
        make_link(source, target)

    monkeypatch.setattr(os, "link", link_after_somebody_else)
    assert load_or_create_key(path) == other


def test_a_file_system_without_hard_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_source: Path, _target: Path) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    key_pair = load_or_create_key(tmp_path / KEY_FILE)
    assert load_or_create_key(tmp_path / KEY_FILE) == key_pair
    assert os.listdir(tmp_path) == [KEY_FILE]


def test_a_folder_that_cannot_be_made_is_our_own_trouble(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LocalError, match="cannot"):
        load_or_create_key(tmp_path / "file" / KEY_FILE)
    with pytest.raises(LocalError, match="cannot lock"):
        identity_for(tmp_path / "file")


def test_a_second_user_of_the_store_gets_another_identity(tmp_path: Path) -> None:
    kept, lock = identity_for(tmp_path)
    assert lock is not None
    other, no_lock = identity_for(tmp_path)
    assert no_lock is None
    assert other != kept
    lock.release()
    lock.release()  # twice does no harm
    again, lock = identity_for(tmp_path)
    assert again == kept
    assert lock is not None
    lock.release()


def test_the_lock_binds_processes_and_ends_with_its_holder(tmp_path: Path) -> None:
    program = (
        "import fcntl, os, sys\n"
        "file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / LOCK_FILE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert IdentityLock.acquire(tmp_path) is None
    finally:
        holder.kill()
        holder.communicate()
    with IdentityLock.acquire(tmp_path) as lock:  # type: ignore[union-attr]
        assert lock is not None


def test_a_bad_key_file_does_not_leave_the_store_locked(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_bytes(b"not a key")
    with pytest.raises(BadInput):
        identity_for(tmp_path)
    lock = IdentityLock.acquire(tmp_path)
    assert lock is not None
    lock.release()
