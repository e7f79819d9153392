"""DCUtR without sockets: messages as others write them, turns, the moment, back-off."""

from __future__ import annotations

import pytest
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch as TheirPunch
from multiaddr import Multiaddr

from tensorswarm.p2p.reach import dcutr, dcutr_wire
from tensorswarm.p2p.reach.dcutr import Answerer, BackOffs, Beginner, Dial, HolePunch, Kind
from tensorswarm.store.errors import ProtocolError

OURS = ("/ip4/203.0.113.9/tcp/4001", "/ip6/2001:db8::9/tcp/4001")
THEIRS = ("/ip4/198.51.100.4/tcp/50123",)


def test_messages_are_those_of_libp2p() -> None:
    written = dcutr_wire.encode(HolePunch(Kind.CONNECT, OURS))
    read = TheirPunch()
    read.ParseFromString(written)
    assert read.type == TheirPunch.CONNECT
    assert [str(Multiaddr(raw)) for raw in read.ObsAddrs] == list(OURS)
    assert read.SerializeToString() == written
    assert dcutr_wire.parse(written) == HolePunch(Kind.CONNECT, OURS)
    assert (
        dcutr_wire.encode(HolePunch(Kind.SYNC))
        == TheirPunch(type=TheirPunch.SYNC).SerializeToString()
    )


def test_addresses_of_other_transports_are_left_out() -> None:
    peer = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
    addrs = (
        "/ip4/203.0.113.9/udp/4001/quic-v1",
        f"/ip4/203.0.113.9/tcp/4001/p2p/{peer}",
        f"/ip4/203.0.113.9/tcp/4001/p2p/{peer}/p2p-circuit",
        "/ip4/203.0.113.9/tcp/443/ws",
        "/dns4/example.com/tcp/4001",
        "/ip4/203.0.113.9/tcp/0",
        "/ip6/2001:db8::9/tcp/4001",
        "/ip4/203.0.113.9/tcp/4001",
    )
    message = TheirPunch(
        type=TheirPunch.CONNECT, ObsAddrs=[Multiaddr(addr).to_bytes() for addr in addrs]
    )
    message.ObsAddrs.append(b"\x04\x01")
    assert dcutr_wire.parse(message.SerializeToString()).addrs == OURS


def test_no_more_addresses_are_read_than_a_host_has() -> None:
    raw = [Multiaddr(f"/ip4/203.0.113.9/tcp/{port}").to_bytes() for port in range(1, 100)]
    message = TheirPunch(type=TheirPunch.CONNECT, ObsAddrs=raw)
    assert len(dcutr_wire.parse(message.SerializeToString()).addrs) == dcutr_wire.MAX_ADDRS


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08",
        b"\x08\x05",
        b"\x08" + b"\xff" * 9 + b"\x7f",
        b"\x12\x05ab",
        b"\x0b",
        b"\x08\x64" + b"\x12\x00" * 3000,
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        dcutr_wire.parse(data)


def test_both_dial_at_the_same_moment() -> None:
    one_way_s = 0.08
    b, a = Beginner(OURS), Answerer(THEIRS)
    connect = b.connect(100.0)
    answer = a.receive(100.0 + one_way_s, connect)
    assert isinstance(answer, HolePunch)
    sync, theirs = b.receive(100.0 + 2 * one_way_s, answer)
    ours = a.receive(100.0 + 3 * one_way_s, sync)
    assert isinstance(ours, Dial)
    assert ours.at == pytest.approx(theirs.at)
    assert (ours.addrs, ours.as_client) == (OURS, True)
    assert (theirs.addrs, theirs.as_client) == (THEIRS, False)


def test_a_stream_serves_several_attempts() -> None:
    a = Answerer(THEIRS)
    for _ in range(2):
        assert isinstance(a.receive(1.0, HolePunch(Kind.CONNECT, OURS)), HolePunch)
        assert isinstance(a.receive(2.0, HolePunch(Kind.SYNC)), Dial)


def test_messages_out_of_turn_are_refused() -> None:
    with pytest.raises(ProtocolError, match="SYNC out of its turn"):
        Answerer(THEIRS).receive(1.0, HolePunch(Kind.SYNC))
    twice = Answerer(THEIRS)
    twice.receive(1.0, HolePunch(Kind.CONNECT))
    with pytest.raises(ProtocolError, match="CONNECT out of its turn"):
        twice.receive(1.0, HolePunch(Kind.CONNECT))
    with pytest.raises(ProtocolError, match="where CONNECT should come"):
        Beginner(OURS).receive(1.0, HolePunch(Kind.CONNECT))
    b = Beginner(OURS)
    b.connect(1.0)
    with pytest.raises(ProtocolError, match="where CONNECT should come"):
        b.receive(1.1, HolePunch(Kind.SYNC))


def test_a_round_trip_without_end_is_refused() -> None:
    b = Beginner(OURS)
    b.connect(1.0)
    with pytest.raises(ProtocolError, match="round trip"):
        b.receive(1.1 + dcutr.MAX_ROUND_TRIP_S, HolePunch(Kind.CONNECT, THEIRS))


def test_who_cannot_be_reached_is_left_in_peace_longer_each_time() -> None:
    pauses = BackOffs()
    assert pauses.may_try(0.0, "x")
    assert [pauses.failed(0.0, "x") for _ in range(5)] == [60.0, 300.0, 1800.0, 1800.0, 1800.0]
    assert not pauses.may_try(1799.0, "x")
    assert pauses.may_try(1800.0, "x")
    pauses.succeeded("x")
    assert pauses.failed(0.0, "x") == 60.0


def test_back_offs_are_bounded() -> None:
    pauses = BackOffs()
    for number in range(dcutr.MAX_BACK_OFFS + 1):
        pauses.failed(0.0, str(number))
    assert pauses.may_try(1.0, "0")
    assert not pauses.may_try(1.0, "1")
