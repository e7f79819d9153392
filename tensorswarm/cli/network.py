"""The commands that use the network: node, fetch, peers."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from tensorswarm.store.errors import BadInput, NoSource
from tensorswarm.store.store import Store

from ..fetching import Network, export_result, fetch_into, remote_ref
from ..refs import RefKind, parse_ref
from .output import Output, human_bytes, human_rate, printable

if TYPE_CHECKING:
    from tensorswarm.p2p.node import Node
    from tensorswarm.p2p.results import FetchResult

OPEN_FILES = 4_096
"""Files that a node may have open: 900 connections of libp2p and 160 of the bulk plane, those
that shake hands, the gateway's, and the store's. The usual limit is 1,024."""

REPORT_INTERVAL_S = 10.0
"""How often a node at a terminal says how it is doing."""


def fetch(args: argparse.Namespace, output: Output) -> int:
    """Fetch a model or a tensor, and export it when asked to."""
    remote_ref(args.ref)  # before a store is made for nothing
    how = Network(
        bootstrap=args.bootstrap,
        origins=args.origin,
        timeout_s=args.timeout,
        upload_limit=args.upload_limit,
        download_limit=args.download_limit,
        network=args.network,
        near_first=args.near_first,
        mdns=args.mdns,
        bulk=args.bulk,
    )
    with Store(args.store) as store:
        with output.progress("fetching") as show:
            result = fetch_into(
                store, args.ref, how, include=args.include, first=args.first, on_progress=show
            )
        if args.out is not None:
            result.path = export_result(store, result, args.include, args.out)
        store.sync()
    output.result(result.as_json(), lambda: _print_fetch(result, output))
    return 0


def _print_fetch(result: FetchResult, output: Output) -> None:
    moved = result.bytes_peers + result.bytes_origin
    output.say(
        f"{human_bytes(result.bytes_total)}: {human_bytes(result.bytes_local)} were here, "
        f"{human_bytes(moved)} came in {result.seconds:.2f} s "
        f"({human_rate(moved, result.seconds)})"
    )
    if result.bytes_wasted:
        output.say(f"{human_bytes(result.bytes_wasted)} received in vain")
    if result.sources:
        output.say()
        rows = [
            [
                f"{source.kind} ({source.via})" if source.via else source.kind,
                source.id,
                human_bytes(source.bytes),
                f"{source.bytes / moved:.0%}" if moved else "-",
                f"dropped: {source.reason}" if source.dropped else source.reason,
            ]
            for source in result.sources
        ]
        output.table(["from", "who", "gave ", "share ", ""], rows)
    if result.path is not None:
        output.say()
        output.say(f"files: {result.path}")


def node(args: argparse.Namespace, output: Output) -> int:
    """Run a peer until SIGINT or SIGTERM."""
    import trio

    from tensorswarm.p2p.fetch import one_error
    from tensorswarm.p2p.gateway import Gateway
    from tensorswarm.p2p.node import Node

    _set_up_logging()
    _allow_open_files()

    async def main() -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with (
                one_error(),
                Node(
                    args.store,
                    listen=args.listen,
                    bootstrap=args.bootstrap,
                    bulk_port=args.bulk_port,
                    bulk_announce=args.bulk_announce,
                    upload_limit=args.upload_limit,
                    download_limit=args.download_limit,
                    mdns=None if args.mdns else False,
                    network=args.network,
                    relay=args.relay,
                    via=args.via,
                    bulk=args.bulk,
                ) as running,
            ):
                limiter = running.upload_limiter
                gateway = None
                if args.http:
                    is_public = running.access.is_public
                    gateway = Gateway(running.store, args.http, limiter, is_public)
                if gateway is not None:
                    gateway.start()
                try:
                    _say_ready(running, gateway.url if gateway else None, output)
                    async for _ in signals:
                        break
                finally:
                    if gateway is not None:
                        gateway.close()

    trio.run(main)
    return 0


def _allow_open_files() -> None:
    """Raise the limit that a process may raise by itself: each connection is an open file."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _say_ready(running: Node, http: str | None, output: Output) -> None:
    document = {"peer_id": running.peer_id, "addrs": list(running.addrs), "http": http}

    def text() -> None:
        output.say(f"peer id  {running.peer_id}")
        for addr in running.addrs:
            output.say(f"address  {addr}")
        if http:
            output.say(f"http     {http}")
        output.say(f"store    {running.store.root}")
        output.say("running until interrupted (Ctrl-C)")

    output.result(document, text)


class _Formatter(logging.Formatter):
    """Writes lines that cannot steer the terminal, whatever strangers call themselves."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        return "\n".join(map(printable, super().format(record).split("\n")))


def _set_up_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("tensorswarm")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # py-libp2p logs every dropped connection of a stranger as an error.
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)


def peers(args: argparse.Namespace, output: Output) -> int:
    """Show the peers that can be reached, and what they hold of a model."""
    import trio

    from tensorswarm.p2p.fetch import one_error
    from tensorswarm.p2p.node import Node
    from tensorswarm.p2p.node_state import read_state, running_node
    from tensorswarm.p2p.survey import survey

    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    ref = parse_ref(args.ref) if args.ref else None
    if ref is not None and ref.kind is RefKind.PATH:
        raise BadInput("peers takes a model id or a tensor digest, not a path")
    bootstrap = args.bootstrap or running_node(args.store)
    state = read_state(args.store)
    if args.dht and not state:
        raise NoSource("--dht shows the node that runs on this store, and none does")
    if not bootstrap:
        raise NoSource("there is nobody to ask: give --bootstrap, or start a node on this store")

    async def main() -> tuple[list[dict[str, Any]], str]:
        async with (
            one_error(),
            Node(args.store, bootstrap=bootstrap, server=False, network=args.network) as asking,
        ):
            rows = await survey(asking, ref.digest if ref else b"", args.timeout)
            with trio.move_on_after(args.timeout):
                await asking.reach.check()
            return rows, asking.reach.reachability.value

    begun = time.monotonic()
    found, verdict = trio.run(main)
    document: dict[str, Any] = {
        "peers": found,
        "reachability": state.get("reachability", verdict),
        "relays": state.get("relays", []),
        "seconds": round(time.monotonic() - begun, 3),
    }
    if args.dht:
        document["dht"] = state.get("dht", {})
        document["door"] = state.get("door", {})

    def text() -> None:
        rows = [
            [
                peer["peer_id"],
                peer["agent"],
                peer["via"],
                f"{peer['rtt_ms']:.1f}",
                human_bytes(peer["bytes_held"]) if ref else "-",
                peer["addrs"][0] if peer["addrs"] else "-",
            ]
            for peer in found
        ]
        output.table(["peer", "agent", "way", "ms ", "holds ", "address"], rows)
        output.say(f"others can dial this node: {document['reachability']}")
        for relay in document["relays"]:
            output.say(f"reachable through relay {relay}")
        for part in ("dht", "door") if args.dht else ():
            output.say()
            counts = [[name.replace("_", " "), str(n)] for name, n in document[part].items()]
            output.table([part, "count "], counts)

    output.result(document, text)
    return 0
