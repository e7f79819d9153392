"""Fetching a model by the URL of its file: what its header tells is not downloaded twice.

In this order:

1. A sidecar beside the file (`sidecar`) has the manifest: only missing objects are fetched.
2. A stamp in the file's header (`stamps`) has the tensors' digests: the header is read,
   and what lies between the tensors; only missing tensors are fetched. Files that this one
   names (`companions`: shards, external data) are looked at in the same way.
3. Otherwise the file is downloaded once with those that it names, and added. So it is if
   the server gives files only as a whole, or has a missing tensor only in another form
   (compressed, say), which cannot be asked for by range.

In the first two cases peers that hold the tensors give them as well. All three fill the
store, and the model's id is the one that `add` of the same files gives.
"""

from __future__ import annotations

import os
import posixpath
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from tensorswarm.p2p.origins.origin import (
    JoinedRanges,
    check_origin_url,
    display_url,
    locate_objects,
    runs_of,
)
from tensorswarm.p2p.origins.remote_file import RemoteFiles
from tensorswarm.p2p.results import FetchResult, SourceReport
from tensorswarm.store import sidecar
from tensorswarm.store.errors import BadInput, HashMismatch, NotFound
from tensorswarm.store.formats.companions import companions
from tensorswarm.store.formats.stamps import read_stamp
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.names import check_path
from tensorswarm.store.place import disk_errors
from tensorswarm.store.remote_model import RemoteCopy, TooMuch, describe_remote
from tensorswarm.store.store import Store

from .refs import Ref, RefKind

if TYPE_CHECKING:
    from tensorswarm.store.manifest import Manifest

INDEX_SUFFIX = ".index.json"

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
    with closing(RemoteFiles()) as remote, _scratch(store) as folder:
        manifest, here = _by_sidecar(store, url, remote), 0
        if manifest is None and url.partition("?")[0].endswith("/"):
            raise NotFound(f"{display_url(url)}: no {sidecar.FOLDER_NAME} in that folder")
        site = _Site(url, remote, folder)
        if manifest is None and (found := site.by_stamps(store)) is not None:
            manifest, here = found
        if manifest is None or not site.gives(_missing(store, manifest), manifest):
            paths = None if manifest is None else [file.path for file in manifest.files]
            result = site.download(store, paths, progress)
            result.seconds = time.monotonic() - begun
            return result
        overhead = remote.received_bytes
    store.put_manifest(manifest, site.name)
    result = fetch(Ref(RefKind.MODEL, manifest.digest, Path()), url)
    # Headers came from the origin too, though they were in the store when this began.
    result.bytes_local = max(0, result.bytes_local - here)
    result.bytes_origin += overhead
    result.bytes_total = result.bytes_local + result.bytes_peers + result.bytes_origin
    _note_source(result, url, overhead)
    result.seconds = time.monotonic() - begun
    return result


def _missing(store: Store, manifest: Manifest) -> list[int]:
    """Return the objects that a fetch would have to bring, by index."""
    wanted = [index for index, ref in enumerate(manifest.objects) if ref.size_bytes]
    return store.missing_objects(manifest, wanted)


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


class _Site:
    """The file at a URL, and those that it names.

    Parameters
    ----------
    url : str
        The file's URL.
    remote : RemoteFiles
        Reads it.
    folder : Path
        An empty folder, for what is read.
    """

    def __init__(self, url: str, remote: RemoteFiles, folder: Path) -> None:
        self.name = _name(url)
        self._url = url
        self._remote = remote
        self._folder = folder
        self._sizes: dict[str, tuple[int, bool]] = {}

    def _size(self, name: str) -> tuple[int, bool]:
        """Return a file's size, and whether the server gives ranges of it."""
        if name not in self._sizes:
            self._sizes[name] = self._remote.size_of(_beside(self._url, quote(name)))
        return self._sizes[name]

    def by_stamps(self, store: Store) -> tuple[Manifest, int] | None:
        """Return the manifest that stamps tell, and the bytes put into the store; or None."""
        with ExitStack() as stack:

            def copy(name: str) -> RemoteCopy:
                size, _ = self._size(name)
                read_at = self._remote.reader(_beside(self._url, quote(name)), size)
                path = self._folder / "headers" / name
                return stack.enter_context(closing(RemoteCopy(name, size, read_at, path)))

            if not self._size(self.name)[1]:
                return None
            first = copy(self.name)
            # Who names other files is looked into, but not before it is known to be worth it.
            is_json = self.name.lower().endswith(".json")
            if not is_json and read_stamp(self.name, first.size_bytes, first.read_at) is None:
                return None
            try:
                names = companions(self.name, first.size_bytes, first.read_at)
            except TooMuch:
                return None
            self._check_index(names)
            if not all(self._size(name)[1] for name in names):
                return None
            return describe_remote(store, [first, *map(copy, names)])

    def _check_index(self, names: Sequence[str]) -> None:
        if self.name.endswith(INDEX_SUFFIX) and not names:
            raise BadInput(f"{display_url(self._url)}: no index of shards: it lacks a weight_map")

    def gives(self, missing: Sequence[int], manifest: Manifest) -> bool:
        """Tell whether each of these objects can be had by asking for ranges of files."""
        places = locate_objects(manifest)
        joined = [places[i] for i in missing if isinstance(places.get(i), JoinedRanges)]
        paths = {run.path for place in joined for run in runs_of(place)}
        return all(index in places for index in missing) and all(
            self._size(path)[1] for path in paths
        )

    def download(
        self, store: Store, paths: Sequence[str] | None, progress: Progress
    ) -> FetchResult:
        """Download files as a whole, and add them: the file and those that it names, or these."""
        folder = self._folder / "files"
        folder.mkdir()
        if paths is None:
            self._save(folder, self.name, progress)
            paths = self._named_by(folder / self.name)
        for name in paths:
            self._size(name)  # before any is downloaded: they are there, all of them
        for name in paths:
            self._save(folder, name, progress)
        added = add_paths(store, [folder], name=self.name)
        result = FetchResult(added.manifest.digest, added.manifest)
        result.bytes_origin = result.bytes_total = self._remote.received_bytes
        _note_source(result, self._url, self._remote.received_bytes)
        return result

    def _named_by(self, path: Path) -> tuple[str, ...]:
        """Return the files that a downloaded one names."""
        with path.open("rb") as file:
            descriptor = file.fileno()
            names = companions(
                self.name,
                self._size(self.name)[0],
                lambda offset, length: os.pread(descriptor, length, offset),
            )
        self._check_index(names)
        return names

    def _save(self, folder: Path, name: str, progress: Progress) -> None:
        path, size = folder / name, self._size(name)[0]
        total = sum(size for size, _ in self._sizes.values())
        before = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
        with disk_errors("cannot write a downloaded file"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for block in self._remote.whole(_beside(self._url, quote(name)), size):
                    file.write(block)
                    progress(before + file.tell(), total)
        if path.stat().st_size != size:
            raise HashMismatch(f"{display_url(self._url)}: {name} came with another length")


@contextmanager
def _scratch(store: Store) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=store.place.temporary().parent) as folder:
        yield Path(folder)
