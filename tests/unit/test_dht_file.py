"""What the DHT keeps on disk: all of a batch or nothing, and never a reason not to start."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tensorswarm.p2p.dht.file import MAX_PEERS_KEPT, DhtFile
from tensorswarm.p2p.dht.provider_table import Changes, ProviderTable
from tensorswarm.p2p.host.addresses import PeerAddress
from tensorswarm.store.errors import LocalError


def filled(count: int) -> ProviderTable:
    table = ProviderTable(random.Random(1))
    for number in range(count):
        table.add(float(number), b"key %d" % number, b"peer %d" % (number % 7), "g", (b"addr",))
    return table


def test_records_come_back(tmp_path: Path) -> None:
    table = filled(100)
    file = DhtFile(tmp_path / "dht.db")
    file.write_records(table.take_changes())
    table.remove(b"key 5", b"peer 5")
    table.add(200.0, b"key 6", b"peer 6", "g2", (b"new",))
    file.write_records(table.take_changes())
    file.tidy()
    file.close()
    again = ProviderTable(random.Random(2))
    again.restore(200.0, *DhtFile(tmp_path / "dht.db").load_records())
    assert len(again) == 99
    assert again.providers(200.0, b"key 6", 5) == [(b"peer 6", (b"new",))]


def test_our_own_announcements_are_forgotten_when_our_addresses_change(tmp_path: Path) -> None:
    file = DhtFile(tmp_path / "dht.db")
    assert file.load_own(["/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/1"]) == {}
    file.write_own({b"a": 1.0, b"b": 2.0}, [])
    file.write_own({b"c": 3.0}, [b"b"])
    assert file.load_own(["/ip4/192.0.2.2/tcp/1", "/ip4/192.0.2.1/tcp/1"]) == {b"a": 1, b"c": 3}
    assert file.load_own(["/ip4/192.0.2.3/tcp/1"]) == {}
    assert file.load_own(["/ip4/192.0.2.3/tcp/1"]) == {}


def test_the_peers_met_last_are_remembered(tmp_path: Path) -> None:
    file = DhtFile(tmp_path / "dht.db")
    for number in range(MAX_PEERS_KEPT + 10):
        file.write_peers([PeerAddress(f"peer{number}", ("/ip4/192.0.2.1/tcp/1",))], float(number))
    peers = file.load_peers()
    assert len(peers) == MAX_PEERS_KEPT
    assert peers[0] == PeerAddress(f"peer{MAX_PEERS_KEPT + 9}", ("/ip4/192.0.2.1/tcp/1",))


@pytest.mark.parametrize("content", [b"not a database", bytes(5000), b"SQLite format 3\0" * 500])
def test_a_damaged_file_is_moved_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "dht.db"
    path.write_bytes(content)
    file = DhtFile(path)
    assert file.load_records() == ([], {})
    assert (tmp_path / "dht.db.damaged").read_bytes() == content


def test_a_folder_that_cannot_be_written_is_our_own_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalError, match="cannot keep the DHT's records"):
        DhtFile(tmp_path / "file" / "dht.db")


WRITER = """
import sys
from pathlib import Path
from tensorswarm.p2p.dht.file import DhtFile
from tensorswarm.p2p.dht.provider_table import Changes
file = DhtFile(Path(sys.argv[1]))
for number in range(10**9):
    batch = {(b"%d.%d" % (number, part), b"peer"): 1.0 for part in range(100)}
    file.write_records(Changes(batch, set(), {b"peer": ("g", (b"addr",))}))
    print(number, flush=True)
"""


def test_a_kill_leaves_whole_batches_and_all_that_were_confirmed(tmp_path: Path) -> None:
    path = tmp_path / "dht.db"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=os.getcwd()
    )
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) >= 20:
            break
    writer.send_signal(signal.SIGKILL)
    confirmed = 21 + len(writer.stdout.read().split())
    writer.wait()
    records, _ = DhtFile(path).load_records()
    assert len(records) % 100 == 0
    assert len(records) // 100 in (confirmed, confirmed + 1)


def test_nothing_is_written_of_a_batch_that_fails(tmp_path: Path) -> None:
    file = DhtFile(tmp_path / "dht.db")
    bad = Changes({(b"key", b"peer"): 1.0, (b"key", object()): 1.0})  # type: ignore[dict-item]
    with pytest.raises(LocalError, match="cannot write"):
        file.write_records(bad)
    assert file.load_records() == ([], {})
