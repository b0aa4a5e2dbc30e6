"""The demo's folder: the default gives way where it must, one demo at a time, and what is kept survives being killed."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from outrider_server.demo import folder as module
from outrider_server.demo.errors import DemoError
from outrider_server.demo.folder import (
    Choice,
    Kept,
    bytes_used,
    choose_folder,
    hold,
    load_kept,
    save_kept,
)
from outrider_server.embedded.errors import DiskFull, StateFolderUnusable

FULL = Kept("admin", "integration", "publisher", 4512, {"crm": "whsec_x"})


def nothing_in_the_way(_folder: Path) -> Path | None:
    return None


def test_the_default_is_taken_where_nothing_is_in_its_way(tmp_path: Path) -> None:
    assert choose_folder(tmp_path / "run", nothing_in_the_way) == Choice(tmp_path / "run")


def test_another_folder_is_taken_and_the_obstacle_named_where_the_default_cannot_be_reached(
    tmp_path: Path,
) -> None:
    private, other = tmp_path / "home", tmp_path / "other"

    def obstacle(folder: Path) -> Path | None:
        return private if folder.is_relative_to(private) else None

    chosen = choose_folder(private / "run", obstacle, [private / "x", other])

    assert chosen == Choice(other, blocked_by=private)


def test_a_link_that_somebody_put_in_a_shared_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "trap").symlink_to(tmp_path)

    def obstacle(folder: Path) -> Path | None:
        return tmp_path if folder.name == "run" else None

    with pytest.raises(DemoError, match="--state-folder"):
        choose_folder(tmp_path / "run", obstacle, [tmp_path / "trap"])


def test_one_demo_at_a_time_uses_a_folder(tmp_path: Path) -> None:
    with (
        hold(tmp_path / "run"),
        pytest.raises(DemoError, match=f"as process {os.getpid()}"),
        hold(tmp_path / "run"),
    ):
        pytest.fail("both hold it")
    with hold(tmp_path / "run"):
        pass


def test_a_file_where_the_folder_should_be_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with (
        pytest.raises(StateFolderUnusable, match="choose another state folder"),
        hold(tmp_path / "run"),
    ):
        pytest.fail("held")


def test_what_was_kept_comes_back_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    save_kept(tmp_path, FULL)

    assert load_kept(tmp_path) == FULL
    assert stat.S_IMODE((tmp_path / "demo.json").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def test_a_half_written_file_of_a_killed_run_is_no_obstacle(tmp_path: Path) -> None:
    save_kept(tmp_path, FULL)
    (tmp_path / "demo.json.new").write_text('{"adm')

    assert load_kept(tmp_path) == FULL
    save_kept(tmp_path, Kept())
    assert load_kept(tmp_path) == Kept()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\x00",
        '{"admin_key": 1, "receiver_port": 70000, "secrets": []}',
        '{"receiver_port": "4512", "secrets": {"crm": 5}}',
    ],
)
def test_what_is_of_no_use_is_as_good_as_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "demo.json").write_text(text)
    assert load_kept(tmp_path) == Kept()


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(DiskFull, match="free some space"):
        save_kept(tmp_path, FULL)


def test_the_bytes_used_are_those_of_everything_below(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    before = bytes_used(tmp_path)
    (tmp_path / "a" / "b" / "file").write_bytes(b"x" * 1_000_000)
    (tmp_path / "gone").symlink_to("nowhere")

    assert 1_000_000 <= bytes_used(tmp_path) - before < 1_200_000
    assert "admin" not in repr(FULL)
