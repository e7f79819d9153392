"""The library's face: fetch, load and add, for programs that do not run a node."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tensorswarm.store.arguments import one_or_more
from tensorswarm.store.errors import BadInput
from tensorswarm.store.store import Store
from tensorswarm.store.upkeep import EXPORTS

from .fetching import DEFAULT_TIMEOUT_S, Network, RateLimit, export_result, fetch_into
from .refs import RefKind, is_url, parse_ref

HOME_VARIABLE = "TENSORSWARM_HOME"


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
    bootstrap: str | Sequence[str] = (),
    origins: str | Sequence[str] = (),
    include: str | Sequence[str] = (),
    out: str | Path | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    upload_limit: RateLimit = None,
    download_limit: RateLimit = None,
    network: str | Path | None = None,
    near_first: bool = False,
) -> Path:
    """Fetch a model and return a folder with its files, bit for bit.

    Parameters
    ----------
    ref : str
        A model id, or the URL of a model's file. A tensor's CID or digest is taken as
        well: the folder then has one file of that name, with its bytes.
    store : path, optional
        The store; by default `default_store()`.
    bootstrap : str or sequence of str
        Addresses of peers to begin with, ``/ip4/…/tcp/…/p2p/…``; by default the node
        that runs on this store.
    origins : str or sequence of str
        URLs of HTTP servers that hold the model's files.
    include : str or sequence of str
        Patterns of file paths or tensor names; none for everything.
    out : path, optional
        The folder; by default one inside the store.
    timeout_s : float
        How long nothing may be found or arrive before giving up.
    upload_limit, download_limit : float or str, optional
        What is given and taken at most, in all: bytes per second, or such as ``"5MB/s"``.
    network : path, optional
        The key file of a private network.
    near_first : bool
        Whether to spare origins for the sake of peers, and peers on the Internet for
        those in the local network, rather than to ask all at once.

    Raises
    ------
    TensorswarmError
        One of its kinds: `BadInput`, `NotFound`, `NoSource`, `HashMismatch`, `NoRoom`.
    """
    if not is_url(ref) and (parsed := parse_ref(ref)).kind is RefKind.PATH:
        return parsed.path
    include = one_or_more(include)
    how = Network(
        bootstrap=one_or_more(bootstrap),
        origins=one_or_more(origins),
        timeout_s=timeout_s,
        upload_limit=upload_limit,
        download_limit=download_limit,
        network=network,
        near_first=near_first,
    )
    root = Path(store or default_store())
    with Store(root) as opened:
        result = fetch_into(opened, ref, how, include=include)
        folder = Path(out) if out is not None else root / EXPORTS / result.id
        export_result(opened, result, include, folder)
        opened.sync()
    return folder


def load(
    ref: str,
    *,
    store: str | Path | None = None,
    bootstrap: str | Sequence[str] = (),
    origins: str | Sequence[str] = (),
    include: str | Sequence[str] = (),
    framework: str = "np",
    lazy: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    upload_limit: RateLimit = None,
    download_limit: RateLimit = None,
    network: str | Path | None = None,
    near_first: bool = False,
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
    network, near_first
        As for `fetch`.

    Returns
    -------
    dict of str to numpy.ndarray or torch.Tensor, or `LazyTensors`
        By tensor name; BF16 and 8-bit floats are arrays of the dtypes of ``ml_dtypes``,
        quantised blocks and 4-bit floats their bytes as uint8, rows counted in bytes.

    Raises
    ------
    TensorswarmError
        As for `fetch`; `BadInput` also for an unknown framework, or one that is not
        installed.
    """
    from tensorswarm.store.ingest import add_paths
    from tensorswarm.store.load import LazyTensors, load_tensors

    include = one_or_more(include)
    how = Network(
        bootstrap=one_or_more(bootstrap),
        origins=one_or_more(origins),
        timeout_s=timeout_s,
        upload_limit=upload_limit,
        download_limit=download_limit,
        network=network,
        near_first=near_first,
    )
    parsed = None if is_url(ref) else parse_ref(ref)
    if parsed is not None and parsed.kind is RefKind.TENSOR:
        raise BadInput("load takes a model: a bare tensor has no name, dtype or shape")
    with ExitStack() as stack:
        opened = stack.enter_context(Store(Path(store or default_store())))
        if parsed is not None and parsed.kind is RefKind.PATH:
            manifest = add_paths(opened, [parsed.path], copy=False).manifest
        else:
            result = fetch_into(opened, ref, how, include=include)
            assert result.manifest is not None  # a model was asked for
            manifest = result.manifest
        if not lazy:
            return load_tensors(opened, manifest, include, framework)
        tensors = LazyTensors(opened, manifest, include, framework)
        stack.pop_all()  # from now on it is theirs to close
        return tensors
