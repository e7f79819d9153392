"""HTTP origins: redirects, credentials, proxies, TLS, and nginx as a real server."""

from __future__ import annotations

import base64
import itertools
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorswarm.p2p.swarm.source import Failure
from tests.support import http_origin as faults
from tests.support.http_origin import HttpOrigin
from tests.support.origin_world import (
    BIAS,
    EVERYTHING,
    HEAD,
    NORM,
    OTHER,
    WAIT_S,
    WEIGHTS,
    World,
    self_signed,
)
from tests.support.tools import require_tool

SECRETS = {"Authorization": "Bearer secret", "X-Api-Key": "secret"}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    world = World(tmp_path / "origin")
    yield world
    world.close()


@pytest.fixture
def elsewhere(world: World) -> Iterator[HttpOrigin]:
    """Yield a second server with the same files: another port is another origin."""
    with HttpOrigin(world.folder) as server:
        yield server


def basic(userpass: str) -> str:
    return "Basic " + base64.b64encode(userpass.encode()).decode()


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirect_is_followed(world: World, elsewhere: HttpOrigin, code: int) -> None:
    world.server.fault("model.bin", faults.redirect(elsewhere.url + "model.bin", code))
    assert world.ask(world.source(connections=1), EVERYTHING).failure is None
    assert world.has(WEIGHTS, BIAS, NORM, OTHER)
    assert elsewhere.seen[0].range == world.server.seen[0].range
    assert (world.server.connections_accepted, elsewhere.connections_accepted) == (1, 1)


def test_redirect_loop_ends(world: World) -> None:
    world.server.fault("model.bin", faults.redirect("/model.bin"))
    assert world.ask(world.source(), HEAD).failure is Failure.PROTOCOL
    assert world.gets("model.bin") == 6


def test_endless_body_of_a_redirect_is_not_read(world: World, elsewhere: HttpOrigin) -> None:
    world.server.fault(
        "model.bin",
        faults.both(
            faults.redirect(elsewhere.url + "model.bin"),
            faults.body(itertools.repeat(bytes(1 << 16))),
        ),
    )
    assert world.ask(world.source(), HEAD).failure is None


def test_another_origin_sees_no_secrets(world: World, elsewhere: HttpOrigin) -> None:
    world.server.fault("model.bin", faults.redirect(elsewhere.url + "model.bin"))
    assert world.ask(world.source(headers=SECRETS), HEAD).failure is None
    assert world.server.seen[0].headers["authorization"] == "Bearer secret"
    assert world.server.seen[0].headers["x-api-key"] == "secret"
    assert not {"authorization", "x-api-key"} & set(elsewhere.seen[0].headers)


def test_password_in_the_url_stays_at_the_origin(world: World, elsewhere: HttpOrigin) -> None:
    world.server.fault("model.bin", faults.redirect(elsewhere.url + "model.bin"))
    source = world.source(world.server.url.replace("//", "//me:pass@"))
    assert world.ask(source, HEAD).failure is None
    assert world.server.seen[0].headers["authorization"] == basic("me:pass")
    assert "authorization" not in elsewhere.seen[0].headers


def test_secrets_stay_when_the_redirect_stays_at_the_origin(world: World) -> None:
    world.server.fault("model.bin", faults.redirect("/sub/../model.bin?again"), None)
    assert world.ask(world.source(headers=SECRETS), HEAD).failure is None
    assert [seen.headers["authorization"] for seen in world.server.seen] == ["Bearer secret"] * 2
    assert [seen.headers["x-api-key"] for seen in world.server.seen] == ["secret"] * 2


def test_netrc_is_used_for_the_origin_alone(
    world: World, elsewhere: HttpOrigin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password pass\n")
    monkeypatch.setenv("NETRC", str(netrc))
    world.server.fault("model.bin", faults.redirect(elsewhere.url + "model.bin"))
    assert world.ask(world.source(), HEAD).failure is None
    assert world.server.seen[0].headers["authorization"] == basic("me:pass")
    assert "authorization" not in elsewhere.seen[0].headers


def test_cookies_live_for_one_exchange(world: World) -> None:
    again = faults.both(faults.redirect("/model.bin"), faults.headers(Set_Cookie="a=b; Path=/"))
    world.server.fault("model.bin", again, None)
    source = world.source(connections=1)
    assert world.ask(source, HEAD).failure is None
    assert world.ask(source, EVERYTHING).failure is None
    cookies = [seen.headers.get("cookie") for seen in world.server.seen]
    assert cookies[:2] == [None, "a=b"]
    assert set(cookies[2:]) == {None}


def test_proxy_from_the_environment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", world.server.url)
    assert world.ask(world.source("http://models.invalid/"), EVERYTHING).failure is None
    assert {seen.headers["host"] for seen in world.server.seen} == {"models.invalid"}


# TLS.


@pytest.fixture
def secure(world: World, tmp_path: Path) -> Iterator[HttpOrigin]:
    with HttpOrigin(world.folder, tls=self_signed(tmp_path / "cert.pem")) as server:
        yield server


def test_certificate_that_nobody_vouches_for(world: World, secure: HttpOrigin) -> None:
    assert world.ask(world.source(secure.url), HEAD).failure is Failure.UNREACHABLE


def test_tls(
    world: World, secure: HttpOrigin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    source = world.source(secure.url, connections=1)
    assert world.ask(source, EVERYTHING).failure is None
    assert world.has(WEIGHTS, BIAS, NORM, OTHER)
    assert secure.connections_accepted == 1


@pytest.mark.parametrize("fault", [faults.hang, faults.pause_at(100_000)])
def test_close_and_deadline_reach_a_thread_inside_tls(
    world: World,
    secure: HttpOrigin,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fault: faults.Fault,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    secure.fault("model.bin", fault)
    end = world.ask(world.source(secure.url, progress_timeout_s=0.2), HEAD)
    assert (end.failure, "too slow" in end.detail) == (Failure.STALLED, True)

    asked = threading.Event()
    secure.fault("model.bin", faults.both(faults.tell(asked), fault))
    source = world.source(secure.url)
    world.submit(source, HEAD)
    assert asked.wait(WAIT_S)
    source.close()
    assert source.join(WAIT_S / 2)


# A real server.


@pytest.fixture
def nginx(world: World, tmp_path: Path) -> Iterator[str]:
    program = require_tool("nginx")
    folder = tmp_path / "nginx"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    temporary = " ".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if hasattr(os, "geteuid") and os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"""{user} worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
        events {{ worker_connections 64; }}
        http {{ access_log {folder}/access.log; gzip on; gzip_types *; {temporary}
        server {{ listen 127.0.0.1:{port}; root {world.folder};
        location = /sub/other.bin {{ max_ranges 0; }} }} }}"""
    )
    command = [program, "-p", str(folder), "-e", f"{folder}/error.log", "-c", "nginx.conf"]
    # It goes into the background when it listens.
    subprocess.run(command, check=True, timeout=WAIT_S, stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}/"
    subprocess.run([*command, "-s", "stop"], timeout=WAIT_S, check=True, stderr=subprocess.DEVNULL)


def test_nginx(world: World, nginx: str, tmp_path: Path) -> None:
    source = world.source(nginx)
    # It gives ranges of one file, and the other only as a whole.
    assert world.ask(source, EVERYTHING).failure is None
    assert world.has(WEIGHTS, BIAS, NORM, OTHER)
    assert world.ask(source, ()).failure is None
    log = (tmp_path / "nginx" / "access.log").read_text().splitlines()
    assert sorted(line.split('"')[2].split()[0] for line in log) == ["200", "206"]
