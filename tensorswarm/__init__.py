"""tensorswarm: model weights by the hash of each tensor's bytes.

    import tensorswarm

    weights = tensorswarm.load("bagaqi…", bootstrap=["/ip4/…/tcp/…/p2p/…"])
    folder = tensorswarm.fetch("bagaqi…", bootstrap=[...])

    async with tensorswarm.Node("store") as node:  # under trio
        ...

Names are loaded when they are first used, so that importing the package costs next
to nothing, and never imports libp2p unless the network is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorswarm.p2p.node import Node
    from tensorswarm.store.errors import TensorswarmError
    from tensorswarm.store.store import Store
    from tensorswarm.store.version import VERSION as __version__  # noqa: N811

    from .api import add, default_store, fetch, load
    from .streaming import stream

__all__ = [
    "Node",
    "Store",
    "TensorswarmError",
    "__version__",
    "add",
    "default_store",
    "fetch",
    "load",
    "stream",
]

_HOMES = {
    "Node": ("tensorswarm.p2p.node", "Node"),
    "Store": ("tensorswarm.store.store", "Store"),
    "TensorswarmError": ("tensorswarm.store.errors", "TensorswarmError"),
    "__version__": ("tensorswarm.store.version", "VERSION"),
    "add": ("tensorswarm.api", "add"),
    "default_store": ("tensorswarm.api", "default_store"),
    "fetch": ("tensorswarm.api", "fetch"),
    "load": ("tensorswarm.api", "load"),
    "stream": ("tensorswarm.streaming", "stream"),
}


def __getattr__(name: str) -> object:
    """Load a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
