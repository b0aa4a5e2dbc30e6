import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_server.domain.event import NewEvent
from outrider_server.domain.sequence import SEQUENCE_MAX
from outrider_server.policy.envelope import (
    batch_body,
    batch_id,
    delivery_id,
    element,
    parse_delivery_id,
    shared_part,
    shared_part_of,
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
SEQUENCES = st.integers(0, SEQUENCE_MAX)
SUBSCRIPTIONS = st.integers(0, 2**63 - 1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIMES = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))  # noqa: DTZ001


@given(
    SEQUENCES,
    SUBSCRIPTIONS,
    TEXT,
    TIMES,
    st.tuples(TEXT, TEXT, TEXT, TEXT, TEXT),
    st.dictionaries(TEXT, TEXT, max_size=3),
    st.recursive(
        st.none() | st.booleans() | st.integers() | TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=5,
    ),
)
def test_an_element_says_what_was_published_and_nothing_else(
    sequence: int,
    subscription: int,
    type_: str,
    time: datetime,
    words: tuple[str, str, str, str, str],
    attributes: dict[str, str],
    data: object,
) -> None:
    time_us = (time - EPOCH) // timedelta(microseconds=1)
    source, subject, key, organization, actor = words
    payload = json.dumps(data).encode()
    event = NewEvent(
        1, type_, payload, time_us, source, subject, key, organization, actor, "idem", attributes
    )
    parsed = json.loads(element(sequence, subscription, shared_part_of(sequence, event), payload))
    optional = {
        "source": source,
        "subject": subject,
        "key": key,
        "organization": organization,
        "actor": actor,
        "attributes": attributes,
    }
    expected = {
        "id": delivery_id(sequence, subscription),
        "event_id": str(sequence),
        "type": type_,
        **{name: value for name, value in optional.items() if value},
        "data": data,
    }
    timestamp = parsed.pop("timestamp")
    assert parsed == expected
    assert timestamp.endswith("Z")
    assert datetime.fromisoformat(timestamp) == time


@pytest.mark.parametrize(
    "payload",
    [b'{ "b":1,\n"a" : 1.0e2, "a":2 }', b"18446744073709551616", b"[1.10]", b'"\\u00e9\xc3\xa9"'],
)
def test_the_payloads_bytes_pass_unchanged(payload: bytes) -> None:
    whole = element(5, 6, shared_part(5, "a.b", 0), payload)
    assert whole.endswith(b'"data":' + payload + b"}")


def test_the_form_of_an_element_is_stable() -> None:
    shared = shared_part(5, "a.b", 1_764_000_000_000_007, subject="s", attributes={"k": "v"})
    assert element(5, 6, shared, b"{}") == (
        b'{"id":"dlv_5_6","event_id":"5","type":"a.b","timestamp":"2025-11-24T16:00:00.000007Z",'
        b'"subject":"s","attributes":{"k":"v"},"data":{}}'
    )


def test_times_before_1970_keep_their_microseconds() -> None:
    assert b'"1969-12-31T23:59:59.999999Z"' in shared_part(1, "a", -1)


@given(st.lists(st.tuples(SEQUENCES, SUBSCRIPTIONS), max_size=5))
def test_a_batch_is_the_array_of_its_elements(deliveries: list[tuple[int, int]]) -> None:
    elements = [
        element(sequence, subscription, shared_part(sequence, "a", 0), b"1")
        for sequence, subscription in deliveries
    ]
    assert json.loads(batch_body(elements)) == [json.loads(single) for single in elements]


@given(SEQUENCES, SUBSCRIPTIONS)
def test_a_delivery_id_names_its_event_and_subscription(sequence: int, subscription: int) -> None:
    assert parse_delivery_id(delivery_id(sequence, subscription)) == (sequence, subscription)


@pytest.mark.parametrize(
    "text",
    ["", "dlv_", "dlv_1", "dlv_1_", "dlv_a_1", "dlv_1_2_3", "dlv_01_2", "dlv_-1_2", "bat_1_2",
     "dlv_١_2", "dlv_1_9223372036854775808", "dlv_1_" + "9" * 30],
)  # fmt: skip
def test_what_is_no_delivery_id_is_none(text: str) -> None:
    assert parse_delivery_id(text) is None


DELIVERIES = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 3)), min_size=1, max_size=4, unique=True
)


@given(DELIVERIES, DELIVERIES)
def test_a_batch_id_is_the_same_exactly_for_the_same_deliveries(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    assert (batch_id(one) == batch_id(other)) == (one == other)
    assert batch_id(one).startswith(f"bat_{one[0][0]}_{one[0][1]}_")


def test_a_batch_id_is_the_same_in_every_process() -> None:
    assert batch_id([(5, 6), (7, 6)]) == "bat_5_6_f044bb310d600523"
