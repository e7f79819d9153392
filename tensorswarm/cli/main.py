"""Arguments, dispatch, and what becomes of errors.

Every command has ``--store DIR`` and ``--json``. With ``--json`` standard output holds
one JSON document (for an error, ``{"error": …, "exit_code": …}``); people's text,
logs and progress go to standard error. An error is one line and never a traceback;
``TENSORSWARM_DEBUG=1`` shows where it came from.

Exit codes: 0 done · 1 damaged store or a fault of ours · 2 wrong usage or bad input ·
3 not found anywhere · 4 no source reachable in time · 5 bytes did not match their
hash · 6 no room on disk · 7 refused · 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tensorswarm.store.errors import BadInput, TensorswarmError
from tensorswarm.store.version import VERSION

from ..api import default_store
from ..fetching import DEFAULT_TIMEOUT_S
from . import INTERRUPTED, commands, comparing, sharing, stamping, upkeep
from .output import Output
from .simulate import simulate

DEBUG_VARIABLE = "TENSORSWARM_DEBUG"

GC_THRESHOLDS = (50_000, 20, 20)
"""How seldom the collector of cycles looks: a command makes hundreds of thousands of objects
that live as long as it does, and hardly any cycles. By default it looks at all 700."""

MAX_BOOTSTRAP_FILE_BYTES = 1 << 20
"""Largest file read for ``--bootstrap @FILE``; an address has under 512 characters."""

Handler = Callable[[argparse.Namespace, Output], int]


class UsageError(BadInput):
    """The command line could not be read (exit 2)."""


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors, so that ``--json`` holds for them too."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, with the way to find out what is right."""
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def positive_seconds(text: str) -> float:
    """Read a duration in seconds for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def port_number(text: str) -> int:
    """Read a TCP port for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def rate(text: str) -> float:
    """Read a rate in bytes per second for argparse."""
    from tensorswarm.p2p.limits.rates import parse_rate

    try:
        return parse_rate(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog="tensorswarm",
        description="Share and fetch model weights by the hash of each tensor's bytes.",
        epilog="A REF is a model id, a tensor's CID or 64-digit digest, or a local path.",
    )
    parser.add_argument("--version", action="version", version=f"tensorswarm {VERSION}")
    common = Parser(add_help=False)
    common.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="the store (else $TENSORSWARM_HOME, else the platform's data folder)",
    )
    common.add_argument("--json", action="store_true", help="print one JSON document")
    network = Parser(add_help=False)
    network.add_argument(
        "--bootstrap",
        action="append",
        default=[],
        metavar="ADDR",
        help="a peer to begin with, /ip4/…/tcp/…/p2p/…, a name in DNS, /dnsaddr/…, or "
        "@FILE with one a line (default: the node that runs on this store)",
    )
    network.add_argument(
        "--network",
        type=Path,
        metavar="KEYFILE",
        help="the private network of this key: see `tensorswarm network-key`",
    )
    network.add_argument(
        "--no-mdns",
        dest="mdns",
        action="store_false",
        help="don't look for peers on the local network, nor be found there",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, handler: Handler, summary: str, *parents: Parser) -> Parser:
        sub = subparsers.add_parser(
            name, help=summary, description=summary, parents=[common, *parents]
        )
        sub.set_defaults(handler=handler)
        return sub

    _add_local_commands(command)
    _add_sharing_commands(command)
    _add_upkeep_commands(command)
    _add_network_commands(command, network)
    _add_simulation_command(command)
    return parser


