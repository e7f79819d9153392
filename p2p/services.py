"""The parts of a running node that a fetch uses."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tensorswarm.store.store import Store

from .addresses import PeerAddress
from .discovery import Discovery
from .neighbours import Neighbours
from .tls import BulkIdentity


@dataclass(frozen=True)
class Services:
    """What `Node` lends to the fetches it runs.

    Attributes
    ----------
    store : Store
        Where objects go.
    neighbours : Neighbours
        Peers with a control stream.
    discovery : Discovery
        The DHT.
    identity : BulkIdentity
        Our certificate on the bulk plane.
    bootstrap : sequence of PeerAddress
        Peers to begin with.
    bulk_addresses : callable
        Finds the bulk-plane addresses (host, port) of a neighbour, best first.
    rng : random.Random
        Source of all random choices.
    """

    store: Store
    neighbours: Neighbours
    discovery: Discovery
    identity: BulkIdentity
    bootstrap: Sequence[PeerAddress]
    bulk_addresses: Callable[[str], Sequence[tuple[str, int]]]
    rng: random.Random
