"""Tenants and the configuration that the path of an event needs of each."""

from __future__ import annotations

from dataclasses import dataclass

from outrider_server.domain.endpoint import Endpoint
from outrider_server.domain.subscription import Subscription


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose data it is. `id` is internal, `name` the last part of `tenants/{tenant}`.

    `shard` is its home, the first of `shards`, which its events are spread over by their keys (empty: only the home).
    `former_shards` may still hold owed deliveries of it. `frozen_until_us`: nothing is taken in before it, while its shards
    change; `spread_us`: when they last did. Both in microseconds since 1970, 0 for never.
    """

    id: int
    name: str
    shard: int
    strict_types: bool = False
    config_version: int = 1
    display_name: str = ""
    shards: tuple[int, ...] = ()
    former_shards: tuple[int, ...] = ()
    frozen_until_us: int = 0
    spread_us: int = 0

    @property
    def spread(self) -> tuple[int, ...]:
        """The shards that its events go to."""
        return self.shards or (self.shard,)

    @property
    def everywhere(self) -> tuple[int, ...]:
        """The shards that hold something of it."""
        return tuple(dict.fromkeys(self.spread + self.former_shards))


@dataclass(frozen=True, slots=True)
class TenantConfiguration:
    """Everything of a tenant that matching and delivery use, as of `tenant.config_version`.

    Deleted endpoints and subscriptions are left out; paused ones are in. `event_types` are the names of the types
    the tenant knows (they matter where it is strict).
    """

    tenant: Tenant
    endpoints: tuple[Endpoint, ...]
    subscriptions: tuple[Subscription, ...]
    event_types: frozenset[str]
