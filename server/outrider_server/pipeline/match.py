"""Match: which subscriptions want an event. Holds each tenant's current index; it is swapped whole.

Rule: an event is matched under one configuration version, which its row names; nothing later decides who gets it. A
subscription that is broken matches nothing, is told once in the log, and stays in a metric until it is mended.
"""

from __future__ import annotations

from zlib import crc32

import structlog

from outrider_server.domain.event import Event
from outrider_server.domain.tenant import TenantConfiguration
from outrider_server.matching.index import Index
from outrider_server.telemetry.counters import MatchCounters


class TenantEntry:
    """A tenant as the path uses it: immutable, replaced with each change of its configuration.

    `shards`: those that its events are spread over, `whole`: only one; `everywhere`: those that hold something of it.
    """

    __slots__ = (
        "configuration",
        "event_types",
        "everywhere",
        "frozen_until_us",
        "id",
        "index",
        "name",
        "shard",
        "shards",
        "spread_us",
        "strict",
        "version",
        "whole",
    )

    def __init__(self, configuration: TenantConfiguration, previous: Index | None) -> None:
        tenant = configuration.tenant
        self.configuration = configuration
        self.id = tenant.id
        self.name = tenant.name
        self.shard = tenant.shard
        self.shards = tenant.spread
        self.whole = len(tenant.spread) == 1
        self.everywhere = tenant.everywhere
        self.frozen_until_us = tenant.frozen_until_us
        self.spread_us = tenant.spread_us
        self.strict = tenant.strict_types
        self.version = tenant.config_version
        self.event_types = configuration.event_types
        self.index = Index.build(configuration.subscriptions, previous=previous)
        for broken in self.index.broken:
            if previous is None or broken not in previous.broken:
                structlog.get_logger().error(
                    "subscription.broken",
                    tenant=tenant.name,
                    subscription=broken.subscription,
                    detail=broken.problem,
                )


class Directory:
    """The tenants that live on this node, by name and number."""

    def __init__(self) -> None:
        self.by_name: dict[str, TenantEntry] = {}
        self.by_id: dict[int, TenantEntry] = {}
        self._earlier: dict[int, TenantEntry] = {}

    def clear(self) -> None:
        """Forget everything, but what makes building it again quicker."""
        self._earlier = self.by_id
        self.by_name, self.by_id = {}, {}

    def replace(self, configuration: TenantConfiguration) -> bool:
        """Take over a tenant's configuration, unless a later version is held already."""
        held = self.by_id.get(configuration.tenant.id)
        if held is not None and held.version > configuration.tenant.config_version:
            return False
        known = held or self._earlier.pop(configuration.tenant.id, None)
        entry = TenantEntry(configuration, known.index if known else None)
        if held is not None and held.name != entry.name:
            self.by_name.pop(held.name, None)
        self.by_name[entry.name] = entry
        self.by_id[entry.id] = entry
        return True

    def remove(self, tenant: int) -> TenantEntry | None:
        """Forget a tenant; what was known of it."""
        entry = self.by_id.pop(tenant, None)
        if entry is not None:
            self.by_name.pop(entry.name, None)
        return entry

    def broken_subscriptions(self) -> int:
        """Subscriptions of this node that match nothing because their stored filter cannot be loaded."""
        return sum(len(entry.index.broken) for entry in list(self.by_id.values()))


def shard_for(shards: tuple[int, ...], event_key: str, idempotency_key: str, data: bytes) -> int:
    """Which of a tenant's shards an event goes to: by its key, so that order by key is kept.

    Without one by its idempotency key, so that duplicates meet, else by its payload: a frame that comes again must be
    split as it was the first time.
    """
    if len(shards) == 1:
        return shards[0]
    text = event_key or idempotency_key
    return shards[crc32(text.encode() if text else data) % len(shards)]


def match(entry: TenantEntry, event: Event, document: object, counters: MatchCounters) -> None:
    """Write into the event whom it goes to, and under which configuration."""
    targets, over_budget = entry.index.match(event, document)
    event.targets = targets
    event.config_version = entry.version
    counters.events += 1
    if targets:
        counters.targets += len(targets)
    else:
        counters.unmatched += 1
    if over_budget:
        event.over_budget = over_budget
        counters.over_budget += len(over_budget)
