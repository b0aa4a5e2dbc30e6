"""Endpoints: where requests go, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class EndpointState(IntEnum):
    """Whether an endpoint is sent to. Stored as its number."""

    ACTIVE = 1
    PAUSED = 2
    DISABLED = 3
    DELETED = 4


class DeliveryMode(IntEnum):
    """One event a request, or many. Stored as its number."""

    SINGLE = 1
    BATCH = 2


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a failed delivery is tried again: exponential back-off with full spread of `jitter`.

    The delay before attempt `n + 1` is `min(base * factor ** (n - 1), maximum)` seconds, times a random factor
    within `1 +- jitter`. After `attempts_max` attempts, or when the next would fall later than `window_seconds` after
    the event, the delivery is dead.
    """

    base_seconds: float = 2.0
    factor: float = 3.0
    maximum_seconds: float = 36_000.0
    jitter: float = 0.2
    attempts_max: int = 20
    window_seconds: float = 5 * 86_400.0


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """When a batch is sent: when it holds `events_max` events or `bytes_max` bytes, or its oldest waited `linger`."""

    events_max: int = 100
    bytes_max: int = 1024 * 1024
    linger_ms: float = 20.0


@dataclass(frozen=True, slots=True)
class RateLimit:
    """`requests` may start in a period, evenly spread, and `burst` of them at once after a pause.

    So in any t microseconds at most `burst + requests * t / period_us` start. A batch is one request, an attempt to try
    again is one like any other.
    """

    requests: int
    period_us: int = 60_000_000
    burst: int = 1


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint as the delivery path uses it: secrets unsealed, everything decided.

    `secrets` are the raw signing keys, newest first; every one of them signs (rotation overlaps). `concurrency` is
    the number of requests in flight at most, `rate_limit` how many may start in a time (None: any number). `headers` are
    sent with each request.
    """

    id: int
    tenant: int
    name: str
    url: str = field(repr=False)
    secrets: tuple[bytes, ...] = field(repr=False)
    state: EndpointState = EndpointState.ACTIVE
    mode: DeliveryMode = DeliveryMode.SINGLE
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    concurrency: int = 8
    attempt_timeout_seconds: float = 30.0
    batch: BatchPolicy = BatchPolicy()
    retry: RetryPolicy = RetryPolicy()
    rate_limit: RateLimit | None = None
    version: int = 1
