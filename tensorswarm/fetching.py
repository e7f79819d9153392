"""Fetching into an open store: what the library and the command line have in common.

A reference may be a model id, a tensor's digest, or the URL of a model's file. Nothing of
the network is imported, and no node started, unless something is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tensorswarm.store.errors import BadInput
from tensorswarm.store.store import Store

from .refs import Ref, RefKind, is_url, parse_ref

if TYPE_CHECKING:
    from tensorswarm.p2p.fetch import FetchOptions
    from tensorswarm.p2p.node import Node
    from tensorswarm.p2p.results import FetchResult
    from tensorswarm.store.manifest import Manifest

DEFAULT_TIMEOUT_S = 30.0
"""How long nothing may be found or arrive before a fetch gives up."""

Progress = Callable[[int, int], None]

RateLimit: TypeAlias = float | str | None
"""Bytes per second, a rate as people write it, or None for no limit."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """How a fetch reaches others. `tensorswarm.fetch` describes what is not said here.

    Attributes
    ----------
    mdns : bool
        Whether a fetch that knows neither peers nor origins asks the local network.
    bulk : str
        ``"tls"`` or ``"clear"``, see `tensorswarm.Node`.
    """

    bootstrap: Sequence[str] = ()
    origins: Sequence[str] = ()
    timeout_s: float = DEFAULT_TIMEOUT_S
    upload_limit: RateLimit = None
    download_limit: RateLimit = None
    network: str | Path | None = None
    near_first: bool = False
    mdns: bool = True
    bulk: str = "tls"

    def node(self, store: Store) -> Node:
        """Return a node, not started yet, that fetches into a store and serves nobody else.

        Without a bootstrap it begins with the node that runs on the store.
        """
        from tensorswarm.p2p.node import Node
        from tensorswarm.p2p.node_state import running_node

        peers = list(self.bootstrap) or running_node(store.root)
        return Node(
            store,
            bootstrap=peers,
            server=False,
            mdns=self.mdns and not peers and not self.origins,
            network=self.network,
            upload_limit=self.upload_limit,
            download_limit=self.download_limit,
            bulk=self.bulk,
        )

    def options(self, include: Sequence[str], first: Sequence[str], **more: Any) -> FetchOptions:
        """Return what the node is to be told of one fetch; `more` as `FetchOptions` says."""
        from tensorswarm.p2p.fetch import FetchOptions

        return FetchOptions(
            origins=tuple(self.origins),
            include=tuple(include),
            first=tuple(first),
            timeout_s=self.timeout_s,
            near_first=self.near_first,
            **more,
        )


def fetch_into(
    store: Store,
    ref: str,
    network: Network,
    *,
    include: Sequence[str] = (),
    first: Sequence[str] = (),
    on_progress: Progress = lambda done, total: None,
) -> FetchResult:
    """Bring what a reference names into a store.

    Parameters
    ----------
    store : Store
        Where it goes.
    ref : str
        A model id, a tensor's CID or digest, or the URL of a model's file.
    network : Network
        How to reach others.
    include, first : sequence of str
        Patterns of file paths or tensor names: all that is wanted (none: everything), and
        what is wanted before the rest.
    on_progress : callable
        Called with the verified bytes so far and the bytes in all.

    Raises
    ------
    TensorswarmError
        As for `tensorswarm.fetch`.
    """

    def bring(found: Ref, *origins: str) -> FetchResult:
        known = local_result(store, found, include)
        if known is not None:
            return known
        wider = replace(network, origins=(*origins, *network.origins))
        options = wider.options(include, first, on_progress=on_progress)
        return _run(wider.node(store), found, options)

    parsed = remote_ref(ref)
    if parsed is not None:
        return bring(parsed)
    from .url_fetch import fetch_url  # brings httpx, which others do without

    return fetch_url(store, ref, bring, on_progress)


def remote_ref(text: str) -> Ref | None:
    """Read a reference that can be fetched; None for a URL.

    Raises
    ------
    BadInput
        It names nothing that can be fetched.
    """
    if is_url(text):
        return None
    parsed = parse_ref(text)
    if parsed.kind is RefKind.PATH:
        raise BadInput(f"{text} is here already: `tensorswarm add` takes local files")
    return parsed


def _run(node: Node, ref: Ref, options: FetchOptions) -> FetchResult:
    import trio

    from tensorswarm.p2p.fetch import one_error

    if trio.lowlevel.in_trio_run():
        raise BadInput(
            "this waits for a whole fetch, which cannot be done inside trio's loop: use "
            "`async with tensorswarm.Node(...)`, or trio.to_thread.run_sync"
        )
    results: list[FetchResult] = []

    async def main() -> None:
        async with one_error(), node:
            is_model = ref.kind is RefKind.MODEL
            results.append(await node.fetch_digest(ref.digest, options, is_model=is_model))

    trio.run(main)
    return results[0]


def local_result(store: Store, ref: Ref, include: Sequence[str]) -> FetchResult | None:
    """Return the result of a fetch that needs no network, or None if it needs one."""
    from tensorswarm.p2p.results import FetchResult
    from tensorswarm.store.export import select

    if ref.kind is RefKind.TENSOR:
        record = store.records([ref.digest]).get(ref.digest)
        if record is None:
            return None
        return FetchResult(ref.digest, bytes_total=record.size_bytes, bytes_local=record.size_bytes)
    manifest = store.manifest(ref.digest)
    if manifest is None:
        return None
    chosen = select(manifest, include)
    if store.missing_objects(manifest, chosen):
        return None
    from tensorswarm.store.digest import DIGEST_SIZE, chunk_count

    refs = [manifest.objects[index] for index in chosen]
    total = store.records([ref.digest])[ref.digest].size_bytes
    total += sum(each.size_bytes for each in refs)
    lists = {each.chunk_list: DIGEST_SIZE * chunk_count(each.size_bytes) for each in refs}
    total += sum(size for digest, size in lists.items() if digest)
    return FetchResult(ref.digest, manifest, bytes_total=total, bytes_local=total)


def export_result(store: Store, result: FetchResult, include: Sequence[str], out: Path) -> Path:
    """Write what was fetched below `out`: a model's files, or a bare tensor's bytes."""
    from tensorswarm.store.export import export_files, export_object, select, whole_files

    if result.manifest is None:
        export_object(store, result.digest, out / result.id)
    else:
        manifest: Manifest = result.manifest
        files = whole_files(manifest, select(manifest, include))
        export_files(store, manifest, files, out)
    return out
