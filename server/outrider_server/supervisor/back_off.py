"""How long a worker that ended waits for its next start."""

from __future__ import annotations

FIRST_SECONDS = 0.1
LONGEST_SECONDS = 5.0
SOUND_SECONDS = 30.0


class BackOff:
    """Nothing the first time, then 0.1 s, twice as long each time up to 5 s; a life of 30 s makes it forget.

    So one crash costs no time, and a worker that cannot live takes no more than a start every 5 s from the others.
    """

    def __init__(self) -> None:
        self._next_seconds = 0.0

    def after(self, alive_seconds: float) -> float:
        """How many seconds to wait after a life of `alive_seconds`."""
        if alive_seconds >= SOUND_SECONDS:
            self._next_seconds = 0.0
        wait_seconds = self._next_seconds
        self._next_seconds = min(max(wait_seconds * 2, FIRST_SECONDS), LONGEST_SECONDS)
        return wait_seconds
