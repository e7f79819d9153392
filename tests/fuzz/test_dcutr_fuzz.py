"""Damaged and invented hole punching messages: refused as such, or read soundly.

What is read names few addresses, each of which can be dialled, and is the same when it is
written and read once more.
"""

from __future__ import annotations

import os
import random

from tensorswarm.p2p.host.addresses import tcp_host
from tensorswarm.p2p.reach import dcutr_wire
from tensorswarm.p2p.reach.dcutr import HolePunch, Kind
from tensorswarm.store.errors import ProtocolError

ROUNDS = int(os.environ.get("TENSORSWARM_FUZZ_ROUNDS", "4000"))
SEEDS = [
    dcutr_wire.encode(HolePunch(Kind.SYNC)),
    dcutr_wire.encode(HolePunch(Kind.CONNECT, ("/ip4/203.0.113.9/tcp/4001",))),
    dcutr_wire.encode(
        HolePunch(Kind.CONNECT, ("/ip6/2001:db8::1/tcp/1", "/ip4/198.51.100.255/tcp/65535"))
    ),
]


def damaged(rng: random.Random, message: bytes) -> bytes:
    """Return a message with a few bytes changed, lost, added or repeated."""
    data = bytearray(message)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randint(1, 6))
        data[at:end] = rng.choice([rng.randbytes(end - at), b"", bytes(data[at:end]) * 2])
    return bytes(data)


def check(data: bytes) -> bool:
    """Read a message; tell whether it was one."""
    try:
        found = dcutr_wire.parse(data)
    except ProtocolError:
        return False
    assert len(found.addrs) <= dcutr_wire.MAX_ADDRS
    for addr in found.addrs:
        assert 0 < tcp_host(addr)[1] < 65536
    assert dcutr_wire.parse(dcutr_wire.encode(found)) == found
    return True


def test_damaged_messages_are_refused_or_sound() -> None:
    rng = random.Random(20)
    read = sum(check(damaged(rng, rng.choice(SEEDS))) for _ in range(ROUNDS))
    assert 0 < read < ROUNDS


def test_noise_is_refused_or_sound() -> None:
    rng = random.Random(21)
    for _ in range(ROUNDS):
        check(rng.randbytes(rng.randrange(64)))
    check(rng.randbytes(dcutr_wire.MAX_MESSAGE_BYTES + 1))