def _add_local_commands(command: Callable[..., Parser]) -> None:
    sub = command("add", commands.add, "add a model's files to the store")
    sub.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files and folders")
    sub.add_argument(
        "--no-copy", action="store_true", help="register the files' bytes where they lie"
    )
    sub.add_argument(
        "--verbatim",
        action="append",
        default=[],
        metavar="GLOB",
        help="keep these files as they are, without looking for tensors in them",
    )
    command("ls", commands.ls, "list the models in the store")
    sub = command("info", commands.info, "show what a model or a tensor is made of")
    sub.add_argument("ref", metavar="REF")
    sub.add_argument("--tensors", action="store_true", help="list every tensor")
    sub = command(
        "adopt",
        comparing.adopt,
        "register the models of a Hugging Face cache, an Ollama store or a folder tree where "
        "they lie",
    )
    sub.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    sub = command("stamp", stamping.stamp, "write a copy with its tensors' hashes in its header")
    sub.add_argument("file", type=Path, metavar="FILE")
    sub.add_argument("--out", type=Path, metavar="FILE", help="(default: NAME.stamped.SUFFIX)")
    sub = command("manifest", stamping.manifest, "write a model's manifest as JSON beside it")
    sub.add_argument("file", type=Path, metavar="PATH", help="a file or a folder")
    sub.add_argument(
        "--out", type=Path, metavar="FILE", help="(default: PATH.tensorswarm.json, or in PATH)"
    )
    sub = command("diff", comparing.diff, "show which tensors two models share")
    sub.add_argument("a", metavar="A", help="a model id, or a file or folder")
    sub.add_argument("b", metavar="B")
    _add_plot(sub)
    sub = command("dedup", comparing.dedup, "show what models take together, tensors kept once")
    sub.add_argument(
        "refs", nargs="*", metavar="REF", help="model ids, files or folders (default: the store's)"
    )
    _add_plot(sub)
    sub = command("verify", commands.verify, "hash what the store has, and drop what is damaged")
    sub.add_argument("ref", nargs="?", metavar="REF", help="one model or tensor (default: all)")
    sub = command("export", commands.export, "write a model's files, bit for bit")
    sub.add_argument("ref", metavar="REF")
    sub.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="where to write them")
    sub.add_argument("--out", type=Path, metavar="DIR", help="the same as DIR")
    _add_include(sub)


def _add_upkeep_commands(command: Callable[..., Parser]) -> None:
    sub = command("rm", upkeep.rm, "remove models, and what no other model needs")
    sub.add_argument("refs", nargs="+", metavar="REF", help="model ids")
    sub = command("pin", upkeep.pin, "keep models and tensors: rm refuses them, gc leaves them")
    sub.add_argument("refs", nargs="+", metavar="REF", help="ids of models and tensors")
    sub = command("unpin", upkeep.unpin, "take pins away again")
    sub.add_argument("refs", nargs="+", metavar="REF", help="ids of models and tensors")
    sub = command("gc", upkeep.gc, "drop what no model and no pin needs")
    sub.add_argument("--dry-run", action="store_true", help="only say what would be dropped")


def _add_sharing_commands(command: Callable[..., Parser]) -> None:
    sub = command("share", sharing.share, "say whom a model is for; alone, show it")
    sub.add_argument("ref", metavar="REF")
    choice = sub.add_mutually_exclusive_group()
    choice.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PEERID",
        help="only for this peer, and others named likewise; not announced",
    )
    choice.add_argument("--private", action="store_true", help="for everybody, but not announced")
    choice.add_argument("--public", action="store_true", help="for everybody, and announced")
    sub = command("network-key", sharing.network_key, "make the key file of a private network")
    sub.add_argument("file", type=Path, metavar="FILE")


def _add_network_commands(command: Callable[..., Parser], network: Parser) -> None:
    sub = command("node", commands.node, "run a peer until interrupted", network)
    sub.add_argument(
        "--listen",
        action="append",
        default=[],
        metavar="ADDR",
        help="where to listen: /ip4/0.0.0.0/tcp/4001 or host:port (default: every "
        "interface, any free port; only loopback with loopback bootstraps)",
    )
    sub.add_argument(
        "--bulk-port",
        type=port_number,
        default=0,
        metavar="PORT",
        help="TCP port of the bulk plane (default: any free one)",
    )
    sub.add_argument(
        "--relay",
        action="store_true",
        help="pass connections on to peers that cannot be dialled (circuit relay v2)",
    )
    sub.add_argument(
        "--via",
        action="append",
        default=[],
        metavar="ADDR",
        help="a relay to use if this node cannot be dialled, besides those it meets",
    )
    sub.add_argument(
        "--bulk-announce",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="tell peers this address of the bulk plane instead of its own, for a port that "
        "a router or proxy forwards; may be given again",
    )
    sub.add_argument(
        "--http", metavar="HOST:PORT", help="serve the store's models over plain HTTP as well"
    )
    _add_limits(sub)
    _add_bulk(sub)
    sub = command("fetch", commands.fetch, "fetch a model or a tensor", network)
    sub.add_argument("ref", metavar="REF")
    sub.add_argument(
        "--origin",
        action="append",
        default=[],
        metavar="URL",
        help="an HTTP server that holds the model's files",
    )
    _add_include(sub)
    sub.add_argument(
        "--first",
        action="append",
        default=[],
        metavar="GLOB",
        help="these files or tensors before all others",
    )
    sub.add_argument("--out", type=Path, metavar="DIR", help="export the files there")
    sub.add_argument(
        "--near-first",
        action="store_true",
        help="spare origins for the sake of peers, and peers on the Internet for those in "
        "the local network (default: all at once)",
    )
    _add_limits(sub)
    _add_bulk(sub)
    _add_timeout(sub)
    sub = command("peers", commands.peers, "show the peers that can be reached", network)
    sub.add_argument("ref", nargs="?", metavar="REF", help="only peers that hold some of it")
    sub.add_argument(
        "--dht", action="store_true", help="also what the node on this store has announced"
    )
    _add_timeout(sub)


