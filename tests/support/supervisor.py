"""Workers whose processes are stand-ins, and leases that only remember what they were told."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from outrider_server.supervisor.leases import Leases
from outrider_server.supervisor.worker import Worker

ROOT = Path(__file__).resolve().parents[2]


class RememberedLeases(Leases):
    """Notes who was expired and who was said to drain, in the order in which it was told."""

    def __init__(self) -> None:
        self.expired: list[str] = []
        self.told: list[tuple[str, ...]] = []

    @override
    async def expire(self, node: str) -> None:
        self.expired.append(node)

    @override
    async def set_draining(self, nodes: Sequence[str]) -> None:
        self.told.append(tuple(nodes))


def stand_in(
    folder: Path, script: str, leases: Leases, *, name: str = "n.1", socket: Path | None = None
) -> Worker:
    """A worker that follows `script`, see `tests.support.stand_in_worker`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OUTRIDER_NODE_NAME": name}
    if socket is not None:
        environment["OUTRIDER_ADMIN_SOCKET"] = str(socket)
    return Worker(
        name,
        [sys.executable, "-m", "tests.support.stand_in_worker", str(folder), script],
        environment,
        leases=leases,
        monotonic=time.monotonic,
    )
