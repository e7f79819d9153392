"""libtorrent as a contender: a v2 torrent with 1 MiB pieces, in the clear."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import libtorrent

PIECE_SIZE = 1 << 20


def new_session(port: int) -> libtorrent.session:
    """Return a session on loopback that speaks to nobody else, with large buffers."""
    return libtorrent.session(
        {
            "listen_interfaces": f"127.0.0.1:{port}",
            "enable_dht": False,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            "enable_outgoing_utp": False,  # TCP is its faster transport here, by far
            "enable_incoming_utp": False,
            "in_enc_policy": 2,  # disabled: plain connections only
            "out_enc_policy": 2,
            "allow_multiple_connections_per_ip": True,
            "alert_mask": libtorrent.alert.category_t.status_notification,
            "send_buffer_watermark": 8 << 20,
            "max_queued_disk_bytes": 64 << 20,
            "aio_threads": 4,
            "hashing_threads": 2,
        }
    )


def make_torrent(source: Path, torrent: Path) -> None:
    """Write the torrent file of one source file."""
    files = libtorrent.file_storage()
    libtorrent.add_files(files, str(source))
    creator = libtorrent.create_torrent(files, PIECE_SIZE, libtorrent.create_torrent.v2_only)
    libtorrent.set_piece_hashes(creator, str(source.parent))
    torrent.write_bytes(libtorrent.bencode(creator.generate()))


def parameters(
    torrent: str, folder: str, *, seed_mode: bool = False
) -> libtorrent.add_torrent_params:
    """Return what `add_torrent` takes for a torrent file and a folder."""
    params = libtorrent.add_torrent_params()
    params.ti = libtorrent.torrent_info(torrent)
    params.save_path = folder
    if seed_mode:
        params.flags |= libtorrent.torrent_flags.seed_mode
    return params


def seed(torrent: str, folder: str) -> None:
    """Seed until terminated; print the port first."""
    session = new_session(0)
    handle = session.add_torrent(parameters(torrent, folder, seed_mode=True))
    while not handle.status().is_seeding:
        session.wait_for_alert(100)
        session.pop_alerts()
    print(session.listen_port(), flush=True)
    signal.pause()


if __name__ == "__main__":
    seed(*sys.argv[1:])
