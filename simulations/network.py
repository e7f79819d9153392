"""Links shared fairly: bytes flow through an uplink and a downlink.

Rates are max-min fair (Bertsekas & Gallager, Data Networks, 6.5.2): raise all flows
together, freeze those through a link that is full, and go on with the others. When a flow
begins or ends, only the flows that share a link with it, directly or through others, are
worked out again. A link without a limit connects nothing; so with free downlinks this is
an equal share of each uplink, which is worked out without looking further.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .engine import Engine


class Link:
    """One direction of a node's line.

    Parameters
    ----------
    bytes_per_s : float
        Its rate; infinity for no limit.
    """

    __slots__ = ("bytes_per_s", "flows", "joint_flows", "sent_bytes")

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.flows: dict[Flow, None] = {}
        self.joint_flows = 0  # those that go through another limited link, too
        self.sent_bytes = 0.0


class Flow:
    """Bytes on their way from one node to another."""

    __slots__ = ("done", "left_bytes", "links", "rate", "since", "version")

    def __init__(self, links: tuple[Link, ...], size_bytes: float, done: Callable[[], None]):
        self.links = links
        self.left_bytes = size_bytes
        self.rate = 0.0
        self.since = 0.0
        self.version = 0
        self.done = done


class Network:
    """All flows.

    Parameters
    ----------
    engine : Engine
        Virtual time.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def send(self, uplink: Link, downlink: Link, size_bytes: int, done: Callable[[], None]) -> Flow:
        """Begin to send; `done` is called when the last byte has left."""
        links: tuple[Link, ...] = (uplink, downlink)
        if math.inf in (uplink.bytes_per_s, downlink.bytes_per_s):
            links = tuple([link for link in links if link.bytes_per_s < math.inf])
        flow = Flow(links, float(size_bytes), done)
        flow.since = self._engine.now
        for link in links:
            link.flows[flow] = None
            link.joint_flows += len(links) > 1
        self._share(flow)
        return flow

    def stop(self, flow: Flow) -> None:
        """Break a flow off."""
        self._leave(flow)
        flow.done = _nothing

    def _finish(self, flow: Flow, version: int) -> None:
        if flow.version != version:
            return
        self._leave(flow)
        done, flow.done = flow.done, _nothing  # it holds the flow, too
        done()

    def _leave(self, flow: Flow) -> None:
        if flow.version < 0:
            return
        flow.version = -1
        sent_bytes = flow.rate * (self._engine.now - flow.since)
        for link in flow.links:
            link.sent_bytes += sent_bytes
            del link.flows[flow]
            link.joint_flows -= len(flow.links) > 1
        for link in flow.links:
            other = next(iter(link.flows), None)
            if other is not None:
                self._share(other)

    def _share(self, start: Flow) -> None:
        """Work out the rates of all flows that hang together with one."""
        if not start.links:
            self._set_rate(start, math.inf)
            return
        first = start.links[0]
        if len(start.links) == 1 and not first.joint_flows:
            rate = first.bytes_per_s / len(first.flows)
            for flow in first.flows:
                self._set_rate(flow, rate)
            return
        flows, links = _component(start)
        room = {link: link.bytes_per_s for link in links}
        open_flows = {link: len(link.flows) for link in links}
        unset = dict.fromkeys(flows)
        while unset:
            tightest = min(links, key=lambda link: room[link] / open_flows[link])
            rate = room[tightest] / open_flows[tightest]
            for flow in tightest.flows:
                if flow in unset:
                    del unset[flow]
                    self._set_rate(flow, rate)
                    for link in flow.links:
                        room[link] = max(0.0, room[link] - rate)
                        open_flows[link] -= 1
            links = [link for link in links if open_flows[link]]

    def _set_rate(self, flow: Flow, rate: float) -> None:
        now = self._engine.now
        if rate == flow.rate and flow.version:
            return
        if flow.version:
            sent_bytes = flow.rate * (now - flow.since)
            flow.left_bytes -= sent_bytes
            for link in flow.links:
                link.sent_bytes += sent_bytes
        flow.since = now
        flow.rate = rate
        flow.version += 1
        wait_s = max(0.0, flow.left_bytes) / rate if rate else math.inf
        if wait_s < math.inf:
            self._engine.after(wait_s, self._finish, flow, flow.version)


def _nothing() -> None:
    """Stand in for what is called once."""


def _component(start: Flow) -> tuple[list[Flow], list[Link]]:
    """Return the flows and links that can be reached from a flow over shared links."""
    flows: dict[Flow, None] = {start: None}
    links: dict[Link, None] = {}
    pending = [start]
    while pending:
        for link in pending.pop().links:
            if link not in links:
                links[link] = None
                for flow in link.flows:
                    if flow not in flows:
                        flows[flow] = None
                        pending.append(flow)
    return list(flows), list(links)
