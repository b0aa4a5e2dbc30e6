"""How much a tenant may hold, and how far its policies may go."""

from __future__ import annotations

from dataclasses import dataclass

from outrider_server.domain.errors import FailedPrecondition


@dataclass(frozen=True, slots=True)
class Limits:
    """The most of each kind in one tenant; of keys, those that still hold."""

    endpoints_max: int = 10_000
    subscriptions_max: int = 20_000
    event_types_max: int = 10_000
    api_keys_max: int = 1_000
    retry_window_seconds_max: float = 30 * 86_400.0


def require_room(held: int, most: int, what: str) -> None:
    """Raise FailedPrecondition where another one would be too many."""
    if held >= most:
        raise FailedPrecondition(
            "LIMIT_REACHED",
            f"there are {held} {what} already, and no more than {most} are allowed",
            metadata={"limit": str(most)},
        )
