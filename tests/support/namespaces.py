"""Small networks for tests: namespaces round one router, on Linux and as root.

Each place has a network of its own behind the router. One that is *hidden* is like a
machine behind NAT: it may dial out, and the router lets nobody dial in.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.swarm_processes import Command, Completed, Node, Process
from tests.support.tools import lacking, require_tool

PORT, BULK_PORT = 4001, 4002
"""The ports that nodes listen on here, and which the router keeps strangers from."""


class NodeIn(Node):
    """A ``tensorswarm`` command in a namespace."""

    def __init__(self, place: Place, *arguments: str | Path) -> None:
        self.arguments = [str(argument) for argument in arguments]
        module = [sys.executable, "-m", "tensorswarm", *self.arguments]
        Process.__init__(self, [*place.enter, *module])


class Place:
    """One namespace.

    Attributes
    ----------
    ip : str
        Its address.
    enter : list of str
        Put before a command to run it there.
    """

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.ip = f"10.71.{number}.2"
        self.name = f"{network.prefix}-{name}"
        self.enter = ["nsenter", f"--net=/run/netns/{self.name}"]
        self._network = network

    def start_node(self, store: Path, *arguments: str) -> NodeIn:
        """Start a node and wait until it says how to reach it."""
        listen = ["--listen", f"{self.ip}:{PORT}", "--bulk-port", str(BULK_PORT)]
        node = NodeIn(self, "node", "--store", store, "--json", *listen, *arguments)
        self._network.stack.callback(node.close)
        node.wait_ready()
        return node

    def run(self, *arguments: str | Path) -> Completed:
        """Run a command to its end."""
        command: Command = NodeIn(self, *arguments)
        self._network.stack.callback(command.close)
        return command.complete()


class Network:
    """A router and the places behind it. Made by `network`."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.prefix = f"ts{uuid.uuid4().hex[:6]}"
        self._router = f"{self.prefix}-router"
        self._add(self._router)
        self._inside(self._router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        self._count = 0

    def place(self, name: str, *, hidden: bool = False) -> Place:
        """Add a place, with a route to all others."""
        self._count += 1
        number = self._count
        place = Place(self, name, number)
        self._add(place.name)
        inner, outer = "eth0", f"to{number}"
        link = ["link", "add", outer, "netns", self._router, "type", "veth", "peer", "name"]
        _ip(*link, inner, "netns", place.name)
        for where, device, host in ((self._router, outer, 1), (place.name, inner, 2)):
            self._inside(where, "ip", "addr", "add", f"10.71.{number}.{host}/24", "dev", device)
            self._inside(where, "ip", "link", "set", device, "up")
        self._inside(place.name, "ip", "route", "add", "default", "via", f"10.71.{number}.1")
        if hidden:
            for port in (PORT, BULK_PORT):
                rule = ["to", place.ip, "ipproto", "tcp", "dport", str(port), "prohibit"]
                self._inside(self._router, "ip", "rule", "add", *rule, "pref", "10")
        return place

    def _add(self, name: str) -> None:
        _ip("netns", "add", name)
        self.stack.callback(_ip, "netns", "del", name)
        self._inside(name, "ip", "link", "set", "lo", "up")

    def _inside(self, name: str, *command: str) -> None:
        _run("nsenter", f"--net=/run/netns/{name}", *command)


@contextmanager
def network() -> Iterator[Network]:
    """Make a network, and take it away at the end."""
    if sys.platform != "linux" or os.geteuid() != 0:
        lacking("needs to be root on Linux, for network namespaces")
    for tool in ("ip", "nsenter"):
        require_tool(tool)
    with ExitStack() as stack:
        yield Network(stack)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, (command, done.stderr)
