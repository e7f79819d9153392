"""Taking files into the store: from paths on disk to a manifest.

Every file's layout is read and checked before a byte is kept, so that one
malformed file leaves the store as it was. A piece whose digest is known already
is not written again. A file that changes under our hands is refused.

Links to files are followed: caches of other tools are made of them. A folder that holds
a link to a folder is refused, rather than left out in silence or followed to a place
that nobody meant to share.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn, Protocol, cast

from blake3 import blake3

from .adding import Adding, Progress
from .digest import EMPTY_DIGEST, digest_of
from .errors import BadInput, LocalError
from .formats import layouts_of
from .formats.companions import companions
from .formats.layout import Content, Extent, Layout, Made, absolute
from .hashing import RangeHasher, hash_range
from .manifest import MAX_FILES, Manifest, ManifestBuilder, ObjectRef, RecipeSpec
from .names import check_path, check_paths, quoted
from .place import disk_errors, read_exactly, write_fully
from .recipes import Bytes, Input, make, read_blocks
from .records import FileState, wait_for_clock
from .store import Store

SKIPPED_FOLDERS = frozenset({".git", ".cache", "__pycache__"})
"""Folders that hold a tool's own state, not the model's files."""

SIDECARS = ("tensorswarm.json", ".tensorswarm.json")
"""Ends of names of files that describe a model and are none of its own (`sidecar`)."""

MAX_ROUNDS = 3
"""Times to add again what somebody else took out of the store before we were done."""

DEFLATE_LEVELS = (6, 9, 1, 5, 8, 7, 4, 3, 2)
"""Levels tried to find out how an array was compressed, the usual ones first."""

_CHANGED = "changed while it was being read; add it again"


class Ingested(NamedTuple):
    """What `add_paths` did, and what a person should hear of it: one line each."""

    manifest: Manifest
    new_bytes: int
    notes: tuple[str, ...] = ()


class Source(NamedTuple):
    """A file of a model: where it lies, its path in the model, its state, its layout."""

    path: Path
    name: str
    state: FileState
    layout: Layout


def files_under(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return the files that paths stand for, with their names in the model.

    A file keeps its own name; a folder gives every file below it, named relative to it.

    Raises
    ------
    BadInput
        A path is missing or of no use, two files have one name, or there are too many.
    """
    found: list[tuple[Path, str]] = []
    for path in paths:
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except (OSError, ValueError) as error:  # ValueError: a NUL in it
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"{_shown(path)}: cannot be read: {reason}") from error
        if is_folder:
            files = ((file, file.relative_to(path).as_posix()) for file in _walk(path))
            found += itertools.islice(files, MAX_FILES + 1)
        else:
            found.append((path, path.name))
        if len(found) > MAX_FILES:
            raise BadInput(f"{_shown(path)}: more than {MAX_FILES} files in one model")
    if not found:
        raise BadInput(f"nothing to add: no files in {', '.join(map(_shown, paths))}")
    for _, name in found:
        check_path(name)
    check_paths([name for _, name in found])
    return sorted(found, key=lambda item: item[1])


def _shown(path: Path) -> str:
    """Return a path for an error message, which is one line whatever files are called."""
    return str(path) if str(path).isprintable() else repr(str(path))


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> NoReturn:
        raise BadInput(
            f"{_shown(Path(error.filename))}: cannot be read: {error.strerror}"
        ) from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for name in folders:
            link = Path(parent) / name
            if link.is_symlink():
                raise BadInput(f"{_shown(link)}: a link to a folder; add that folder itself")
        for name in sorted(files):
            if not name.endswith(SIDECARS):
                yield Path(parent) / name


def _open(path: Path) -> int:
    try:
        # Looked at before it is opened: opening a device can have effects of its own.
        if stat.S_ISREG(path.stat().st_mode):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
            os.close(descriptor)
    except OSError as error:
        raise BadInput(f"{_shown(path)}: cannot be read: {error.strerror}") from error
    raise BadInput(f"{_shown(path)}: not a regular file")


def read_sources(paths: Sequence[Path], verbatim: Sequence[str] = ()) -> list[Source]:
    """Find the files of a model and check the layout of each; nothing is kept.

    Parameters
    ----------
    paths : sequence of Path
        Files and folders.
    verbatim : sequence of str
        Patterns of files that are kept as they are, whatever their names say.

    Raises
    ------
    BadInput
        A path or a file is of no use.
    """
    return sources_of(files_under(paths), verbatim)


