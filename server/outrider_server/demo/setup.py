"""Sets the sample company up through the API, as anybody would: tenant, keys, event types, endpoints, subscriptions.

Rule: it makes what is missing and leaves what is there, also what a person changed by hand; only where requests go
and what signs them follow the receiver. Keys that do not hold any more are made anew.
"""

from __future__ import annotations

import binascii
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from outrider.client import Client, connect
from outrider.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from outrider.v1 import api_key_pb2 as api_key
from outrider.v1 import api_key_service_pb2 as api_keys
from outrider.v1 import endpoint_pb2 as endpoint
from outrider.v1 import endpoint_service_pb2 as endpoints
from outrider.v1 import event_type_pb2 as event_type
from outrider.v1 import event_type_service_pb2 as event_types
from outrider.v1 import ingest_service_pb2 as ingest
from outrider.v1 import subscription_pb2 as subscription
from outrider.v1 import subscription_service_pb2 as subscriptions
from outrider.v1 import tenant_pb2 as tenant
from outrider.v1 import tenant_service_pb2 as tenants
from outrider_server.demo.folder import Kept
from outrider_server.demo.scenario import (
    ENDPOINTS,
    EVENT_TYPES,
    SUBSCRIPTIONS,
    TENANT,
    TENANT_DISPLAY_NAME,
    SampleEndpoint,
    sample_of,
)

SECRET_BYTES = 32
PARENT = f"tenants/{TENANT}"

_RETRY = endpoint.RetryPolicy(
    base=Duration(nanos=500_000_000),
    factor=2.0,
    maximum=Duration(seconds=15),
    attempts_max=30,
    window=Duration(seconds=1800),
)


@dataclass(frozen=True, slots=True)
class Place:
    """What the set-up needs to know of the world around it.

    `make_admin_key` makes a key on the database itself, for which no other key is asked. `url` gives where an
    endpoint's requests go; `random` gives random bytes. `save` is called whenever something new must not be forgotten.
    """

    target: str
    make_admin_key: Callable[[], Awaitable[str]]
    url: Callable[[str], str]
    save: Callable[[Kept], None]


def complete_secrets(kept: Kept, random: Callable[[int], bytes]) -> set[str]:
    """Give every endpoint a secret that has none; returns the names of those."""
    lacking = {each.name for each in ENDPOINTS if each.name not in kept.secrets}
    for name in lacking:
        text = binascii.b2a_base64(random(SECRET_BYTES), newline=False).decode()
        kept.secrets[name] = f"whsec_{text}"
    return lacking


async def set_up(place: Place, kept: Kept, new_secrets: set[str]) -> None:
    """Bring keys and resources to what the demo needs. `new_secrets`: endpoints that may have been made with others."""
    changed_database = False
    if not (kept.admin_key and await _holds(place.target, kept.admin_key, _list_tenants)):
        # With the key went the rest, if this is another database than the last time.
        changed_database = True
        kept.admin_key = await place.make_admin_key()
        place.save(kept)
    async with connect(place.target, kept.admin_key) as client:
        await _ensure_tenant(client)
        for kind in EVENT_TYPES:
            await _ensure_event_type(client, kind.name)
        for each in ENDPOINTS:
            stale = changed_database or each.name in new_secrets
            await _ensure_endpoint(
                client, each, place.url(each.name), kept.secrets[each.name], stale=stale
            )
        await _ensure_subscriptions(client)
        await _ensure_keys(client, place, kept)


async def _ensure_keys(client: Client, place: Place, kept: Kept) -> None:
    wanted: tuple[tuple[str, api_key.ApiKey.Role, Callable[[Client], Awaitable[Any]]], ...] = (
        ("integration_key", api_key.ApiKey.ROLE_INTEGRATION_ADMIN, _list_endpoints),
        ("publisher_key", api_key.ApiKey.ROLE_PUBLISHER, _publish_nothing),
    )
    for name, role, use in wanted:
        text = getattr(kept, name)
        if text and await _holds(place.target, text, use):
            continue
        made = await client.api_keys.CreateApiKey(
            api_keys.CreateApiKeyRequest(
                parent=PARENT, api_key=api_key.ApiKey(role=role, display_name="Made by the demo")
            )
        )
        setattr(kept, name, made.key)
        place.save(kept)


