"""A Postgres of another process is waited for while it starts, and no longer than the limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider_server.embedded import running
from outrider_server.embedded.errors import PasswordMissing, StartFailed, StateFolderUnusable
from outrider_server.embedded.running import find_running


class Clock:
    """Time that passes when somebody sleeps; `then` is done at each sleep."""

    def __init__(self, *then: object) -> None:
        self.now = 0.0
        self.then = list(then)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.then:
            step = self.then.pop(0)
            assert callable(step)
            step()


def state(folder: Path, status: str, password: str = "p@ss") -> None:
    data = folder / "postgres"
    data.mkdir(parents=True, exist_ok=True)
    (data / "PG_VERSION").write_text("18\n")
    (data / "postmaster.pid").write_text(
        f"42\n{data}\n1700000000\n15432\n/run/some where\n127.0.0.1\n 1 2\n{status}\n"
    )
    (folder / "postgres.password").write_text(password)


@pytest.fixture(autouse=True)
def everybody_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "serves", lambda pid, _: pid == 42)


def test_it_is_found_when_it_is_ready(tmp_path: Path) -> None:
    clock = Clock(lambda: state(tmp_path, "starting"), lambda: state(tmp_path, "ready   "))
    found = find_running(tmp_path, monotonic=clock.monotonic, sleep=clock.sleep)
    assert found.dsn == ("postgresql://outrider:p%40ss@/outrider?host=/run/some%20where&port=15432")
    assert found.version == "18"
    assert not clock.then


@pytest.mark.parametrize("status", ["starting", "stopping"])
def test_one_that_does_not_become_ready_is_not_waited_for_for_ever(
    tmp_path: Path, status: str
) -> None:
    clock = Clock()
    state(tmp_path, status)
    with pytest.raises(StartFailed, match=r"was not ready within 3 s: .*\.$"):
        find_running(tmp_path, wait_seconds_max=3, monotonic=clock.monotonic, sleep=clock.sleep)
    assert 3 < clock.now < 4


def test_one_that_is_dead_is_not_ready_whatever_its_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    state(tmp_path, "ready")
    monkeypatch.setattr(running, "serves", lambda *_: False)
    with pytest.raises(StartFailed):
        find_running(tmp_path, monotonic=clock.monotonic, sleep=clock.sleep)


def test_without_its_password_it_cannot_be_used(tmp_path: Path) -> None:
    state(tmp_path, "ready", password="")
    with pytest.raises(PasswordMissing):
        find_running(tmp_path)


def test_a_file_that_cannot_be_read_is_told_in_a_sentence(tmp_path: Path) -> None:
    state(tmp_path, "ready")
    (tmp_path / "postgres.password").unlink()
    (tmp_path / "postgres.password").mkdir()
    with pytest.raises(StateFolderUnusable, match="cannot be used"):
        find_running(tmp_path)
