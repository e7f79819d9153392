"""The parts of a running node that a fetch uses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tensorswarm.store.store import Store

from .addresses import PeerAddress
from .discovery import Discovery
from .neighbours import Neighbours
from .routes import Routes


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
    routes : Routes
        The ways to a peer's bytes.
    bootstrap : sequence of PeerAddress
        Peers to begin with.
    rng : random.Random
        Source of all random choices.
    """

    store: Store
    neighbours: Neighbours
    discovery: Discovery
    routes: Routes
    bootstrap: Sequence[PeerAddress]
    rng: random.Random
