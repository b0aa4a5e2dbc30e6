"""The sample company is one that the server takes: names, patterns and filters hold, and every subscription gets work."""

from __future__ import annotations

import json
import random
from collections import Counter

from outrider.v1.event_pb2 import Event as Published
from outrider_server.demo.scenario import (
    ENDPOINTS,
    EVENT_TYPES,
    EXAMPLE_TO_PUBLISH,
    SUBSCRIPTIONS,
    SampleEvents,
    sample_of,
)
from outrider_server.domain.event import Event
from outrider_server.domain.subscription import Subscription
from outrider_server.matching.event_types import validate_event_type, validate_type_pattern
from outrider_server.matching.filter import check_filter
from outrider_server.matching.index import Index

NAMES = {number: each.name for number, each in enumerate(SUBSCRIPTIONS, 1)}


def index() -> Index:
    return Index.build(
        tuple(
            Subscription(
                id=number,
                tenant=1,
                name=each.name,
                endpoint=1,
                types=each.types,
                filter_text=each.filter,
                filter_ast=check_filter(each.filter).ast if each.filter else None,
            )
            for number, each in enumerate(SUBSCRIPTIONS, 1)
        )
    )


def test_there_are_a_dozen_subscriptions_over_known_endpoints_and_types() -> None:
    assert len(SUBSCRIPTIONS) == len({each.name for each in SUBSCRIPTIONS}) == 12
    endpoints = {each.name for each in ENDPOINTS}
    assert {each.endpoint for each in SUBSCRIPTIONS} == endpoints
    for kind in EVENT_TYPES:
        validate_event_type(kind.name)
    for each in SUBSCRIPTIONS:
        for pattern in each.types:
            validate_type_pattern(pattern)


def test_one_endpoint_takes_batches_and_one_fails_now_and_then() -> None:
    assert sum(each.batch_linger_ms is not None for each in ENDPOINTS) == 1
    assert sum(each.share_failed > 0 for each in ENDPOINTS) == 1


def test_the_same_chance_makes_the_same_events() -> None:
    first, second = (SampleEvents(random.Random(7)) for _ in range(2))
    assert [first.next() for _ in range(50)] == [second.next() for _ in range(50)]


def test_samples_are_json_and_the_same_at_every_start() -> None:
    for kind in EVENT_TYPES:
        assert json.loads(sample_of(kind))
        assert sample_of(kind) == sample_of(kind)


def matched(index: Index, published: Published) -> list[str]:
    data = published.data or published.data_json.encode()
    event = Event(1, published.type, data, 0, organization=published.organization)
    return [NAMES[target] for target in index.match(event, json.loads(data)).targets]


def test_every_subscription_gets_some_events_and_those_with_a_filter_not_all_of_their_types() -> (
    None
):
    built, events = index(), SampleEvents(random.Random(1))
    wanted: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for _ in range(5000):
        event = events.next()
        types[event.type] += 1
        wanted.update(matched(built, event))
    assert set(types) == {kind.name for kind in EVENT_TYPES}
    for each in SUBSCRIPTIONS:
        assert wanted[each.name] > 10, each.name
        exact = sum(types[name] for name in each.types)
        if each.filter and exact:
            assert wanted[each.name] < exact, each.name


def test_the_example_to_paste_is_wanted_as_it_says() -> None:
    example = Published(
        type=EXAMPLE_TO_PUBLISH["type"],
        organization=EXAMPLE_TO_PUBLISH["organization"],
        data_json=EXAMPLE_TO_PUBLISH["dataJson"],
    )
    assert matched(index(), example) == ["large-orders", "export-orders", "sales"]
