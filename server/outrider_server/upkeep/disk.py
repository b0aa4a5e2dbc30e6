"""Free disk: under its floor publishes are refused, before Postgres itself runs out and stops.

It can be watched only where the database's files are on this machine, that is for the embedded Postgres.
Rule: a file system that does not answer is no reason to stop; what was told of it last holds until it answers again.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import structlog


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user can still write to the file system of `folder`."""
    return shutil.disk_usage(folder).free


async def watch(
    folder: Path, floor_bytes: int, interval_seconds: float, tell: Callable[[bool], None]
) -> None:
    """Tell for ever whether free disk is under its floor."""
    log = structlog.get_logger()
    failing = False
    while True:
        try:
            free = await asyncio.to_thread(free_bytes, folder)
        except OSError as error:
            if not failing:
                log.warning("disk.unknown", folder=str(folder), error=str(error))
            failing = True
        else:
            if failing:
                log.info("disk.known_again", folder=str(folder))
            failing = False
            tell(free < floor_bytes)
        await asyncio.sleep(interval_seconds)
