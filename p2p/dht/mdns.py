"""Peers on the same local network, found without knowing anybody (mDNS).

Purpose
-------
Tell the local network that we are here, and hear who else is, as the libp2p
specification of mDNS discovery says: a service ``_p2p._udp.local`` with a random name,
and a TXT record with one ``dnsaddr=<multiaddr>`` for each address. Members of a private
network use a service name of their own, so that neither sees the other.

Rules
-----
- Anybody on the local network can say anything here. Only addresses are taken that lead
  into a private network or to this machine, and of at most `MAX_SERVICES` services.
- zeroconf runs in threads of its own; what it finds reaches trio through one queue that
  forgets when it is full.
- Without multicast (containers, some clouds) there is a line in the log, and nothing else.

What it does not do: connect. Whoever reads `found` decides.
"""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Iterable, Sequence

import trio
from zeroconf import InterfaceChoice, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from tensorswarm.store.errors import BadInput

from ..host.addresses import (
    MAX_ADDRESS_TEXT,
    MAX_ADDRS_PER_PEER,
    PeerAddress,
    believable,
    parse_peer_address,
    tcp_host,
    with_peer_id,
)

SERVICE_TYPE = "_p2p._udp.local."

MAX_SERVICES = 256
"""Services looked at in one run: a large local network, or somebody's flood."""

QUEUE_PEERS = 64
"""Peers that wait to be met."""

INFO_TIMEOUT_MS = 3000
"""Time for a service to say what it is, in milliseconds."""

MAX_TXT_BYTES = 1300
"""Longest TXT record we send: it has to fit in one packet."""

_RECORD = b"dnsaddr="

log = logging.getLogger("tensorswarm.mdns")


def service_type(fingerprint: str = "") -> str:
    """Return the service's name; private networks have their own (specification)."""
    return f"_p2p-{fingerprint}._udp.local." if fingerprint else SERVICE_TYPE


def txt_of(peer_id: str, addrs: Iterable[str]) -> bytes:
    """Return the TXT record that says where a peer is."""
    text = b""
    for addr in addrs:
        entry = _RECORD + with_peer_id(addr, peer_id).encode()
        if len(entry) <= 255 and len(text) + len(entry) < MAX_TXT_BYTES:
            text += bytes([len(entry)]) + entry
    return text


def peer_in(text: bytes | None) -> PeerAddress | None:
    """Read the peer out of a TXT record; None if there is none that can be used."""
    addrs: dict[str, list[str]] = {}
    rest = text or b""
    while rest:
        entry, rest = rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
        if not entry.startswith(_RECORD) or len(entry) > MAX_ADDRESS_TEXT:
            continue
        try:
            peer = parse_peer_address(entry.removeprefix(_RECORD).decode("utf-8", "replace"))
        except BadInput:
            continue  # another transport, or nonsense
        addrs.setdefault(peer.peer_id, []).extend(peer.addrs)
    for peer_id, claimed in addrs.items():
        # The teller is near: an address on this machine or in a private network is as
        # likely as any.
        usable = believable(claimed, told_by="127.0.0.1")
        if usable:
            return PeerAddress(peer_id, usable[:MAX_ADDRS_PER_PEER])
    return None


class Mdns:
    """Tells the local network of us, and hears of others. Blocks: start it in a thread.

    Parameters
    ----------
    peer_id : str
        Ours.
    addrs : sequence of str
        Our multiaddrs, without ``/p2p/``; none to listen only.
    fingerprint : str
        Of the private network we belong to; empty for the public one.
    interfaces : sequence of str
        IP addresses of the interfaces to use; all by default.
    """

    def __init__(
        self,
        peer_id: str,
        addrs: Sequence[str],
        *,
        fingerprint: str = "",
        interfaces: Sequence[str] = (),
    ) -> None:
        self._peer_id = peer_id
        self._addrs = tuple(addrs)
        self._type = service_type(fingerprint)
        self._name = f"{secrets.token_hex(16)}.{self._type}"
        self._interfaces = list(interfaces)
        self._seen: set[str] = set()
        self._zeroconf: Zeroconf | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._send, self.found = trio.open_memory_channel[PeerAddress](QUEUE_PEERS)

    def start(self, token: trio.lowlevel.TrioToken) -> None:
        """Begin; peers come out of `found`.

        Raises
        ------
        OSError
            There is no multicast here.
        """
        self._token = token
        self._zeroconf = Zeroconf(interfaces=self._interfaces or InterfaceChoice.All)
        if self._addrs:
            host, port = tcp_host(self._addrs[0])
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            info = ServiceInfo(
                self._type,
                self._name,
                port=port,
                addresses=[socket.inet_pton(family, host)],
                properties=txt_of(self._peer_id, self._addrs),
                server=f"{self._name.partition('.')[0]}.local.",
            )
            self._zeroconf.register_service(info)
        ServiceBrowser(self._zeroconf, self._type, handlers=[self._changed])

    def close(self) -> None:
        """Say goodbye, and end."""
        if self._zeroconf is not None:
            self._zeroconf.close()

    def _changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        """Hear of a service, in zeroconf's thread."""
        if state_change is ServiceStateChange.Removed:
            self._seen.discard(name)
            return
        if name == self._name or (name not in self._seen and len(self._seen) >= MAX_SERVICES):
            return
        self._seen.add(name)
        info = zeroconf.get_service_info(service_type, name, timeout=INFO_TIMEOUT_MS)
        peer = peer_in(info.text) if info is not None else None
        if peer is None or peer.peer_id == self._peer_id or self._token is None:
            return
        try:
            self._token.run_sync_soon(self._offer, peer)
        except trio.RunFinishedError:
            return  # we are closing

    def _offer(self, peer: PeerAddress) -> None:
        try:
            self._send.send_nowait(peer)
        except (trio.WouldBlock, trio.BrokenResourceError):
            log.debug("no time for %s", peer.peer_id)
