"""The endpoint table: what may be a credential is sealed, the rest is JSON that can be read.

Rule: an endpoint's row and its revision are written by one statement, under its tenant's lock (`tenants.lock`).
`sealed` holds URL, headers and signing secrets as JSON, sealed for this tenant and endpoint id; a secret that was
rotated out carries its end, after which nobody loads it.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from datetime import datetime

import asyncpg
import orjson

from outrider_server.domain.endpoint import (
    BatchPolicy,
    DeliveryMode,
    Endpoint,
    EndpointState,
    RateLimit,
    RetryPolicy,
)
from outrider_server.secrets.sealing import Sealer
from outrider_server.storage.database import Connection
from outrider_server.storage.queries import load
from outrider_server.storage.tenants import LockedTenant

SEALED_PURPOSE = "endpoint"
CONCURRENCY_DEFAULT = 8
ATTEMPT_TIMEOUT_SECONDS_DEFAULT = 30.0


@dataclass(frozen=True, slots=True)
class SigningSecret:
    """A signing key, and when it ends, in microseconds since 1970 (None: not before a rotation)."""

    key: bytes = field(repr=False)
    ends_us: int | None = None

    def holds(self, now_us: int) -> bool:
        """Whether it signs at `now_us`."""
        return self.ends_us is None or self.ends_us > now_us


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """What a caller decides about an endpoint. `secrets` are newest first."""

    url: str = field(repr=False)
    secrets: tuple[SigningSecret, ...] = field(repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    mode: DeliveryMode = DeliveryMode.SINGLE
    batch: BatchPolicy = field(default_factory=BatchPolicy)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    concurrency: int = CONCURRENCY_DEFAULT
    attempt_timeout_seconds: float = ATTEMPT_TIMEOUT_SECONDS_DEFAULT
    rate_limit: RateLimit | None = None
    display_name: str = ""


@dataclass(frozen=True, slots=True)
class StoredEndpoint:
    """An endpoint's row, unsealed."""

    id: int
    tenant: int
    name: str
    version: int
    state: EndpointState
    spec: EndpointSpec
    created_at: datetime
    updated_at: datetime


async def create(
    connection: Connection, sealer: Sealer, locked: LockedTenant, name: str, spec: EndpointSpec
) -> StoredEndpoint | None:
    """Make an endpoint; None where the name is taken."""
    endpoint = await connection.fetchval(load("next_endpoint_id"))
    row = await connection.fetchrow(
        load("insert_endpoint"),
        endpoint,
        locked.id,
        name,
        spec.display_name,
        _settings(spec),
        _sealed(sealer, locked.id, endpoint, spec),
        locked.config_version,
    )
    return None if row is None else _stored(row, sealer)


async def get(
    connection: Connection, sealer: Sealer, tenant: int, name: str
) -> StoredEndpoint | None:
    """The endpoint of this name."""
    row = await connection.fetchrow(load("get_endpoint"), tenant, name)
    return None if row is None else _stored(row, sealer)


async def list_page(
    connection: Connection, sealer: Sealer, tenant: int, after: str, count: int
) -> list[StoredEndpoint]:
    """At most `count` endpoints whose names follow `after`."""
    rows = await connection.fetch(load("list_endpoints"), tenant, after, count)
    return [_stored(row, sealer) for row in rows]


async def count(connection: Connection, tenant: int) -> int:
    """How many endpoints a tenant has."""
    return int(await connection.fetchval(load("count_endpoints"), tenant))


async def is_used(connection: Connection, endpoint: int) -> bool:
    """Whether a subscription uses the endpoint."""
    return bool(await connection.fetchval(load("is_endpoint_used"), endpoint))


async def update(
    connection: Connection,
    sealer: Sealer,
    locked: LockedTenant,
    endpoint: StoredEndpoint,
    state: EndpointState,
    spec: EndpointSpec,
) -> StoredEndpoint:
    """Change an endpoint; state DELETED deletes it softly."""
    row = await connection.fetchrow(
        load("update_endpoint"),
        endpoint.id,
        state,
        spec.display_name,
        _settings(spec),
        _sealed(sealer, locked.id, endpoint.id, spec),
        locked.config_version,
    )
    if row is None:
        raise LookupError(f"endpoint {endpoint.id} is gone")
    return _stored(row, sealer)


