"""docker-compose.yml without Docker: what can be wrong in it and show only at start-up.

The keys are held against the Compose specification's lists (compose-spec.io), as far as
the file uses them; references must lead somewhere; our own commands must be understood
by our own argument parser.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tensorswarm.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[2]

SERVICE_KEYS = {
    "build", "cap_add", "cap_drop", "command", "depends_on", "entrypoint", "environment",
    "expose", "healthcheck", "image", "init", "networks", "ports", "read_only", "restart",
    "security_opt", "stop_grace_period", "tmpfs", "user", "volumes", "working_dir",
}  # fmt: skip
HEALTHCHECK_KEYS = {
    "test", "interval", "timeout", "retries", "start_period", "start_interval", "disable",
}  # fmt: skip
TOP_LEVEL_KEYS = {"name", "services", "volumes", "networks", "configs", "secrets"}
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}
DURATION = re.compile(r"(\d+(h|m|s|ms|us))+")

Service = dict[str, Any]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Service]:
    found = compose["services"]
    assert isinstance(found, dict)
    return found


def expand(text: str) -> str:
    """Return a command as the container's shell sees it: Compose has turned $$ into $."""
    rest = text.replace("$$", "")
    assert "$" not in rest, f"Compose would replace a variable in {text!r}: write $$"
    return text.replace("$$", "$")


def scripts_of(service: Service) -> list[str]:
    """Return the shell scripts a service runs."""
    entrypoint = service.get("entrypoint", [])
    if entrypoint[:1] != ["sh"]:
        return []
    assert entrypoint[-1].startswith("-") and "c" in entrypoint[-1]
    assert "e" in entrypoint[-1], "the shell must stop at the first command that fails"
    (script,) = service["command"]
    return [expand(script)]


def our_commands(script: str) -> list[list[str]]:
    """Return the argument lists of every `tensorswarm` command in a shell script."""
    commands = []
    for line in script.splitlines():
        words = shlex.split(line)
        if "tensorswarm" in words:
            commands.append(words[words.index("tensorswarm") + 1 :])
    return commands


def all_commands(services: dict[str, Service]) -> list[list[str]]:
    return [
        command
        for service in services.values()
        for script in scripts_of(service)
        for command in our_commands(script)
    ]


def test_keys_are_known(compose: dict[str, Any], services: dict[str, Service]) -> None:
    assert {key for key in compose if not key.startswith("x-")} <= TOP_LEVEL_KEYS
    for name, service in services.items():
        assert set(service) <= SERVICE_KEYS, name
        assert set(service["healthcheck"]) <= HEALTHCHECK_KEYS, name


def test_there_is_an_origin_a_bootstrap_node_a_seeder_and_two_peers(
    services: dict[str, Service],
) -> None:
    assert {"origin", "bootstrap", "seeder"} <= set(services)
    assert len(set(services) - {"origin", "bootstrap", "seeder"}) == 2


def test_every_service_has_an_image_and_a_health_check(services: dict[str, Service]) -> None:
    for name, service in services.items():
        assert service["image"], name
        health = service["healthcheck"]
        assert health["test"][0] == "CMD", name
        for key in ("interval", "timeout", "start_period"):
            assert DURATION.fullmatch(health[key]), f"{name}: {key} {health[key]}"


def test_health_checks_in_python_are_python(services: dict[str, Service]) -> None:
    for name, service in services.items():
        test = service["healthcheck"]["test"]
        if test[1] == "python":
            assert test[2] == "-c", name
            compile(expand(test[3]), f"health check of {name}", "exec")


def test_dependencies_exist_and_have_no_circle(services: dict[str, Service]) -> None:
    needs = {name: service.get("depends_on", {}) for name, service in services.items()}
    for name, targets in needs.items():
        for target, how in targets.items():
            assert target in services, f"{name} depends on {target}"
            assert how["condition"] in CONDITIONS, f"{name} depends on {target}"
    started: set[str] = set()
    while len(started) < len(services):
        ready = {name for name in needs if name not in started and set(needs[name]) <= started}
        assert ready, f"these wait for each other: {sorted(set(services) - started)}"
        started |= ready


def test_volumes_are_declared_and_used(
    compose: dict[str, Any], services: dict[str, Service]
) -> None:
    sources = {
        re.sub(r"\$\{[^}]*\}", "/variable", volume).partition(":")[0]
        for service in services.values()
        for volume in service.get("volumes", [])
    }
    named = {source for source in sources if not source.startswith((".", "/"))}
    assert named == set(compose["volumes"])


def test_mounted_and_built_files_exist(services: dict[str, Service]) -> None:
    for service in services.values():
        if "build" in service:
            assert (ROOT / service["build"] / "Dockerfile").is_file()
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                assert (ROOT / volume.partition(":")[0]).exists(), volume


def test_every_node_has_a_store_of_its_own(services: dict[str, Service]) -> None:
    stores = [
        volume.partition(":")[0]
        for service in services.values()
        for volume in service.get("volumes", [])
        if volume.endswith(":/data")
    ]
    assert len(stores) == len(set(stores)) == len(services) - 1  # all but the origin


def test_nodes_find_each_other(services: dict[str, Service]) -> None:
    (bootstrap,) = scripts_of(services["bootstrap"])
    assert "--to /swarm/bootstrap --line /dns4/bootstrap/tcp/4001/p2p/{peer_id} --" in bootstrap
    nodes = [command for command in all_commands(services) if command[0] == "node"]
    assert len(nodes) == 4
    for command in nodes:
        assert command[command.index("--listen") + 1] == "/ip4/0.0.0.0/tcp/4001"
    joining = [command for command in nodes if "--bootstrap" in command]
    assert len(joining) == 3
    for command in joining:
        assert command[command.index("--bootstrap") + 1] == "@/swarm/bootstrap"


def test_what_is_read_was_noted_before(services: dict[str, Service]) -> None:
    noted = {
        path: name
        for name, service in services.items()
        for script in scripts_of(service)
        for path in re.findall(r"note\.py\s+--to (\S+)", script)
    }
    for name, service in services.items():
        for script in scripts_of(service):
            for path in re.findall(r"(?:@|cat )(/swarm/[\w-]+)", script):
                assert noted[path] in service["depends_on"], f"{name} reads {path} too early"


def test_commands_are_ones_we_understand(services: dict[str, Service]) -> None:
    commands = all_commands(services)
    assert {command[0] for command in commands} == {"add", "fetch", "node"}
    parser = build_parser()
    for command in commands:
        parser.parse_args(command)


def test_comments_name_commands_we_understand() -> None:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    shown = re.findall(r"^#.*docker compose exec \S+ tensorswarm (.*)$", text, re.MULTILINE)
    assert shown
    parser = build_parser()
    for line in shown:
        parser.parse_args(shlex.split(line))


def test_image_has_what_compose_runs() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["tensorswarm"]' in dockerfile
    assert re.search(r"^USER (?!root|0)\w+$", dockerfile, re.MULTILINE)
    for source in re.findall(r"^COPY (?!--from)(\S+) ", dockerfile, re.MULTILINE):
        assert (ROOT / source).exists(), source
    for needed in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "deploy"):
        assert f"!{needed}\n" in ignore, f"{needed} does not reach the image"
    for folder in ("p2p", "simulations", "store", "tensorswarm"):
        assert f"!{folder}\n" in ignore, f"{folder} does not reach the image"
