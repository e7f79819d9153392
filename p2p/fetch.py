"""Fetching a model or a tensor: from an id to verified objects in the store.

The chain of trust is model id → manifest → chunk list → chunk; each step is
verified against the one before. A tensor asked for by bare digest takes its chunk
list from a peer as a hint; the digest of the whole decides, and who gave a false
list is not asked again.

The steps of a fetch, in order: know the manifest, know the chunk lists, take up
what is here already, download what is missing, export.
"""

from __future__ import annotations

import contextlib
from array import array
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from tensorswarm.store.digest import CHUNK_SIZE, DIGEST_SIZE, chunk_count
from tensorswarm.store.errors import (
    BadInput,
    HashMismatch,
    NoSource,
    NotFound,
    RemoteError,
    TensorswarmError,
)
from tensorswarm.store.export import export_files, select, whole_files
from tensorswarm.store.manifest import MAX_MANIFEST_BYTES, Manifest, ObjectRef
from tensorswarm.store.object_table import ObjectTable
from tensorswarm.store.order import urgency
from tensorswarm.store.runs import runs_in
from tensorswarm.store.wanted import Wanted

from .chunk_lists import ChunkLists
from .companions import Companions
from .control.neighbour import Neighbour
from .dht.search import Search
from .download import Download
from .inquiry import FRUITLESS_ROUNDS, Inquiry, pause_s
from .known_source import OriginSpec
from .origins.origin import check_origin_url, file_url, locate_objects
from .preparation import Preparation
from .results import FetchResult, SourceReport
from .services import Services
from .subscriptions import Subscriptions

SETTLE_S = 1.0
"""Longest wait for further sources once there is one, so that several known from the
start all get a share before the fastest has given everything."""

INTRODUCTION_S = 3.0
"""Longest wait for the neighbours who are here to say who else there is, when there is an
origin to share: of many that start at once on busy machines each would else take itself for
alone, and all ask it for the same."""

MORE_PEERS_PAUSE_S = 10.0
"""Pause between rounds of the search while a download runs well."""

MEET_OTHERS_PAUSE_S = 1.0
"""The first such pause when there is an origin, and each is twice as long as the one before,
while few are met: others share it with us once we meet."""

LOOK_INTERVAL_S = 0.5
"""How often it is looked whether something lacks a source, while nothing does."""

LARGEST_LACKING = 3
"""Tensors without a source that are looked up in one round, largest first. The first
round looks for one alone: whoever has the largest usually has the others too, as with a
fine-tune whose base is elsewhere."""

LOOK_UP_AT_ONCE = 8192
"""Objects looked up in the index in one go: their digests are objects of Python each."""

Progress = Callable[[int, int], None]
"""Called with the verified bytes so far, and the bytes in all."""


@dataclass(frozen=True)
class FetchOptions:
    """What to fetch, and how.

    Attributes
    ----------
    origins : sequence of str
        URLs that hold the model's files.
    include : sequence of str
        Patterns of file paths or tensor names; none for everything.
    out : Path or None
        Folder to export the files to.
    timeout_s : float
        How long to go on when nobody is found or nothing arrives.
    on_progress : callable
        Hears of progress.
    first : sequence of str
        Patterns of tensor names or file paths wanted before all others.
    in_order : bool
        Whether everything is wanted in the order of the files, rather than soonest
        as a whole.
    near_first : bool
        Whether to spare origins for the sake of peers, and far peers for near ones.
    on_manifest : callable
        Hears of the manifest, once it is known.
    on_object : callable
        Hears of each object that became whole, by its digest, in any thread.
    """

    origins: Sequence[str] = ()
    include: Sequence[str] = ()
    out: Path | None = None
    timeout_s: float = 30.0
    on_progress: Progress = lambda done, total: None
    first: Sequence[str] = ()
    in_order: bool = False
    near_first: bool = False
    on_manifest: Callable[[Manifest], None] = lambda manifest: None
    on_object: Callable[[bytes], None] | None = None


