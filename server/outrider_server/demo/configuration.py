"""The settings of the demo: as configured, with bounds on disk that suit a laptop where nobody set others.

Refuses before anything is started what would fail after it: taken addresses, a disk without room.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from outrider_server.demo.errors import DemoError
from outrider_server.settings import Settings, split_address

MIB = 1024 * 1024

DISK_BOUNDS: Mapping[str, object] = {
    # A day or half a GiB of events, dropped in quarters of an hour: some 400 partitions at most.
    "retention_bytes_max": 512 * MIB,
    "retention_days": 1.0,
    "retry_window_hours_max": 12.0,
    "partition_hours": 0.25,
}
POSTGRES_SETTINGS: Mapping[str, str] = {"max_wal_size": "1GB"}
START_BYTES_MIN = 512 * MIB
"""What a new database and its first log files take, and some room to show anything."""


def demo_settings(settings: Settings, folder: Path) -> Settings:
    """The settings with the folder in use, and the demo's bounds where a knob has its default."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    bounds = {
        name: value for name, value in DISK_BOUNDS.items() if settings.origin(name) == "default"
    }
    if len(bounds) < len(DISK_BOUNDS):
        bounds = {}  # they must fit each other: whoever sets one sets them all
    return Settings(**{**given, **bounds, "state_folder": folder})


def local_target(address: str, port: int) -> str:
    """Where a program on this host reaches a server that listens on `address`."""
    host, _ = split_address(address)
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound
    host = everywhere.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def require_room(folder: Path, floor_bytes: int) -> None:
    """DemoError where the folder's disk has so little room that publishes would be refused soon."""
    free = shutil.disk_usage(folder).free
    wanted = floor_bytes + START_BYTES_MIN
    if free < wanted:
        raise DemoError(
            f"The disk under {folder} has {free // MIB} MiB free and {wanted // MIB} MiB are needed:"
            " free some space, or choose a folder on another disk with --state-folder."
        )
