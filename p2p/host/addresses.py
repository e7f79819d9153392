"""Network addresses as text: what people type, what peers claim, what we tell.

Purpose
-------
Read the addresses of this project (TCP multiaddrs such as
``/ip4/192.0.2.7/tcp/4001/p2p/12D3…``) and decide which of them may be dialled
and which may be told to others. Text and numbers only: no sockets, no names
looked up, no libp2p.

Rules
-----
- One transport: ``/ip4|ip6|dns|dns4|dns6/<host>/tcp/<port>``, then nothing or
  ``/p2p/<peer id>``. QUIC and WebSocket addresses are not read here.
- A *circuit* address leads through a relay: a relay's address with its peer id, then
  ``/p2p-circuit``, then nothing or ``/p2p/<peer id>``. What holds for a host of its own
  holds for the relay's. A relay behind a relay is not read.
- What a *user* gives is dialled as it stands, if it can be dialled at all.
- What a *peer* claims (DHT, identify, peer exchange) is dialled only if it is an
  IP address, not a name (a name would make us ask our resolver about anything a
  stranger likes), and no more private than the teller: a loopback address is
  believed only from someone who is on loopback too. Link-local addresses are
  never believed: cloud metadata services live there.
- What we *tell* leaves out addresses of no use elsewhere: unspecified,
  link-local, and loopback if there is anything else.
- At most `MAX_ADDRS_PER_PEER` addresses are kept of any peer, of them
  `MAX_CIRCUITS_PER_PEER` circuits.

Peer ids are the usual text (base58btc multihash, ``12D3…`` or ``Qm…``); the CID
form (``bafz…``) is read and turned into it, so that equal ids are equal texts.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from multiformats import CID

from tensorswarm.store.errors import BadInput

MAX_ADDRESS_TEXT = 512
"""Longest address read, in characters: a name of 253, an id of 64, and room."""

MAX_ADDRS_PER_PEER = 8
"""Addresses kept of one peer: a machine has few, and each costs a dial attempt."""

MAX_CIRCUITS_PER_PEER = 3
"""Circuit addresses kept of one peer: each dial costs a connection to a relay as well."""

CIRCUIT = "/p2p-circuit"

MAX_PEER_ID_TEXT = 128
"""Longest peer id read, in characters: RSA ids as CIDs have about 70."""

LISTEN_EXAMPLE = "/ip4/0.0.0.0/tcp/4001 or 0.0.0.0:4001"
PEER_EXAMPLE = "/ip4/192.0.2.7/tcp/4001/p2p/12D3KooW…"

_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")
_MAX_NAME = 253
_PORT = re.compile(r"[0-9]{1,5}")
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_SHA256_PREFIX = b"\x12\x20"
_SHA256_LENGTH = 34
_MAX_INLINE_KEY = 42  # longest public key that libp2p writes into the id itself

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Scope(IntEnum):
    """How far an address reaches; a larger number reaches further."""

    UNUSABLE = 0
    LINK_LOCAL = 1
    LOOPBACK = 2
    PRIVATE = 3
    GLOBAL = 4


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Who a peer is and where it may be reached.

    Attributes
    ----------
    peer_id : str
        The peer's id, in base58btc.
    addrs : tuple of str
        Multiaddrs without the peer's own ``/p2p/``.
    """

    peer_id: str
    addrs: tuple[str, ...]


def parse_listen(text: str) -> str:
    """Read an address to listen on.

    Parameters
    ----------
    text : str
        ``/ip4/0.0.0.0/tcp/0``, or ``host:port`` with an IP address,
        ``localhost`` or nothing (every IPv4 interface) as the host. Port 0
        stands for any free port.

    Returns
    -------
    str
        The multiaddr.

    Raises
    ------
    BadInput
        The text is not such an address.
    """
    try:
        if text.startswith("/"):
            host, port, peer_id = _split(text)
            if peer_id is not None:
                raise ValueError("the part /p2p/… does not belong there")
        else:
            host, port = _split_host_port(text)
        return multiaddr_of(str(_ip(host)), port)
    except ValueError as error:
        raise BadInput(
            f"cannot listen on {_shown(text)}: {error}; write for example {LISTEN_EXAMPLE}"
        ) from error


