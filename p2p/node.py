"""A running node: host, DHT, neighbours and bulk server round one store.

``async with Node(store) as node`` starts everything and stops it in the reverse
order. The parts know nothing of each other beyond what this module hands them.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import trio

from tensorswarm.store.arguments import one_or_more
from tensorswarm.store.cid import MODEL_CODEC, parse_reference
from tensorswarm.store.errors import BadInput, ProtocolError, RemoteError, TensorswarmError
from tensorswarm.store.store import Store
from tensorswarm.store.version import VERSION

from .bulk.server import BulkServer
from .bulk.stream_server import BULK_STREAM_PROTOCOL, StreamServer
from .bulk.tls import BulkIdentity
from .control import wire, wire_limits
from .control.access import Access
from .control.answers import Answers
from .control.neighbour import MODELS
from .control.neighbours import Neighbours
from .dht.announcer import Announcer
from .dht.bootstrap import Bootstrapper, Bootstraps
from .dht.discovery import Discovery
from .dht.file import FILE_NAME, DhtFile
from .dht.mdns import Mdns
from .fetch import Fetch, FetchOptions, Progress
from .host.addresses import PeerAddress, is_loopback, parse_peer_address, tcp_host
from .host.host import Host
from .host.identity import identity_for
from .host.pnet import fingerprint, read_key
from .limits.rates import limiter_of
from .node_state import remove_state, write_state
from .reach.autonat import AutoNatServer
from .reach.punch import Puncher
from .reach.reach import Reach
from .reach.relay_client import RelayClient
from .reach.relay_server import RelayServer
from .results import FetchResult
from .routes import Routes, bulk_candidates, bulk_told
from .services import Services
from .uploads import OFFERS, Uploads

DEFAULT_LISTEN = "/ip4/0.0.0.0/tcp/0"
"""Every IPv4 interface, any free port."""

LOOPBACK_LISTEN = "/ip4/127.0.0.1/tcp/0"

STATE_INTERVAL_S = 2.0
"""How often the file that tells of a running node is written anew."""

log = logging.getLogger("tensorswarm.node")


class Node:
    """A peer on the network. Use as ``async with Node(...) as node`` under trio.

    Parameters
    ----------
    store : Store or Path
        What it keeps and serves; a path is opened, and closed at the end.
    listen : str or sequence of str
        Addresses to listen on: multiaddrs or ``host:port``. Without any, every IPv4
        interface; only loopback when all bootstrap peers are on loopback.
    bootstrap : str or sequence of str
        Addresses of peers to begin with, ending in ``/p2p/<peer id>``, and names of
        such addresses in DNS, ``/dnsaddr/<name>``.
    bulk_port : int
        TCP port of the bulk plane, on the same interfaces; 0 for any free one.
    bulk_announce : str or sequence of str
        ``host:port`` addresses to tell peers as those of the bulk plane, instead of what
        it listens on: for a port that a router or proxy forwards.
    server : bool
        Whether to keep DHT records for others and to announce the store. A short
        fetch does neither.
    mdns : bool, optional
        Whether to look for peers on the local network, and as a server to be found
        there. By default a server does that listens on more than loopback.
    network : Path, optional
        File with the key of the private network to belong to.
    seed : int, optional
        Seed of all random choices; from the system by default.
    upload_limit, download_limit : float or str, optional
        What the node gives, and takes, in all: bytes per second, or as people write it,
        such as ``"5MB/s"`` (see `rates.parse_rate`).
    relay : bool
        Whether to be a relay for peers that cannot be dialled (see `relay_server`).
    via : str or sequence of str
        Relays to use if this node cannot be dialled, ending in ``/p2p/<peer id>``; besides
        those it meets.
    bulk : str
        ``"tls"``, or ``"clear"``: connections within this machine, or within the private
        network, may leave TLS after the handshake (see `bulk.clear`).

    Attributes
    ----------
    peer_id : str
        The node's public name, once it runs.
    store : Store
        Its store, once it runs.

    Raises
    ------
    BadInput
        An address or a limit is malformed, an address is in use, or the store is of no
        use.
    """

    def __init__(
        self,
        store: Store | Path | str,
        *,
        listen: str | Sequence[str] = (),
        bootstrap: str | Sequence[str] = (),
        bulk_port: int = 0,
        bulk_announce: str | Sequence[str] = (),
        server: bool = True,
        mdns: bool | None = None,
        network: Path | str | None = None,
        seed: int | None = None,
        upload_limit: float | str | None = None,
        download_limit: float | str | None = None,
        relay: bool = False,
        via: str | Sequence[str] = (),
        bulk: str = "tls",
    ) -> None:
        if bulk not in ("tls", "clear"):
            raise BadInput(f"bulk is tls or clear, not {bulk!r}")
        self._given_store = store
        self._bootstraps = Bootstraps(one_or_more(bootstrap))
        self._listen = one_or_more(listen) or (_default_listen(self._bootstraps),)
        self._mdns = mdns
        self._network_key = read_key(Path(network)) if network is not None else None
        self._bulk_port = bulk_port
        self._may_clear = bulk == "clear"
        self._bulk_announce = _bulk_addresses(one_or_more(bulk_announce))
        self._server = server
        self._rng = random.Random(seed)
        self.upload_limiter = limiter_of(upload_limit)
        self.download_limiter = limiter_of(download_limit)
        self._is_relay = relay
        self._via = [parse_peer_address(text) for text in one_or_more(via)]
        self._stack = AsyncExitStack()
        self._fetches = 0  # under way
        self.peer_id = ""

    # ---- life

    async def __aenter__(self) -> Node:
        try:
            await self._start()
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        try:
            return await self._stack.__aexit__(kind, error, trace)
        except BaseExceptionGroup as group:
            # The nursery wraps what left the body; whoever wrote the body wants it bare.
            if error is not None and _leaves(group) == [error]:
                return False
            raise

    async def _start(self) -> None:
        stack = self._stack
        if isinstance(self._given_store, Store):
            self.store = self._given_store
        else:
            self.store = await trio.to_thread.run_sync(Store, Path(self._given_store))
            stack.callback(self.store.close)
        key_pair, lock = await trio.to_thread.run_sync(identity_for, self.store.root)
        if lock is not None:
            stack.callback(lock.release)
        self._identity = BulkIdentity(
            key_pair, may_clear=self._may_clear, network_key=self._network_key
        )
        self._host = await stack.enter_async_context(
            Host(key_pair, self._listen, network_key=self._network_key)
        )
        self.peer_id = self._host.peer_id
        self.access = await trio.to_thread.run_sync(Access, self.store)
        answers = Answers(self.store, self.access)
        self.neighbours = Neighbours(self._host, answers, self._hello)
        self._uploads = Uploads(self.neighbours, self.access.may_have, self._rng)
        client = RelayClient(self._host)
        self._puncher = Puncher(self._host, client, move=self.neighbours.renew)
        self._start_bulk_plane()
        self.neighbours.is_served = self._is_served
        self._host.door.standing = self.neighbours.standing
        self.reach = Reach(self._host, client, self._via, on_change=self._addresses_changed)
        if self._is_relay:
            RelayServer(self._host, limiter=self.upload_limiter).start()
        file = None
        if lock is not None:
            path = self.store.root / FILE_NAME
            file = await trio.to_thread.run_sync(DhtFile, path)
            stack.callback(file.close)
        self.discovery = Discovery(
            self._host, server=self._server, rng=self._rng, file=file if self._server else None
        )
        self._nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(self._nursery.cancel_scope.cancel)
        await self._nursery.start(self.discovery.run)
        await self._nursery.start(self.neighbours.run)
        await self._nursery.start(self._uploads.run)
        await self._start_tasks(file)
        if lock is not None and self._server:
            write_state(self.store.place, self._state())
            stack.callback(remove_state, self.store.root)
            self._nursery.start_soon(self._keep_state)

    def _is_served(self, peer_id: str) -> bool:
        return self._bulk.is_serving(peer_id) or self._streams.is_serving(peer_id)

    def _start_bulk_plane(self) -> None:
        """Serve bytes over TLS and over streams, and know the ways to others' bytes."""
        self._bulk = BulkServer(
            self._identity,
            self.store.open_reader,
            self.neighbours.is_neighbour,
            host=_bulk_host(self._host.addrs()),
            port=self._bulk_port,
            read_small=self.store.read_small,
            may_have=self.access.may_have,
            limiter=self.upload_limiter,
            gate=self._uploads,
        )
        if self.download_limiter is not None:
            self._stack.callback(self.download_limiter.close)
        self._bulk.start()
        self._stack.callback(self._bulk.close)
        self._streams = StreamServer(
            self.store.open_reader,
            self.neighbours.is_neighbour,
            limiter=self.upload_limiter,
            read_small=self.store.read_small,
            may_have=self.access.may_have,
            gate=self._uploads,
        )
        self._host.set_handler(BULK_STREAM_PROTOCOL, self._streams.handle)
        self._routes = Routes(
            self._identity,
            self._bulk_addresses,
            lambda peer_id: self._host.open_stream(peer_id, BULK_STREAM_PROTOCOL),
            self._host.start_soon,
            is_relayed=self._host.is_relayed,
            is_punched=self._puncher.is_punched,
            is_shut=self._puncher.is_shut,
            held_until=self._puncher.held_until,
            seen_at=self.neighbours.seen_at,
            limiter=self.download_limiter,
        )
        self._puncher.settled.append(self._routes.tell_changed)

    async def _start_tasks(self, file: DhtFile | None) -> None:
        """Run what keeps the node in the network, in the background."""
        bootstrapper = Bootstrapper(
            self._host,
            self.discovery,
            self.neighbours,
            self._bootstraps,
            file=file,
            mdns=self._local_discovery(),
        )
        self._nursery.start_soon(bootstrapper.run)
        if self._server:
            announcer = Announcer(
                self.store,
                self.discovery,
                self.neighbours,
                self.access,
                log.info,
                lambda: bool(self._fetches) or self._uploads.is_any_open(),
            )
            self._nursery.start_soon(announcer.run)
            AutoNatServer(self._host)
            await self._nursery.start(self.reach.run)

    def _local_discovery(self) -> Mdns | None:
        addrs = self._host.advertised_addrs()
        is_near_only = all(is_loopback(addr) for addr in addrs)
        if not (self._server and not is_near_only if self._mdns is None else self._mdns):
            return None
        key = self._network_key
        return Mdns(
            self.peer_id,
            addrs if self._server else (),
            fingerprint=fingerprint(key) if key is not None else "",
        )

    def _addresses_changed(self) -> None:
        log.info("reachable at %s", ", ".join(self._host.advertised_addrs()) or "nowhere")
        self.discovery.announce_again()

    def _hello(self) -> wire.Hello:
        _, port = self._bulk.address
        addrs = self._host.addrs()[: wire_limits.MAX_HELLO_ADDRS]
        bulk = self._bulk_announce or bulk_told(self._host.advertised_addrs(), port)
        return wire.Hello(
            wire_limits.PROTOCOL_VERSION, f"tensorswarm/{VERSION}", bulk, addrs, (OFFERS, MODELS)
        )

    # ---- what others on this machine may know

    async def _keep_state(self) -> None:
        """Have a file say how to reach this node and how it is doing."""
        while True:
            await trio.sleep(STATE_INTERVAL_S)
            try:
                await trio.to_thread.run_sync(write_state, self.store.place, self._state())
            except TensorswarmError as error:
                log.warning("%s", error)

    def _state(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "peer_id": self.peer_id,
            "addrs": list(self.addrs),
            "dht": self.discovery.statistics(),
            "door": {"connected": len(self._host.connected()), **self._host.door.statistics()},
            "reachability": self.reach.reachability.value,
            "relays": list(self.reach.places),
        }

    # ---- use

    @property
    def addrs(self) -> tuple[str, ...]:
        """The node's addresses, each ending in ``/p2p/<peer id>``."""
        return self._host.addrs()

    async def fetch(
        self,
        ref: str,
        *,
        origins: Sequence[str] = (),
        include: Sequence[str] = (),
        first: Sequence[str] = (),
        out: Path | None = None,
        timeout_s: float = 30.0,
        on_progress: Progress = lambda done, total: None,
        near_first: bool = False,
    ) -> FetchResult:
        """Bring a model, or a bare tensor, into the store.

        Parameters
        ----------
        ref : str
            A model id, or a tensor's CID or 64-digit digest.
        origins : sequence of str
            URLs of HTTP servers that hold the model's files.
        include : sequence of str
            Patterns of file paths or tensor names; none for everything.
        first : sequence of str
            Patterns of what is wanted before all else.
        out : Path, optional
            A folder to export the files to.
        timeout_s : float
            How long nothing may be found or arrive before giving up.
        on_progress : callable
            Called with the verified bytes so far and the bytes in all.
        near_first : bool
            Whether to spare origins for the sake of peers, and peers on the Internet for
            those in the local network, rather than to ask all at once.

        Raises
        ------
        NotFound, NoSource, HashMismatch, Refused, NoRoom, BadInput
            As `Fetch` says.
        """
        reference = parse_reference(ref)
        options = FetchOptions(
            tuple(origins),
            tuple(include),
            out,
            timeout_s,
            on_progress,
            tuple(first),
            near_first=near_first,
        )
        return await self.fetch_digest(
            reference.digest, options, is_model=reference.codec == MODEL_CODEC
        )

    async def fetch_digest(
        self, digest: bytes, options: FetchOptions, *, is_model: bool
    ) -> FetchResult:
        """Do as `fetch` does, for a digest that is parsed already."""
        fetch = Fetch(self._services(), options)
        self._fetches += 1
        try:
            return await (fetch.model(digest) if is_model else fetch.tensor(digest))
        finally:
            self._fetches -= 1

    def _services(self) -> Services:
        return Services(
            self.store,
            self.neighbours,
            self.discovery,
            self._routes,
            self._bootstraps.peers,
            self._rng,
            self.download_limiter,
            self._uploads,
        )

    def _bulk_addresses(self, peer_id: str) -> list[tuple[str, int]]:
        """Return where a neighbour's bulk plane is: what it said, seen from here."""
        neighbour = self.neighbours.get(peer_id)
        if neighbour is None:
            return []
        return bulk_candidates(neighbour.hello.bulk, self._host.remote_host(peer_id))

    async def meet_bootstrap(self, timeout_s: float) -> dict[str, str]:
        """Meet the bootstrap peers once; return why some could not be met, by address."""
        await self._bootstraps.resolve()
        failed = dict(self._bootstraps.failures)

        async def meet(peer: PeerAddress) -> None:
            try:
                await self.neighbours.meet(peer, timeout_s)
            except RemoteError as error:
                failed[f"{peer.addrs[0]}/p2p/{peer.peer_id}"] = str(error)

        async with trio.open_nursery() as nursery:
            for peer in self._bootstraps.peers:
                nursery.start_soon(meet, peer)
        return failed

    async def wait_path(self, peer_id: str) -> None:
        """Wait, for seconds at most, until it is settled which way leads to a peer."""
        await self._puncher.wait_settled(peer_id)

    def path_to(self, peer_id: str) -> str:
        """Tell how a peer is connected: ``"direct"``, ``"punched"`` or ``"relay"``."""
        if self._host.is_relayed(peer_id):
            return "relay"
        return "punched" if self._puncher.is_punched(peer_id) else "direct"

    def statistics(self) -> dict[str, Any]:
        """Return counters of the node, for people and logs."""
        served = self._bulk.statistics()
        return {
            "neighbours": len(self.neighbours.all()),
            "routing_table": self.discovery.routing_table_size(),
            "bytes_served": served.bytes_sent + self._streams.statistics().bytes_sent,
        }


