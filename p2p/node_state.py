"""The file by which a running node is found by other commands on the same store.

It says how to reach the node, and how it is doing. It is written whole or not at all,
and removed at the end; after a kill, the process id tells that nobody is there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tensorswarm.store.place import Place, disk_errors

from .host.addresses import is_loopback

STATE_FILE = "node.json"
"""The file's name in the store's directory."""


def write_state(place: Place, state: dict[str, Any]) -> None:
    """Write what a node says of itself: ``pid``, ``addrs`` and whatever else."""
    temporary = place.temporary()
    with disk_errors("cannot write the node's state"):
        temporary.write_text(json.dumps(state))
        temporary.replace(place.root / STATE_FILE)


def remove_state(store: Path) -> None:
    """Say that no node runs any more."""
    (store / STATE_FILE).unlink(missing_ok=True)


def read_state(store: Path) -> dict[str, Any]:
    """Return what the node that runs on a store says of itself; empty if none runs."""
    try:
        state = json.loads((store / STATE_FILE).read_text())
        os.kill(int(state["pid"]), 0)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(state)


def running_node(store: Path) -> list[str]:
    """Return the addresses of the node that runs on a store, if one does."""
    addrs = [str(text) for text in read_state(store).get("addrs", [])]
    return [addr for addr in addrs if is_loopback(addr)] or addrs[:1]
