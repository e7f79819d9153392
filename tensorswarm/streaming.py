"""Tensors one after another, while the rest of the model is still on its way."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tensorswarm.store.arguments import one_or_more
from tensorswarm.store.digest import EMPTY_DIGEST
from tensorswarm.store.errors import BadInput, NotFound
from tensorswarm.store.export import select
from tensorswarm.store.load import load_tensor
from tensorswarm.store.manifest import Manifest
from tensorswarm.store.order import tensors_in_order
from tensorswarm.store.store import Store

from .api import default_store
from .fetching import DEFAULT_TIMEOUT_S, Network, RateLimit, local_result
from .refs import Ref, RefKind, parse_ref

if TYPE_CHECKING:
    from tensorswarm.store.load import Array

JOIN_TIMEOUT_S = 10.0
"""How long an abandoned stream waits for its download to end."""

News = Manifest | bytes | BaseException | None
"""The manifest; the digest of an object that became whole; why it failed; the end."""


def stream(
    ref: str,
    *,
    store: str | Path | None = None,
    bootstrap: str | Sequence[str] = (),
    origins: str | Sequence[str] = (),
    include: str | Sequence[str] = (),
    first: str | Sequence[str] = (),
    timeout_s: float = DEFAULT_TIMEOUT_S,
    upload_limit: RateLimit = None,
    download_limit: RateLimit = None,
    network: str | Path | None = None,
    near_first: bool = False,
) -> Iterator[tuple[str, Array]]:
    """Fetch a model and give its tensors as they are proved, in the order asked.

    Parameters
    ----------
    ref : str
        A model id.
    store, bootstrap, origins, include, timeout_s, upload_limit, download_limit
        As for `tensorswarm.fetch`.
    first : str or sequence of str
        Patterns of tensor names or file paths wanted first, in this order; the others
        follow in the order of the files.
    network, near_first
        As for `tensorswarm.fetch`.

    Yields
    ------
    tuple of str and numpy.ndarray
        Name and tensor, as `tensorswarm.load` gives it. Leaving the loop early ends
        the download; what was proved is kept.

    Raises
    ------
    TensorswarmError
        As for `tensorswarm.fetch`.
    """
    include, first = one_or_more(include), one_or_more(first)
    how = Network(
        bootstrap=one_or_more(bootstrap),
        origins=one_or_more(origins),
        timeout_s=timeout_s,
        upload_limit=upload_limit,
        download_limit=download_limit,
        network=network,
        near_first=near_first,
    )
    parsed = parse_ref(ref)
    if parsed.kind is not RefKind.MODEL:
        raise BadInput("stream takes a model id")
    with Store(Path(store or default_store())) as opened:
        if local_result(opened, parsed, include) is not None:
            manifest = opened.manifest(parsed.digest)
            assert manifest is not None  # local_result has just read it
            for tensor in tensors_in_order(manifest, select(manifest, include), first):
                yield tensor.name, load_tensor(opened, manifest, tensor)
            return
        with _fetching(opened, parsed, how, include, first) as news:
            yield from _as_they_come(opened, news, include, first)


def _as_they_come(
    store: Store, news: queue.SimpleQueue[News], include: Sequence[str], first: Sequence[str]
) -> Iterator[tuple[str, Array]]:
    manifest = news.get()
    if isinstance(manifest, BaseException):
        raise manifest
    assert isinstance(manifest, Manifest)  # it is told first, or not at all
    order = tensors_in_order(manifest, select(manifest, include), first)
    needed = [
        {manifest.objects[i].digest for i in manifest.objects_of([tensor.object_index])}
        for tensor in order
    ]
    whole = {EMPTY_DIGEST, *store.records(list(set().union(*needed)))}
    for tensor, digests in zip(order, needed, strict=True):
        while not whole.issuperset(digests):
            item = news.get()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, bytes):
                whole.add(item)
            elif item is None:
                # All is done, so what was not told of came by another process' hand.
                whole.update(store.records(list(set().union(*needed))))
                if not whole.issuperset(digests):
                    raise NotFound(f"{tensor.name!r} went out of the store before it was read")
                news.put(None)
        yield tensor.name, load_tensor(store, manifest, tensor)


@contextmanager
def _fetching(
    store: Store, ref: Ref, how: Network, include: Sequence[str], first: Sequence[str]
) -> Iterator[queue.SimpleQueue[News]]:
    """Run the fetch in a thread of its own, for as long as the block lasts."""
    import trio

    from tensorswarm.p2p.fetch import one_error

    news: queue.SimpleQueue[News] = queue.SimpleQueue()
    scope = trio.CancelScope()
    token: list[trio.lowlevel.TrioToken] = []
    is_left = threading.Event()
    options = how.options(include, first, in_order=True, on_manifest=news.put, on_object=news.put)

    async def main() -> None:
        token.append(trio.lowlevel.current_trio_token())
        if is_left.is_set():  # before there was anything to cancel
            return
        with scope:
            async with one_error(), how.node(store) as node:
                await node.fetch_digest(ref.digest, options, is_model=True)

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as error:  # carried to the thread that reads the stream
            news.put(error)
        else:
            news.put(None)

    thread = threading.Thread(target=run, name="stream", daemon=True)
    thread.start()
    try:
        yield news
    finally:
        is_left.set()
        if token:
            with suppress(trio.RunFinishedError):  # it has ended by itself
                token[0].run_sync_soon(scope.cancel)
        thread.join(JOIN_TIMEOUT_S)
