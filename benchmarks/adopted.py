"""Serving a model where it lies, beside serving a copy in the store.

    python -m benchmarks.adopted [--mib 512] [--rounds 6] [--json]

Two nodes serve the same model, one that copied it and one that registered the file's byte
ranges (``add --no-copy``, what ``adopt`` does). Receivers take turns between them as in
`one_source`: a fresh process each, into an empty store, everything in the page cache. Both
are measured over TLS and with ``--bulk clear``, where a copy is sent without being read
and an adopted file is not: it is looked at again after each read, before the bytes leave.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

from .contenders import Contender, Tensorswarm, TensorswarmClear
from .model import tensor_sizes, write_model
from .one_source import WARM, measure
from .report import Target, at_least_one, document, emit, spread, table
from .warm_memory import warm_memory

LEAST_RATIO = 0.9
"""Of the rate from a copy, over TLS: "at the bulk plane's speed" (issue 6)."""


class Adopted(Tensorswarm):
    """A node that serves the file from where it lies."""

    name = "adopted"
    add_options = ("--no-copy",)

    def prepare(self) -> None:
        """Register a file of its own."""
        self._serve_copy()
        served = self.served
        super().prepare()
        self.served = served


class AdoptedClear(Adopted):
    """The same with ``--bulk clear``."""

    name = "adopted, clear"
    bulk = "clear"


PAIRS = ((Adopted, Tensorswarm), (AdoptedClear, TensorswarmClear))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="an adopted file beside a copy in the store")
    parser.add_argument("--mib", type=at_least_one, default=512, help="size of the model in MiB")
    parser.add_argument("--rounds", type=at_least_one, default=6, help="rounds that are counted")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's tmp)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("there is at least one round")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        source = work / "source" / "model.safetensors"
        source.parent.mkdir()
        write_model(source, tensor_sizes(args.mib))
        size_bytes = source.stat().st_size
        contenders: list[Contender] = []
        for number, kind in enumerate(kind for pair in PAIRS for kind in pair):
            (work / str(number)).mkdir()
            contenders.append(kind(source, work / str(number)))
            contenders[-1].prepare()
        with warm_memory(size_bytes):
            measured = measure(contenders, work, args.rounds, WARM)
    rates = {
        name: [size_bytes / run.seconds / 1e6 for run in runs] for name, runs in measured.items()
    }
    cpu = {
        name: spread([run.cpu_server_s / size_bytes * 1e9 for run in runs])
        for name, runs in measured.items()
    }
    ratios = {
        own.name: spread(
            [mine / other for mine, other in zip(rates[own.name], rates[copy.name], strict=True)]
        )
        for own, copy in PAIRS
    }
    rows = [
        (
            name,
            spread(values).median,
            spread(values).span,
            cpu[name].median,
            ratios[name].median if name in ratios else None,
            ratios[name].span if name in ratios else None,
        )
        for name, values in rates.items()
    ]
    columns = (f"{args.mib} MiB", "MB/s", "from-to", "server CPU s/GB", "x a copy", "from-to")
    result = document(
        "adopted",
        mib=args.mib,
        rounds=args.rounds,
        mb_per_s={name: asdict(spread(values)) for name, values in rates.items()},
        cpu_server_s_per_gb={name: asdict(each) for name, each in cpu.items()},
        ratio_to_copy={name: asdict(each) for name, each in ratios.items()},
    )
    targets = [Target("x a copy in the store", ratios[Adopted.name].median, LEAST_RATIO)]
    emit(result, table(columns, rows), targets, as_json=args.json)


if __name__ == "__main__":
    main()
