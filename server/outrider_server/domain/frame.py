"""Frames: what travels on the ingest stream, and what a frame is answered with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from outrider_server.domain.sequence import SHARD_BITS, shard_of

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
    not stored; `duplicates` are (index, id) of events whose idempotency key named an earlier event; `singles` are (index,
    id) of events of split tenants, which have no range. Events in none of these lists have the next id of their
    tenant's range. `duplicate`: the whole frame was durable before. `homes` are (tenant name, address) of the nodes
    that it was passed on to.
    """

    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    refusals: list[EventRefusal] = field(default_factory=list)
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    singles: list[tuple[int, int]] = field(default_factory=list)
    duplicate: bool = False
    homes: list[tuple[str, str]] = field(default_factory=list)

    def joined(self, other: FrameResult) -> FrameResult:
        """The answer to a frame whose two parts were answered with these."""
        refusals = {refusal.index: refusal for refusal in (*self.refusals, *other.refusals)}
        return FrameResult(
            ranges=list(dict.fromkeys((*self.ranges, *other.ranges))),
            refusals=[refusals[index] for index in sorted(refusals)],
            duplicates=sorted(set(self.duplicates) | set(other.duplicates)),
            singles=sorted(set(self.singles) | set(other.singles)),
            duplicate=self.duplicate and other.duplicate,
            homes=list(dict.fromkeys((*self.homes, *other.homes))),
        )

    def of(self, shards: Collection[int], places: Collection[int]) -> FrameResult:
        """The part of an answer that is about these shards, and about the events at these places."""
        return FrameResult(
            ranges=[item for item in self.ranges if shard_of(item[1]) in shards],
            refusals=[refusal for refusal in self.refusals if refusal.index in places],
            duplicates=[item for item in self.duplicates if item[0] in places],
            singles=[item for item in self.singles if item[0] in places],
            duplicate=self.duplicate,
        )
