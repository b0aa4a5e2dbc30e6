"""The demo's log is bounded and its last lines are never lost to the bound."""

from __future__ import annotations

from pathlib import Path

from outrider_server.demo.logs import BoundedLog


def test_a_full_file_is_set_aside_and_one_such_only_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "demo.log"
    with BoundedLog(path, bytes_max=100) as log:
        for number in range(100):
            assert log.write(f"line {number:04}\n") == 10
    files = {each.name: each.read_text() for each in tmp_path.iterdir()}
    assert set(files) == {"demo.log", "demo.log.1"}
    assert files["demo.log"].endswith("line 0099\n")
    assert sum(map(len, files.values())) <= 200


def test_a_start_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "demo.log"
    for text in ("first", "second"):
        with BoundedLog(path) as log:
            log.write(text)
    assert path.read_text() == "second"
