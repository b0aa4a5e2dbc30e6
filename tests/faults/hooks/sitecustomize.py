"""Run by every Python of a service under test, before anything else. It does what the environment asks for.

    FAULTS_CLOCK_FILE    time.time and time.time_ns go ahead of the machine's by the seconds in this file
    FAULTS_POISON_FILE   while this file exists, whoever is about to send a payload with "marker": "poison" dies at once

Only for tests: the server knows nothing of it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

LOOK_SECONDS = 0.05
MARKER = b'"poison"'


def step_clock(path: str) -> None:
    """Wall clocks of this process show another time. Monotonic ones, as anywhere, do not step."""
    real, real_ns, monotonic = time.time, time.time_ns, time.monotonic
    offset, looked = 0.0, -1.0

    def current() -> float:
        nonlocal offset, looked
        now = monotonic()
        if now - looked > LOOK_SECONDS:
            looked = now
            try:
                with open(path) as file:  # noqa: PTH123 - nothing else may be imported this early
                    offset = float(file.read())
            except (OSError, ValueError):
                pass
        return offset

    time.time = lambda: real() + current()
    time.time_ns = lambda: real_ns() + int(current() * 1e9)


def poison(path: str) -> None:
    """A node dies before it sends what is marked."""
    from outrider_server.pipeline import deliver

    message: Callable[..., tuple[str, bytes]] = deliver._message

    def deadly(endpoint: Any, deliveries: list[Any]) -> tuple[str, bytes]:
        made = message(endpoint, deliveries)
        if MARKER in made[1] and os.path.exists(path):  # noqa: PTH110
            os._exit(9)
        return made

    deliver._message = deadly


if file := os.environ.get("FAULTS_CLOCK_FILE"):
    step_clock(file)
if (file := os.environ.get("FAULTS_POISON_FILE")) and "node" in sys.orig_argv:
    poison(file)
