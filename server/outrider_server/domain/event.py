"""Events: what modules publish, and what the log keeps of them.

A `NewEvent` is what a module sent; it becomes an `Event` when the persist stage gives it its sequence. The
sequence is the event's id, its place in the log and its time at once (see `domain.sequence`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

EVENT_BYTES_MAX = 10 * 1024 * 1024
"""Largest payload of one event, in bytes."""


@dataclass(slots=True)
class NewEvent:
    """An event as its module published it, checked but not yet in the log.

    `tenant` is the tenant's number, not its name. `time_us` is when it happened at the module's, in microseconds
    since 1970 UTC. `data` is the payload's JSON text in UTF-8, passed on unchanged. Text fields that the module
    left out are empty.
    """

    tenant: int
    type: str
    data: bytes
    time_us: int
    source: str = ""
    subject: str = ""
    key: str = ""
    organization: str = ""
    actor: str = ""
    idempotency_key: str = ""
    attributes: dict[str, str] = field(default_factory=dict)