async def _holds(target: str, key: str, use: Callable[[Client], Awaitable[Any]]) -> bool:
    """Whether the key still opens what it should: found out by using it."""
    try:
        async with connect(target, key) as client:
            await use(client)
    except (Unauthenticated, PermissionDenied, ValueError):
        return False
    return True


async def _list_tenants(client: Client) -> None:
    await client.tenants.ListTenants(tenants.ListTenantsRequest(page_size=1))


async def _list_endpoints(client: Client) -> None:
    await client.endpoints.ListEndpoints(endpoints.ListEndpointsRequest(parent=PARENT, page_size=1))


async def _publish_nothing(client: Client) -> None:
    # A call without an event is refused, but only after the key was let in.
    with contextlib.suppress(InvalidArgument):
        await client.ingest.Publish(ingest.PublishRequest(parent=PARENT))


async def _ensure_tenant(client: Client) -> None:
    with contextlib.suppress(AlreadyExists):
        await client.tenants.CreateTenant(
            tenants.CreateTenantRequest(
                tenant_id=TENANT, tenant=tenant.Tenant(display_name=TENANT_DISPLAY_NAME)
            )
        )


async def _ensure_event_type(client: Client, name: str) -> None:
    kind = next(each for each in EVENT_TYPES if each.name == name)
    with contextlib.suppress(AlreadyExists):
        await client.event_types.CreateEventType(
            event_types.CreateEventTypeRequest(
                parent=PARENT,
                event_type_id=name,
                event_type=event_type.EventType(
                    description=kind.description,
                    sample_json=sample_of(kind),
                    owning_module=kind.module,
                ),
            )
        )


async def _ensure_endpoint(
    client: Client, wanted: SampleEndpoint, url: str, secret: str, *, stale: bool
) -> None:
    name = f"{PARENT}/endpoints/{wanted.name}"
    try:
        found = await client.endpoints.GetEndpoint(endpoints.GetEndpointRequest(name=name))
    except NotFound:
        await client.endpoints.CreateEndpoint(
            endpoints.CreateEndpointRequest(
                parent=PARENT, endpoint_id=wanted.name, endpoint=_endpoint(wanted, url, secret)
            )
        )
        return
    if found.url != url:
        await client.endpoints.UpdateEndpoint(
            endpoints.UpdateEndpointRequest(
                endpoint=endpoint.Endpoint(name=name, url=url), update_mask=FieldMask(paths=["url"])
            )
        )
    if stale:
        await client.endpoints.RotateEndpointSecret(
            endpoints.RotateEndpointSecretRequest(name=name, secret=secret, overlap=Duration())
        )


def _endpoint(wanted: SampleEndpoint, url: str, secret: str) -> endpoint.Endpoint:
    made = endpoint.Endpoint(
        display_name=wanted.display_name,
        url=url,
        secret=secret,
        mode=endpoint.Endpoint.MODE_SINGLE,
        retry=_RETRY,
        attempt_timeout=Duration(seconds=5),
    )
    if wanted.batch_linger_ms is not None:
        made.mode = endpoint.Endpoint.MODE_BATCH
        made.batch.events_max = 100
        made.batch.linger.FromMilliseconds(wanted.batch_linger_ms)
    return made


async def _ensure_subscriptions(client: Client) -> None:
    for each in SUBSCRIPTIONS:
        with contextlib.suppress(AlreadyExists):
            await client.subscriptions.CreateSubscription(
                subscriptions.CreateSubscriptionRequest(
                    parent=PARENT,
                    subscription_id=each.name,
                    subscription=subscription.Subscription(
                        endpoint=f"{PARENT}/endpoints/{each.endpoint}",
                        types=each.types,
                        filter=each.filter,
                    ),
                )
            )