@contextlib.asynccontextmanager
async def one_error() -> AsyncIterator[None]:
    """Let a single error of ours out of the groups in which nurseries wrap it."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, TensorswarmError):
            raise error from None
        raise


class Fetch:
    """One fetch on a running node.

    Parameters
    ----------
    services : Services
        The node's parts.
    options : FetchOptions
        What the caller wants.
    """

    def __init__(self, services: Services, options: FetchOptions) -> None:
        for url in options.origins:
            check_origin_url(url)
        self._services = services
        self._store = services.store
        self._options = options
        self._search = Search(services.neighbours, services.discovery, services.bootstrap)
        self._inquiry = Inquiry(services, self._search, options.timeout_s)
        self._urgency: dict[bytes, int] = {}
        self._overhead: Counter[str] = Counter()  # manifest and chunk lists, by peer
        self._companions: Companions | None = None

    async def model(self, digest: bytes) -> FetchResult:
        """Fetch a model by its manifest's digest.

        Raises
        ------
        BadInput
            What the id names is not a manifest, or an include pattern matches nothing.
        NotFound, NoSource, HashMismatch, Refused
            No source could give what is missing.
        NoRoom
            The disk is, or would become, full.
        """
        begun = trio.current_time()
        async with one_error():
            manifest = self._store.manifest(digest) or await self._find_manifest(digest)
            await trio.to_thread.run_sync(self._store.put_manifest, manifest, "")
            options = self._options
            indices, self._urgency = _choice(manifest, options)
            options.on_manifest(manifest)
            result = FetchResult(digest, manifest)
            result.bytes_total = self._store.records([digest])[digest].size_bytes
            self._share_origins(digest)
            await self._bring(result, manifest.table, indices, self._origins(manifest, indices))
            result.seconds = trio.current_time() - begun
            if self._options.out is not None:
                files = whole_files(manifest, indices)
                out = self._options.out
                await trio.to_thread.run_sync(export_files, self._store, manifest, files, out)
                result.path = out
        return result

    def _share_origins(self, digest: bytes) -> None:
        """Look for those who fetch the same from here on, to share the origins with them."""
        options, services = self._options, self._services
        if options.origins and not options.near_first:
            self._companions = Companions(digest, services.neighbours, services.rng)
            self._search.chooser, self._search.chosen_key = self._companions, digest

    async def tensor(self, digest: bytes) -> FetchResult:
        """Fetch one tensor or blob by its bare digest.

        Raises
        ------
        NotFound, NoSource, HashMismatch, Refused, NoRoom
            As for a model.
        """
        begun = trio.current_time()
        async with one_error():
            known = self._store.records([digest]).get(digest)
            if known is not None:
                result = FetchResult(digest)
                ref = ObjectRef(digest, known.size_bytes, known.chunk_list)
                await self._bring(result, ObjectTable([ref]), range(1), [])
            else:
                result = await self._by_hints(digest)
        result.seconds = trio.current_time() - begun
        return result

    async def _by_hints(self, digest: bytes) -> FetchResult:
        """Fetch by what peers say of an object, best supported first, until one is true."""
        failure: RemoteError | NotFound | None = None
        while True:
            try:
                ref, givers = await self._find_hint(digest)
            except (NotFound, NoSource):
                if failure is not None:
                    raise failure from None
                raise
            result = FetchResult(digest)
            try:
                async with one_error():
                    await self._bring(result, ObjectTable([ref]), range(1), [])
                return result
            except (HashMismatch, NotFound, NoSource) as error:
                failure = error if failure is None or isinstance(error, HashMismatch) else failure
                self._inquiry.distrusted |= givers

    # ---- manifest and chunk lists

    async def _find_manifest(self, digest: bytes) -> Manifest:
        async def ask(neighbour: Neighbour) -> tuple[str, bytes] | None:
            data = (await neighbour.get_blobs({digest: MAX_MANIFEST_BYTES})).get(digest)
            return None if data is None else (neighbour.peer_id, data)

        giver, data = await self._inquiry.until_found([digest], ask, "the model")
        self._overhead[giver] += len(data)
        try:
            return await trio.to_thread.run_sync(Manifest.decode, data)
        except BadInput as error:
            raise BadInput(f"what this id names is not a model's manifest: {error}") from error

    async def _find_hint(self, digest: bytes) -> tuple[ObjectRef, set[str]]:
        """Return an object's size and chunk list as most peers say, and who said so."""

        async def ask(neighbour: Neighbour) -> tuple[ObjectRef, str] | None:
            hint = await neighbour.get_chunk_list(digest)
            if hint is None or hint.size_bytes == 0:
                return None
            return ObjectRef(digest, hint.size_bytes, hint.chunk_list), neighbour.peer_id

        first = await self._inquiry.until_found([digest], ask, "the tensor")
        givers: defaultdict[ObjectRef, set[str]] = defaultdict(set)
        for ref, peer_id in [first, *await self._inquiry.ask_each(ask, SETTLE_S)]:
            givers[ref].add(peer_id)
        best = max(givers, key=lambda ref: len(givers[ref]))
        return best, givers[best]

    # ---- objects

    def _origins(self, manifest: Manifest, indices: Sequence[int]) -> list[OriginSpec]:
        """Return the origins, with places by digest turned into places by position."""
        if not self._options.origins:
            return []
        places = locate_objects(manifest)
        wanted = {manifest.objects[i].digest: places[i] for i in indices if i in places}
        paths = [file.path for file in manifest.files]
        return [
            OriginSpec(url, wanted, {path: file_url(url, path, paths) for path in paths})
            for url in self._options.origins
        ]

    async def _bring(
        self,
        result: FetchResult,
        table: ObjectTable,
        indices: Sequence[int],
        origins: Sequence[OriginSpec],
    ) -> None:
        """Bring objects into the store, and account for them in `result`."""
        sizes = array("q", map(table.sizes.__getitem__, indices))
        if 0 in sizes:
            indices = [index for index in indices if table.sizes[index]]
        result.bytes_total += sum(sizes)
        result.bytes_total += sum([_list_bytes(size) for size in sizes if size > CHUNK_SIZE])
        missing = await trio.to_thread.run_sync(self._missing, table, indices)
        if not missing:
            self._account(result, None)
            return
        wanted = self._store.want(table, missing)
        wanted.on_whole = self._options.on_object
        lists = ChunkLists(self._store, self._inquiry, self._overhead)
        preparation = Preparation(
            self._store, wanted, lists, _others(table, missing), result.digest
        )
        await preparation.take_up_what_is_here()
        download = self._download(result, wanted, origins)
        try:
            await preparation.begin(download)
            subscriptions = Subscriptions(
                self._services.neighbours,
                result.digest,
                wanted,
                is_model=result.manifest is not None,
                note_failure=self._search.note_failure,
            )
            await self._run(download, preparation, subscriptions, [result.digest], wanted.digests)
        finally:
            result.bytes_total += lists.along_bytes
            self._account(result, download)

    def _missing(self, table: ObjectTable, indices: Sequence[int]) -> array[int]:
        """Return which objects are not in the store, whole."""
        missing = array("q")
        for start in range(0, len(indices), LOOK_UP_AT_ONCE):
            part = indices[start : start + LOOK_UP_AT_ONCE]
            digests: list[bytes] = []
            for first, stop in runs_in(part):
                digests += table.digests(part[first], part[stop - 1] + 1)
            here = self._store.sizes(digests)
            missing.extend([i for i, each in zip(part, digests, strict=True) if each not in here])
        return missing

    def _download(
        self, result: FetchResult, wanted: Wanted, origins: Sequence[OriginSpec]
    ) -> Download:
        done = result.bytes_total - wanted.all_missing_bytes()

        def count(byte_count: int) -> None:
            nonlocal done
            done += byte_count
            self._options.on_progress(done, result.bytes_total)

        self._options.on_progress(done, result.bytes_total)
        services = self._services
        return Download(
            wanted,
            neighbours=services.neighbours,
            routes=services.routes,
            origins=origins,
            rng=services.rng,
            on_progress=count,
            urgency=self._urgency,
            limiter=services.download_limiter,
            swarm_key=result.digest,
            near_first=self._options.near_first,
            uploads=services.uploads,
            companions=self._companions,
        )

    async def _run(
        self,
        download: Download,
        preparation: Preparation,
        subscriptions: Subscriptions,
        keys: Sequence[bytes],
        digests: Sequence[bytes],
    ) -> None:
        download.open()
        try:
            async with trio.open_nursery() as nursery:
                introduced, settled = trio.Event(), trio.Event()
                nursery.start_soon(
                    self._supply, download, subscriptions, keys, digests, introduced, settled
                )
                nursery.start_soon(preparation.keep_ahead, download)
                if self._companions is not None:
                    with trio.move_on_after(INTRODUCTION_S):
                        await introduced.wait()
                with trio.move_on_after(SETTLE_S):
                    await settled.wait()
                await download.run(self._options.timeout_s)
                nursery.cancel_scope.cancel()
        finally:
            download.close()
            with trio.CancelScope(shield=True), trio.move_on_after(0.5):
                await subscriptions.end()

    # ---- sources

    async def _supply(
        self,
        download: Download,
        subscriptions: Subscriptions,
        keys: Sequence[bytes],
        digests: Sequence[bytes],
        introduced: trio.Event,
        settled: trio.Event,
    ) -> None:
        """Keep a download in sources: ask neighbours what they hold, and find more.

        It is introduced when all neighbours have answered. It is settled, and may begin, when
        those whom they named have, too; with an origin, as soon as anybody is known to share
        it with.
        """
        neighbours, companions = self._services.neighbours, self._companions

        def look(_peer_id: str = "") -> None:
            is_known = companions is not None and companions.is_anybody_there()
            if introduced.is_set() and is_known:
                settled.set()

        async with trio.open_nursery() as nursery:
            asking = meeting = later = nursery

            async def introduce(peer_id: str) -> None:
                await self._introduce(peer_id, subscriptions, keys[0], meeting, later)

            def joined(peer_id: str) -> None:
                download.search_is_over = False
                asking.start_soon(introduce, peer_id)

            neighbours.joined.append(joined)
            neighbours.want_listeners.append(look)
            try:
                async with trio.open_nursery() as later:
                    async with trio.open_nursery() as first:
                        asking = meeting = first
                        if companions is None:
                            first.start_soon(self._search.round, keys)
                        async with trio.open_nursery() as here:
                            for each in neighbours.all():
                                here.start_soon(introduce, each.peer_id)
                        introduced.set()
                        look()
                        if companions is not None and not settled.is_set():
                            first.start_soon(self._search.round, keys)
                    asking = meeting = later
                    settled.set()
                asking = meeting = later = nursery
                await self._keep_searching(download, keys, digests)
            finally:
                neighbours.joined.remove(joined)
                neighbours.want_listeners.remove(look)

    async def _keep_searching(
        self, download: Download, keys: Sequence[bytes], digests: Sequence[bytes]
    ) -> None:
        fruitless = rounds = 0
        pause = MEET_OTHERS_PAUSE_S if self._options.origins else MORE_PEERS_PAUSE_S
        next_round = trio.current_time() + pause
        while True:
            lacking = sorted(download.lacking(), key=download.missing_bytes_of, reverse=True)
            if lacking:
                download.search_is_over = fruitless >= FRUITLESS_ROUNDS
                await trio.sleep(pause_s(rounds))
                rounds += 1
            else:
                fruitless = rounds = 0
                download.search_is_over = False
                await trio.sleep(LOOK_INTERVAL_S)
                if trio.current_time() < next_round:
                    continue
            count = 1 if rounds == 1 else LARGEST_LACKING
            largest = [digests[index] for index in lacking[:count]]
            is_whole = await self._search.round([*keys, *largest], widely=bool(lacking))
            fruitless += is_whole and bool(lacking)
            has_company = self._companions is not None and self._companions.are_enough()
            pause = MORE_PEERS_PAUSE_S if has_company else min(2 * pause, MORE_PEERS_PAUSE_S)
            next_round = trio.current_time() + pause

    async def _introduce(
        self,
        peer_id: str,
        subscriptions: Subscriptions,
        key: bytes,
        meeting: trio.Nursery,
        later: trio.Nursery,
    ) -> None:
        """Tell a neighbour what we want, and then ask it who else does.

        In this order: of two that begin at the same moment and share a neighbour, at
        least one is then told of the other. Whom it names is met in tasks of `meeting`.
        """
        neighbour = self._services.neighbours.get(peer_id)
        if neighbour is None or peer_id in self._inquiry.distrusted:
            return
        if await subscriptions.ask(neighbour, later):
            await self._search.ask_neighbour(peer_id, key, meeting)

    # ---- the account

    def _account(self, result: FetchResult, download: Download | None) -> None:
        reports, wasted = download.reports() if download is not None else ([], 0)
        by_id = {(report.kind, report.id): report for report in reports}
        for peer_id, count in (+self._overhead).items():
            old = by_id.get(("peer", peer_id))
            if old is None:  # it gave a manifest or a chunk list, on the control stream
                via = self._services.routes.without_bulk(peer_id).value
                old = SourceReport("peer", peer_id, 0, False, via=via)
            by_id["peer", peer_id] = replace(old, bytes=old.bytes + count)
        self._overhead.clear()
        result.sources = sorted(by_id.values(), key=lambda report: -report.bytes)
        result.bytes_peers = sum(r.bytes for r in result.sources if r.kind == "peer")
        result.bytes_origin = sum(r.bytes for r in result.sources if r.kind == "origin")
        result.bytes_local = result.bytes_total - result.bytes_peers - result.bytes_origin
        result.bytes_wasted += wasted


def _choice(manifest: Manifest, options: FetchOptions) -> tuple[array[int], dict[bytes, int]]:
    """Return which objects are wanted, in order, and how urgent they are by digest."""
    everything = range(len(manifest.objects))
    chosen = sorted(select(manifest, options.include)) if options.include else everything
    return (
        array("q", chosen),
        urgency(manifest, chosen, options.first, in_order=options.in_order),
    )


def _list_bytes(size_bytes: int) -> int:
    """Return the length of an object's chunk list."""
    return DIGEST_SIZE * chunk_count(size_bytes) if size_bytes > CHUNK_SIZE else 0


def _others(table: ObjectTable, wanted: Sequence[int]) -> dict[bytes, int]:
    """Return the chunk lists, by digest, of objects that are not wanted now."""
    if len(wanted) == len(table):
        return {}
    taken = frozenset(wanted)
    return {
        table.chunk_list(index): _list_bytes(size_bytes)
        for index, size_bytes in enumerate(table.sizes)
        if size_bytes > CHUNK_SIZE and index not in taken
    }
