"""Proto <-> stored: what an unset field means, and what an answer shows.

Rule: answers show what is in force, defaults filled in; secrets and keys only where they are handed in for it.
"""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from outrider.v1 import api_key_pb2, endpoint_pb2, event_type_pb2, subscription_pb2, tenant_pb2
from outrider_server.api import names
from outrider_server.api.validation import etag, invalid
from outrider_server.domain.access import Role
from outrider_server.domain.endpoint import (
    BatchPolicy,
    DeliveryMode,
    EndpointState,
    RateLimit,
    RetryPolicy,
)
from outrider_server.domain.subscription import SubscriptionState
from outrider_server.policy.headers import validate_headers
from outrider_server.policy.url import validate_url
from outrider_server.storage.api_keys import StoredApiKey
from outrider_server.storage.endpoints import (
    ATTEMPT_TIMEOUT_SECONDS_DEFAULT,
    CONCURRENCY_DEFAULT,
    EndpointSpec,
    SigningSecret,
    StoredEndpoint,
)
from outrider_server.storage.event_types import EventTypeSpec, StoredEventType
from outrider_server.storage.subscriptions import StoredSubscription
from outrider_server.storage.tenants import StoredTenant

_NANOS = 1_000_000_000

_MODES = {
    endpoint_pb2.Endpoint.MODE_UNSPECIFIED: DeliveryMode.SINGLE,
    endpoint_pb2.Endpoint.MODE_SINGLE: DeliveryMode.SINGLE,
    endpoint_pb2.Endpoint.MODE_BATCH: DeliveryMode.BATCH,
}
_MODES_SHOWN = {
    DeliveryMode.SINGLE: endpoint_pb2.Endpoint.MODE_SINGLE,
    DeliveryMode.BATCH: endpoint_pb2.Endpoint.MODE_BATCH,
}
_ENDPOINT_STATES = {
    EndpointState.ACTIVE: endpoint_pb2.Endpoint.STATE_ACTIVE,
    EndpointState.PAUSED: endpoint_pb2.Endpoint.STATE_PAUSED,
    EndpointState.DISABLED: endpoint_pb2.Endpoint.STATE_DISABLED,
    EndpointState.DELETED: endpoint_pb2.Endpoint.STATE_UNSPECIFIED,
}
_SUBSCRIPTION_STATES = {
    SubscriptionState.ACTIVE: subscription_pb2.Subscription.STATE_ACTIVE,
    SubscriptionState.PAUSED: subscription_pb2.Subscription.STATE_PAUSED,
    SubscriptionState.DELETED: subscription_pb2.Subscription.STATE_UNSPECIFIED,
}
ROLES = {
    api_key_pb2.ApiKey.ROLE_PUBLISHER: Role.PUBLISHER,
    api_key_pb2.ApiKey.ROLE_INTEGRATION_ADMIN: Role.INTEGRATION_ADMIN,
    api_key_pb2.ApiKey.ROLE_SYSTEM_ADMIN: Role.SYSTEM_ADMIN,
}
_ROLES_SHOWN = {role: shown for shown, role in ROLES.items()}


def seconds_of(duration: Duration) -> float:
    """A duration as seconds."""
    return duration.ToNanoseconds() / _NANOS