def sources_of(found: Sequence[tuple[Path, str]], verbatim: Sequence[str] = ()) -> list[Source]:
    """Check the layouts of the files of a model, given their names in it.

    Raises
    ------
    BadInput
        As for `read_sources`.
    """
    path_of = {name: path for path, name in found}
    states = {name: _state_of(path) for path, name in found}

    def read_at(name: str, offset: int, length: int) -> bytes:
        path = path_of[name]
        try:
            with _opened(path) as descriptor:
                return os.pread(descriptor, length, offset)
        except OSError as error:
            raise BadInput(f"cannot be read: {error.strerror}") from error

    def fail(name: str, error: BadInput) -> NoReturn:
        raise BadInput(f"{_shown(path_of[name])}: {error}") from error

    files = {name: (state.size_bytes, partial(read_at, name)) for name, state in states.items()}
    layouts = layouts_of(files, verbatim, fail)
    return [Source(path, name, states[name], layouts[name]) for path, name in found]


def _lacking(source: Source, sources: Sequence[Source]) -> str:
    """Return what to say of a file that names others, if some of them were not added."""
    try:
        with _opened(source.path) as descriptor:
            named = companions(
                source.name,
                source.state.size_bytes,
                lambda offset, length: os.pread(descriptor, length, offset),
            )
    except (OSError, BadInput):
        return ""  # what it names is of no use, or it is gone by now: it is kept as it was read
    lacking = sorted(set(named) - {each.name for each in sources})
    if not lacking:
        return ""
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    return f"names {quoted(lacking[0])}{more}, not added with it: those tensors are left out"