def is_loopback(addr: str) -> bool:
    """Tell whether a multiaddr leads to this machine itself."""
    try:
        return ipaddress.ip_address(tcp_host(addr)[0]).is_loopback
    except (BadInput, ValueError):
        return False


def parse_peer_address(text: str) -> PeerAddress:
    """Read the address of a peer.

    Parameters
    ----------
    text : str
        A TCP or circuit multiaddr that ends in ``/p2p/<peer id>``.

    Raises
    ------
    BadInput
        The text is not such an address, or nobody can be reached at it.
    """
    if is_circuit(text):
        return _parse_circuit_peer(text)
    try:
        host, port, peer_id = _split(text)
        if peer_id is None:
            raise ValueError("the peer id is missing (/p2p/… at the end)")
        if port == 0:
            raise ValueError("port 0 cannot be dialled")
        if not _is_name(host) and scope_of(host) is Scope.UNUSABLE:
            raise ValueError(f"{host} cannot be dialled")
        return PeerAddress(parse_peer_id(peer_id), (multiaddr_of(host, port, _kind(text)),))
    except ValueError as error:
        raise BadInput(
            f"not the address of a peer: {_shown(text)}: {error}; write for example {PEER_EXAMPLE}"
        ) from error


def _parse_circuit_peer(text: str) -> PeerAddress:
    relay, _, rest = text.partition(CIRCUIT)
    through = parse_peer_address(relay)
    try:
        if not rest.startswith("/p2p/"):
            raise ValueError("no peer id at its end")
        peer_id = parse_peer_id(rest.removeprefix("/p2p/"))
    except ValueError as error:
        raise BadInput(
            f"not the address of a peer: {_shown(text)}: {error}; write for example "
            f"{PEER_EXAMPLE}{CIRCUIT}/p2p/12D3KooW…"
        ) from error
    return PeerAddress(peer_id, (circuit_through(through),))


def is_circuit(addr: str) -> bool:
    """Tell whether a multiaddr leads through a relay."""
    return CIRCUIT in addr


def circuit_through(relay: PeerAddress) -> str:
    """Return the circuit address through a relay, without a peer's id at its end."""
    return f"{relay.addrs[0]}/p2p/{relay.peer_id}{CIRCUIT}"


def relay_of(addr: str) -> PeerAddress:
    """Return the relay that a circuit address leads through.

    Raises
    ------
    BadInput
        The address cannot be read.
    """
    return parse_peer_address(addr.partition(CIRCUIT)[0])


def parse_peer_id(text: str) -> str:
    """Return a peer id in its base58btc form.

    Raises
    ------
    ValueError
        The text is not a peer id.
    """
    if not text or len(text) > MAX_PEER_ID_TEXT or not text.isascii():
        raise ValueError("that is not a peer id")
    try:
        if text.startswith(("1", "Qm")):
            raw = peer_id_bytes(text)
        else:
            cid = CID.decode(text)
            raw = bytes(cid.digest) if cid.codec.name == "libp2p-key" else b""
        return peer_id_text(raw)
    except Exception as error:  # the library raises many kinds; all mean "not an id"
        raise ValueError(f"{_shown(text)} is not a peer id") from error


@lru_cache(maxsize=4_096)  # the same few are named in each answer of the DHT
def peer_id_text(raw: bytes) -> str:
    """Return a binary peer id as text, in base58btc.

    Raises
    ------
    ValueError
        It is neither a SHA-256 multihash nor one that holds a short key itself.
    """
    inline = raw[:1] == b"\0" and 2 < len(raw) <= 2 + _MAX_INLINE_KEY and raw[1] == len(raw) - 2
    hashed = raw[:2] == _SHA256_PREFIX and len(raw) == _SHA256_LENGTH
    if not inline and not hashed:
        raise ValueError("not a peer id")
    number = int.from_bytes(raw, "big")
    digits = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(_BASE58[digit])
    zeros = len(raw) - len(raw.lstrip(b"\0"))
    return _BASE58[0] * zeros + "".join(reversed(digits))


