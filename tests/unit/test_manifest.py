"""Manifests: the worked example of docs/format.md, every rule, every limit, hostile bytes."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tensorswarm.store import manifest as limits
from tensorswarm.store import manifest_reader, names
from tensorswarm.store.digest import (
    CHUNK_SIZE,
    EMPTY_DIGEST,
    MAX_OBJECT_SIZE,
    chunk_list_of,
    digest_of,
)
from tensorswarm.store.errors import BadInput
from tensorswarm.store.formats import Layout, layout_of
from tensorswarm.store.manifest import (
    FileEntry,
    Manifest,
    ManifestBuilder,
    NamedTensor,
    ObjectRef,
)

TESTS = Path(__file__).parents[1]
VECTOR: dict[str, Any] = json.loads((TESTS / "vectors" / "manifest.json").read_text("utf-8"))
PATHS: dict[str, list[Any]] = json.loads((TESTS / "vectors" / "paths.json").read_text("utf-8"))
FORMAT_PAGE = (TESTS.parent / "docs" / "format.md").read_text("utf-8")

TensorSpec = tuple[str, str, Sequence[int], ObjectRef]


def content(spec: dict[str, Any]) -> bytes:
    if "counting_bytes" in spec:
        length: int = spec["counting_bytes"]
        return (bytes(range(251)) * (length // 251 + 1))[:length]
    text: str = spec["text"]
    return (
        bytes.fromhex(spec.get("before", "")) + text.encode() + bytes.fromhex(spec.get("after", ""))
    )


def layout_in_memory(path: str, data: bytes) -> Layout:
    return layout_of(path, len(data), lambda at, length: data[at : at + length])


def reference(data: bytes) -> ObjectRef:
    chunk_list = chunk_list_of(data)
    return ObjectRef(digest_of(data), len(data), digest_of(chunk_list) if chunk_list else b"")


def sized(number: int, size_bytes: int) -> ObjectRef:
    """Return a reference to an object of which only the size matters."""
    chunk_list = bytes(32) if size_bytes > CHUNK_SIZE else b""
    return ObjectRef(number.to_bytes(32, "big"), size_bytes, chunk_list)


def manifest_of(files: dict[str, bytes]) -> Manifest:
    builder = ManifestBuilder()
    for path, data in files.items():
        layout = layout_in_memory(path, data)
        parts = [reference(data[at : at + size]) for at, size, _ in layout.pieces]
        tensors = [
            (name, dtype, shape, reference(data[at : at + size]))
            for name, dtype, shape, at, size in layout.tensors
        ]
        builder.add_file(path, layout.format, parts, tensors)
    return builder.build()


def one_file(
    parts: Sequence[ObjectRef] = (), tensors: Sequence[TensorSpec] = (), path: str = "model"
) -> Manifest:
    builder = ManifestBuilder()
    builder.add_file(path, "verbatim", parts, tensors)
    return builder.build()


def example() -> Manifest:
    return manifest_of({path: content(spec) for path, spec in VECTOR["files"].items()})


# ---- the worked example


def test_example_from_its_files() -> None:
    manifest = example()
    assert manifest.encode().hex() == VECTOR["manifest"]
    assert manifest.model_id == VECTOR["model_id"]
    assert manifest.weights_digest.hex() == VECTOR["weights_digest"]
    assert manifest.total_bytes == VECTOR["total_bytes"]


def test_example_from_its_bytes() -> None:
    data = bytes.fromhex(VECTOR["manifest"])
    manifest = Manifest.decode(data)
    assert manifest == example()
    assert manifest.digest == digest_of(data)
    assert list(manifest.file_by_path) == list(VECTOR["files"])
    tensors = manifest.file_by_path["model.safetensors"].tensors
    assert [(t.name, t.dtype, t.shape) for t in tensors] == [
        ("bias", "F32", (0,)),
        ("embed.weight", "F32", (2, 2)),
        ("head.weight", "F32", (2, 2)),
    ]
    assert manifest.tensor_indices == {t.object_index for t in tensors}
    assert manifest.objects[tensors[0].object_index] == (EMPTY_DIGEST, 0, b"")


def test_example_puts_the_files_together_again() -> None:
    manifest = Manifest.decode(bytes.fromhex(VECTOR["manifest"]))
    known: dict[bytes, bytes] = {}
    for path, spec in VECTOR["files"].items():
        data = content(spec)
        layout = layout_in_memory(path, data)
        for at, size, _ in layout.pieces:
            known[digest_of(data[at : at + size])] = data[at : at + size]
    for path, spec in VECTOR["files"].items():
        parts = manifest.file_by_path[path].parts
        assert b"".join(known[manifest.objects[i].digest] for i in parts) == content(spec)


def blocks_of_format_page(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", FORMAT_PAGE, re.MULTILINE | re.DOTALL)


def test_format_page_shows_the_example() -> None:
    (listing,) = blocks_of_format_page("hex")
    lines = [line.partition("#")[0].strip() for line in listing.splitlines()]
    assert "".join(lines) == VECTOR["manifest"]
    (header,) = blocks_of_format_page("json")
    assert header.replace("\n", "") == VECTOR["files"]["model.safetensors"]["text"].rstrip()
    assert f"The manifest has {len(VECTOR['manifest']) // 2} bytes" in FORMAT_PAGE


def test_programs_on_the_format_page_print_the_vectors() -> None:
    outputs = []
    for program in blocks_of_format_page("python"):
        assert "tensorswarm" not in program
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(program, "docs/format.md", "exec"), {"__name__": "__main__"})
        outputs.append(output.getvalue())
    manifest, identifiers = outputs[0].split("\n", 1)
    assert manifest == VECTOR["manifest"]
    (shown,) = blocks_of_format_page("text")
    assert identifiers.split() == [line.split()[-1] for line in shown.splitlines()]
    assert identifiers.split()[:2] == [VECTOR["model_id"], VECTOR["weights_digest"]]
    assert outputs[1] == (TESTS / "vectors" / "digests.json").read_text("utf-8")


def test_format_page_names_the_limits() -> None:
    for number in (
        limits.MAX_OBJECTS,
        limits.MAX_FILES,
        limits.MAX_PARTS,
        limits.MAX_TENSORS,
        names.MAX_TENSOR_NAME_BYTES,
        names.MAX_PATH_BYTES,
    ):
        assert f"{number:,}" in FORMAT_PAGE


# ---- identities


def test_weights_digest_is_that_of_the_sorted_tensors() -> None:
    manifest = example()
    weight = manifest.file_by_path["model.safetensors"].tensors[1].object_index
    digests = sorted([EMPTY_DIGEST, manifest.objects[weight].digest])
    assert manifest.weights_digest == digest_of(b"".join(digests))


def test_weights_digest_sorts_by_digest() -> None:
    # A set of these indices does not come out in ascending order by itself.
    objects = [sized(i, 4) for i in range(20)]
    chosen = [1, 8, 16]
    manifest = one_file(objects, [(str(i), "F32", (), objects[i]) for i in chosen])
    assert manifest.weights_digest == digest_of(b"".join(objects[i].digest for i in chosen))


def test_weights_digest_does_not_see_names_formats_and_other_files() -> None:
    a, b, blob = sized(2, 4), sized(1, 4), sized(3, 9)
    first = one_file([a, b], [("a", "F32", (), a), ("b", "F32", (), b)])
    builder = ManifestBuilder()
    builder.add_file("x", "gguf", [b, blob, a], [("q", "U8", (4,), b), ("r", "I16", (2,), a)])
    builder.add_file("y", "verbatim", [blob], [])
    second = builder.build()
    assert first.weights_digest == second.weights_digest
    assert first.model_id != second.model_id
    assert one_file([a, b], [("a", "F32", (), a)]).weights_digest != first.weights_digest


def test_model_without_tensors() -> None:
    manifest = one_file([sized(1, 4)])
    assert manifest.weights_digest == EMPTY_DIGEST
    assert manifest.tensor_indices == frozenset()


def test_total_counts_an_object_once() -> None:
    a = sized(1, 5)
    assert one_file([a, a, a]).total_bytes == 5
    assert one_file([a, a, a]).files[0].size_bytes == 15


def test_order_of_adding_does_not_matter() -> None:
    entries = [("b", [sized(2, 4)]), ("a", [sized(3, 4)]), ("c/d", [sized(1, 4)])]
    encodings = set()
    for order in (entries, entries[::-1]):
        builder = ManifestBuilder()
        for path, parts in order:
            builder.add_file(path, "verbatim", parts, [])
        encodings.add(builder.build().encode())
    assert len(encodings) == 1


def test_manifest_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        example().files = ()  # type: ignore[misc]


# ---- what may be


def test_tied_tensors() -> None:
    a, b = sized(1, 4), sized(2, 4)
    tensors = [("e", "F32", (), a), ("h", "U8", (4,), a), ("x", "F32", (), b)]
    manifest = one_file([a, b], tensors)
    assert [t.object_index for t in manifest.files[0].tensors] == [0, 0, 1]
    assert Manifest.decode(manifest.encode()) == manifest


def test_empty_tensors_have_no_part() -> None:
    none = ObjectRef(EMPTY_DIGEST, 0, b"")
    manifest = one_file([none], [("a", "F32", (0, 7), none), ("", "F4", (0,), none)])
    assert manifest.files[0].parts == ()
    assert manifest.tensor_indices == {0}
    assert Manifest.decode(manifest.encode()) == manifest


def test_unknown_format_is_carried() -> None:
    entry = FileEntry("a", 0, "gguf-3.1", (), ())
    assert Manifest.decode(Manifest((), (entry,)).encode()).files == (entry,)


def test_largest_object() -> None:
    manifest = one_file([sized(1, MAX_OBJECT_SIZE)])
    assert Manifest.decode(manifest.encode()) == manifest


# ---- what may not be

A, B = sized(1, 4), sized(2, 8)
NONE = ObjectRef(EMPTY_DIGEST, 0, b"")
FILE = FileEntry("f", 12, "verbatim", (0, 1), (NamedTensor("a", "F32", (), 0),))
TENSOR = FILE.tensors[0]


def with_tensors(*tensors: NamedTensor) -> FileEntry:
    return replace(FILE, tensors=tensors)


BROKEN: list[tuple[str, tuple[ObjectRef, ...], tuple[FileEntry, ...], str]] = [
    ("no files", (), (), "without files"),
    ("objects out of order", (B, A), (FILE,), "order of digests"),
    ("an object twice", (A, A), (replace(FILE, size_bytes=8),), "order of digests"),
    ("a short digest", (A, B._replace(digest=b"x" * 31)), (FILE,), "31 bytes"),
    ("a long digest", (A, B._replace(digest=b"x" * 33)), (FILE,), "33 bytes"),
    ("an empty digest", (B._replace(digest=b""), A), (FILE,), "0 bytes"),
    ("a negative size", (A, B._replace(size_bytes=-1)), (FILE,), "of -1 bytes"),
    ("too large", (A, sized(2, MAX_OBJECT_SIZE + 1)), (FILE,), "at most"),
    ("no bytes, wrong digest", (A, sized(2, 0)), (FILE,), "digest of no bytes"),
    ("bytes, empty digest", (A, NONE._replace(size_bytes=8)), (FILE,), "digest of no bytes"),
    ("needless chunk list", (A, B._replace(chunk_list=bytes(32))), (FILE,), "chunk list"),
    ("no chunk list", (A, B._replace(size_bytes=CHUNK_SIZE + 1)), (FILE,), "chunk list"),
    (
        "a short chunk list",
        (A, B._replace(size_bytes=CHUNK_SIZE + 1, chunk_list=bytes(31))),
        (FILE,),
        "chunk list",
    ),
    (
        "a chunk list for one chunk",
        (A, B._replace(size_bytes=CHUNK_SIZE, chunk_list=bytes(32))),
        (FILE,),
        "chunk list",
    ),
    ("unused object", (A, B, sized(3, 1)), (FILE,), "object 2 is used by no file"),
    ("unused empty object", (A, B, NONE), (FILE,), "object 2 is used by no file"),
    ("files out of order", (A, B), (replace(FILE, path="g"), FILE), "order of paths"),
    ("a file twice", (A, B), (FILE, FILE), "name one file"),
    ("files that collide", (A, B), (replace(FILE, path="F"), FILE), "name one file"),
    ("a file and folder", (A, B), (FILE, replace(FILE, path="f/g")), "the folder of"),
    ("a bad path", (A, B), (replace(FILE, path="../f"),), "bad path"),
    ("no format", (A, B), (replace(FILE, format=""),), "format name"),
    ("a long format", (A, B), (replace(FILE, format="x" * 33),), "format name"),
    ("a bad format", (A, B), (replace(FILE, format="a\n"),), "format name"),
    ("a part that is not there", (A, B), (replace(FILE, parts=(0, 2)),), "object 2 of 2"),
    ("a negative part", (A, B), (replace(FILE, parts=(0, -1)),), "object -1 of 2"),
    ("an empty part", (A, B, NONE), (replace(FILE, parts=(0, 1, 2)),), "an empty object"),
    ("parts too long", (A, B), (replace(FILE, size_bytes=11),), "parts have 12"),
    ("parts too short", (A, B), (replace(FILE, size_bytes=13),), "parts have 12"),
    ("a tensor twice", (A, B), (with_tensors(TENSOR, TENSOR),), "twice"),
    (
        "a tensor that is not there",
        (A, B),
        (with_tensors(TENSOR._replace(object_index=2)),),
        "object 2 of 2",
    ),
    (
        "a negative object",
        (A, B),
        (with_tensors(TENSOR._replace(object_index=-2)),),
        "object -2 of 2",
    ),
    ("a wrong shape", (A, B), (with_tensors(TENSOR._replace(shape=(2,))),), "contradict"),
    ("a wrong dtype", (A, B), (with_tensors(TENSOR._replace(dtype="F64")),), "contradict"),
    ("an unknown dtype", (A, B), (with_tensors(TENSOR._replace(dtype="F1")),), "unknown dtype"),
    ("a negative dimension", (A, B), (with_tensors(TENSOR._replace(shape=(-1, -1))),), "negative"),
    ("a long name", (A, B), (with_tensors(TENSOR._replace(name="x" * 1025)),), "1025 bytes"),
    ("half a character", (A, B), (with_tensors(TENSOR._replace(name="\ud800")),), "Unicode"),
    (
        "a tensor that is no part of any file",
        (A, B),
        (replace(FILE, parts=(1,), size_bytes=8),),
        "object 0 is used by no file",
    ),
]


@pytest.mark.parametrize(
    ("objects", "files", "fault"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN]
)
def test_broken_rule(
    objects: tuple[ObjectRef, ...], files: tuple[FileEntry, ...], fault: str
) -> None:
    with pytest.raises(BadInput, match=fault) as caught:
        Manifest(objects, files)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("objects", "files", "fault"),
    [row[1:] for row in BROKEN if row[0] != "half a character"],
    ids=[row[0] for row in BROKEN if row[0] != "half a character"],
)
def test_broken_rule_in_bytes(
    objects: tuple[ObjectRef, ...], files: tuple[FileEntry, ...], fault: str
) -> None:
    rows = [(f.path, f.size_bytes, f.format, f.parts, f.tensors) for f in files]
    with pytest.raises(BadInput, match=fault):
        Manifest.decode(msgpack.packb((1, objects, rows)))


def test_the_unbroken_one_is_good() -> None:
    assert Manifest((A, B), (FILE,)).files == (FILE,)


def test_too_large_a_file() -> None:
    with pytest.raises(BadInput, match="at most"):
        one_file([sized(1, MAX_OBJECT_SIZE), sized(2, 1)])


def test_builder_refuses_two_objects_of_one_digest() -> None:
    builder = ManifestBuilder()
    builder.add_file("a", "verbatim", [sized(1, 4)], [])
    with pytest.raises(BadInput, match="two sizes"):
        builder.add_file("b", "verbatim", [sized(1, 5)], [])


def test_builder_without_files() -> None:
    with pytest.raises(BadInput, match="without files"):
        ManifestBuilder().build()


@pytest.mark.parametrize(
    ("limit", "what"),
    [
        ("MAX_FILES", "files"),
        ("MAX_OBJECTS", "objects"),
        ("MAX_PARTS", "parts"),
        ("MAX_TENSORS", "tensors"),
    ],
)
def test_counts_are_limited(limit: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = example()  # 4 files, 5 objects, 5 parts, 3 tensors
    counts = {"files": 4, "objects": 5, "parts": 5, "tensors": 3}
    data = manifest.encode()

    def allow(count: int) -> None:
        for module in (limits, manifest_reader):
            monkeypatch.setattr(module, limit, count)

    allow(counts[what])
    assert Manifest.decode(data) == manifest
    allow(counts[what] - 1)
    with pytest.raises(BadInput, match=f"too many {what}"):
        Manifest.decode(data)
    with pytest.raises(BadInput, match=f"{counts[what]} {what}, at most"):
        Manifest(manifest.objects, manifest.files)


def test_length_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = example()
    data = manifest.encode()
    monkeypatch.setattr(limits, "MAX_MANIFEST_BYTES", len(data))
    assert Manifest.decode(data) == manifest
    monkeypatch.setattr(limits, "MAX_MANIFEST_BYTES", len(data) - 1)
    for attempt in (manifest.encode, lambda: Manifest.decode(data)):
        with pytest.raises(BadInput, match="at most"):
            attempt()


# ---- bytes that are no manifest


def packed(*fields: Any) -> bytes:
    data: bytes = msgpack.packb(fields)
    return data


GOOD_FILE = ["f", 0, "verbatim", [], []]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"{}",
        b"\x93",
        packed(),
        packed(1, []),
        packed(1, [], [GOOD_FILE], None),
        packed(2, [], [GOOD_FILE]),
        packed(0, [], [GOOD_FILE]),
        packed(True, [], [GOOD_FILE]),
        packed(1.0, [], [GOOD_FILE]),
        packed("1", [], [GOOD_FILE]),
        packed(None, [], [GOOD_FILE]),
        packed([1], [], [GOOD_FILE]),
        packed({}, [], [GOOD_FILE]),
        packed(1, {}, [GOOD_FILE]),
        packed(1, None, [GOOD_FILE]),
        packed(1, [], GOOD_FILE),
        packed(1, [], [["f", 0, "verbatim", []]]),
        packed(1, [], [[b"f", 0, "verbatim", [], []]]),
        packed(1, [], [["f", 0.0, "verbatim", [], []]]),
        packed(1, [], [["f", False, "verbatim", [], []]]),
        packed(1, [], [["f", 0, None, [], []]]),
        packed(1, [], [["f", 0, "verbatim", None, []]]),
        packed(1, [A], [["f", 4, "verbatim", [False], []]]),
        packed(1, [A], [["f", 4, "verbatim", [[0]], []]]),
        packed(1, [("x" * 32, 4, b"")], [["f", 4, "verbatim", [0], []]]),
        packed(1, [(A.digest, "4", b"")], [["f", 4, "verbatim", [0], []]]),
        packed(1, [(A.digest, 4, None)], [["f", 4, "verbatim", [0], []]]),
        packed(1, [A], [["f", 4, "verbatim", [0], [[b"a", "F32", [], 0]]]]),
        packed(1, [A], [["f", 4, "verbatim", [0], [["a", b"F32", [], 0]]]]),
        packed(1, [A], [["f", 4, "verbatim", [0], [["a", "F32", [True], 0]]]]),
        packed(1, [A], [["f", 4, "verbatim", [0], [["a", "F32", [1] * 33, 0]]]]),
        packed(1, [A], [["f", 4, "verbatim", [0], [["a", "F32", [], False]]]]),
        packed(1, [A], [["f", 4, "verbatim", [0], [["a", "F32", []]]]]),
        packed(1, [], [GOOD_FILE]).replace(b"\xa1f", b"\xa1\xff"),  # not UTF-8
        packed(1, [], [GOOD_FILE]).replace(b"\x00", b"\xc7\x00\x05"),  # an extension
        packed(1, [], [GOOD_FILE]).replace(b"\x00", b"\xd6\xff\x00\x00\x00\x00"),  # a time
        packed(1, [], [GOOD_FILE]).replace(b"\x00", b"\xd7\xff" + b"\xff" * 8),  # a bad time
    ],
)
def test_what_is_no_manifest(data: bytes) -> None:
    with pytest.raises(BadInput) as caught:
        Manifest.decode(data)
    assert str(caught.value).isprintable()


def test_the_file_in_them_is_good() -> None:
    assert Manifest.decode(packed(1, [], [GOOD_FILE])).files[0].path == "f"


@pytest.mark.parametrize("nested", [[], [1], {}, [[]], [1, [2, {}]]])
def test_containers_are_refused_before_their_contents_pile_up(nested: Any) -> None:
    data = packed(1, [], [["f", nested, "verbatim", [], []]])
    with pytest.raises(BadInput, match="where a single value belongs"):
        Manifest.decode(data)


@pytest.mark.parametrize(
    "lengthen",
    [
        lambda data: data + b"\x00",
        lambda data: data + data,
        lambda data: b"\xdc\x00\x03" + data[1:],  # array 16 for 3 fields
        lambda data: data[:1] + b"\xcc\x01" + data[2:],  # uint 8 for version 1
        lambda data: data[:1] + b"\xd0\x01" + data[2:],  # int 8 for version 1
        lambda data: data.replace(b"\xa8verbatim", b"\xd9\x08verbatim"),
        lambda data: data.replace(b"\xc4\x20", b"\xc5\x00\x20"),
    ],
)
def test_other_encodings_of_a_manifest(lengthen: Callable[[bytes], bytes]) -> None:
    data = example().encode()
    changed = lengthen(data)
    assert changed != data
    with pytest.raises(BadInput, match="not canonical"):
        Manifest.decode(changed)


def test_every_cut_is_refused() -> None:
    data = example().encode()
    for end in range(len(data)):
        with pytest.raises(BadInput):
            Manifest.decode(data[:end])


@pytest.mark.parametrize(
    "claim",
    [
        b"\x93\x01\xdd\xff\xff\xff\xff",  # four thousand million objects
        b"\x93\x01\x90\xdd\x00\x01\x00\x01",  # one file too many
        b"\x93\x01\xdd\x00\x0f\xff\xff" * 1000,
        b"\x93" + b"\xdd\x00\x10\x00\x00" * 2000,  # arrays in arrays, where the version belongs
        b"\x93" + b"\x91" * 1_000_000,
        b"\x93" + b"\xdd\x00\x10\x00\x00" + b"\x90" * 1_000_000,
        b"\x93" + b"\x81\xa1a" * 100_000,
        b"\x93\xc6\xff\xff\xff\xff",
        b"\x93\xdb\xff\xff\xff\xff",
    ],
)
def test_claims_of_much_to_come(claim: bytes) -> None:
    with pytest.raises(BadInput):
        Manifest.decode(claim)


# ---- paths


@pytest.mark.parametrize("path", PATHS["good"])
def test_good_path(path: str) -> None:
    assert names.check_path(path) == path


@pytest.mark.parametrize(("path", "fault"), [*PATHS["bad"], ("\ud800", "Unicode")])
def test_bad_path(path: str, fault: str) -> None:
    with pytest.raises(BadInput, match=re.escape(fault)) as caught:
        names.check_path(path)
    assert str(caught.value).isprintable()


def test_length_of_paths() -> None:
    assert names.check_path("x" * 255)
    assert names.check_path("é" * 127)
    assert names.check_path("/".join(["x" * 200] * 5) + "/" + "y" * 19)
    for path in ("x" * 256, "é" * 128, "a/" + "x" * 256, "/".join(["x" * 200] * 5) + "/" * 2):
        with pytest.raises(BadInput):
            names.check_path(path)
    with pytest.raises(BadInput, match="1025 bytes long"):
        names.check_path("/".join(["x" * 200] * 5) + "/" + "y" * 20)


@pytest.mark.parametrize("pair", PATHS["colliding"], ids=" and ".join)
def test_colliding_paths(pair: list[str]) -> None:
    for paths in (pair, pair[::-1]):
        with pytest.raises(BadInput, match="name one file|the folder of"):
            names.check_paths(["0", *paths, "zz"])


@pytest.mark.parametrize("pair", PATHS["apart"], ids=" and ".join)
def test_paths_that_do_not_collide(pair: list[str]) -> None:
    names.check_paths(pair)
