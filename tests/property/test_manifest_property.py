"""What holds for every manifest and every set of paths that can be made."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from random import Random

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from tensorswarm.store.digest import CHUNK_SIZE, EMPTY_DIGEST, MAX_OBJECT_SIZE, digest_of
from tensorswarm.store.dtypes import DTYPE_BITS, tensor_size_bytes
from tensorswarm.store.errors import BadInput
from tensorswarm.store.manifest import Manifest, ManifestBuilder, ObjectRef
from tensorswarm.store.names import check_path, check_paths

FileSpec = tuple[str, str, Sequence[ObjectRef], Sequence[tuple[str, str, Sequence[int], ObjectRef]]]

sizes = st.one_of(
    st.integers(1, 100),
    st.sampled_from([CHUNK_SIZE, CHUNK_SIZE + 1, 2**32, 2**40]),
)
digests = st.binary(min_size=32, max_size=32).filter(lambda digest: digest != EMPTY_DIGEST)
tensor_names = st.text(max_size=20)
folders = st.sampled_from(["", "a/", "b/c/"])


def reference(digest: bytes, size_bytes: int) -> ObjectRef:
    return ObjectRef(digest, size_bytes, digest if size_bytes > CHUNK_SIZE else b"")


@st.composite
def file_specs(draw: st.DrawFn, path: str, pool: list[ObjectRef]) -> FileSpec:
    parts = draw(st.lists(st.sampled_from(pool), max_size=6)) if pool else []
    tensors: list[tuple[str, str, Sequence[int], ObjectRef]] = []
    used_names: set[str] = set()

    def name_tensor(shape: tuple[int, ...], item: ObjectRef) -> None:
        name = draw(tensor_names.filter(lambda name: name not in used_names))
        used_names.add(name)
        tensors.append((name, "U8", shape, item))

    for part in parts:
        for _ in range(draw(st.integers(0, 2))):  # two names for one part: tied
            name_tensor((part.size_bytes,), part)
        if draw(st.booleans()):
            name_tensor((3, 0), ObjectRef(EMPTY_DIGEST, 0, b""))
    return path, draw(st.sampled_from(["safetensors", "verbatim", "x-1.0"])), parts, tensors


@st.composite
def models(draw: st.DrawFn) -> list[FileSpec]:
    unique = draw(st.lists(digests, max_size=5, unique=True))
    pool = [reference(digest, draw(sizes)) for digest in unique]
    count = draw(st.integers(1, 4))
    paths = [f"{draw(folders)}file{i}" for i in range(count)]
    return [draw(file_specs(path, pool)) for path in paths]


def build(files: Sequence[FileSpec]) -> Manifest:
    builder = ManifestBuilder()
    for path, format_name, parts, tensors in files:
        builder.add_file(path, format_name, parts, tensors)
    return builder.build()


@given(models())
def test_decoding_undoes_encoding(files: list[FileSpec]) -> None:
    manifest = build(files)
    again = Manifest.decode(manifest.encode())
    assert again == manifest
    assert again.encode() == manifest.encode()
    assert again.model_id == manifest.model_id


@given(models())
def test_manifest_says_what_was_added(files: list[FileSpec]) -> None:
    manifest = build(files)
    assert set(manifest.file_by_path) == {path for path, *_ in files}
    for path, format_name, parts, tensors in files:
        entry = manifest.file_by_path[path]
        assert entry.format == format_name
        assert [manifest.objects[i] for i in entry.parts] == list(parts)
        assert entry.size_bytes == sum(part.size_bytes for part in parts)
        assert [
            (tensor.name, tensor.dtype, tensor.shape, manifest.objects[tensor.object_index])
            for tensor in entry.tensors
        ] == list(tensors)


@given(models(), st.randoms(use_true_random=False))
def test_order_of_adding_does_not_matter(files: list[FileSpec], random: Random) -> None:
    shuffled = list(files)
    random.shuffle(shuffled)
    assert build(shuffled).encode() == build(files).encode()


@given(models())
def test_digests_are_those_of_the_definition(files: list[FileSpec]) -> None:
    manifest = build(files)
    tensor_digests = {item.digest for *_, tensors in files for *_, item in tensors}
    assert manifest.weights_digest == digest_of(b"".join(sorted(tensor_digests)))
    assert manifest.digest == digest_of(manifest.encode())
    everything = {item for _, _, parts, tensors in files for item in parts}
    assert manifest.total_bytes == sum(item.size_bytes for item in everything)


@given(models())
def test_encoding_is_plain_messagepack(files: list[FileSpec]) -> None:
    """Another library that packs the same values in shortest form gets the same bytes."""
    data = build(files).encode()
    assert msgpack.packb(msgpack.unpackb(data, strict_map_key=False)) == data


@given(
    st.sampled_from(sorted(DTYPE_BITS)),
    st.lists(st.one_of(st.integers(-1, 9), st.integers(0, 2**70)), max_size=40),
)
def test_tensor_sizes(dtype: str, shape: list[int]) -> None:
    elements = widest = 1
    for length in shape:
        elements *= length
        widest *= max(length, 1)
    bits = elements * DTYPE_BITS[dtype]
    possible = (
        len(shape) <= 32
        and min(shape, default=0) >= 0
        and widest * DTYPE_BITS[dtype] <= 8 * MAX_OBJECT_SIZE
        and bits % 8 == 0
    )
    try:
        size_bytes = tensor_size_bytes(dtype, shape)
    except BadInput:
        assert not possible
    else:
        assert possible
        assert size_bytes * 8 == bits


awkward_text = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from("/.\\: aA\u0000\u0301\u00e9\u2028"),
    ),
    max_size=12,
)


@given(awkward_text)
def test_good_paths_stay_inside_their_folder(path: str) -> None:
    try:
        assert check_path(path) is path
    except BadInput as error:
        assert str(error).isprintable()
        return
    parts = path.split("/")
    assert not {"", ".", ".."} & set(parts)
    assert not set(path) & set("\\:\0\n\r\x1b\x7f")
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in path)
    assert len(path.encode()) <= 1024


@given(st.lists(awkward_text, max_size=5))
def test_accepted_paths_are_apart_on_any_file_system(paths: list[str]) -> None:
    try:
        check_paths(paths)
    except BadInput:
        return
    for change in (str.lower, str.upper, str.casefold):
        for form in ("NFC", "NFD"):
            seen = [unicodedata.normalize(form, change(path)) for path in paths]
            assert len(set(seen)) == len(paths)
            assert not any(a.startswith(b + "/") for a in seen for b in seen)
