from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from outrider_server.embedded.processes import PidFile, end_leftovers, read_pid_file, serves


def write_pid_file(data: Path, pid: int, status: str = "ready   ") -> Path:
    data.mkdir(exist_ok=True)
    (data / "PG_VERSION").write_text("18\n")
    file = data / "postmaster.pid"
    file.write_text(f"{pid}\n{data}\n1700000000\n5432\n/tmp\n127.0.0.1\n 1 2\n{status}\n")
    return file


def end(data: Path) -> None:
    end_leftovers(data, fast_seconds=5, monotonic=time.monotonic, sleep=time.sleep)


def test_the_pid_file_tells_who_and_how_far(tmp_path: Path) -> None:
    write_pid_file(tmp_path / "data", 42, "starting")
    assert read_pid_file(tmp_path / "data") == PidFile(42, "starting", 5432, "/tmp")


@pytest.mark.parametrize("text", ["", "\n", "no number\n"])
def test_a_pid_file_half_written_is_none_yet(tmp_path: Path, text: str) -> None:
    (tmp_path / "postmaster.pid").write_text(text)
    assert read_pid_file(tmp_path) is None


def test_no_folder_has_no_pid_file(tmp_path: Path) -> None:
    assert read_pid_file(tmp_path / "nowhere") is None


def test_a_process_id_that_went_to_somebody_else_is_left_alone(tmp_path: Path) -> None:
    somebody = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        file = write_pid_file(tmp_path / "data", somebody.pid)
        assert not serves(somebody.pid, tmp_path / "data")
        end(tmp_path / "data")
        assert not file.exists(), "Postgres would take it for a running server"
        assert somebody.poll() is None
    finally:
        somebody.kill()
        somebody.communicate()


def test_somebody_who_merely_works_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    write_pid_file(tmp_path / "data", 1)
    shell = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, cwd=tmp_path / "data"
    )
    try:
        end(tmp_path / "data")
        assert shell.poll() is None
    finally:
        shell.kill()
        shell.communicate()


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    zombie = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL)
    # Wait for its end without collecting it.
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    try:
        os.kill(zombie.pid, 0)  # to the system it is still there
        file = write_pid_file(tmp_path / "data", zombie.pid)
        assert not serves(zombie.pid, tmp_path / "data")
        end(tmp_path / "data")
        assert not file.exists()
    finally:
        zombie.wait()


def test_nothing_is_cleared_from_a_folder_that_is_not_postgres_data(tmp_path: Path) -> None:
    (tmp_path / "postmaster.pid").write_text("1\n")
    end(tmp_path)
    assert (tmp_path / "postmaster.pid").exists()
