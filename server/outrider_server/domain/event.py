"""Events: what modules publish, on their whole way through the node.

One object goes the whole way, because at tens of thousands of events a second every copy counts: ingest makes it,
match adds `targets`, persist its `sequence`, the lanes count `open` and `held` down.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EVENT_BYTES_MAX = 10 * 1024 * 1024
"""Largest payload of one event, in bytes."""

EVENT_OVERHEAD_BYTES = 512
"""What an event counts for in budgets beside its payload: its object, texts and deliveries."""


@dataclass(slots=True, eq=False)
class Event:
    """One event.

    Given by the module: `tenant` is the tenant's number, not its name. `time_us` is when it happened, in microseconds
    since 1970 UTC. `data` is the payload's JSON text in UTF-8, passed on unchanged. Texts that the module left out are
    empty.

    Added on the way: `targets` (ids of the subscriptions it matched, ascending), `over_budget` (ids of those whose
    filter exceeded its budget), `config_version` (what it was matched under), `shard`, `sequence` (0 until it is persisted),
    `size` (bytes that it counts for in budgets). `open` counts the deliveries that no record stands for yet, plus one
    while the event is not committed; `held` the deliveries in memory, without which `data` is dropped. `deliveries`
    and `envelope` belong to `policy.obligations` and `policy.envelope`.
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
    shard: int = 0
    sequence: int = 0
    targets: tuple[int, ...] = ()
    over_budget: tuple[int, ...] = ()
    config_version: int = 0
    size: int = 0
    open: int = 0
    held: int = 0
    deliveries: Any = None
    envelope: bytes | None = None


NewEvent = Event
