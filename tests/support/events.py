"""Waiting for what is to happen, without asking again and again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import trio

from tensorswarm.p2p.dht.discovery import Discovery
from tensorswarm.p2p.node import Node


class Watch:
    """Looks at a condition whenever it is called: a listener of whatever calls it."""

    def __init__(self) -> None:
        self._called = trio.Event()

    def __call__(self, *_args: object) -> None:
        self._called.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds that only changes when the watch is called."""
        while not condition():
            self._called = trio.Event()
            await self._called.wait()


def watch_calls(owner: object, name: str) -> Watch:
    """Return a watch that is called after each call of an object's method."""
    watch, inner = Watch(), getattr(owner, name)

    def call(*args: Any) -> Any:
        result = inner(*args)
        watch()
        return result

    setattr(owner, name, call)
    return watch


async def until_neighbour(node: Node, peer_id: str) -> None:
    """Wait until a peer is a node's neighbour."""
    watch = Watch()
    node.neighbours.joined.append(watch)
    await watch.until(lambda: node.neighbours.is_neighbour(peer_id))


async def until_dht(discovery: Discovery, condition: Callable[[], bool]) -> None:
    """Wait until something holds that a DHT node's counters tell."""
    watch = Watch()
    discovery.listeners.append(watch)
    await watch.until(condition)


class LogWatch(logging.Handler):
    """Waits for lines in the log of tensorswarm; to be made before they are written."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._watch = Watch()
        self._lines: list[str] = []
        logging.getLogger("tensorswarm").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line."""
        self._lines.append(record.getMessage())
        self._watch()

    async def until(self, text: str) -> None:
        """Wait for a line with a text."""
        await self._watch.until(lambda: any(text in line for line in self._lines))

    def close(self) -> None:
        """Hear no more."""
        logging.getLogger("tensorswarm").removeHandler(self)
        super().close()
