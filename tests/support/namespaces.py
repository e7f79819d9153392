"""Small networks for tests: namespaces round one router, on Linux and as root.

Each place has a network of its own behind the router. One that is *hidden* is behind a
firewall: it may dial out, and the router lets nobody dial in. One with a *NAT* has a private
address, the same as every other such place, and a gateway of its own with a public one.
"""

from __future__ import annotations

import json
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

PRIVATE_NETS, PUBLIC_NETS = "10.71", "45.71"
"""How the addresses of places begin. Nothing here is connected with the real Internet, but
some of what is to be tested makes a difference between private and public addresses."""

NAT_INSIDE = "192.168.1"
"""The network behind every NAT: that of many a home."""

KEEPS_PORTS, RANDOM_PORTS = "masquerade", "masquerade random"
"""Kinds of NAT. The first gives a connection the port that it left from, whomever it goes
to (endpoint-independent mapping, as long as ports do not collide); the second another one
each time, so that nobody can know where the next one will come from (a symmetric NAT)."""

GATEWAY_RULES = """
table ip nat {{
    chain out {{
        type nat hook postrouting priority srcnat
        oifname "wan" {nat}
    }}
}}
table ip filter {{
    chain to_it {{
        type filter hook input priority filter
        iifname "wan" ct state established,related accept
        iifname "wan" drop
    }}
    chain through_it {{
        type filter hook forward priority filter
        iifname "wan" ct state established,related accept
        iifname "wan" drop
    }}
}}
"""
"""What home gateways do: nobody comes in whose address was not dialled first."""


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
        Its address; behind a NAT, that inside.
    enter : list of str
        Put before a command to run it there.
    """

    def __init__(self, network: Network, name: str, ip: str) -> None:
        self.ip = ip
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

    def received_bytes(self) -> int:
        """Return how many bytes have come in by its network so far, as the kernel counts."""
        show = [*self.enter, "ip", "-json", "-stats", "link", "show", "eth0"]
        done = subprocess.run(show, capture_output=True, text=True, timeout=20, check=True)
        return int(json.loads(done.stdout)[0]["stats64"]["rx"]["bytes"])


class Network:
    """A router and the places behind it. Made by `network`."""

    def __init__(self, stack: ExitStack, nets: str) -> None:
        self.stack = stack
        self._nets = nets
        self.prefix = f"ts{uuid.uuid4().hex[:6]}"
        self._router = f"{self.prefix}-router"
        self._add(self._router)
        self._forward(self._router)
        self._count = 0

    def place(self, name: str, *, hidden: bool = False, nat: str = "") -> Place:
        """Add a place, with a route to all others.

        Parameters
        ----------
        name : str
            Short and unlike the others'.
        hidden : bool
            Whether nobody may dial its ports.
        nat : str
            The kind of NAT it is behind, `KEEPS_PORTS` or `RANDOM_PORTS`; none by default.
        """
        self._count += 1
        outside = f"{self._nets}.{self._count}"
        place = Place(self, name, f"{NAT_INSIDE}.2" if nat else f"{outside}.2")
        self._add(place.name)
        uplink = f"to{self._count}"
        if nat:
            gateway = f"{place.name}-gw"
            self._add(gateway)
            self._link(self._router, uplink, gateway, "wan", outside)
            self._link(gateway, "lan", place.name, "eth0", NAT_INSIDE)
            self._forward(gateway)
            rules = GATEWAY_RULES.format(nat=nat)
            self._inside(gateway, require_tool("nft"), "-f", "-", text=rules)
        else:
            self._link(self._router, uplink, place.name, "eth0", outside)
        if hidden:
            for port in (PORT, BULK_PORT):
                rule = ["to", place.ip, "ipproto", "tcp", "dport", str(port), "prohibit"]
                self._inside(self._router, "ip", "rule", "add", *rule, "pref", "10")
        return place

    def _link(self, upper: str, device: str, lower: str, lower_device: str, net: str) -> None:
        """Join two namespaces by a network; the lower one's other routes lead to the upper."""
        pair = ["type", "veth", "peer", "name", lower_device, "netns", lower]
        _ip("link", "add", device, "netns", upper, *pair)
        for where, link, host in ((upper, device, 1), (lower, lower_device, 2)):
            self._inside(where, "ip", "addr", "add", f"{net}.{host}/24", "dev", link)
            self._inside(where, "ip", "link", "set", link, "up")
        self._inside(lower, "ip", "route", "add", "default", "via", f"{net}.1")

    def _forward(self, name: str) -> None:
        self._inside(name, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def _add(self, name: str) -> None:
        _ip("netns", "add", name)
        self.stack.callback(_ip, "netns", "del", name)
        self._inside(name, "ip", "link", "set", "lo", "up")

    def _inside(self, name: str, *command: str, text: str = "") -> None:
        _run("nsenter", f"--net=/run/netns/{name}", *command, text=text)


@contextmanager
def network(nets: str = PRIVATE_NETS) -> Iterator[Network]:
    """Make a network, and take it away at the end.

    Parameters
    ----------
    nets : str
        How its addresses begin: `PRIVATE_NETS` or `PUBLIC_NETS`.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        lacking("needs to be root on Linux, for network namespaces")
    for tool in ("ip", "nsenter"):
        require_tool(tool)
    with ExitStack() as stack:
        yield Network(stack, nets)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str, text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, (command, done.stderr)
