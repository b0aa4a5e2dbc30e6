"""Sets up what a run needs through the management API, and takes it away again from a server that stays."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from benchmarks.scenario import Plan, Topology
from outrider import Client, OutriderError
from outrider.v1.endpoint_pb2 import BatchPolicy, Endpoint
from outrider.v1.endpoint_service_pb2 import CreateEndpointRequest, DeleteEndpointRequest
from outrider.v1.subscription_pb2 import Subscription
from outrider.v1.subscription_service_pb2 import (
    CreateSubscriptionRequest,
    DeleteSubscriptionRequest,
)
from outrider.v1.tenant_pb2 import Tenant
from outrider.v1.tenant_service_pb2 import CreateTenantRequest, DeleteTenantRequest

AT_ONCE = 8
CALL_SECONDS_MAX = 30.0

Item = TypeVar("Item")


async def set_up(
    client: Client, plan: Plan, topology: Topology, ports: list[int], secrets: list[bytes]
) -> None:
    """Make tenants, endpoints and subscriptions. Endpoint `i` is received on `ports[i % len(ports)]`."""

    async def tenant(name: str) -> None:
        request = CreateTenantRequest(tenant_id=name, tenant=Tenant(display_name="benchmark"))
        await client.tenants.CreateTenant(request, timeout=CALL_SECONDS_MAX)

    async def endpoint(index: int) -> None:
        planned = topology.endpoints[index]
        made = Endpoint(
            url=f"http://127.0.0.1:{ports[index % len(ports)]}{planned.path}",
            secret="whsec_" + base64.b64encode(secrets[index]).decode(),
            mode=Endpoint.MODE_SINGLE if plan.single or planned.large else Endpoint.MODE_BATCH,
        )
        if made.mode == Endpoint.MODE_BATCH:
            made.batch.CopyFrom(BatchPolicy(events_max=plan.batch_events))
            made.batch.linger.FromMicroseconds(int(plan.endpoint_linger_ms * 1000))
        request = CreateEndpointRequest(
            parent=f"tenants/{planned.tenant}", endpoint_id=planned.name, endpoint=made
        )
        await client.endpoints.CreateEndpoint(request, timeout=CALL_SECONDS_MAX)

    async def subscription(index: int) -> None:
        planned = topology.subscriptions[index]
        made = Subscription(
            endpoint=f"tenants/{planned.tenant}/endpoints/{topology.endpoints[planned.endpoint].name}",
            types=[planned.type],
            filter=planned.filter,
        )
        request = CreateSubscriptionRequest(
            parent=f"tenants/{planned.tenant}", subscription_id=planned.name, subscription=made
        )
        await client.subscriptions.CreateSubscription(request, timeout=CALL_SECONDS_MAX)

    await _for_all(topology.tenants, tenant)
    await _for_all(range(len(topology.endpoints)), endpoint)
    await _for_all(range(len(topology.subscriptions)), subscription)


async def take_down(client: Client, topology: Topology) -> None:
    """Delete it all again. What cannot be deleted stays: the figures are told all the same."""

    async def quietly(call: Awaitable[object]) -> None:
        with contextlib.suppress(OutriderError):
            await call

    subscriptions = [f"tenants/{s.tenant}/subscriptions/{s.name}" for s in topology.subscriptions]
    endpoints = [f"tenants/{e.tenant}/endpoints/{e.name}" for e in topology.endpoints]
    await _for_all(
        subscriptions,
        lambda name: quietly(
            client.subscriptions.DeleteSubscription(
                DeleteSubscriptionRequest(name=name), timeout=CALL_SECONDS_MAX
            )
        ),
    )
    await _for_all(
        endpoints,
        lambda name: quietly(
            client.endpoints.DeleteEndpoint(
                DeleteEndpointRequest(name=name), timeout=CALL_SECONDS_MAX
            )
        ),
    )
    await _for_all(
        topology.tenants,
        lambda name: quietly(
            client.tenants.DeleteTenant(
                DeleteTenantRequest(name=f"tenants/{name}"), timeout=CALL_SECONDS_MAX
            )
        ),
    )


async def _for_all(items: Iterable[Item], act: Callable[[Item], Awaitable[None]]) -> None:
    waiting = iter(list(items))

    async def work() -> None:
        for item in waiting:
            await act(item)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(work())