async def find_ended_secrets(connection: Connection, after_us: int, until_us: int) -> list[int]:
    """Tenants with a secret that ended in this time: their configuration must be loaded anew to forget it."""
    rows = await connection.fetch(load("find_ended_secrets"), after_us, until_us)
    return [row["tenant"] for row in rows]


def loaded(row: asyncpg.Record, sealer: Sealer, now_us: int) -> Endpoint:
    """The endpoint as the delivery path uses it, with the secrets that hold at `now_us`."""
    spec = _spec(row, sealer)
    return Endpoint(
        id=row["id"],
        tenant=row["tenant"],
        name=row["name"],
        url=spec.url,
        secrets=tuple(secret.key for secret in spec.secrets if secret.holds(now_us)),
        state=EndpointState(row["state"]),
        mode=spec.mode,
        headers=spec.headers,
        concurrency=spec.concurrency,
        attempt_timeout_seconds=spec.attempt_timeout_seconds,
        batch=spec.batch,
        retry=spec.retry,
        rate_limit=spec.rate_limit,
        version=row["version"],
    )


def _stored(row: asyncpg.Record, sealer: Sealer) -> StoredEndpoint:
    return StoredEndpoint(
        id=row["id"],
        tenant=row["tenant"],
        name=row["name"],
        version=row["version"],
        state=EndpointState(row["state"]),
        spec=_spec(row, sealer),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


def _settings(spec: EndpointSpec) -> str:
    return orjson.dumps(
        {
            "mode": int(spec.mode),
            "concurrency": spec.concurrency,
            "attempt_timeout_seconds": spec.attempt_timeout_seconds,
            "batch": {
                "events_max": spec.batch.events_max,
                "bytes_max": spec.batch.bytes_max,
                "linger_ms": spec.batch.linger_ms,
            },
            "retry": {
                "base_seconds": spec.retry.base_seconds,
                "factor": spec.retry.factor,
                "maximum_seconds": spec.retry.maximum_seconds,
                "jitter": spec.retry.jitter,
                "attempts_max": spec.retry.attempts_max,
                "window_seconds": spec.retry.window_seconds,
            },
            "rate_limit": None
            if spec.rate_limit is None
            else {
                "requests": spec.rate_limit.requests,
                "period_us": spec.rate_limit.period_us,
                "burst": spec.rate_limit.burst,
            },
            # Outside the seal, so that a query finds the endpoints whose secrets have just ended.
            "secret_ends_us": [s.ends_us for s in spec.secrets if s.ends_us is not None],
        }
    ).decode()


def _sealed(sealer: Sealer, tenant: int, endpoint: int, spec: EndpointSpec) -> bytes:
    plain = orjson.dumps(
        {
            "url": spec.url,
            "headers": spec.headers,
            "secrets": [
                {"key": base64.b64encode(secret.key).decode(), "ends_us": secret.ends_us}
                for secret in spec.secrets
            ],
        }
    )
    return sealer.seal(tenant, SEALED_PURPOSE, str(endpoint), plain)


def _spec(row: asyncpg.Record, sealer: Sealer) -> EndpointSpec:
    settings = orjson.loads(row["settings"])
    opened = orjson.loads(
        sealer.unseal(row["tenant"], SEALED_PURPOSE, str(row["id"]), row["sealed"])
    )
    rate_limit = settings.get("rate_limit")  # rows of earlier versions hold none
    return EndpointSpec(
        display_name=row.get("display_name", ""),
        url=opened["url"],
        headers=tuple((name, value) for name, value in opened["headers"]),
        secrets=tuple(
            SigningSecret(base64.b64decode(secret["key"]), secret["ends_us"])
            for secret in opened["secrets"]
        ),
        mode=DeliveryMode(settings["mode"]),
        concurrency=settings["concurrency"],
        attempt_timeout_seconds=settings["attempt_timeout_seconds"],
        # A field that a later version adds takes its default in rows of an earlier one.
        batch=BatchPolicy(**settings["batch"]),
        retry=RetryPolicy(**settings["retry"]),
        rate_limit=None if rate_limit is None else RateLimit(**rate_limit),
    )
