"""What a DHT server keeps for others: provider records and values, bounded.

Purpose
-------
`ProviderRecords` joins the table of provider records (`provider_table`), the file that
it survives in (`dht.file`), and what the host knows of a peer's addresses.
`ValueRecords` is py-libp2p's store of values, with a bound.

Rules
-----
- Of an announcement, only addresses that `addresses.believable` leaves are kept. They
  are read once for a peer, not for each of its thousand announcements.
- Whoever is told that a record is kept can rely on it: `settle` writes it to the file
  first. Many announcements share one write.
- A file that cannot be written costs a warning, not the service.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence

import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Record as ValueRecord
from libp2p.kad_dht.value_store import ValueStore
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from tensorswarm.store.errors import LocalError

from ..host.addresses import PeerAddress, believable, peer_id_bytes
from ..host.host import Host
from .file import DhtFile
from .provider_table import ProviderTable, group_of
from .rpc import addr_text, id_text

log = logging.getLogger("tensorswarm.dht")

MAX_PROVIDERS_PER_ANSWER = 32
"""Providers named in one answer: above the 20 that others keep, and 4 KB."""

MAX_CLAIMED_ADDRS = 128
"""Addresses read of those that a peer claims; most machines claim fewer than ten."""

MAX_CLAIMS_REMEMBERED = 2_000
"""Peers whose claimed addresses are remembered as they came, to read them once."""

MAX_VALUE_BYTES = 16 << 10
"""Longest value kept: IPNS allows 10 KiB."""

MAX_VALUES_BYTES = 32 << 20
"""All values together; the oldest go."""


class ProviderRecords:
    """Who provides what.

    Parameters
    ----------
    host : Host
        Ours.
    clock : callable
        Gives the time in seconds since 1970.
    rng : random.Random
        Source of all random choices.
    file : DhtFile, optional
        Where records survive; without it they end with the process.
    """

    def __init__(
        self,
        host: Host,
        *,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        file: DhtFile | None = None,
    ) -> None:
        self._host = host
        self._clock = clock
        self._file = file
        self._own_id = peer_id_bytes(host.peer_id)
        self._own_keys: set[bytes] = set()
        self._writing = trio.Lock()
        self._claims: dict[str, tuple[tuple[bytes, ...], str | None, tuple[bytes, ...]]] = {}
        self._latest = 0.0
        self.table = ProviderTable(rng or random.Random())
        if file is not None:
            self.table.restore(self._now(), *file.load_records())

    def add_own(self, key: bytes) -> None:
        """Note that we provide a key: told to whoever asks us."""
        self._own_keys.add(key)

    def remove_own(self, key: bytes) -> None:
        """Note that we provide a key no longer."""
        self._own_keys.discard(key)

    def take(self, key: bytes, peer_id: str, claimed: Sequence[bytes]) -> bool:
        """Keep a record that a peer sent of itself; return whether it is kept.

        Parameters
        ----------
        key : bytes
            The DHT key.
        peer_id : str
            The peer, connected.
        claimed : sequence of bytes
            Its addresses as it says, binary.
        """
        if peer_id == self._host.peer_id:
            return False
        addrs, group = self._believed(peer_id, tuple(claimed[:MAX_CLAIMED_ADDRS]))
        if not addrs:
            return False
        return self.table.add(self._now(), key, peer_id_bytes(peer_id), group, addrs)

    def others(self, key: bytes) -> list[PeerAddress]:
        """Return the providers of a key that told us so themselves."""
        found = self.table.providers(self._now(), key, MAX_PROVIDERS_PER_ANSWER)
        return [
            PeerAddress(name, tuple(text for raw in addrs if (text := addr_text(raw))))
            for peer, addrs in found
            if (name := id_text(peer)) is not None
        ]

    def answer(self, key: bytes, asker: str) -> list[tuple[bytes, tuple[bytes, ...]]]:
        """Return whom to name to a peer that asks for a key; ourselves first, if we do."""
        found = self.table.providers(
            self._now(), key, MAX_PROVIDERS_PER_ANSWER, first=peer_id_bytes(asker)
        )
        if key in self._own_keys:
            ours = tuple(Multiaddr(addr).to_bytes() for addr in self._host.advertised_addrs())
            found.insert(0, (self._own_id, ours))
        return found

    def expire(self) -> None:
        """Drop records that have run out."""
        self.table.expire(self._now())

    def size(self) -> int:
        """Return the number of records, without our own."""
        return len(self.table)

    async def settle(self) -> None:
        """Have everything taken so far on file."""
        if self._file is None:
            self.table.take_changes()
            return
        async with self._writing:
            changes = self.table.take_changes()
            if not changes:
                return  # whoever wrote before us has written ours, too
            try:
                await trio.to_thread.run_sync(self._file.write_records, changes)
            except LocalError as error:
                log.warning("%s", error)

    def _now(self) -> float:
        """Return the time; never earlier than before, even if the clock was set back."""
        self._latest = max(self._latest, self._clock())
        return self._latest

    def _believed(self, peer_id: str, claimed: tuple[bytes, ...]) -> tuple[tuple[bytes, ...], str]:
        seen_at = self._host.remote_host(peer_id)
        known = self._claims.get(peer_id)
        if known is None or known[:2] != (claimed, seen_at):
            texts = (text for raw in claimed if (text := addr_text(raw)) is not None)
            addrs = tuple(Multiaddr(text).to_bytes() for text in believable(texts, seen_at))
            if len(self._claims) >= MAX_CLAIMS_REMEMBERED:
                del self._claims[next(iter(self._claims))]
            known = self._claims[peer_id] = (claimed, seen_at, addrs)
        return known[2], group_of(seen_at, peer_id)


class ValueRecords(ValueStore):
    """Values kept for others (IPNS records, public keys), bounded by bytes."""

    def __init__(self, host: Host, own_id: ID) -> None:
        super().__init__(host.libp2p, own_id)

    def put_record(self, key: bytes, record: ValueRecord) -> None:
        """Keep a value that has passed its validator.

        Raises
        ------
        ValueError
            It is too long; py-libp2p then resets the stream.
        """
        if len(key) + len(record.value) > MAX_VALUE_BYTES:
            raise ValueError(f"a value of {len(record.value)} bytes")
        self.store.pop(key, None)  # to the end: the order is that of arrival
        super().put_record(key, record)
        kept = sum(entry.ByteSize() for entry, _ in self.store.values())
        for oldest in list(self.store):
            if kept <= MAX_VALUES_BYTES:
                break
            if oldest not in self.local_keys:
                kept -= self.store.pop(oldest)[0].ByteSize()
