"""The parts of a running node that a fetch uses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tensorswarm.store.store import Store

from .control.neighbours import Neighbours
from .dht.discovery import Discovery
from .host.addresses import PeerAddress
from .limits.rates import RateLimiter
from .routes import Routes
from .uploads import Uploads


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
    download_limiter : RateLimiter or None
        Holds what is received below a rate; shared by all fetches and sources.
    uploads : Uploads or None
        Offers what we have to those who fetch the same.
    """

    store: Store
    neighbours: Neighbours
    discovery: Discovery
    routes: Routes
    bootstrap: Sequence[PeerAddress]
    rng: random.Random
    download_limiter: RateLimiter | None = None
    uploads: Uploads | None = None
