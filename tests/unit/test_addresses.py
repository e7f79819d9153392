"""Addresses: what is read, what is refused and with which words, what is believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.peer.id import ID

from tensorswarm.p2p.host.addresses import (
    MAX_ADDRESS_TEXT,
    MAX_ADDRS_PER_PEER,
    PeerAddress,
    Scope,
    advertised,
    believable,
    multiaddr_of,
    parse_listen,
    parse_peer_address,
    parse_peer_id,
    peer_id_bytes,
    peer_id_text,
    plain,
    relay_of,
    scope_of,
    tcp_host,
    with_peer_id,
    without_peer_id,
)
from tensorswarm.store.errors import BadInput

ED25519_ID = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
ED25519_CID = "bafzaajaiaejcal72gwuz2or47oyxxn6b3rkwdmmkrxgkjxzy3rqt5kczyn7lcm3l"
RSA_ID = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
CIRCUIT_AT_A_RELAY = f"/ip4/192.0.2.7/tcp/1/p2p/{ED25519_ID}/p2p-circuit"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/tcp/0"),
        ("/ip6/::/tcp/4001", "/ip6/::/tcp/4001"),
        ("/ip6/0:0::1/tcp/4001", "/ip6/::1/tcp/4001"),
        ("127.0.0.1:4001", "/ip4/127.0.0.1/tcp/4001"),
        ("[::1]:4001", "/ip6/::1/tcp/4001"),
        ("localhost:0", "/ip4/127.0.0.1/tcp/0"),
        (":4001", "/ip4/0.0.0.0/tcp/4001"),
        ("*:4001", "/ip4/0.0.0.0/tcp/4001"),
    ],
)
def test_listen_addresses_are_read(text: str, expected: str) -> None:
    assert parse_listen(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no port"),
        ("127.0.0.1", "no port"),
        ("127.0.0.1:", "not a port"),
        ("127.0.0.1:65536", "not a port"),
        ("127.0.0.1:-1", "not a port"),
        ("127.0.0.1:４001", "not a port"),
        ("example.org:4001", "not an IP address"),
        ("::1:4001", "brackets"),
        ("010.0.0.1:1", "not an IP address"),
        ("/ip4/::1/tcp/1", "not an ip4 address"),
        ("/ip4/0.0.0.0/udp/4001/quic-v1", "only plain TCP"),
        ("/ip4/0.0.0.0/tcp/4001/ws", "only plain TCP"),
        ("/dns/example.org/tcp/1", "not an IP address"),
        ("/ip6/fe80::1%eth0/tcp/1", "zone"),
        (f"/ip4/0.0.0.0/tcp/1/p2p/{ED25519_ID}", "does not belong"),
        ("/ip4/0.0.0.0", "names host and port"),
        ("x" * (MAX_ADDRESS_TEXT + 1), "at most"),
    ],
)
def test_bad_listen_addresses_are_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason) as caught:
        parse_listen(text)
    line = str(caught.value)
    assert "\n" not in line
    assert "for example /ip4/0.0.0.0/tcp/4001" in line
    assert len(line) < 300


@pytest.mark.parametrize("peer_id", [ED25519_ID, RSA_ID])
def test_a_peer_address_is_taken_apart(peer_id: str) -> None:
    text = f"/ip4/192.0.2.7/tcp/4001/p2p/{peer_id}"
    assert parse_peer_address(text) == PeerAddress(peer_id, ("/ip4/192.0.2.7/tcp/4001",))


def test_names_keep_their_kind_and_old_and_cid_forms_are_read() -> None:
    got = parse_peer_address(f"/dns4/seed.example.org/tcp/80/ipfs/{ED25519_CID}")
    assert got == PeerAddress(ED25519_ID, ("/dns4/seed.example.org/tcp/80",))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("/ip4/192.0.2.7/tcp/4001", "peer id is missing"),
        ("/ip4/192.0.2.7/tcp/4001/p2p/", "not a peer id"),
        ("/ip4/192.0.2.7/tcp/4001/p2p/12D3KooW", "not a peer id"),
        ("/ip4/192.0.2.7/tcp/4001/p2p/bafkreib", "not a peer id"),
        (f"/p2p/{ED25519_ID}", "names host and port"),
        (f"/ip4/192.0.2.7/tcp/0/p2p/{ED25519_ID}", "port 0"),
        (f"/ip4/0.0.0.0/tcp/1/p2p/{ED25519_ID}", "cannot be dialled"),
        (f"/ip4/224.0.0.1/tcp/1/p2p/{ED25519_ID}", "cannot be dialled"),
        (f"/ip4/192.0.2.7/udp/1/quic-v1/p2p/{ED25519_ID}", "only plain TCP"),
        (f"/ip4/192.0.2.7/tcp/1/p2p/{ED25519_ID}/p2p-circuit", "no peer id at its end"),
        (f"/ip4/192.0.2.7/tcp/1/p2p-circuit/p2p/{ED25519_ID}", "the peer id is missing"),
        (f"{CIRCUIT_AT_A_RELAY}/p2p/{RSA_ID}/p2p-circuit/p2p/{RSA_ID}", "is not a peer id"),
        (f"/dns/a..b/tcp/1/p2p/{ED25519_ID}", "not a host name"),
        (f"/dns/1.2.3.4/tcp/1/p2p/{ED25519_ID}", "not a host name"),
        (f"/unix/x/tcp/1/p2p/{ED25519_ID}", "is not a host"),
        ("seed.example.org:4001", "names host and port"),
        ("\n\x1b[31m", "names host and port"),
    ],
)
def test_bad_peer_addresses_are_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason) as caught:
        parse_peer_address(text)
    line = str(caught.value)
    assert "for example /ip4/" in line
    assert line.isprintable()


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_listen, parse_peer_address, tcp_host):
        try:
            parse(text)
        except BadInput as error:
            assert str(error).isprintable()  # both outcomes are fine


@given(
    st.ip_addresses().filter(lambda ip: getattr(ip, "scope_id", None) is None),
    st.integers(0, 65535),
)
def test_host_and_port_come_back(ip: object, port: int) -> None:
    assert tcp_host(multiaddr_of(str(ip), port)) == (str(ip), port)
    assert parse_listen(multiaddr_of(str(ip), port)) == multiaddr_of(str(ip), port)


@given(st.binary(min_size=1, max_size=42))
def test_peer_ids_come_back_and_are_what_libp2p_writes(key: bytes) -> None:
    raw = b"\0" + bytes([len(key)]) + key
    text = peer_id_text(raw)
    assert text == ID(raw).to_base58()
    assert peer_id_bytes(text) == raw
    assert parse_peer_id(text) == text


@given(st.binary(max_size=80))
def test_other_bytes_are_no_peer_id(raw: bytes) -> None:
    if not raw.startswith((b"\0", b"\x12\x20")):
        with pytest.raises(ValueError, match="not a peer id"):
            peer_id_text(raw)


def test_a_peer_id_is_put_on_and_taken_off() -> None:
    addr = "/ip4/192.0.2.7/tcp/1"
    assert with_peer_id(addr, ED25519_ID) == f"{addr}/p2p/{ED25519_ID}"
    assert with_peer_id(f"{addr}/p2p/{RSA_ID}", ED25519_ID) == f"{addr}/p2p/{ED25519_ID}"
    assert without_peer_id(f"{addr}/p2p/{RSA_ID}") == addr


def test_an_address_has_one_usual_form() -> None:
    assert plain(f"/ip6/0:0::1/tcp/007/p2p/{ED25519_ID}") == "/ip6/::1/tcp/7"
    assert plain("/dns6/example.org/tcp/7") == "/dns6/example.org/tcp/7"
    with pytest.raises(BadInput, match="not a TCP address"):
        plain("/ip4/192.0.2.7/udp/7")


@pytest.mark.parametrize(
    ("host", "scope"),
    [
        ("127.0.0.1", Scope.LOOPBACK),
        ("::1", Scope.LOOPBACK),
        ("::ffff:127.0.0.1", Scope.LOOPBACK),
        ("10.0.0.1", Scope.PRIVATE),
        ("fd00::2", Scope.PRIVATE),
        ("100.64.0.1", Scope.PRIVATE),
        ("169.254.169.254", Scope.LINK_LOCAL),
        ("::ffff:169.254.169.254", Scope.LINK_LOCAL),
        ("fe80::1", Scope.LINK_LOCAL),
        ("0.0.0.0", Scope.UNUSABLE),
        ("0.0.0.1", Scope.UNUSABLE),
        ("::", Scope.UNUSABLE),
        ("224.0.0.1", Scope.UNUSABLE),
        ("255.255.255.255", Scope.UNUSABLE),
        ("8.8.8.8", Scope.GLOBAL),
        ("2606:4700::1", Scope.GLOBAL),
        ("example.org", Scope.GLOBAL),
    ],
)
def test_scopes(host: str, scope: Scope) -> None:
    assert scope_of(host) is scope


CLAIMED = (
    "/ip4/127.0.0.1/tcp/22",
    "/ip4/169.254.169.254/tcp/80",
    "/ip4/0.0.0.0/tcp/4001",
    "/dns/intranet.example/tcp/80",
    "/ip4/10.0.0.9/tcp/4001",
    "/ip4/8.8.8.8/tcp/4001",
    "/ip4/8.8.8.8/tcp/0",
    "/ip4/8.8.8.8/udp/4001/quic-v1",
    f"/ip4/8.8.8.8/tcp/4001/p2p/{ED25519_ID}",
)


def test_a_stranger_cannot_send_us_to_loopback_names_or_metadata_services() -> None:
    assert believable(CLAIMED, told_by="8.8.4.4") == ("/ip4/8.8.8.8/tcp/4001",)
    assert believable(CLAIMED, told_by=None) == ("/ip4/8.8.8.8/tcp/4001",)


@pytest.mark.parametrize("teller", ["192.168.1.7", "fe80::1"])
def test_a_peer_on_the_local_network_may_name_private_addresses(teller: str) -> None:
    assert believable(CLAIMED, told_by=teller) == (
        "/ip4/10.0.0.9/tcp/4001",
        "/ip4/8.8.8.8/tcp/4001",
    )


def test_a_peer_on_this_machine_may_name_loopback_addresses() -> None:
    assert believable(CLAIMED, told_by="127.0.0.1") == (
        "/ip4/127.0.0.1/tcp/22",
        "/ip4/10.0.0.9/tcp/4001",
        "/ip4/8.8.8.8/tcp/4001",
    )


def test_circuit_addresses_are_read() -> None:
    addr = f"/ip4/192.0.2.7/tcp/01/p2p/{ED25519_CID}/p2p-circuit"
    assert parse_peer_address(f"{addr}/p2p/{RSA_ID}") == PeerAddress(RSA_ID, (CIRCUIT_AT_A_RELAY,))
    assert plain(addr) == plain(f"{addr}/p2p/{RSA_ID}") == CIRCUIT_AT_A_RELAY
    assert with_peer_id(CIRCUIT_AT_A_RELAY, RSA_ID) == f"{CIRCUIT_AT_A_RELAY}/p2p/{RSA_ID}"
    assert without_peer_id(f"{CIRCUIT_AT_A_RELAY}/p2p/{RSA_ID}") == CIRCUIT_AT_A_RELAY
    assert relay_of(CIRCUIT_AT_A_RELAY) == PeerAddress(ED25519_ID, ("/ip4/192.0.2.7/tcp/1",))
    for bad in (f"{addr}/p2p/{RSA_ID}/p2p-circuit", f"{addr}x", "/p2p-circuit"):
        with pytest.raises(BadInput):
            plain(bad)


def test_a_relay_is_believed_where_a_peer_would_be() -> None:
    def circuit(host: str) -> str:
        return f"/ip4/{host}/tcp/1/p2p/{ED25519_ID}/p2p-circuit"

    claimed = [circuit(host) for host in ("127.0.0.1", "10.0.0.9", "8.8.8.8", "169.254.169.254")]
    assert believable(claimed, told_by="8.8.4.4") == (circuit("8.8.8.8"),)
    assert believable(claimed, told_by="10.0.0.1") == (circuit("10.0.0.9"), circuit("8.8.8.8"))
    many = [circuit(f"8.8.8.{number}") for number in range(1, 9)]
    assert believable([*many, "/ip4/8.8.8.8/tcp/1"], told_by=None) == (
        *many[:3],
        "/ip4/8.8.8.8/tcp/1",
    )


def test_only_so_many_addresses_of_a_peer_are_kept() -> None:
    many = [f"/ip4/8.8.8.8/tcp/{port}" for port in range(1, 1000)]
    assert believable(many, told_by="8.8.4.4") == tuple(many[:MAX_ADDRS_PER_PEER])


def test_what_is_told_leaves_out_what_nobody_else_can_reach() -> None:
    ours = [
        "/ip4/127.0.0.1/tcp/1",
        "/ip4/192.168.1.2/tcp/1",
        "/ip6/fe80::1/tcp/1",
        "/ip4/0.0.0.0/tcp/1",
    ]
    assert advertised(ours) == ("/ip4/192.168.1.2/tcp/1",)
    assert advertised(ours[:1]) == ("/ip4/127.0.0.1/tcp/1",)
    assert advertised([]) == ()
