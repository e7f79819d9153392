"""Stores used by real processes: killed at any moment, and several at a time.

A process is killed with SIGKILL, by itself at a certain step (the n-th file it opens,
renames or removes, or statement it begins), or by the test when it has said that so
much is done. Afterwards the store opens, shows nothing false, and still has what was
there before.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tensorswarm.store.digest import digest_of
from tensorswarm.store.export import export_files
from tensorswarm.store.ingest import add_paths, describe_paths
from tensorswarm.store.store import Store
from tests.support.store_world import (
    DEADLINE_S,
    MIB,
    assert_sound,
    begin,
    files_below,
    random_bytes,
    random_model,
    receive_all,
    rubbish,
    run_python,
    start_python,
)

pytestmark = pytest.mark.e2e

SIZES = [40, 1000, 65_536, 65_537, 300_000, MIB + 1, 3 * MIB, 9 * MIB + 5] * 3
OBJECTS = {1: 6 * MIB + 5, 2: 3 * MIB, 3: 200_000}
"""Seeds and sizes of what is received in these tests."""

DIE_AT_STEP = """
import os, signal, sys, threading
steps, lock = 0, threading.Lock()
def hook(event, arguments):
    global steps
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "sqlite3.connect"):
        with lock:
            steps += 1
            if steps == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
"""

ADD = (
    DIE_AT_STEP
    + """
from pathlib import Path
from tensorswarm.store import ingest
from tensorswarm.store.store import Store
root, path, die_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
sys.addaudithook(hook)
with Store(root) as store:
    print(ingest.add_paths(store, [path]).manifest.model_id, flush=True)
"""
)

RECEIVE = """
import os, random, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tensorswarm.store.store import Store
from tests.support.store_world import begin, chunk_of, random_bytes
root, seed = Path(sys.argv[1]), int(sys.argv[2])
sizes = dict(map(int, pair.split(":")) for pair in sys.argv[3:])
store = Store(root)
data = {which: random_bytes(size, which) for which, size in sizes.items()}
incoming = {which: begin(store, bytes_) for which, bytes_ in data.items()}
work = [(w, c) for w, i in incoming.items() for c in range(i.chunk_count) if i.is_missing(c)]
random.Random(seed).shuffle(work)
os.write(1, b"ready\\n")
os.read(0, 1)
def one(item):
    which, chunk = item
    incoming[which].write_chunk(chunk, chunk_of(data[which], chunk))
    os.write(1, b"%d %d\\n" % (which, chunk))
    os.read(0, 1)  # goes on when it is told to, or is killed here
with ThreadPoolExecutor(3) as pool:
    list(pool.map(one, work))
for each in incoming.values():
    each.finished.result(60)
