"""Fetching a model by the URL of its file: what its header tells is not downloaded twice.

In this order:

1. A sidecar beside the file (`sidecar`) has the manifest: only missing objects are fetched.
2. A stamp in the file's header (`stamps`) has the tensors' digests: the header is read,
   and what lies between the tensors; only missing tensors are fetched. For an index of
   shards this is done with each of them.
3. Otherwise the file is downloaded once, and added.

In the first two cases peers that hold the tensors give them as well. All three fill the
store, and the model's id is the one that `add` of the same files gives.
"""

from __future__ import annotations

import os
import posixpath
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from tensorswarm.p2p.origins.origin import check_origin_url, display_url
from tensorswarm.p2p.origins.remote_file import RemoteFiles
from tensorswarm.p2p.results import FetchResult, SourceReport
from tensorswarm.store import sidecar
from tensorswarm.store.errors import BadInput, HashMismatch, NotFound
from tensorswarm.store.formats.safetensors import load_header
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.names import check_path, quoted
from tensorswarm.store.place import disk_errors
from tensorswarm.store.remote_model import RemotePart, describe_remote
from tensorswarm.store.store import Store

from .refs import Ref, RefKind

if TYPE_CHECKING:
    from tensorswarm.store.manifest import Manifest

INDEX_SUFFIX = ".index.json"

MAX_SHARDS = 10_000
"""Most shards that an index may name: published models have some hundreds."""

MAX_INDEX_BYTES = 100_000_000
"""Longest index: as long as a safetensors header may be."""

Progress = Callable[[int, int], None]
Fetcher = Callable[[Ref, str], FetchResult]
"""Fetches a model whose manifest and chunk lists are in the store, with an origin."""


def fetch_url(
    store: Store, url: str, fetch: Fetcher, progress: Progress = lambda done, total: None
) -> FetchResult:
    """Bring the model at a URL into the store.

    Parameters
    ----------
    store : Store
        Where it goes.
    url : str
        A file, an index of shards, or, ending in ``/``, a folder with a sidecar.
    fetch : callable
        Fetches what is missing.
    progress : callable
        Hears of bytes, while a file is downloaded whole.

    Raises
    ------
    TensorswarmError
        `BadInput` for a URL or file that is of no use, otherwise as for `fetch`.
    """
    check_origin_url(url)
    begun = time.monotonic()
    with closing(RemoteFiles()) as remote:
        manifest = _by_sidecar(store, url, remote)
        if manifest is None and url.partition("?")[0].endswith("/"):
            raise NotFound(f"{display_url(url)}: no {sidecar.FOLDER_NAME} in that folder")
        here = 0
        if manifest is None:
            sizes = _sizes(url, remote)
            found = _by_stamps(store, url, sizes, remote)
            if found is None:
                result = _download(store, url, sizes, remote, progress)
                result.seconds = time.monotonic() - begun
                return result
            manifest, here = found
        overhead = remote.received_bytes
    store.put_manifest(manifest, _name(url))
    result = fetch(Ref(RefKind.MODEL, manifest.digest, Path()), url)
    # Headers came from the origin too, though they were in the store when this began.
    result.bytes_local = max(0, result.bytes_local - here)
    result.bytes_origin += overhead
    result.bytes_total = result.bytes_local + result.bytes_peers + result.bytes_origin
    _note_source(result, url, overhead)
    result.seconds = time.monotonic() - begun
    return result


def _note_source(result: FetchResult, url: str, byte_count: int) -> None:
    """Count bytes of headers among what the origin gave."""
    shown = display_url(url)
    for index, source in enumerate(result.sources):
        if source.kind == "origin":
            result.sources[index] = SourceReport(
                source.kind, source.id, source.bytes + byte_count, source.dropped, source.reason
            )
            return
    result.sources.append(SourceReport("origin", shown, byte_count, False))


def _name(url: str) -> str:
    """Return the name of a URL's file, which has to be fit for a disk."""
    return check_path(unquote(posixpath.basename(urlsplit(url).path)) or "model")


def _beside(url: str, name: str) -> str:
    """Return the URL of another file in the same folder."""
    parts = urlsplit(url)
    folder = parts.path.rpartition("/")[0]
    return urlunsplit((parts.scheme, parts.netloc, f"{folder}/{name}", parts.query, ""))


def _by_sidecar(store: Store, url: str, remote: RemoteFiles) -> Manifest | None:
    """Return the manifest of a sidecar, if there is one; its chunk lists go into the store."""
    path = urlsplit(url).path
    name = path.rpartition("/")[2]
    where = _beside(url, name + sidecar.SUFFIX if name else sidecar.FOLDER_NAME)
    try:
        size, _ = remote.size_of(where)
        if size > sidecar.MAX_SIDECAR_BYTES:
            raise BadInput(f"{display_url(where)}: {size} bytes are too many for a sidecar")
        manifest, lists = sidecar.decode(remote.reader(where, size)(0, size))
    except NotFound:
        return None
    if name and _name(url) not in manifest.file_by_path:
        raise BadInput(f"{display_url(where)} describes another file")
    for data in lists.values():
        store.put_blob(data)
    return manifest


def _sizes(url: str, remote: RemoteFiles) -> dict[str, int]:
    """Return the sizes of the file, and of the shards if it is an index, by name."""
    name = _name(url)
    size, _ = remote.size_of(url)
    sizes = {name: size}
    if name.endswith(INDEX_SUFFIX):
        if size > MAX_INDEX_BYTES:
            raise BadInput(f"{display_url(url)}: an index of {size} bytes")
        document = load_header(remote.reader(url, size)(0, size).lstrip())
        shards = document.get("weight_map")
        if not isinstance(shards, dict):
            raise BadInput(f"{display_url(url)}: no index of shards: it lacks a weight_map")
        names = {str(value) for value in shards.values()}
        if len(names) > MAX_SHARDS:
            raise BadInput(f"{display_url(url)}: {len(names)} shards, at most {MAX_SHARDS}")
        for shard in sorted(names):
            if "/" in check_path(shard):
                raise BadInput(f"{display_url(url)}: the shard {quoted(shard)} is elsewhere")
            sizes[shard], _ = remote.size_of(_beside(url, quote(shard)))
    return sizes


def _by_stamps(
    store: Store, url: str, sizes: dict[str, int], remote: RemoteFiles
) -> tuple[Manifest, int] | None:
    """Return the manifest that stamps tell, and the bytes put into the store; or None."""
    parts = [
        RemotePart(name, size, remote.reader(_beside(url, quote(name)), size))
        for name, size in sizes.items()
    ]
    return describe_remote(store, parts)


def _download(
    store: Store, url: str, sizes: dict[str, int], remote: RemoteFiles, progress: Progress
) -> FetchResult:
    """Download files whole, and add them."""
    total, done = sum(sizes.values()), 0
    with _scratch(store) as folder:
        for name, size in sizes.items():
            with disk_errors("cannot write a downloaded file"), (folder / name).open("wb") as file:
                for block in remote.whole(_beside(url, quote(name)), size):
                    file.write(block)
                    done += len(block)
                    progress(done, total)
            if os.stat(folder / name).st_size != size:
                raise HashMismatch(f"{display_url(url)}: {name} came with another length")
        paths = [folder / name for name in sizes]
        added = add_paths(store, paths, name=_name(url))
    result = FetchResult(added.manifest.digest, added.manifest)
    result.bytes_origin = result.bytes_total = remote.received_bytes
    _note_source(result, url, remote.received_bytes)
    return result


@contextmanager
def _scratch(store: Store) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=store.place.temporary().parent) as folder:
        yield Path(folder)
