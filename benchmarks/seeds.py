"""Real nodes that hold a model, for benchmarks that fetch from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from .processes import Server, python, run_json

LISTEN = "/ip4/127.0.0.1/tcp/0"


class Seed(NamedTuple):
    """A node process and how to fetch from it."""

    server: Server
    model: str
    peer_id: str
    address: str


def start_seed(source: Path, store: Path, *arguments: str) -> Seed:
    """Register a model's file where it lies, and serve it by ``tensorswarm node``."""
    where = ("--store", str(store), "--json")
    added = run_json(python("tensorswarm", "add", str(source), "--no-copy", *where))
    server = Server(python("tensorswarm", "node", *where, "--listen", LISTEN, *arguments))
    ready = json.loads(server.first_line)
    return Seed(server, added["model"], ready["peer_id"], ready["addrs"][0])
