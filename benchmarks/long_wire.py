"""One source behind a long wire: 100 ms there and back, 200 Mbit/s, and cuts.

    python -m benchmarks.long_wire [--mib 256] [--rounds 5] [--json]

A node tells a proxy's address as that of its bulk plane (`--bulk-announce`), so that all
tensors come through the proxy: a delay, a rate shared by all connections, a buffer no
larger than the wire's own, and cuts (`tests/support/delay_proxy.py`). Each connection
lives five seconds on average. The rate is payload by the time from the wish for the model
to the last tensor in the store; the wire's own is what the proxy lets through, TLS and
heads included.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.support.delay_proxy import DelayProxy

from .model import tensor_sizes, write_model
from .processes import Server, python, run_json
from .report import Target, at_least_one, document, emit, spread, table

WANTED_SHARE = 0.9
"""Least part of the wire's rate that payload gets."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="one source behind a long wire")
    parser.add_argument("--mib", type=at_least_one, default=256, help="size of the model in MiB")
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--round-trip-ms", type=float, default=100)
    parser.add_argument("--mbit", type=float, default=200, help="rate of the wire in Mbit/s")
    parser.add_argument("--life-s", type=float, default=5, help="mean life of a connection")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's tmp)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        runs = measure(args, Path(name))
    wire = args.mbit * 1e6 / 8
    share = spread([run["bytes"] / run["seconds"] / wire for run in runs])
    again = spread([run["again_bytes_per_cut"] / 1e6 for run in runs if run["cuts"]] or [0.0])
    cuts = sum(run["cuts"] for run in runs)
    emit(
        document(
            "long_wire",
            mib=args.mib,
            rounds=args.rounds,
            round_trip_ms=args.round_trip_ms,
            mbit=args.mbit,
            life_s=args.life_s,
            share=asdict(share),
            again_mb_per_cut=asdict(again),
            runs=runs,
        ),
        table(
            ("", "median", "from-to"),
            [
                ("MB/s", share.median * wire / 1e6, ""),
                ("of the wire", share.median, share.span),
                (f"MB again per cut ({cuts} cuts)", again.median, again.span),
            ],
        ),
        [Target("of the wire", share.median, WANTED_SHARE)],
        as_json=args.json,
    )


def measure(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Return what each round came to."""
    source, store = work / "model.safetensors", work / "store"
    write_model(source, tensor_sizes(args.mib))
    added = run_json(python("tensorswarm", "add", str(source), "--store", str(store), "--json"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runs = []
    with DelayProxy(
        ("127.0.0.1", port),
        round_trip_s=args.round_trip_ms / 1e3,
        bytes_per_s=args.mbit * 1e6 / 8,
        mean_life_s=args.life_s,
        seed=1,
    ) as proxy:
        node = Server(
            python(
                *("tensorswarm", "node", "--listen", "/ip4/127.0.0.1/tcp/0", "--store", str(store)),
                *("--bulk-port", str(port), "--json"),
                *("--bulk-announce", f"127.0.0.1:{proxy.address[1]}"),
            )
        )
        try:
            address = json.loads(node.first_line)["addrs"][0]
            for number in range(args.rounds):
                before = (proxy.cuts, proxy.bytes_taken)
                target = str(work / f"target{number}")
                run = run_json(
                    python(
                        *("benchmarks.receivers", "tensorswarm", target),
                        *(added["model"], address, "tls"),
                    )
                )
                cuts, taken = proxy.cuts - before[0], proxy.bytes_taken - before[1]
                size_bytes = source.stat().st_size
                if taken < size_bytes:
                    raise RuntimeError("bytes came past the proxy: nothing was measured")
                again = max(0, taken - size_bytes) / max(1, cuts)
                runs.append(
                    {
                        "seconds": run["seconds"],
                        "bytes": size_bytes,
                        "cuts": cuts,
                        "again_bytes_per_cut": again,
                    }
                )
        finally:
            node.stop()
    return runs


if __name__ == "__main__":
    main()