def duration_of(seconds: float) -> Duration:
    """Seconds as a duration."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * _NANOS))
    return duration


def timestamp_of(at: datetime) -> Timestamp:
    """A time of the database as a timestamp."""
    timestamp = Timestamp()
    timestamp.FromDatetime(at)
    return timestamp


def datetime_of(timestamp: Timestamp, field: str) -> datetime:
    """A timestamp as a time, if there is such a time."""
    try:
        return timestamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise invalid(field, "must lie within the years 1 to 9999") from None


def endpoint_spec(
    message: endpoint_pb2.Endpoint,
    secrets: tuple[SigningSecret, ...],
    *,
    retry_window_seconds_max: float,
) -> EndpointSpec:
    """What an endpoint message asks for. It keeps its proto's rules already; the rules between fields are checked here.

    Raises InvalidArgument with paths within the message.
    """
    mode = _MODES[message.mode]
    if mode is not DeliveryMode.BATCH and message.HasField("batch"):
        raise invalid("batch", "may be given with MODE_BATCH only")
    return EndpointSpec(
        display_name=message.display_name,
        url=validate_url(message.url),
        # A map has no order of its own; one that stays the same makes requests comparable.
        headers=validate_headers(sorted(message.headers.items())),
        secrets=secrets,
        mode=mode,
        batch=_batch_policy(message.batch),
        retry=_retry_policy(message.retry, retry_window_seconds_max),
        concurrency=message.concurrency or CONCURRENCY_DEFAULT,
        attempt_timeout_seconds=(
            seconds_of(message.attempt_timeout)
            if message.HasField("attempt_timeout")
            else ATTEMPT_TIMEOUT_SECONDS_DEFAULT
        ),
        rate_limit=_rate_limit(message.rate_limit) if message.HasField("rate_limit") else None,
    )


def endpoint_message(
    stored: StoredEndpoint, tenant: str, *, secret: str = ""
) -> endpoint_pb2.Endpoint:
    """An endpoint as an answer; `secret` is the text of a secret that was made just now."""
    spec = stored.spec
    message = endpoint_pb2.Endpoint(
        name=names.child_name(tenant, "endpoints", stored.name),
        display_name=spec.display_name,
        url=spec.url,
        headers=dict(spec.headers),
        mode=_MODES_SHOWN[spec.mode],
        retry=endpoint_pb2.RetryPolicy(
            base=duration_of(spec.retry.base_seconds),
            factor=spec.retry.factor,
            maximum=duration_of(spec.retry.maximum_seconds),
            jitter=spec.retry.jitter,
            attempts_max=spec.retry.attempts_max,
            window=duration_of(spec.retry.window_seconds),
        ),
        concurrency=spec.concurrency,
        attempt_timeout=duration_of(spec.attempt_timeout_seconds),
        state=_ENDPOINT_STATES[stored.state],
        secret=secret,
        create_time=timestamp_of(stored.created_at),
        update_time=timestamp_of(stored.updated_at),
        etag=etag(stored.created_at, stored.version),
    )
    if spec.mode is DeliveryMode.BATCH:
        message.batch.CopyFrom(
            endpoint_pb2.BatchPolicy(
                events_max=spec.batch.events_max,
                bytes_max=spec.batch.bytes_max,
                linger=duration_of(spec.batch.linger_ms / 1000),
            )
        )
    if spec.rate_limit is not None:
        message.rate_limit.requests = spec.rate_limit.requests
        message.rate_limit.period.FromMicroseconds(spec.rate_limit.period_us)
        message.rate_limit.burst = spec.rate_limit.burst
    return message


def subscription_message(stored: StoredSubscription, tenant: str) -> subscription_pb2.Subscription:
    """A subscription as an answer."""
    return subscription_pb2.Subscription(
        name=names.child_name(tenant, "subscriptions", stored.name),
        display_name=stored.spec.display_name,
        endpoint=names.child_name(tenant, "endpoints", stored.endpoint_name),
        types=stored.spec.types,
        filter=stored.spec.filter_text,
        state=_SUBSCRIPTION_STATES[stored.state],
        create_time=timestamp_of(stored.created_at),
        update_time=timestamp_of(stored.updated_at),
        etag=etag(stored.created_at, stored.version),
    )


def event_type_spec(message: event_type_pb2.EventType) -> EventTypeSpec:
    """What an event type message asks for."""
    return EventTypeSpec(
        description=message.description,
        schema_json=message.schema_json,
        sample_json=message.sample_json,
        owning_module=message.owning_module,
    )


def event_type_message(stored: StoredEventType, tenant: str) -> event_type_pb2.EventType:
    """An event type as an answer."""
    return event_type_pb2.EventType(
        name=names.child_name(tenant, "eventTypes", stored.name),
        description=stored.spec.description,
        schema_json=stored.spec.schema_json,
        sample_json=stored.spec.sample_json,
        owning_module=stored.spec.owning_module,
        create_time=timestamp_of(stored.created_at),
        update_time=timestamp_of(stored.updated_at),
        etag=etag(stored.created_at, stored.version),
    )


def tenant_message(stored: StoredTenant) -> tenant_pb2.Tenant:
    """A tenant as an answer."""
    return tenant_pb2.Tenant(
        name=names.tenant_name(stored.tenant.name),
        display_name=stored.tenant.display_name,
        strict_types=stored.tenant.strict_types,
        shard=stored.tenant.shard,
        shards=len(stored.tenant.spread),
        create_time=timestamp_of(stored.created_at),
        update_time=timestamp_of(stored.updated_at),
        etag=etag(stored.created_at, stored.version),
    )


def api_key_message(stored: StoredApiKey, tenant: str, *, text: str = "") -> api_key_pb2.ApiKey:
    """A key as an answer; `text` is that of a key that was made just now."""
    message = api_key_pb2.ApiKey(
        name=names.child_name(tenant, "apiKeys", stored.name),
        display_name=stored.display_name,
        role=_ROLES_SHOWN[stored.role],
        key=text,
        create_time=timestamp_of(stored.created_at),
    )
    if stored.expires_at is not None:
        message.expire_time.CopyFrom(timestamp_of(stored.expires_at))
    if stored.revoked_at is not None:
        message.revoke_time.CopyFrom(timestamp_of(stored.revoked_at))
    return message


def _batch_policy(message: endpoint_pb2.BatchPolicy) -> BatchPolicy:
    default = BatchPolicy()
    return BatchPolicy(
        events_max=message.events_max or default.events_max,
        bytes_max=message.bytes_max or default.bytes_max,
        linger_ms=(
            seconds_of(message.linger) * 1000 if message.HasField("linger") else default.linger_ms
        ),
    )


def _rate_limit(message: endpoint_pb2.RateLimit) -> RateLimit:
    default = RateLimit(message.requests)
    limit = RateLimit(
        message.requests,
        message.period.ToMicroseconds() if message.HasField("period") else default.period_us,
        message.burst or default.burst,
    )
    if limit.burst > limit.requests:
        raise invalid("rate_limit.burst", "must not be more than rate_limit.requests")
    return limit


def _retry_policy(message: endpoint_pb2.RetryPolicy, window_seconds_max: float) -> RetryPolicy:
    default = RetryPolicy()
    base = seconds_of(message.base) if message.HasField("base") else default.base_seconds
    policy = RetryPolicy(
        base_seconds=base,
        factor=message.factor or default.factor,
        maximum_seconds=(
            seconds_of(message.maximum)
            if message.HasField("maximum")
            else max(base, default.maximum_seconds)
        ),
        jitter=message.jitter if message.HasField("jitter") else default.jitter,
        attempts_max=message.attempts_max or default.attempts_max,
        window_seconds=(
            seconds_of(message.window)
            if message.HasField("window")
            else min(default.window_seconds, window_seconds_max)
        ),
    )
    if policy.factor < 1:
        raise invalid("retry.factor", "must be 1 to 10, or 0 for the default")
    if policy.base_seconds > policy.maximum_seconds:
        raise invalid("retry.base", "must not be longer than retry.maximum")
    if policy.window_seconds > window_seconds_max:
        raise invalid("retry.window", f"must not be longer than {window_seconds_max:g} s here")
    return policy
