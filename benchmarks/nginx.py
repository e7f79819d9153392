"""nginx as a server of one folder, in the shape that `processes.Server` waits for."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

START_TIMEOUT_S = 20.0
POLL_S = 0.05


def main(nginx: str, work: str, folder: str) -> None:
    """Print the port as soon as nginx answers, then become nginx."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = Path(work) / "nginx.conf"
    # One process, because one connection keeps no more than one busy, and its CPU time
    # can then be read where that of every other server is read.
    config.write_text(
        f"daemon off; master_process off; pid {work}/nginx.pid; error_log {work}/nginx.log;\n"
        "events { }\n"
        "http { access_log off; sendfile on; tcp_nopush on;\n"
        f"  server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
    )
    if os.fork() == 0:
        _announce(port)
        os._exit(0)
    os.execv(nginx, [nginx, "-p", work, "-c", str(config)])


def _announce(port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(POLL_S)
        else:
            print(port, flush=True)
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
