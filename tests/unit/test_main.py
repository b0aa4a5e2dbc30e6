"""The command line without a database: what is wrong is answered in one sentence, before anything is started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider_server.__main__ import main


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith(("OUTRIDER_", "OTEL_", "PG")):
            monkeypatch.delenv(name)


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def refusal(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


WORKERS = pytest.mark.parametrize("workers", ["1", "2"])
"""In one process, and under a supervisor."""


def serve(state: Path, **knobs: str) -> subprocess.CompletedProcess[str]:
    """`serve` as a process of its own, because it decides how the whole process logs."""
    given = {"STATE_FOLDER": str(state), "LISTEN_ADDRESS": "127.0.0.1:0", **knobs}
    given.setdefault("ADMIN_ADDRESS", "127.0.0.1:0")
    return subprocess.run(
        [sys.executable, "-m", "outrider_server", "serve"],
        env={**os.environ, **{f"OUTRIDER_{name}": value for name, value in given.items()}},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("name", ["A B", "x/../y", "a" * 100, "a_b"])
def test_a_key_that_could_never_be_used_is_not_made(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    line = refusal(["create-admin-key", "--name", name, "--state-folder", str(state)], 1, capsys)
    assert "an id has 1 to 63 lower-case letters, digits and -" in line
    assert not state.exists()


@pytest.mark.parametrize("command", ["balance", "migrate", "create-admin-key", "nodes", "let-go"])
def test_a_database_that_refuses_is_told_by_its_place_and_without_password(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"127.0.0.1:{listener.getsockname()[1]}/d"
    line = refusal([command, "--database-url", f"postgresql://u:s3cret@{place}"], 1, capsys)
    assert line == (
        f"outrider-server: cannot connect to {place}: Connection refused; check database_url"
    )


def test_a_database_url_that_could_never_connect_is_refused_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refusal(["migrate", "--database-url", "postgresql://u:s3cret@h:notaport/d"], 2, capsys)
    assert line.startswith("database_url: must have a port")
    assert "s3cret" not in line


@WORKERS
@pytest.mark.parametrize("knob", ["LISTEN_ADDRESS", "ADMIN_ADDRESS"])
def test_a_taken_address_is_told_last_and_before_a_database_is_made(
    knob: str, workers: str, taken: str, tmp_path: Path
) -> None:
    ran = serve(tmp_path / "state", WORKERS=workers, **{knob: taken})
    assert ran.returncode == 1
    line = ran.stderr.splitlines()[-1]
    assert line.startswith(f"outrider-server: Cannot listen on {taken} (address already in use)")
    assert line.endswith(f"with {knob.lower()}.")
    assert not (tmp_path / "state").exists()


@WORKERS
def test_a_missing_exporter_is_told_by_the_package_to_install(workers: str, tmp_path: Path) -> None:
    try:
        import opentelemetry.exporter.otlp.proto.http  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("the exporter is installed here")
    ran = serve(tmp_path / "state", WORKERS=workers, OTLP_ENDPOINT="http://127.0.0.1:1/v1/metrics")
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert "pip install opentelemetry-exporter-otlp-proto-http" in line
    assert not (tmp_path / "state").exists()


def test_the_configuration_that_is_printed_holds_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTRIDER_OTLP_ENDPOINT", "https://u:s3cret@h/v1?api-key=s3cret")
    monkeypatch.setenv("OUTRIDER_DATABASE_URL", "postgresql://u:s3cret@h/d")
    assert main(["config"]) == 0
    printed = capsys.readouterr().out
    assert "https://[redacted]@h/v1?api-key=[redacted]" in printed
    assert "s3cret" not in printed


@WORKERS
def test_a_server_whose_database_refuses_ends_with_the_same_sentence(
    workers: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"127.0.0.1:{listener.getsockname()[1]}/d"
    ran = serve(tmp_path / "state", WORKERS=workers, DATABASE_URL=f"postgresql://u:s3cret@{place}")
    assert ran.returncode == 1
    sentence = f"cannot connect to {place}: Connection refused; check database_url"
    assert ran.stderr.splitlines()[-1] == f"outrider-server: {sentence}"
    assert ran.stderr.count("outrider-server: ") == 1
    assert "s3cret" not in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("knobs", "problem"),
    [
        ({"WORKERS": "65"}, "workers: must be less than or equal to 64"),
        ({"WORKERS": "2", "NODE_NAME": "a" * 39}, "node_name: "),
        ({"WORKERS": "2", "OWN_ADDRESS": "127.0.0.1:65535"}, "own_address: must end in a port"),
    ],
)
def test_settings_that_do_not_fit_every_worker_are_refused_before_a_database_is_made(
    knobs: dict[str, str], problem: str, tmp_path: Path
) -> None:
    ran = serve(tmp_path / "state", **knobs)
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith(problem)
    assert not (tmp_path / "state").exists()


def test_the_number_of_workers_can_be_given_on_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "--workers", "99"]) == 2
    assert "workers: must be less than or equal to 64 (got 99, from command line)" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert "--workers" in shown
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "\n    node " not in capsys.readouterr().out