def _state_of(path: Path) -> FileState:
    with _opened(path) as descriptor:
        return FileState.of(os.fstat(descriptor))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = _open(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def add_paths(
    store: Store,
    paths: Sequence[Path],
    *,
    copy: bool = True,
    verbatim: Sequence[str] = (),
    name: str | None = None,
    progress: Progress = lambda count: None,
) -> Ingested:
    """Add one model, made of all files that `paths` stand for.

    Parameters
    ----------
    store : Store
        Where it goes.
    paths : sequence of Path
        Files and folders.
    copy : bool
        False to register byte ranges of the files where they lie.
    verbatim : sequence of str
        Patterns of files that are kept as they are, unread.
    name : str, optional
        The model's name for people; by default that of the file or folder.
    progress : callable
        Hears of bytes read.

    Returns
    -------
    Ingested
        The manifest, how many bytes of its objects were new to the store, and notes.

    Raises
    ------
    BadInput
        A path or a file is of no use; the store is as it was.
    NoRoom
        The disk is full; what this call had added is removed again.
    """
    sources = read_sources(paths, verbatim)
    adding = Adding(store, copy, progress)
    try:
        for _ in range(MAX_ROUNDS):
            manifest = Describing(sources, adding, store.place.temporary().parent).manifest()
            if adding.complete(manifest, name or model_name(paths)):
                notes = ((s.path, s.layout.note or _lacking(s, sources)) for s in sources)
                shown = (f"{_shown(path)}: {note}" for path, note in notes if note)
                return Ingested(manifest, adding.new_bytes, tuple(shown))
            adding.begin_anew()
        raise LocalError("the model's tensors are removed from the store while it is added")
    except BaseException:
        adding.undo()
        raise
    finally:
        adding.close()


@contextlib.contextmanager
def _unchanged(source: Source) -> Iterator[int]:
    """Open a file and give its descriptor; it must be as it was examined, until the end."""
    descriptor = _open(source.path)
    try:
        yield descriptor
        if FileState.of(os.fstat(descriptor)) != source.state:
            raise BadInput(f"{_shown(source.path)}: {_CHANGED}")
    except OSError as error:
        raise BadInput(
            f"{_shown(source.path)}: cannot be read: {error.strerror or error}"
        ) from error
    finally:
        os.close(descriptor)


class Taker(Protocol):
    """Takes ranges of open files as objects; `Adding` puts them into a store."""

    def take(
        self, descriptor: int, offset: int, size_bytes: int, *, own: bool = False
    ) -> ObjectRef:
        """Return the object that a range of an open file is."""

    def ahead(
        self, descriptor: int, ranges: Sequence[tuple[int, int]]
    ) -> contextlib.AbstractContextManager[None]:
        """Work ahead on the ranges of a file that will be taken while the block lasts."""

    def finish_file(self, path: Path, state: FileState) -> None:
        """Hear that a file was taken, in this state."""


class HashingTaker:
    """Stands in for `Adding` where nothing is kept."""

    def __init__(self) -> None:
        self._hasher = RangeHasher()

    def take(
        self, descriptor: int, offset: int, size_bytes: int, *, own: bool = False
    ) -> ObjectRef:
        """Return what a range of an open file would be."""
        digest, chunk_list = self._hasher.scan(descriptor, offset, size_bytes)
        return ObjectRef(digest, size_bytes, digest_of(chunk_list) if chunk_list else b"")

    @contextlib.contextmanager
    def ahead(self, descriptor: int, ranges: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Work ahead on the ranges of a file that will be taken while the block lasts."""
        with self._hasher.ahead(descriptor, ranges):
            yield

    def finish_file(self, path: Path, state: FileState) -> None:
        """Do nothing: nothing was kept."""

    def close(self) -> None:
        """End the thread that hashes."""
        self._hasher.close()


def describe_paths(paths: Sequence[Path], verbatim: Sequence[str] = ()) -> Manifest:
    """Return the manifest that `add_paths` would make; nothing is kept.

    Raises
    ------
    BadInput
        A path or a file is of no use.
    """
    hashing = HashingTaker()
    try:
        return Describing(read_sources(paths, verbatim), hashing, None).manifest()
    finally:
        hashing.close()


class Describing:
    """Turns layouts into a manifest, while the pieces are taken into a store.

    Parameters
    ----------
    sources : sequence of Source
        The files.
    taker : Taker
        Takes the objects.
    scratch : Path or None
        Folder for decoded tensors; by default the system's.
    pieces : mapping of Extent to ObjectRef or RecipeSpec
        Pieces that are known already, and are not read.
    contents : mapping of Content to ObjectRef
        The tensors that they are made of.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        taker: Taker,
        scratch: Path | None,
        pieces: Mapping[Extent, ObjectRef | RecipeSpec] | None = None,
        contents: Mapping[Content, ObjectRef] | None = None,
    ) -> None:
        self._sources = {source.name: source for source in sources}
        self._taker = taker
        self._scratch = scratch
        self._refs = dict(pieces or {})
        self._contents = dict(contents or {})

    def manifest(self) -> Manifest:
        """Take all pieces, and return the manifest."""
        builder = ManifestBuilder()
        for source in self._sources.values():
            self._take_file(source)
        for source in self._sources.values():
            self._put_into(builder, source)
        return builder.build()

    def _take_file(self, source: Source) -> None:
        with _unchanged(source) as descriptor:
            if FileState.of(os.fstat(descriptor)) != source.state:
                raise BadInput(f"{_shown(source.path)}: {_CHANGED}")
            wait_for_clock(source.state)
            self._take_pieces(source, descriptor)
        self._taker.finish_file(source.path.resolve(), source.state)

    def _take_pieces(self, source: Source, descriptor: int) -> None:
        pieces, made = source.layout.pieces, source.layout.made
        plain = [(offset, size_bytes) for offset, size_bytes, _ in pieces if offset not in made]
        with self._taker.ahead(descriptor, plain):
            for offset, size_bytes, _ in pieces:
                extent = Extent(source.name, offset, size_bytes)
                if extent in self._refs:
                    continue
                recipe = made.get(offset)
                ref = None if recipe is None else self._try_made(source, extent, recipe)
                self._refs[extent] = ref or self._taker.take(descriptor, offset, size_bytes)

    def _try_made(self, source: Source, extent: Extent, made: Made) -> RecipeSpec | None:
        """Return how a piece is made from tensors, which are taken, if it can be so made."""
        contents = [absolute(content, source.name) for content in made.inputs]
        with _opened(source.path) as descriptor:
            digest = hash_range(descriptor, extent.offset, extent.size_bytes)
        parameters: tuple[int, ...] | None = made.parameters
        with contextlib.ExitStack() as stack:
            files: list[BinaryIO] = []
            if made.kind != "slice" or contents[0] not in self._contents:
                try:
                    files += [stack.enter_context(self._decoded(each)) for each in contents]
                except BadInput:
                    return None  # it cannot be decoded: it is kept as it is
            if made.kind != "slice":  # a slice of what it was put together from
                parameters = _parameters_that_make(digest, extent.size_bytes, made, files)
            if parameters is None:
                return None
            for content, file in zip(contents, files, strict=False):
                if content not in self._contents:
                    ref = self._taker.take(file.fileno(), 0, content.size_bytes, own=True)
                    self._contents[content] = ref
        inputs = tuple(self._contents[content] for content in contents)
        return RecipeSpec(digest, extent.size_bytes, made.kind, parameters, inputs)

    @contextlib.contextmanager
    def _decoded(self, content: Content) -> Iterator[BinaryIO]:
        """Give a temporary file with a content's bytes.

        Raises
        ------
        BadInput
            It cannot be decoded, or has another size than it should have.
        """
        with disk_errors("cannot write a decoded tensor"):
            scratch = cast(BinaryIO, tempfile.TemporaryFile(dir=self._scratch))  # noqa: SIM115
        with scratch:
            blocks = self._blocks_of(content)
            size = 0
            for block in blocks:
                with disk_errors("cannot write a decoded tensor"):
                    write_fully(scratch.fileno(), size, memoryview(block))
                size += len(block)
            if size != content.size_bytes:
                raise BadInput(f"a tensor of {size} bytes, {content.size_bytes} were expected")
            yield scratch

    def _blocks_of(self, content: Content) -> Iterator[Bytes]:
        """Yield a content's bytes."""
        if content.inner is not None:
            with self._decoded(content.inner) as file:
                item = recipe_input(file.fileno(), content.inner.size_bytes)
                yield from make(content.decode, content.parameters, [item], content.size_bytes)
            return
        for extent in content.extents:
            source = self._sources.get(extent.path)
            if source is None or extent.offset + extent.size_bytes > source.state.size_bytes:
                raise BadInput(f"{quoted(extent.path)} lacks bytes that a tensor should have")
            with _unchanged(source) as descriptor:
                item = recipe_input(descriptor, extent.size_bytes, extent.offset)
                if content.decode:
                    yield from make(content.decode, content.parameters, [item], content.size_bytes)
                else:
                    yield from read_blocks(item)

    def _put_into(self, builder: ManifestBuilder, source: Source) -> None:
        """Add a file to the manifest; all pieces are known."""
        empty = ObjectRef(EMPTY_DIGEST, 0, b"")
        layout, name = source.layout, source.name
        entries: list[tuple[int, str, str, tuple[int, ...], ObjectRef | RecipeSpec]] = [
            (
                t.offset,
                t.name,
                t.dtype,
                t.shape,
                self._refs[Extent(name, t.offset, t.size_bytes)] if t.size_bytes else empty,
            )
            for t in layout.tensors
        ]
        for held in layout.held:
            content = absolute(held.content, name)
            ref = self._held(source, content)
            if ref is not None:
                first = content.first
                at = first.offset if first.path == name else source.state.size_bytes
                entries.append((at, held.name, held.dtype, held.shape, ref))
        entries.sort(key=lambda entry: entry[0])  # stable: the layout's order otherwise
        parts = [
            self._refs[Extent(name, piece.offset, piece.size_bytes)] for piece in layout.pieces
        ]
        builder.add_file(name, layout.format, parts, [entry[1:] for entry in entries])

    def _held(self, source: Source, content: Content) -> ObjectRef | RecipeSpec | None:
        """Return the object of a held tensor, or how it is made from one.

        None for a tensor that would take two steps, because what it is made from in the
        second is no object: that is left unseen.
        """
        known = self._contents.get(content)
        if known is not None:
            return known
        ref: ObjectRef | RecipeSpec | None
        if content.inner is not None:
            ref = self._contents.get(content.inner)
            if ref is None:
                return None
        else:
            ref = self._refs.get(content.first) if len(content.extents) == 1 else None
        if ref is not None and not content.decode:
            return ref
        if not isinstance(ref, ObjectRef):
            raise BadInput(f"{_shown(source.path)}: a tensor's bytes are not where they should be")
        hasher = blake3(max_threads=blake3.AUTO)
        size = 0
        for block in self._blocks_of(content):
            hasher.update(block)
            size += len(block)
        if size != content.size_bytes:
            raise BadInput(f"{_shown(source.path)}: a tensor that cannot be decoded")
        return RecipeSpec(hasher.digest(), size, content.decode, content.parameters, (ref,))


def _parameters_that_make(
    digest: bytes, size_bytes: int, made: Made, files: Sequence[BinaryIO]
) -> tuple[int, ...] | None:
    """Return the parameters with which a recipe makes what has this digest, if any do."""
    tries = [made.parameters]
    if made.kind == "deflate" and not made.parameters:
        tries = [(level,) for level in DEFLATE_LEVELS]
    for parameters in tries:
        inputs = [recipe_input(each.fileno(), os.fstat(each.fileno()).st_size) for each in files]
        if _digest_up_to(make(made.kind, parameters, inputs, size_bytes), size_bytes) == digest:
            return parameters
    return None


def recipe_input(descriptor: int, size_bytes: int, offset: int = 0) -> Input:
    """Return a range of an open file as a recipe's input."""

    def read_at(start: int, length: int) -> memoryview:
        view = memoryview(bytearray(length))
        read_exactly(descriptor, offset + start, view)
        return view

    return Input(size_bytes, read_at)


def _digest_up_to(blocks: Iterator[Bytes], size_bytes: int) -> bytes:
    """Return the digest of what is made; none if it is not of that size."""
    hasher = blake3(max_threads=blake3.AUTO)
    size = 0
    for block in blocks:
        hasher.update(block)
        size += len(block)
        if size > size_bytes:
            return b""
    return hasher.digest() if size == size_bytes else b""


def model_name(paths: Sequence[Path]) -> str:
    """Return a name for people: the folder or file that was added."""
    path = paths[0].resolve() if paths[0].name in ("", "..") else paths[0]
    return path.name or str(path)
