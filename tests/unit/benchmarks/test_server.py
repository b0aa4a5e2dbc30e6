"""Only this machine is measured, without settings that nobody asked for, and the embedded database is found."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from benchmarks.server import (
    TargetError,
    embedded_database,
    environment,
    find_processes,
    require_loopback,
)


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("127.0.0.1:4510", ("127.0.0.1", 4510)),
        ("localhost:1", ("localhost", 1)),
        ("[::1]:4510", ("::1", 4510)),
    ],
)
def test_loopback_addresses_are_taken(address: str, found: tuple[str, int]) -> None:
    assert require_loopback(address) == found


@pytest.mark.parametrize("address", ["10.0.0.1:4510", "example.com:4510", "127.0.0.1", "::", ""])
def test_anything_else_is_refused(address: str) -> None:
    with pytest.raises(TargetError, match="not host:port on this machine"):
        require_loopback(address)


def test_the_server_gets_the_settings_asked_for_and_none_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OUTRIDER_LANE_DELIVERIES_MAX", "3")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("KEPT", "yes")
    made = environment({"record_interval_ms": "50"})
    assert made["OUTRIDER_RECORD_INTERVAL_MS"] == "50"
    assert made["KEPT"] == "yes"
    assert "OUTRIDER_LANE_DELIVERIES_MAX" not in made
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" not in made


def test_the_embedded_database_is_found_by_its_state_folder(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "postmaster.pid").write_text(
        "4711\n/data\n1764000000\n54321\n/run/a b\n127.0.0.1\n  1 2\nready\n"
    )
    (tmp_path / "postgres.password").write_text("p@ss/word\n")
    dsn, pid = embedded_database(tmp_path)
    assert dsn == "postgresql://outrider:p%40ss%2Fword@/outrider?host=/run/a%20b&port=54321"
    assert pid == 4711


def test_a_running_server_is_found_by_its_port() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert find_processes(port) == (None, None)
        listener.listen()
        assert find_processes(port)[0] == os.getpid()
