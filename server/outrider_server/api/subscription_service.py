"""SubscriptionService: which events an endpoint gets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask
from typing_extensions import override

from outrider.v1 import subscription_pb2, subscription_service_pb2_grpc
from outrider.v1 import subscription_service_pb2 as pb
from outrider_server.api import names, paging, validation
from outrider_server.api.conversion import subscription_message
from outrider_server.api.errors import ServicerContext
from outrider_server.api.limits import Limits, require_room
from outrider_server.api.tenancy import Change, Tenancy, not_found
from outrider_server.api.validation import check, etag, invalid, placed
from outrider_server.domain.endpoint import EndpointState
from outrider_server.domain.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from outrider_server.domain.subscription import SubscriptionState
from outrider_server.matching.event_types import validate_type_pattern
from outrider_server.matching.filter import CheckedFilter, check_filter
from outrider_server.secrets.sealing import Sealer
from outrider_server.storage import endpoints, subscriptions
from outrider_server.storage.database import Connection
from outrider_server.storage.subscriptions import StoredSubscription, SubscriptionSpec

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["SubscriptionService"].full_name

CHANGEABLE = ("display_name", "types", "filter")
IMMUTABLE = ("endpoint",)

TRANSITIONS: Mapping[str, tuple[SubscriptionState, SubscriptionState]] = {
    "pause": (SubscriptionState.ACTIVE, SubscriptionState.PAUSED),
    "resume": (SubscriptionState.PAUSED, SubscriptionState.ACTIVE),
}
"""What each verb needs, and what it makes."""

CheckFilter = Callable[[str], Awaitable[CheckedFilter]]
"""Parses and type-checks a filter; raises a FilterError."""


async def check_in_thread(text: str) -> CheckedFilter:
    """Check a filter beside the loop: text from outside may take the parser milliseconds."""
    return await asyncio.to_thread(check_filter, text)


class SubscriptionService(subscription_service_pb2_grpc.SubscriptionServiceServicer):
    """Manages subscriptions. `random` gives ids (`os.urandom`)."""

    def __init__(
        self,
        tenancy: Tenancy,
        sealer: Sealer,
        limits: Limits,
        random: names.RandomBytes,
        check_filter: CheckFilter = check_in_thread,
    ) -> None:
        self._tenancy = tenancy
        self._sealer = sealer
        self._limits = limits
        self._random = random
        self._check_filter = check_filter

    @override
    async def CreateSubscription(
        self, request: pb.CreateSubscriptionRequest, context: ServicerContext
    ) -> subscription_pb2.Subscription:
        check(request)
        tenant = names.parse_tenant(request.parent, "parent")
        name = names.given_or_chosen(request.subscription_id, "subscription_id", self._random)
        given = request.subscription
        endpoint_name = _endpoint_of(given, tenant)
        _check_types(given.types)
        checked = await self._checked(given.filter)
        async with self._tenancy.change(tenant, dry_run=request.validate_only) as change:
            held = await subscriptions.count(change.connection, change.locked.id)
            require_room(held, self._limits.subscriptions_max, "subscriptions")
            endpoint = await endpoints.get(
                change.connection, self._sealer, change.locked.id, endpoint_name
            )
            if endpoint is None or endpoint.state is EndpointState.DELETED:
                raise not_found(given.endpoint)
            spec = _spec(given, None if checked is None else checked.ast)
            made = await subscriptions.create(
                change.connection, change.locked, name, endpoint.id, spec
            )
            if made is None:
                resource = names.child_name(tenant, "subscriptions", name)
                raise AlreadyExists(
                    "RESOURCE_EXISTS",
                    f"there is a subscription {resource} already",
                    metadata={"resource": resource},
                )
        return subscription_message(made, tenant)

    @override
    async def GetSubscription(
        self, request: pb.GetSubscriptionRequest, context: ServicerContext
    ) -> subscription_pb2.Subscription:
        check(request)
        tenant, _ = names.parse_child(request.name, "subscriptions", "name")
        async with self._tenancy.database.connection() as connection:
            owner = await self._tenancy.resolve(connection, tenant)
            return subscription_message(await _get(connection, owner.id, request.name), tenant)

    @override
    async def ListSubscriptions(
        self, request: pb.ListSubscriptionsRequest, context: ServicerContext
    ) -> pb.ListSubscriptionsResponse:
        check(request)
        tenant = names.parse_tenant(request.parent, "parent")
        query = f"subscriptions of {tenant}"
        after = validation.parse_page_token(query, request.page_token)
        size = validation.page_size(request.page_size)
        async with self._tenancy.database.connection() as connection:
            owner = await self._tenancy.resolve(connection, tenant)
            rows = await subscriptions.list_page(connection, owner.id, after, size + 1)
        page, token = paging.fill(query, rows, size, lambda row: subscription_message(row, tenant))
        return pb.ListSubscriptionsResponse(subscriptions=page, next_page_token=token)

    @override
    async def UpdateSubscription(
        self, request: pb.UpdateSubscriptionRequest, context: ServicerContext
    ) -> subscription_pb2.Subscription:
        if not request.HasField("subscription"):
            raise invalid("subscription", "value is required")
        given = request.subscription
        tenant, _ = names.parse_child(given.name, "subscriptions", "subscription.name")
        checked = None
        if _names_filter(request.update_mask):
            # Before the tenant is locked, for it may take a while; so its bound is kept here, too.
            check(
                subscription_pb2.Subscription(endpoint="-", types=["-"], filter=given.filter),
                "subscription",
            )
            checked = await self._checked(given.filter)
        async with self._tenancy.change(tenant, dry_run=request.validate_only) as change:
            current = await _get(change.connection, change.locked.id, given.name)
            _require_etag(given.etag, current, given.name)
            message, touched = validation.merged(
                subscription_message(current, tenant),
                given,
                request.update_mask,
                changeable=CHANGEABLE,
                immutable=IMMUTABLE,
            )
            check(message, "subscription")
            _check_types(message.types)
            ast = current.spec.filter_ast
            if "filter" in touched:
                ast = None if checked is None else checked.ast
            updated = await subscriptions.update(
                change.connection, change.locked, current, current.state, _spec(message, ast)
            )
        return subscription_message(updated, tenant)

    @override
    async def DeleteSubscription(
        self, request: pb.DeleteSubscriptionRequest, context: ServicerContext
    ) -> Empty:
        check(request)
        tenant, _ = names.parse_child(request.name, "subscriptions", "name")
        async with self._tenancy.change(tenant) as change:
            current = await _get(change.connection, change.locked.id, request.name)
            _require_etag(request.etag, current, request.name)
            _ = await _turned(change, current, SubscriptionState.DELETED)
        return Empty()

    @override
    async def PauseSubscription(
        self, request: pb.PauseSubscriptionRequest, context: ServicerContext
    ) -> subscription_pb2.Subscription:
        check(request)
        return await self._turn(request.name, "pause")

    @override
    async def ResumeSubscription(
        self, request: pb.ResumeSubscriptionRequest, context: ServicerContext
    ) -> subscription_pb2.Subscription:
        check(request)
        return await self._turn(request.name, "resume")

    async def _turn(self, name: str, verb: str) -> subscription_pb2.Subscription:
        tenant, _ = names.parse_child(name, "subscriptions", "name")
        needed, made = TRANSITIONS[verb]
        async with self._tenancy.change(tenant) as change:
            current = await _get(change.connection, change.locked.id, name)
            if current.state is not needed:
                raise FailedPrecondition(
                    "WRONG_STATE",
                    f"{name} is {current.state.name.lower()}; only what is {needed.name.lower()} can {verb}",
                    metadata={"resource": name, "state": current.state.name},
                )
            updated = await _turned(change, current, made)
        return subscription_message(updated, tenant)

    async def _checked(self, text: str) -> CheckedFilter | None:
        if not text:
            return None
        try:
            return await self._check_filter(text)
        except InvalidArgument as error:
            raise placed(error, "subscription") from None


async def _get(connection: Connection, tenant: int, name: str) -> StoredSubscription:
    found = await subscriptions.get(connection, tenant, name.rpartition("/")[2])
    if found is None:
        raise not_found(name)
    return found


async def _turned(
    change: Change, current: StoredSubscription, state: SubscriptionState
) -> StoredSubscription:
    return await subscriptions.update(
        change.connection, change.locked, current, state, current.spec
    )


def _names_filter(mask: FieldMask) -> bool:
    return not mask.paths or "filter" in mask.paths or "*" in mask.paths


def _require_etag(given: str, current: StoredSubscription, name: str) -> None:
    validation.require_etag(given, etag(current.created_at, current.version), name)


def _endpoint_of(given: subscription_pb2.Subscription, tenant: str) -> str:
    owner, endpoint = names.parse_child(given.endpoint, "endpoints", "subscription.endpoint")
    if owner != tenant:
        raise invalid("subscription.endpoint", "must be an endpoint of the same tenant")
    return endpoint


def _spec(message: subscription_pb2.Subscription, ast: bytes | None) -> SubscriptionSpec:
    return SubscriptionSpec(
        types=tuple(message.types),
        filter_text=message.filter,
        filter_ast=ast,
        display_name=message.display_name,
    )


def _check_types(types: Sequence[str]) -> None:
    for index, text in enumerate(types):
        field = f"subscription.types[{index}]"
        try:
            validate_type_pattern(text)
        except InvalidArgument as error:
            raise placed(error, field, reason="INVALID_TYPE_PATTERN") from None
        if text in types[:index]:
            raise invalid(field, "is given twice")
