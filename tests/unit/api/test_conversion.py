"""What unset fields mean, and that answers can be sent back as they are."""

from __future__ import annotations

import datetime

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from outrider.v1 import endpoint_pb2
from outrider_server.api.conversion import (
    datetime_of,
    duration_of,
    endpoint_message,
    endpoint_spec,
    seconds_of,
    timestamp_of,
)
from outrider_server.domain.endpoint import (
    BatchPolicy,
    DeliveryMode,
    EndpointState,
    RateLimit,
    RetryPolicy,
)
from outrider_server.domain.errors import InvalidArgument
from outrider_server.storage.endpoints import EndpointSpec, StoredEndpoint

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)
DAY = 86_400.0


def spec_of(window_max: float = 30 * DAY, **fields: object) -> EndpointSpec:
    message = endpoint_pb2.Endpoint(url="https://example.com", **fields)  # type: ignore[arg-type]
    return endpoint_spec(message, (), retry_window_seconds_max=window_max)


def test_unset_fields_mean_what_the_protos_say() -> None:
    spec = spec_of()
    assert spec.mode is DeliveryMode.SINGLE
    assert (spec.concurrency, spec.attempt_timeout_seconds) == (8, 30)
    assert (spec.batch.events_max, spec.batch.bytes_max, spec.batch.linger_ms) == (100, 1 << 20, 20)
    retry = spec.retry
    assert (retry.base_seconds, retry.factor, retry.maximum_seconds) == (2, 3, 36_000)
    assert (retry.jitter, retry.attempts_max, retry.window_seconds) == (0.2, 20, 5 * DAY)
    assert spec.rate_limit is None
    assert spec_of(rate_limit={"requests": 100}).rate_limit == RateLimit(100, 60_000_000, 1)


def test_answer_sent_back_asks_for_the_same() -> None:
    spec = EndpointSpec(
        url="https://example.com",
        secrets=(),
        headers=(("a", "1"), ("b", "2")),
        mode=DeliveryMode.BATCH,
        batch=BatchPolicy(5, 6, 7.25),
        retry=RetryPolicy(0.5, 2.5, 90.125, 0.0, 4, 500.0),
        concurrency=9,
        attempt_timeout_seconds=1.25,
        rate_limit=RateLimit(10, 1_500_000, 10),
        display_name="E",
    )
    stored = StoredEndpoint(1, 2, "e", 3, EndpointState.PAUSED, spec, NOW, NOW)
    message = endpoint_message(stored, "t")
    assert endpoint_spec(message, (), retry_window_seconds_max=DAY) == spec
    assert message.state == endpoint_pb2.Endpoint.STATE_PAUSED


def test_window_stays_within_what_the_installation_allows() -> None:
    assert spec_of(DAY).retry.window_seconds == DAY
    with pytest.raises(InvalidArgument) as caught:
        _ = spec_of(DAY, retry={"window": {"seconds": 86_401}})
    assert caught.value.violations[0][0] == "retry.window"


def test_long_first_delay_needs_no_maximum() -> None:
    assert spec_of(retry={"base": {"seconds": 86_400}}).retry.maximum_seconds == DAY


def test_burst_of_more_than_the_requests_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        _ = spec_of(rate_limit={"requests": 4, "burst": 5})
    assert caught.value.violations[0][0] == "rate_limit.burst"


def test_times_and_durations_are_exact() -> None:
    assert datetime_of(timestamp_of(NOW), "f") == NOW
    for seconds in (0.0, 0.02, 1.000001, 604_800.0):
        assert seconds_of(duration_of(seconds)) == seconds
    with pytest.raises(InvalidArgument) as caught:
        _ = datetime_of(Timestamp(seconds=10**15), "f")
    assert caught.value.violations[0][0] == "f"
