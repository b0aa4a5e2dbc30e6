"""Frames: what travels on the ingest stream, and what a frame is answered with."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider_server.domain.sequence import SHARD_BITS

ID_STEP = 1 << SHARD_BITS
"""The distance between two ids of one range."""


@dataclass(slots=True)
class EventRefusal:
    """Why one event of a frame was not stored; permanent. `reason` is a name of the published enum."""

    index: int
    reason: str
    message: str


@dataclass(slots=True)
class FrameResult:
    """The answer to a frame whose good events are durable.

    `ranges` are (tenant name, first id, count), in order of each tenant's first event; `refusals` the events that were
    not stored; `duplicates` are (index, id) of events whose idempotency key named an earlier event. Events in neither
    list have the next id of their tenant's range. `duplicate`: the whole frame was durable before.
    """

    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    refusals: list[EventRefusal] = field(default_factory=list)
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    duplicate: bool = False
