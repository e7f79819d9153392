"""Helpers of `Host` for ids and addresses in use: names, interfaces, why a dial failed."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Iterator
from functools import lru_cache

import trio
from libp2p.io.exceptions import IncompleteReadError
from libp2p.peer.id import ID
from multiaddr import Multiaddr
from multiaddr.utils import get_network_addrs

from tensorswarm.store.errors import BadInput

from .addresses import is_circuit, multiaddr_of, plain, tcp_host


def usable(addrs: Iterable[str]) -> list[str]:
    """Return the TCP addresses among `addrs`, without their peer ids."""
    found = []
    for addr in addrs:
        try:
            found.append(plain(addr))
        except BadInput:
            continue  # another transport, or nonsense
    return found


def interfaces(addr: str) -> list[str]:
    """Return an address as it is, or one per interface if it means all of them."""
    host, port = tcp_host(addr)
    if host == "0.0.0.0":
        return [multiaddr_of(found, port) for found in (*get_network_addrs(4), "127.0.0.1")]
    if host == "::":
        return [multiaddr_of(found, port) for found in (*get_network_addrs(6), "::1")]
    return [addr]


async def resolve(addr: str) -> list[str]:
    """Look a host name up, /etc/hosts included (py-libp2p asks DNS servers only)."""
    kind = addr.split("/", 2)[1]
    if is_circuit(addr):
        return [addr]  # the relay's name is looked up when it is dialled
    host, port = tcp_host(addr)
    if not kind.startswith("dns"):
        return [addr]
    families = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}
    found = await trio.socket.getaddrinfo(
        host, port, family=families.get(kind, socket.AF_UNSPEC), type=socket.SOCK_STREAM
    )
    return list(dict.fromkeys(multiaddr_of(str(entry[4][0]), port) for entry in found))


def cause_of(error: BaseException) -> str:
    """Say in a few words why libp2p failed, from the chain of its errors."""
    words = {
        errno.ECONNREFUSED: "connection refused",
        errno.EHOSTUNREACH: "no route to it",
        errno.ENETUNREACH: "no route to its network",
        errno.ETIMEDOUT: "no answer",
        errno.ECONNRESET: "it cut the connection",
    }
    chain = list(_chain(error))
    texts = " ".join(f"{type(link).__name__} {link}" for link in chain)
    if "mismatch" in texts.lower():
        return "a peer with another id answers there"
    for link in reversed(chain):
        if isinstance(link, socket.gaierror):
            return "no such host name"
        if isinstance(link, OSError) and link.errno in words:
            return words[link.errno]
        if isinstance(link, IncompleteReadError) and link.is_clean_close:
            return "it closed the connection at once; it may have too many"
    for text, meaning in (
        ("not supported", "it does not speak that protocol"),
        ("upgrade security", "what answers there is not a peer of this network"),
        ("limit", "too many connections"),
        ("timed out", "no answer"),
    ):
        if text in texts:
            return meaning
    return " ".join(str(error).split())[:200] or type(error).__name__


def _chain(error: BaseException | None, depth: int = 0) -> Iterator[BaseException]:
    """Yield an error and what caused it, nearest first; groups member by member."""
    while error is not None and depth < 20:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for inner in error.exceptions[:4]:
                yield from _chain(inner, depth + 1)
        error = error.__cause__ or error.__context__
        depth += 1


@lru_cache(maxsize=4096)
def addr_text(addr: Multiaddr) -> str:
    """Return an address as text; writing it takes 13 µs, so it is remembered."""
    return str(addr)


@lru_cache(maxsize=4096)
def libp2p_id(peer_id: str) -> ID:
    """Return libp2p's form of an id; decoding base58 takes 20 µs, so it is remembered."""
    try:
        return ID.from_string(peer_id)
    except ValueError as error:
        raise BadInput(f"not a peer id: {peer_id[:80]!r}") from error
