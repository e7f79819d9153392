"""The key of a private network, and the cipher below everything else."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.secret import SecretBox

from tensorswarm.p2p.host.pnet import fingerprint, hsalsa20, read_key, write_new_key, xsalsa20
from tensorswarm.store.errors import BadInput


@settings(max_examples=30)
@given(st.binary(min_size=32, max_size=32), st.binary(min_size=24, max_size=24), st.binary())
def test_the_cipher_is_that_of_libsodium(key: bytes, nonce: bytes, text: bytes) -> None:
    # A secret box uses the first 32 bytes of the stream for its authenticator.
    sealed = SecretBox(key).encrypt(text, nonce).ciphertext
    assert xsalsa20(key, nonce).encrypt(bytes(32) + text)[32:] == sealed[16:]


def test_the_key_derivation_is_that_of_the_paper() -> None:
    # Bernstein, "Extending the Salsa20 nonce"; the vectors of NaCl's tests (core1).
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    expected = "1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389"
    assert hsalsa20(shared, bytes(16)).hex() == expected


def test_a_key_file_is_made_once_and_read_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "network.key"
    key = write_new_key(path)
    assert read_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith("/key/swarm/psk/1.0.0/\n/base16/\n")
    with pytest.raises(BadInput, match="never overwritten"):
        write_new_key(path)
    assert key.hex() not in fingerprint(key) and len(fingerprint(key)) == 16


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"00" * 32,
        b"/key/swarm/psk/1.0.0/\n/base16/\nabc\n",
        b"/key/swarm/psk/1.0.0/\n/base64/\n" + b"0" * 64,
        b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"0" * 65,
    ],
)
def test_what_is_no_key_is_an_error_of_the_user(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "network.key"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="is not the key of a network"):
        read_key(path)
    with pytest.raises(BadInput, match="cannot read"):
        read_key(tmp_path / "nothing")