def peer_id_bytes(peer_id: str) -> bytes:
    """Return a peer id in base58btc as bytes: 3 µs, a tenth of what multiformats takes.

    Raises
    ------
    ValueError
        The text is not base58btc.
    """
    number = 0
    for char in peer_id:
        number = number * 58 + _BASE58.index(char)
    zeros = len(peer_id) - len(peer_id.lstrip(_BASE58[0]))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")


def tcp_host(addr: str) -> tuple[str, int]:
    """Return host and port of a TCP multiaddr.

    Raises
    ------
    BadInput
        The text is not a TCP multiaddr.
    """
    try:
        host, port, _peer_id = _split(addr)
    except ValueError as error:
        raise BadInput(f"not a TCP address: {_shown(addr)}: {error}") from error
    return host, port


def multiaddr_of(host: str, port: int, kind: str = "dns") -> str:
    """Write a multiaddr; `kind` says which sort of name a host name is."""
    if _is_name(host):
        return f"/{kind}/{host}/tcp/{port}"
    return f"/ip{_ip(host).version}/{_ip(host)}/tcp/{port}"


def with_peer_id(addr: str, peer_id: str) -> str:
    """Return a multiaddr with ``/p2p/<peer id>`` at its end."""
    return f"{without_peer_id(addr)}/p2p/{peer_id}"


def without_peer_id(addr: str) -> str:
    """Return a multiaddr without the ``/p2p/`` of the peer that it leads to."""
    relay, circuit, _ = addr.partition(CIRCUIT)
    return relay + circuit if circuit else addr.partition("/p2p/")[0]


def plain(addr: str) -> str:
    """Return a TCP or circuit multiaddr in its one usual form, without the peer's id.

    Raises
    ------
    BadInput
        The text is neither.
    """
    if is_circuit(addr):
        _, _, rest = addr.partition(CIRCUIT)
        if (rest and not rest.startswith("/p2p/")) or rest.count("/") > 2:
            raise BadInput(f"not a circuit address: {_shown(addr)}")
        return circuit_through(relay_of(addr))
    return _plain_tcp(addr)


@lru_cache(maxsize=4_096)  # as `scope_of`; what is too long raises and is not remembered
def _plain_tcp(addr: str) -> str:
    return multiaddr_of(*tcp_host(addr), kind=_kind(addr))


@lru_cache(maxsize=4_096)  # asked for each address in each answer of the DHT
def scope_of(host: str) -> Scope:
    """Tell how far an IP address reaches; names count as global.

    Of the special ranges (RFC 6890) those that no single machine answers at
    are unusable: unspecified, 0.0.0.0/8, multicast, broadcast, reserved.
    """
    if _is_name(host):
        return Scope.GLOBAL
    ip = _ip(host)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_loopback:
        return Scope.LOOPBACK
    if ip.is_link_local:
        return Scope.LINK_LOCAL
    in_zero_net = isinstance(ip, ipaddress.IPv4Address) and int(ip) >> 24 == 0
    if ip.is_unspecified or ip.is_multicast or ip.is_reserved or in_zero_net:
        return Scope.UNUSABLE
    return Scope.GLOBAL if ip.is_global else Scope.PRIVATE


def believable(addrs: Iterable[str], told_by: str | None) -> tuple[str, ...]:
    """Choose, of the addresses a peer claims, those that may be dialled.

    Parameters
    ----------
    addrs : iterable of str
        Multiaddrs, from anybody; unreadable ones are left out, and no more
        than `MAX_ADDRS_PER_PEER` of the rest are kept.
    told_by : str or None
        The IP address of whoever told us, as we see it; None if that is not known.

    Returns
    -------
    tuple of str
        Multiaddrs without ``/p2p/``, each once, in the order given.
    """
    # Nobody is told of addresses further inside than the teller itself is seen to be.
    innermost = Scope.GLOBAL if told_by is None else scope_of(told_by)
    if innermost is Scope.LINK_LOCAL:
        innermost = Scope.PRIVATE
    kept: dict[str, None] = {}
    circuits = 0
    for addr in addrs:
        if len(kept) == MAX_ADDRS_PER_PEER:
            break
        try:
            host, port, _peer_id = _split(addr.partition(CIRCUIT)[0])
            told = plain(addr)
        except (ValueError, BadInput):
            continue  # another transport, or nonsense: of no use to us
        if port == 0 or _is_name(host):
            continue
        if is_circuit(told):
            circuits += 1
            if circuits > MAX_CIRCUITS_PER_PEER:
                continue
        if innermost is not Scope.UNUSABLE and scope_of(host) >= innermost:
            kept[told] = None
    return tuple(kept)


