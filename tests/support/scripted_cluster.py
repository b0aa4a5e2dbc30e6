"""Scripted nodes that share one log, and what tests of a publisher among them need."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from tests.support.scripted_ingest import Log, ScriptedIngest

from outrider.publisher import Publisher
from outrider.v1.event_pb2 import Event

KEY = "or_test_key"


def event(tenant: str, number: int) -> Event:
    return Event(tenant=tenant, type="sales_order.created", data=b'"%d"' % number)


def publisher(server: ScriptedIngest, **options: Any) -> Publisher:
    settings: dict[str, Any] = {"backoff_ms": 1, "backoff_ms_max": 20, "linger_ms": 0}
    return Publisher(server.target, KEY, "test-1", **(settings | options))


class Cluster:
    """Three nodes; publishers are given the first."""

    def __init__(self, nodes: list[ScriptedIngest]) -> None:
        self.nodes = nodes
        self.first, self.second, self.third = nodes
        self.log = nodes[0].shared

    def at_home(self, tenant: str, *nodes: ScriptedIngest) -> None:
        self.log.homes[tenant] = tuple(node.target for node in nodes)

    def numbers(self, tenant: str) -> list[int]:
        return [int(data.strip(b'"')) for data in self.first.payloads(tenant)]

    def arrivals(self, tenant: str) -> list[str]:
        """The node that each of the tenant's events came by."""
        pairs = zip(self.log.events, self.log.nodes, strict=True)
        return [node for (name, _, _), node in pairs if name == tenant]


@asynccontextmanager
async def running_cluster() -> AsyncIterator[Cluster]:
    """Three nodes; at the end no client may have broken the contract."""
    log = Log()
    async with AsyncExitStack() as stack:
        yield Cluster(
            [
                await stack.enter_async_context(ScriptedIngest(api_key=KEY, log=log))
                for _ in range(3)
            ]
        )
        assert log.violations == []


async def publish_until_at(
    cluster: Cluster, p: Publisher, tenant: str, node: ScriptedIngest, first: int = 0
) -> int:
    """Publish one by one until an event arrives there; returns the number of the next event."""
    for number in range(first, first + 500):
        await p.publish(event(tenant, number))
        if cluster.log.nodes[-1] == node.target:
            return number + 1
    raise AssertionError(f"{tenant} never came to {node.target}")