def _add_simulation_command(command: Callable[..., Parser]) -> None:
    sub = command("sim", simulate, "run an experiment on a simulated network")
    sub.add_argument(
        "scenario", metavar="SCENARIO", help="a name (`sim list` shows them) or a Python file"
    )
    sub.add_argument("--nodes", type=int, metavar="N", help="number of receivers")
    sub.add_argument(
        "--seed", type=int, default=1, metavar="S", help="replays a run (default %(default)s)"
    )
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value for a parameter of the scenario",
    )
    sub.add_argument(
        "--out", type=Path, metavar="DIR", help="write JSON, CSV and plots (PNG) there"
    )


def _add_plot(sub: Parser) -> None:
    sub.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw it: a .png, .svg or .pdf (needs matplotlib)",
    )


def _add_include(sub: Parser) -> None:
    sub.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="only these files (by path) or tensors (by name)",
    )


def _add_limits(sub: Parser) -> None:
    for name, what in (("--upload-limit", "give to others"), ("--download-limit", "receive")):
        sub.add_argument(
            name,
            type=rate,
            metavar="RATE",
            help=f"{what} at most so much in all: 5MB/s, 500k (bytes), 40Mbit (default: no limit)",
        )


def _add_bulk(sub: Parser) -> None:
    sub.add_argument(
        "--bulk",
        choices=("tls", "clear"),
        default="tls",
        help="clear: within this machine or a private network (--network), leave TLS once "
        "both peer ids are proved, if the peer has opted in too (default: %(default)s)",
    )


def _add_timeout(sub: Parser) -> None:
    sub.add_argument(
        "--timeout",
        type=positive_seconds,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="give up when nobody is found or nothing arrives for so long (default %(default)g s)",
    )


def expand_bootstrap(texts: Sequence[str]) -> list[str]:
    """Return addresses, with each ``@FILE`` replaced by the lines of the file."""
    found: list[str] = []
    for text in texts:
        if not text.startswith("@"):
            found.append(text)
            continue
        path = Path(text[1:])
        try:
            with path.open(encoding="utf-8") as file:
                content = file.read(MAX_BOOTSTRAP_FILE_BYTES)
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--bootstrap {text}: cannot be read: {error}") from error
        lines = (line.strip() for line in content.splitlines())
        found += [line for line in lines if line and not line.startswith("#")]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        args = build_parser().parse_args(given)
    except UsageError as error:
        Output(as_json="--json" in given).error(str(error), error.exit_code)
        return error.exit_code
    output = Output(as_json=args.json)
    debug = os.environ.get(DEBUG_VARIABLE) == "1"
    try:
        args.store = args.store or default_store()
        if hasattr(args, "bootstrap"):
            args.bootstrap = expand_bootstrap(args.bootstrap)
        handler: Handler = args.handler
        return handler(args, output)
    except KeyboardInterrupt:
        output.error("interrupted; what was verified is kept", INTERRUPTED)
        return INTERRUPTED
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except TensorswarmError as error:
        if debug:
            raise
        output.error(str(error), error.exit_code)
        return error.exit_code
    except BaseExceptionGroup as group:
        if debug:
            raise
        return _group_failed(group, output)
    except Exception as error:
        if debug:
            raise
        output.error(
            f"internal error: {type(error).__name__}: {error} "
            f"(run with {DEBUG_VARIABLE}=1 for the details)",
            1,
        )
        return 1


def _group_failed(group: BaseExceptionGroup[BaseException], output: Output) -> int:
    """Report errors that came out of several tasks at once: ours first."""
    if group.subgroup(KeyboardInterrupt) is not None:
        output.error("interrupted; what was verified is kept", INTERRUPTED)
        return INTERRUPTED
    ours = group.subgroup(TensorswarmError)
    error: BaseException = ours if ours is not None else group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    code = error.exit_code if isinstance(error, TensorswarmError) else 1
    text = str(error) if ours is not None else f"internal error: {type(error).__name__}: {error}"
    output.error(text, code)
    return code
