from __future__ import annotations

import os
from pathlib import Path

import pytest

from outrider_server.embedded.account import Account
from outrider_server.embedded.errors import (
    DataFolderForeign,
    DataFolderVersion,
    PasswordMissing,
    StateFolderInUse,
    StateFolderUnusable,
)
from outrider_server.embedded.state import SOCKET_PATH_BYTES_MAX, StateFolder

OURSELVES = Account(os.geteuid(), os.getegid(), drops=False)


@pytest.fixture
def state(tmp_path: Path) -> StateFolder:
    state = StateFolder(tmp_path / "deep" / "state")
    state.folder.mkdir(parents=True)
    return state


def test_one_launcher_at_a_time_uses_a_folder(state: StateFolder) -> None:
    state.open()
    other = StateFolder(state.folder)
    with pytest.raises(StateFolderInUse, match=f"process {os.getpid()}:"):
        other.open()
    state.close()
    other.open()
    other.close()


def test_a_new_state_folder_is_private(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "a" / "b")
    state.open()
    state.close()
    assert state.folder.stat().st_mode & 0o777 == 0o700


def test_no_data_and_an_empty_folder_are_the_same(state: StateFolder) -> None:
    assert not state.has_data(18)
    state.data.mkdir()
    assert not state.has_data(18)


def test_a_foreign_folder_is_refused(state: StateFolder) -> None:
    state.data.mkdir()
    (state.data / "thesis.txt").write_text("")
    with pytest.raises(DataFolderForeign, match="move it away"):
        state.has_data(18)


def test_a_file_in_the_datas_place_is_refused(state: StateFolder) -> None:
    state.data.write_text("")
    with pytest.raises(DataFolderForeign, match="move it away"):
        state.has_data(18)


@pytest.mark.parametrize("made_by", ["15", "19", "9.6"])
def test_data_of_an_older_or_newer_version_is_refused(state: StateFolder, made_by: str) -> None:
    state.data.mkdir()
    (state.data / "PG_VERSION").write_text(f"{made_by}\n")
    with pytest.raises(DataFolderVersion, match=f"bin folder of a Postgres {made_by},"):
        state.has_data(18)


def test_data_and_password_appear_together_and_the_password_is_private(state: StateFolder) -> None:
    staging = state.staging(OURSELVES)
    (staging / "PG_VERSION").write_text("18\n")
    assert not state.has_data(18)
    state.adopt(staging, "secret")
    assert state.has_data(18)
    assert state.password() == "secret"
    assert (state.folder / "postgres.password").stat().st_mode & 0o777 == 0o600


def test_what_a_creation_that_was_killed_left_is_cleared_away(state: StateFolder) -> None:
    first = state.staging(OURSELVES)
    (first / "PG_VERSION").write_text("18\n")
    second = state.staging(OURSELVES)
    assert not first.exists()
    assert second.exists()


@pytest.mark.parametrize("text", [None, "", "\n"])
def test_data_without_its_password_is_an_error(state: StateFolder, text: str | None) -> None:
    if text is not None:
        (state.folder / "postgres.password").write_text(text)
    with pytest.raises(PasswordMissing, match="put it back"):
        state.password()


def test_the_socket_lies_in_the_state_folder_if_its_path_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "unused"))
    state = StateFolder(tmp_path / "s")
    state.folder.mkdir()
    folder = state.socket_folder(OURSELVES)
    assert folder == state.folder / "postgres.run"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_long_path_gets_a_short_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    state, other = (StateFolder(tmp_path / ("x" * 120) / name) for name in ("one", "two"))
    for each in (state, other):
        each.folder.mkdir(parents=True)
    folder = state.socket_folder(OURSELVES)
    assert folder.parent == runtime
    assert len(os.fsencode(folder / ".s.PGSQL.65535")) <= SOCKET_PATH_BYTES_MAX
    assert state.socket_folder(OURSELVES) == folder
    assert other.socket_folder(OURSELVES) != folder


def test_a_short_folder_that_somebody_made_before_us_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    state = StateFolder(tmp_path / ("x" * 120))
    state.folder.mkdir()
    folder = state.socket_folder(OURSELVES)
    folder.rmdir()
    (tmp_path / "theirs").mkdir()
    folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(StateFolderUnusable, match="belongs to somebody else"):
        state.socket_folder(OURSELVES)


def test_sockets_of_a_killed_server_are_cleared_away(state: StateFolder) -> None:
    folder = state.socket_folder(OURSELVES)
    (folder / ".s.PGSQL.1234.lock").write_text("1\n")
    assert list(state.socket_folder(OURSELVES).iterdir()) == []