def _leaves(error: BaseException) -> list[BaseException]:
    """Return the errors in a group, however deep."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in _leaves(inner)]


def _default_listen(bootstraps: Bootstraps) -> str:
    return LOOPBACK_LISTEN if bootstraps.all_on_loopback() else DEFAULT_LISTEN


def _bulk_addresses(texts: Sequence[str]) -> tuple[str, ...]:
    """Check the addresses that are to be told as those of the bulk plane."""
    if len(texts) > wire_limits.MAX_HELLO_ADDRS:
        raise BadInput(f"{len(texts)} bulk addresses, at most {wire_limits.MAX_HELLO_ADDRS}")
    for text in texts:
        try:
            host, _ = wire_limits.split_bulk_address(wire_limits.take_bulk_address(text, text))
            ipaddress.ip_address(host)
        except (ProtocolError, ValueError) as error:
            raise BadInput(
                f"{text!r} is no bulk address: it takes an IP address and a port, as in "
                "198.51.100.4:4002"
            ) from error
    return tuple(texts)


def _bulk_host(addrs: Sequence[str]) -> str:
    """Return the address the bulk plane listens on, given the host's own."""
    hosts = {ipaddress.ip_address(tcp_host(addr)[0]) for addr in addrs}
    if not hosts:
        return "127.0.0.1"
    if len(hosts) == 1:
        return str(next(iter(hosts)))
    return "::" if any(host.version == 6 for host in hosts) else "0.0.0.0"