store.close()
os.write(1, b"done\\n")
"""


def receiver(root: Path, seed: int, which: Sequence[int] = tuple(OBJECTS)) -> subprocess.Popen[str]:
    sizes = [f"{each}:{OBJECTS[each]}" for each in which]
    process = start_python(RECEIVE, root, str(seed), *sizes)
    assert line_of(process) == "ready"
    return process


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str], lines: int = 1) -> None:
    assert process.stdin is not None
    process.stdin.write("\n" * lines)
    process.stdin.flush()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    assert process.wait(DEADLINE_S) == -signal.SIGKILL
    close_pipes(process)


def close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def objects() -> dict[int, bytes]:
    return {which: random_bytes(size, which) for which, size in OBJECTS.items()}


# ---- adding


@pytest.mark.parametrize("seed", range(2))
def test_add_that_is_killed_again_and_again(tmp_path: Path, seed: int) -> None:
    """At steps that grow, so that each process comes further than the one before."""
    root = tmp_path / "store"
    folder = tmp_path / "model"
    path = random_model(folder / "m.safetensors", SIZES, seed)
    manifest = describe_paths([path])
    with Store(root) as store:
        old = add_paths(store, [random_model(tmp_path / "old.safetensors", SIZES[:6], 77)])
        before = set(store.all_digests())
    rng = random.Random(seed)
    killed, step = 0, 0
    while True:
        step += rng.randint(1, 12)
        process = start_python(ADD, root, path, str(step))
        output, _ = process.communicate(timeout=DEADLINE_S)
        with Store(root) as store:
            assert_sound(store)
            assert rubbish(root) == []
            assert before <= set(store.all_digests()), "something was lost"
            before = set(store.all_digests())
            assert store.missing_objects(old.manifest, range(len(old.manifest.objects))) == []
            is_listed = manifest.digest in {model.digest for model in store.models()}
            missing = store.missing_objects(manifest, range(len(manifest.objects)))
            assert not (is_listed and missing), "a model is listed before it is complete"
        if process.returncode == 0:
            assert output.strip() == manifest.model_id
            break
        assert process.returncode == -signal.SIGKILL
        killed += 1
    assert killed >= 5
    with Store(root) as store:
        assert store.missing_objects(manifest, range(len(manifest.objects))) == []
        export_files(store, manifest, manifest.files, tmp_path / "out")
    assert (tmp_path / "out" / "m.safetensors").read_bytes() == path.read_bytes()


def test_two_add_models_that_share_tensors(tmp_path: Path) -> None:
    root = tmp_path / "store"
    paths = [random_model(tmp_path / f"{i}.safetensors", SIZES, 5) for i in range(2)]
    paths += [random_model(tmp_path / f"{i}.safetensors", SIZES[: 12 + i], 5) for i in (2, 3)]
    processes = [start_python(ADD, root, path, "0") for path in paths]
    outputs = [process.communicate(timeout=DEADLINE_S)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    with Store(root) as store:
        for path, output in zip(paths, outputs, strict=True):
            manifest = describe_paths([path])
            assert manifest.model_id == output
            assert store.missing_objects(manifest, range(len(manifest.objects))) == []
        assert_sound(store)
        assert rubbish(root) == []


# ---- receiving


@pytest.mark.parametrize("kills", [1, 3, 7])
def test_what_was_proved_before_a_kill_is_claimed_again(tmp_path: Path, kills: int) -> None:
    root = tmp_path / "store"
    data = {which: bytes_ for which, bytes_ in objects().items() if len(bytes_) > MIB}
    proved: set[tuple[int, int]] = set()
    for attempt in range(40):
        process = receiver(root, attempt, list(data))
        go_on(process)
        said: list[str] = []
        for _ in range(kills):
            said.append(line_of(process))
            if said[-1] == "done":
                break
            go_on(process)
        if said[-1] == "done":
            assert process.wait(DEADLINE_S) == 0
            close_pipes(process)
            break
        kill(process)
        new = {(int(w), int(c)) for w, c in (line.split() for line in said)}
        assert not new & proved, "asked for again, though it was proved"
        proved |= new
        with Store(root) as store:
            assert_sound(store)
            for which, chunk in proved:
                assert not begin(store, data[which]).is_missing(chunk)
    else:
        pytest.fail("it never came to an end")
    with Store(root) as store:
        assert {digest_of(each) for each in data.values()} <= set(store.all_digests())
        assert_sound(store)
        assert rubbish(root) == []


def test_two_receive_the_same(tmp_path: Path) -> None:
    """Both take everything they lack, into the same files, and neither disturbs the other."""
    root = tmp_path / "store"
    first, second = receiver(root, 1), receiver(root, 2)
    for process in (first, second):
        go_on(process, 50)
    for process in (first, second):
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
        assert output.endswith("done\n")
    with Store(root) as store:
        assert {digest_of(each) for each in objects().values()} <= set(store.all_digests())
        assert_sound(store)
        assert rubbish(root) == []


@pytest.mark.parametrize("point", [1, 4, 8])
def test_one_of_two_is_killed(tmp_path: Path, point: int) -> None:
    root = tmp_path / "store"
    first, second = receiver(root, 3), receiver(root, 4)
    go_on(first, point)
    go_on(second, 3)
    for _ in range(point):
        line_of(first)
    kill(first)
    go_on(second, 50)
    output, _ = second.communicate(timeout=DEADLINE_S)
    assert second.returncode == 0 and output.endswith("done\n")
    with Store(root) as store:
        assert_sound(store)
        for each in objects().values():
            receive_all(store, each)
        assert_sound(store)
    assert rubbish(root) == []


# ---- opening


def test_many_open_a_new_store_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tensorswarm.store.store import Store\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "with Store(Path(sys.argv[1])) as store: store.put_blob(sys.argv[2].encode() * 9000)\n"
    )
    for attempt in range(3):
        root = tmp_path / f"store-{attempt}"
        processes = [start_python(code, root, str(i)) for i in range(6)]
        for process in processes:
            assert line_of(process) == "ready"
        for process in processes:
            go_on(process)
        for process in processes:
            process.communicate(timeout=DEADLINE_S)
        assert [process.returncode for process in processes] == [0] * 6
        with Store(root) as store:
            assert len(store.all_digests()) == 6
            assert_sound(store)
        assert files_below(root / "tmp") == []


# ---- memory


@pytest.mark.parametrize(("copy", "size"), [(False, 2 << 30), (True, 256 << 20)])
def test_large_sparse_file_takes_little_memory(tmp_path: Path, copy: bool, size: int) -> None:
    """Adopted, and as far as disks need not have 2 GB to spare, copied."""
    path = tmp_path / "m.safetensors"
    text = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, path.stat().st_size + size)
    printed = run_python(
        "import resource, sys; from pathlib import Path\n"
        "from tensorswarm.store.ingest import add_paths\n"
        "from tensorswarm.store.store import Store\n"
        "with Store(Path(sys.argv[1])) as store:\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    add_paths(store, [Path(sys.argv[2])], copy=sys.argv[3] == 'True')\n"
        "    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print((after - before) * (1 if sys.platform == 'darwin' else 1024))\n",
        tmp_path / "store",
        path,
        str(copy),
    )
    assert int(printed) < 100 * MIB
