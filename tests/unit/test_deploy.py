"""What stands in deploy/ fits the server: settings that exist, ports that are its own, an account without rights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # stubs would be one more dependency, for one test

from outrider_server.settings import CONFIG_VARIABLE, PREFIX, Settings, split_address

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
OURS = {name: one for name, one in COMPOSE["services"].items() if one["image"] == "outrider"}
SERVING = {name: one for name, one in OURS.items() if "command" not in one}

DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}
LISTEN_PORT = split_address(DEFAULTS["listen_address"])[1]
ADMIN_PORT = split_address(DEFAULTS["admin_address"])[1]


def instructions(name: str) -> list[str]:
    """The arguments of each instruction of that name in the Containerfile, continued lines joined."""
    joined = CONTAINERFILE.replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", joined, re.MULTILINE)


def container_variables() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(instructions("ENV"))))


def unit() -> dict[str, list[str]]:
    """The values of each key of the systemd unit, in order."""
    values: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / "outrider.service").read_text().splitlines():
        if re.match(r"\w+=", line):
            key, _, value = line.partition("=")
            values.setdefault(key, []).append(value)
    return values


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_variable_that_a_file_names_is_a_setting(path: Path) -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | {CONFIG_VARIABLE}
    named = set(re.findall(rf"\b{PREFIX}[A-Z_]+\b", path.read_text()))
    assert named - known == set()


def test_the_container_is_configured_by_values_that_the_server_accepts() -> None:
    values = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in container_variables().items()
        if name.startswith(PREFIX)
    }
    settings = Settings(**values)  # type: ignore[arg-type]  # as text, as from the environment
    assert split_address(settings.listen_address) == ("0.0.0.0", LISTEN_PORT)
    assert split_address(settings.admin_address) == ("0.0.0.0", ADMIN_PORT)
    assert instructions("EXPOSE") == [f"{LISTEN_PORT} {ADMIN_PORT}"]
    assert str(settings.state_folder) in instructions("VOLUME")


def test_the_container_runs_as_a_user_that_the_image_makes_and_not_as_root() -> None:
    (user,) = instructions("USER")
    assert re.search(rf"useradd .*\b{user}\b", CONTAINERFILE.replace("\\\n", " "))
    assert user not in {"root", "0"}


def test_the_image_installs_only_what_a_lock_names() -> None:
    installs = [
        part
        for line in instructions("RUN")
        for part in line.split("&&")
        if re.search(r"\bpip (install|wheel)\b", part)
    ]
    assert len(installs) == 4
    for part in installs:
        assert "--require-hashes" in part or "--no-deps" in part, part


def test_what_the_containerfile_copies_exists_and_reaches_the_builder() -> None:
    kept = {
        line.removeprefix("!")
        for line in (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for line in instructions("COPY")
        if not line.startswith("--from")
        for source in line.split()[:-1]
    }
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_compose_publishes_ports_on_the_loopback_address_only(name: str) -> None:
    for port in COMPOSE["services"][name].get("ports", []):
        assert str(port).startswith("127.0.0.1:")


@pytest.mark.parametrize("name", sorted(SERVING))
def test_compose_asks_each_server_whether_it_is_ready(name: str) -> None:
    service = SERVING[name]
    assert f"http://127.0.0.1:{ADMIN_PORT}/readyz" in service["healthcheck"]["test"][-1]
    assert {f"127.0.0.1:{port}:{port}" for port in (LISTEN_PORT, ADMIN_PORT)} == set(
        service["ports"]
    )


@pytest.mark.parametrize("name", sorted(OURS))
def test_compose_keeps_the_state_of_each_server_on_a_volume(name: str) -> None:
    volume, _, folder = OURS[name]["volumes"][0].partition(":")
    assert volume in COMPOSE["volumes"]
    assert folder == container_variables()["OUTRIDER_STATE_FOLDER"]


def test_compose_waits_longer_for_the_end_than_the_server_drains() -> None:
    for service in OURS.values():
        assert int(service["stop_grace_period"].removesuffix("s")) > DEFAULTS["drain_seconds"] + 20


def test_compose_migrates_before_it_serves_on_a_postgres_of_its_own() -> None:
    service = COMPOSE["services"]["outrider-postgres"]
    assert service["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
    assert COMPOSE["services"]["migrate"]["environment"] == service["environment"]
    assert "@postgres:5432/" in service["environment"]["OUTRIDER_DATABASE_URL"]
    assert re.fullmatch(r"postgres:(1[5-9]|[2-9]\d)", COMPOSE["services"]["postgres"]["image"])


def test_the_unit_keeps_its_state_where_it_may_write() -> None:
    values = unit()
    (folder,) = values["StateDirectory"]
    assert f"OUTRIDER_STATE_FOLDER=/var/lib/{folder}" in values["Environment"]
    assert values["DynamicUser"] == ["yes"]
    assert values["ProtectSystem"] == ["strict"]
    assert values["CapabilityBoundingSet"] == [""]


def test_the_unit_lets_the_server_drain_before_its_database_ends() -> None:
    values = unit()
    assert values["KillMode"] == ["mixed"]
    (stop,) = values["TimeoutStopSec"]
    assert int(stop.removesuffix("s")) > DEFAULTS["drain_seconds"] + 20
    assert values["ExecStart"] == ["/opt/outrider/bin/outrider-server serve"]
