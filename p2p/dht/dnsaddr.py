"""Bootstrap peers by name: ``/dnsaddr/<name>``, looked up in DNS.

The TXT records of ``_dnsaddr.<name>`` hold ``dnsaddr=<multiaddr>`` each (multiformats,
dnsaddr); such a multiaddr may be a ``/dnsaddr/`` itself. Whoever runs a network can so
move its bootstrap peers without telling anybody.

Rules
-----
- A name is the user's; what DNS says is believed as far as an address goes. Who answers
  there is proved by the peer id in it, which is required.
- At most `MAX_QUERIES` names are asked for, `MAX_DEPTH` deep, and `MAX_PEERS` addresses
  are kept. Records that are not such addresses are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import trio

from tensorswarm.store.errors import BadInput, NoSource

from ..host.addresses import PeerAddress, parse_peer_address

PREFIX = "/dnsaddr/"

LOOK_UP_TIMEOUT_S = 5.0
"""Time for one answer of the DNS, in seconds."""

MAX_DEPTH = 4
"""Names behind names: libp2p's own bootstrap name is two deep."""

MAX_QUERIES = 16
"""Names asked for in all."""

MAX_PEERS = 64
"""Addresses kept of one name."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63}){0,20}\.?")
_RECORD = b"dnsaddr="

TxtLookup = Callable[[str], Awaitable[list[bytes]]]
"""Returns the TXT records of a name. Raises NoSource if there is no answer."""


def parse_dnsaddr(text: str) -> tuple[str, str]:
    """Read ``/dnsaddr/<name>[/p2p/<peer id>]``.

    Returns
    -------
    str, str
        The name, and the peer id or nothing.

    Raises
    ------
    BadInput
        The text is not such an address.
    """
    name, _, peer_id = text.removeprefix(PREFIX).partition("/p2p/")
    if not text.startswith(PREFIX) or not _NAME.fullmatch(name) or "/" in peer_id:
        raise BadInput(
            f"not a name of peers: {text[:200]!r}; write for example /dnsaddr/peers.example.org"
        )
    return name, peer_id


async def resolve_dnsaddr(text: str, look_up: TxtLookup) -> list[PeerAddress]:
    """Return the peers behind a name.

    Parameters
    ----------
    text : str
        ``/dnsaddr/<name>``, and ``/p2p/<peer id>`` if only that peer is meant.
    look_up : callable
        Asks the DNS.

    Raises
    ------
    BadInput
        The text is not such an address.
    NoSource
        The DNS does not answer, or names no peer.
    """
    found: dict[PeerAddress, None] = {}
    asked: set[str] = set()
    wanted = parse_dnsaddr(text)[1]
    level = [text]
    for _ in range(MAX_DEPTH):
        next_level: list[str] = []
        for each in level:
            name = parse_dnsaddr(each)[0].lower()
            if name in asked or len(asked) >= MAX_QUERIES:
                continue
            asked.add(name)
            for record in await look_up(f"_dnsaddr.{name}"):
                _take(record, found, next_level)
        level = next_level
    peers = [peer for peer in found if not wanted or peer.peer_id == wanted][:MAX_PEERS]
    if not peers:
        raise NoSource(f"{text} names no peer that can be dialled over TCP")
    return peers


def _take(record: bytes, found: dict[PeerAddress, None], names: list[str]) -> None:
    if not record.startswith(_RECORD):
        return
    text = record.removeprefix(_RECORD).decode("utf-8", "replace")
    try:
        if text.startswith(PREFIX):
            parse_dnsaddr(text)
            names.append(text)
        else:
            found[parse_peer_address(text)] = None
    except BadInput:
        return  # another transport, or nonsense: of no use to us


async def system_txt(name: str) -> list[bytes]:
    """Ask the system's DNS servers for the TXT records of a name.

    Raises
    ------
    NoSource
        There is no answer, or no such name.
    """
    return await txt_from(name)


async def txt_from(name: str, servers: tuple[str, ...] = (), port: int = 53) -> list[bytes]:
    """Ask given DNS servers, or else the system's. Raises as `system_txt`."""
    import dns.asyncbackend
    import dns.asyncresolver
    import dns.exception

    try:
        resolver = dns.asyncresolver.Resolver(configure=not servers)
        if servers:
            resolver.nameservers = list(servers)
            resolver.port = port
        answer = await resolver.resolve(
            name, "TXT", backend=dns.asyncbackend.get_backend("trio"), lifetime=LOOK_UP_TIMEOUT_S
        )
    except (dns.exception.DNSException, OSError, trio.TooSlowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NoSource(f"DNS has no answer for {name}: {reason}") from error
    return [b"".join(record.strings) for record in answer]