def advertised(addrs: Iterable[str]) -> tuple[str, ...]:
    """Choose, of our own addresses, those worth telling to others.

    Loopback addresses are told only if there is nothing else: then all our
    peers are on this machine.
    """
    readable = [(addr, scope_of(tcp_host(addr)[0])) for addr in addrs]
    told = [addr for addr, scope in readable if scope >= Scope.PRIVATE]
    return tuple(told or [addr for addr, scope in readable if scope is Scope.LOOPBACK])


@lru_cache(maxsize=4_096)  # as `_plain_tcp`
def _split(text: str) -> tuple[str, int, str | None]:
    """Take a multiaddr apart: host, port, peer id. ValueError says what is wrong."""
    if len(text) > MAX_ADDRESS_TEXT:
        raise ValueError(f"{len(text)} characters, at most {MAX_ADDRESS_TEXT}")
    parts = text.split("/")
    if len(parts) < 5 or parts[0]:
        raise ValueError("a multiaddr names host and port, as in /ip4/192.0.2.7/tcp/4001")
    kind, host, transport, port = parts[1:5]
    rest = parts[5:]
    if transport != "tcp" or rest[:1] not in ([], ["p2p"], ["ipfs"]):
        raise ValueError("only plain TCP addresses are supported")
    if len(rest) not in (0, 2):
        raise ValueError("there is more after the peer id, or nothing where it should be")
    if kind in ("ip4", "ip6"):
        ip = _ip(host)
        if ip.version != int(kind[2]):
            raise ValueError(f"{host} is not an {kind} address")
        host = str(ip)
    elif kind not in ("dns", "dns4", "dns6"):
        raise ValueError(f"/{kind[:20]}/ is not a host: use ip4, ip6 or dns")
    elif not _is_name(host):
        raise ValueError(f"{_shown(host)} is not a host name")
    return host, _port(port), (rest[1] if rest else None)


def _split_host_port(text: str) -> tuple[str, int]:
    if len(text) > MAX_ADDRESS_TEXT:
        raise ValueError(f"{len(text)} characters, at most {MAX_ADDRESS_TEXT}")
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError("there is no port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("write an IPv6 address in brackets, as in [::1]:4001")
    names = {"": "0.0.0.0", "*": "0.0.0.0", "localhost": "127.0.0.1"}
    return names.get(host, host), _port(port)


def _ip(text: str) -> IPAddress:
    try:
        ip = ipaddress.ip_address(text)
    except ValueError as error:
        raise ValueError(f"{_shown(text)} is not an IP address") from error
    if isinstance(ip, ipaddress.IPv6Address) and ip.scope_id is not None:
        raise ValueError("IPv6 addresses with a zone are not supported")
    return ip


def _port(text: str) -> int:
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise ValueError(f"{_shown(text)} is not a port")
    return int(text)


def _is_name(host: str) -> bool:
    """Tell whether this is a host name and not an IP address."""
    if len(host) > _MAX_NAME or not _NAME.fullmatch(host):
        return False
    last = host.rstrip(".").rpartition(".")[2]
    return not last.isdigit()  # all digits at the end: an IPv4 address, or a bad one


def _kind(text: str) -> str:
    """Return which sort of name a multiaddr starts with (``dns``, ``dns4``, ``dns6``)."""
    return text.split("/", 2)[1]


def _shown(text: str) -> str:
    """Quote text for an error line: one line, not too long."""
    return repr(text if len(text) <= 80 else text[:77] + "…")
