"""The library's face: fetch, load and add, for programs that do not run a node."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tensorswarm.store.errors import BadInput, NotFound
from tensorswarm.store.store import Store
from tensorswarm.store.upkeep import EXPORTS

from .refs import Ref, RefKind, parse_ref

if TYPE_CHECKING:
    from tensorswarm.p2p.results import FetchResult
    from tensorswarm.store.manifest import Manifest

DEFAULT_TIMEOUT_S = 30.0
"""How long nothing may be found or arrive before a fetch gives up."""

HOME_VARIABLE = "TENSORSWARM_HOME"

Progress = Callable[[int, int], None]

RateLimit: TypeAlias = float | str | None
"""Bytes per second, a rate as people write it, or None for no limit."""


def default_store() -> Path:
    """Return the store's place: ``TENSORSWARM_HOME``, or the platform's data folder."""
    home = os.environ.get(HOME_VARIABLE)
    if home:
        return Path(home)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "tensorswarm"
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "tensorswarm"


def add(
    paths: Sequence[str | Path] | str | Path,
    *,
    store: str | Path | None = None,
    copy: bool = True,
) -> str:
    """Add a model's files to the store.

    Parameters
    ----------
    paths : path or sequence of paths
        Files and folders that together are one model.
    store : path, optional
        The store; by default `default_store()`.
    copy : bool
        False to register the files' byte ranges where they lie.

    Returns
    -------
    str
        The model id.

    Raises
    ------
    BadInput
        A file is malformed or cannot be read; the store is as it was.
    NoRoom
        The disk is full.
    """
    from tensorswarm.store.ingest import add_paths

    given = [paths] if isinstance(paths, str | Path) else list(paths)
    with Store(Path(store or default_store())) as opened:
        ingested = add_paths(opened, [Path(path) for path in given], copy=copy)
        opened.sync()
        return ingested.manifest.model_id


def fetch(
    ref: str,
    *,
    store: str | Path | None = None,
    bootstrap: Sequence[str] = (),
    origins: Sequence[str] = (),
    include: Sequence[str] = (),
    out: str | Path | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    upload_limit: RateLimit = None,
    download_limit: RateLimit = None,
) -> Path:
    """Fetch a model and return a folder with its files, bit for bit.

    Parameters
    ----------
    ref : str
        A model id.
    store : path, optional
        The store; by default `default_store()`.
    bootstrap : sequence of str
        Addresses of peers to begin with, ``/ip4/…/tcp/…/p2p/…``; by default the node
        that runs on this store.
    origins : sequence of str
        URLs of HTTP servers that hold the model's files.
    include : sequence of str
        Patterns of file paths or tensor names; none for everything.
    out : path, optional
        The folder; by default one inside the store.
    timeout_s : float
        How long nothing may be found or arrive before giving up.
    upload_limit, download_limit : float or str, optional
        What is given and taken at most, in all: bytes per second, or such as ``"5MB/s"``.

    Raises
    ------
    TensorswarmError
        One of its kinds: `BadInput`, `NotFound`, `NoSource`, `HashMismatch`, `NoRoom`.
    """
    parsed = parse_ref(ref)
    if parsed.kind is RefKind.PATH:
        return parsed.path
    root = Path(store or default_store())
    folder = Path(out) if out is not None else root / EXPORTS / ref
    with Store(root) as opened:
        fetch_into(
            opened,
            parsed,
            bootstrap=bootstrap,
            origins=origins,
            include=include,
            out=folder,
            timeout_s=timeout_s,
            upload_limit=upload_limit,
            download_limit=download_limit,
        )
        opened.sync()
    return folder


def load(
    ref: str,
    *,
    store: str | Path | None = None,
    bootstrap: Sequence[str] = (),
    origins: Sequence[str] = (),
    include: Sequence[str] = (),
    framework: str = "np",
    lazy: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    upload_limit: RateLimit = None,
    download_limit: RateLimit = None,
) -> Mapping[str, Any]:
    """Return a model's tensors, mapped and not copied, whatever format its files have.

    What is not in the store is fetched first. The parameters are those of `fetch`; a
    local path is taken as well, and mapped where it lies.

    Parameters
    ----------
    ref, store, bootstrap, origins, include, timeout_s, upload_limit, download_limit
        As for `fetch`.
    framework : str
        ``"np"`` for numpy arrays, which are read-only; ``"pt"`` for PyTorch tensors.
        Those may be written to; neither the store nor another process sees it.
    lazy : bool
        Whether each tensor is made only when it is asked for. The result then keeps the
        store open: use it in a ``with`` block, or call its ``close``.

    Returns
    -------
    dict of str to numpy.ndarray or torch.Tensor, or `LazyTensors`
        By tensor name; BF16 and 8-bit floats are arrays of the dtypes of ``ml_dtypes``.

    Raises
    ------
    TensorswarmError
        As for `fetch`; `BadInput` also for an unknown framework, or one that is not
        installed.
    """
    from tensorswarm.store.ingest import add_paths
    from tensorswarm.store.load import LazyTensors, load_tensors

    parsed = parse_ref(ref)
    if parsed.kind is RefKind.TENSOR:
        raise BadInput("load takes a model: a bare tensor has no name, dtype or shape")
    with ExitStack() as stack:
        opened = stack.enter_context(Store(Path(store or default_store())))
        if parsed.kind is RefKind.PATH:
            manifest = add_paths(opened, [parsed.path], copy=False).manifest
        else:
            result = fetch_into(
                opened,
                parsed,
                bootstrap=bootstrap,
                origins=origins,
                include=include,
                timeout_s=timeout_s,
                upload_limit=upload_limit,
                download_limit=download_limit,
            )
            assert result.manifest is not None  # a model was asked for
            manifest = result.manifest
        if not lazy:
            return load_tensors(opened, manifest, include, framework)
        tensors = LazyTensors(opened, manifest, include, framework)
        stack.pop_all()  # from now on it is theirs to close
        return tensors


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


def fetch_into(
    store: Store,
    ref: Ref,
    *,
    bootstrap: Sequence[str] = (),
    origins: Sequence[str] = (),
    include: Sequence[str] = (),
    first: Sequence[str] = (),
    out: Path | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    on_progress: Progress | None = None,
    upload_limit: RateLimit = None,
    download_limit: RateLimit = None,
    mdns: bool = True,
    network: Path | None = None,
    bulk: str = "tls",
    near_first: bool = False,
) -> FetchResult:
    """Fetch into an open store; starts a node for it only when something is missing.

    `network` is the key file of a private network. With `mdns`, a fetch that knows
    neither peers nor origins asks the local network. `near_first` spares origins for the
    sake of peers, and far peers for near ones.

    Raises
    ------
    TensorswarmError
        As for `fetch`.
    """
    result = local_result(store, ref, include)
    if result is None:
        limits = (upload_limit, download_limit)
        result = _fetch_from_network(
            store,
            ref,
            bootstrap,
            origins,
            include,
            first,
            timeout_s,
            on_progress,
            limits,
            mdns,
            network,
            bulk,
            near_first,
        )
    if out is not None:
        result.path = export_result(store, result, include, out)
    return result


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


def _fetch_from_network(
    store: Store,
    ref: Ref,
    bootstrap: Sequence[str],
    origins: Sequence[str],
    include: Sequence[str],
    first: Sequence[str],
    timeout_s: float,
    on_progress: Progress | None,
    limits: tuple[RateLimit, RateLimit],
    mdns: bool,
    network: Path | None,
    bulk: str,
    near_first: bool,
) -> FetchResult:
    import trio

    from tensorswarm.p2p.fetch import FetchOptions, one_error
    from tensorswarm.p2p.node import Node
    from tensorswarm.p2p.node_state import running_node

    options = FetchOptions(
        origins=tuple(origins),
        include=tuple(include),
        first=tuple(first),
        timeout_s=timeout_s,
        on_progress=on_progress or (lambda done, total: None),
        near_first=near_first,
    )
    peers = list(bootstrap) or running_node(store.root)
    mdns = mdns and not peers and not origins

    async def main() -> Any:
        async with (
            one_error(),
            Node(
                store,
                bootstrap=peers,
                server=False,
                mdns=mdns,
                network=network,
                upload_limit=limits[0],
                download_limit=limits[1],
                bulk=bulk,
            ) as node,
        ):
            return await node.fetch_digest(ref.digest, options, is_model=ref.kind is RefKind.MODEL)

    if ref.kind is RefKind.PATH:
        raise NotFound("a local path is not fetched")
    result: FetchResult = trio.run(main)
    return result
