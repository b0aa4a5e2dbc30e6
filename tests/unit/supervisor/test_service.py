"""What a worker is given, and that a supervisor is light."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from outrider_server.embedded.state import SOCKET_PATH_BYTES_MAX
from outrider_server.settings import Settings, SettingsError
from outrider_server.supervisor import service
from outrider_server.supervisor.service import (
    socket_folder,
    told_by_signals,
    worker_environment,
    worker_settings,
)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith(("OUTRIDER_", "OTEL_")):
            monkeypatch.delenv(name)


def test_a_supervisor_imports_no_grpc() -> None:
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, outrider_server.__main__, outrider_server.supervisor.service;"
            "print(sorted(m for m in sys.modules if m.split('.')[0] in ('grpc', 'outrider', 'google')))",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert said.stdout.strip() == "[]"


def test_each_worker_has_a_name_and_a_port_of_its_own_and_knows_how_many_there_are() -> None:
    each = worker_settings(Settings(node_name="a", workers=3, own_address="127.0.0.2:6000"))
    assert [s.node_name for s in each] == ["a.1", "a.2", "a.3"]
    assert [s.own_address for s in each] == ["127.0.0.2:6000", "127.0.0.2:6001", "127.0.0.2:6002"]
    assert {s.workers for s in each} == {3}
    assert {s.listen_address for s in each} == {"127.0.0.1:4510"}


def test_a_port_of_the_systems_choice_stays_one() -> None:
    each = worker_settings(Settings(workers=2, own_address="[::1]:0"))
    assert {s.own_address for s in each} == {"[::1]:0"}


def test_as_many_workers_as_cores_are_told_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)), raising=False)
    assert [s.workers for s in worker_settings(Settings())] == [5] * 5


@pytest.mark.parametrize(
    ("knobs", "name"),
    [
        ({"node_name": "a" * 39}, "node_name"),
        ({"own_address": "127.0.0.1:65535"}, "own_address"),
        ({"own_address": "127.0.0.1:4509"}, "own_address"),
    ],
)
def test_what_does_not_fit_some_worker_is_refused_by_name(
    knobs: dict[str, object], name: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        worker_settings(Settings(workers=2, **knobs))  # type: ignore[arg-type]
    (problem,) = caught.value.problems
    assert problem.startswith(f"{name}: ")


def test_a_worker_reads_from_its_environment_just_what_it_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "outrider.toml"
    config.write_text("lane_deliveries_max = 7\ndrain_seconds = 3\n")
    ours = {
        "PATH": "/bin",
        "OUTRIDER_CONFIG": str(config),
        "OUTRIDER_DRAIN_SECONDS": "99",
        "OUTRIDER_PORT": "tcp://10.0.0.1:4510",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://other:4318",
    }
    given = Settings(
        state_folder=tmp_path,
        lease_seconds=12.5,
        lane_deliveries_max=9,
        metrics_enabled=False,
        sealing_keys="kek_a\nkek_b",  # type: ignore[arg-type]
        database_url="postgresql://u:p%2Fq@/d?host=/run/x&port=5",  # type: ignore[arg-type]
        otlp_endpoint="http://collector:4318/v1/metrics",
    )
    environment = worker_environment(given, ours)
    assert environment["PATH"] == "/bin"
    for name in os.environ:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    read = Settings.load()
    assert dict(read) == dict(given)
    assert read.ignored_variables == ()


def test_sockets_are_where_only_this_user_may_enter(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    (tmp_path / "run" / "3.sock").touch()
    with socket_folder(tmp_path) as folder:
        assert folder == tmp_path / "run"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "1.sock").touch()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("long", [True, False])
def test_without_a_folder_whose_name_is_short_enough_sockets_are_elsewhere(
    long: bool, tmp_path: Path
) -> None:
    state = tmp_path / ("x" * 100) if long else None
    if state is not None:
        state.mkdir()
    with socket_folder(state) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert tmp_path not in folder.parents
        assert len(os.fsencode(folder / "64.sock")) <= SOCKET_PATH_BYTES_MAX
    assert not folder.exists()


class Told:
    """Stands in for the workers, and notes what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.something = asyncio.Event()

    def stop(self) -> None:
        self.told.append("stop")
        self.something.set()

    def roll(self) -> None:
        self.told.append("roll")
        self.something.set()


async def signalled(told: Told, number: int) -> str:
    told.something.clear()
    os.kill(os.getpid(), number)
    async with asyncio.timeout(10):
        await told.something.wait()
    return told.told[-1]


async def test_signals_stop_and_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_has_terminal", lambda: True)
    told = Told()
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    with told_by_signals(told):  # type: ignore[arg-type]
        assert await signalled(told, signal.SIGHUP) == "roll"
        assert await signalled(told, signal.SIGTERM) == "stop"
        assert await signalled(told, signal.SIGINT) == "stop"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


async def test_a_terminal_that_was_closed_is_a_wish_to_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter([True, False])
    monkeypatch.setattr(service, "_has_terminal", lambda: next(answers))
    told = Told()
    with told_by_signals(told):  # type: ignore[arg-type]
        assert await signalled(told, signal.SIGHUP) == "stop"
