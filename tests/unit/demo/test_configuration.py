"""The demo's settings: bounded on disk unless somebody said otherwise; what would fail later is refused first."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider_server.demo.configuration import (
    DISK_BOUNDS,
    demo_settings,
    local_target,
    require_room,
)
from outrider_server.demo.errors import DemoError
from outrider_server.settings import Settings


def test_disk_is_bounded_where_nobody_set_anything(tmp_path: Path) -> None:
    made = demo_settings(Settings.load({"listen_address": "127.0.0.1:1"}), tmp_path)
    assert made.state_folder == tmp_path
    assert made.listen_address == "127.0.0.1:1"
    assert {name: getattr(made, name) for name in DISK_BOUNDS} == DISK_BOUNDS


def test_who_sets_a_bound_sets_them_all(tmp_path: Path) -> None:
    made = demo_settings(Settings.load({"retention_days": 30}), tmp_path)
    assert made.retention_days == 30
    assert made.partition_hours == Settings().partition_hours


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("127.0.0.1:4510", "127.0.0.1:9"),
        ("0.0.0.0:4510", "127.0.0.1:9"),
        ("[::]:4510", "[::1]:9"),
        ("[::1]:4510", "[::1]:9"),
        ("localhost:4510", "localhost:9"),
    ],
)
def test_a_program_on_this_host_is_told_an_address_it_can_reach(address: str, target: str) -> None:
    assert local_target(address, 9) == target


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    require_room(tmp_path, 0)
    with pytest.raises(DemoError, match="free some space"):
        require_room(tmp_path, 1 << 60)
