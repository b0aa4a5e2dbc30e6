"""A run's plan: bounds, payloads of an exact size, and filters that match exactly the copies they should."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from benchmarks.scenario import (
    LARGE_BYTES,
    LARGE_TYPE,
    NUMBER_BASE,
    SCENARIOS,
    SIZE_MAX,
    SIZE_MIN,
    TENANTS,
    TIME_BASE,
    Plan,
    PlanError,
    due,
    intended_us,
    large_tail,
    payload,
    payload_tail,
    plan_of,
    sent_by,
    topology_of,
)

from outrider_server.domain.event import NewEvent
from outrider_server.domain.subscription import Subscription, SubscriptionState
from outrider_server.matching.filter import check_filter
from outrider_server.matching.index import Index

SCENARIO_NAMES = tuple(SCENARIOS)


def indexes(plan: Plan) -> dict[str, Index]:
    """The server's own matching over a plan's subscriptions; a subscription's id is its place, counted from 1."""
    topology = topology_of(plan, "test")
    by_tenant: dict[str, list[Subscription]] = {tenant: [] for tenant in topology.tenants}
    for number, planned in enumerate(topology.subscriptions, 1):
        by_tenant[planned.tenant].append(
            Subscription(
                id=number,
                tenant=1,
                name=planned.name,
                endpoint=planned.endpoint + 1,
                types=(planned.type,),
                filter_text=planned.filter,
                filter_ast=check_filter(planned.filter).ast,
                state=SubscriptionState.ACTIVE,
            )
        )
    return {tenant: Index.build(subscriptions) for tenant, subscriptions in by_tenant.items()}


@pytest.mark.parametrize(
    ("scenario", "subscriptions"),
    [
        ("batched", 1_000),
        ("batched", 10),
        ("batched", 137),
        ("single", 30),
        ("fanout", 999),
        ("fanout", 30),
        ("large", 50),
    ],
)
def test_each_event_is_matched_by_exactly_its_copies_and_nothing_else(
    scenario: str, subscriptions: int
) -> None:
    plan = plan_of(scenario, {"subscriptions": subscriptions, "rate": 100.0})
    topology = topology_of(plan, "test")
    index = indexes(plan)
    for number, route in enumerate(topology.routes):
        data = payload(number, 1, payload_tail(route, plan.size, number))
        event = NewEvent(tenant=1, type=route.type, data=data, time_us=0)
        targets = index[route.tenant].match(event, json.loads(data)).targets
        got = sorted(topology.subscriptions[target - 1].endpoint for target in targets)
        assert got == sorted(route.endpoints)
        assert len(set(got)) == plan.copies


def test_the_large_event_has_its_size_and_goes_to_its_own_endpoint_alone() -> None:
    plan = plan_of("large", {"subscriptions": 20})
    topology = topology_of(plan, "test")
    data = payload(3, 4, large_tail(LARGE_BYTES))
    assert len(data) == LARGE_BYTES
    event = NewEvent(tenant=1, type=LARGE_TYPE, data=data, time_us=0)
    (target,) = indexes(plan)[topology.tenants[0]].match(event, json.loads(data)).targets
    assert topology.endpoints[topology.subscriptions[target - 1].endpoint].large
    assert not any(endpoint.large for endpoint in topology.endpoints[:-1])


@pytest.mark.parametrize("size", [250, 366, 400, SIZE_MAX])
def test_a_payload_is_json_of_exactly_the_size_and_carries_number_and_time(size: int) -> None:
    plan = plan_of("batched", {"size": size})
    for serial, route in enumerate(topology_of(plan, "test").routes):
        data = payload(123_456_789 + serial, 3_600_000_000, payload_tail(route, size, serial))
        assert len(data) == size
        document = json.loads(data)
        assert document["n"] == NUMBER_BASE + 123_456_789 + serial
        assert document["t"] == TIME_BASE + 3_600_000_000


def test_a_size_that_has_no_room_for_the_order_is_refused_by_name() -> None:
    route = topology_of(plan_of("batched", {}), "test").routes[0]
    with pytest.raises(PlanError, match="--size must be at least"):
        payload_tail(route, 150, 1)


def test_the_smallest_size_has_room_for_the_longest_order() -> None:
    plan = plan_of("batched", {"size": SIZE_MIN, "subscriptions": 20_000})
    routes = topology_of(plan, "test").routes
    assert {len(payload(1, 1, payload_tail(r, SIZE_MIN, n))) for n, r in enumerate(routes)} == {
        SIZE_MIN
    }


@pytest.mark.parametrize("subscriptions", [10, 99, 100, 101, 1_000])
def test_an_endpoint_belongs_to_the_tenant_of_its_subscriptions(subscriptions: int) -> None:
    topology = topology_of(plan_of("batched", {"subscriptions": subscriptions}), "test")
    assert len(topology.tenants) == TENANTS
    assert len(topology.subscriptions) == subscriptions
    for subscription in topology.subscriptions:
        assert topology.endpoints[subscription.endpoint].tenant == subscription.tenant
    assert {s.endpoint for s in topology.subscriptions} == {e.index for e in topology.endpoints}


def test_a_thousand_subscriptions_spread_evenly_over_a_hundred_endpoints_and_ten_tenants() -> None:
    topology = topology_of(plan_of("batched", {}), "test")
    assert set(Counter(s.endpoint for s in topology.subscriptions).values()) == {10}
    assert set(Counter(e.tenant for e in topology.endpoints).values()) == {10}
    assert len(topology.endpoints) == 100


def test_every_process_of_a_run_makes_the_same_topology() -> None:
    plan = plan_of("fanout", {})
    assert topology_of(plan, "a") == topology_of(Plan.from_json(plan.to_json()), "a")


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"rate": 1e9}, "--rate"),
        ({"seconds": 0.1}, "--seconds"),
        ({"seconds": 1e9}, "--seconds"),
        ({"size": 10}, "--size"),
        ({"subscriptions": 5}, "--subscriptions"),
        ({"producers": 1, "generators": 2}, "--producers"),
        ({"batch_events": 0}, "--batch"),
        ({"cpus": 0}, "--cpus"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_the_name_of_its_flag(
    given: dict[str, float], flag: str
) -> None:
    with pytest.raises(PlanError, match=flag):
        plan_of("batched", given)


def test_more_events_than_a_ledger_counts_are_refused() -> None:
    with pytest.raises(PlanError, match="more than one run counts"):
        plan_of("batched", {"rate": 100_000.0, "seconds": 3_000.0})


def test_an_unknown_scenario_is_refused_with_those_there_are() -> None:
    with pytest.raises(PlanError, match=r"there is no scenario fast; there are batched"):
        plan_of("fast", {})


def test_a_fan_out_of_a_number_that_three_does_not_divide_is_refused() -> None:
    with pytest.raises(PlanError, match="multiple of 3"):
        plan_of("fanout", {"subscriptions": 1_000})


def test_the_comparison_with_large_events_needs_a_rate() -> None:
    with pytest.raises(PlanError, match="fixed --rate"):
        plan_of("large", {"rate": 0.0})


@pytest.mark.parametrize("scenario", SCENARIO_NAMES)
def test_what_is_given_wins_over_a_scenarios_defaults_and_none_does_not(scenario: str) -> None:
    plan = plan_of(scenario, {"seconds": 3.0, "publisher_linger_ms": 7.0, "rate": None})
    assert (plan.seconds, plan.publisher_linger_ms) == (3.0, 7.0)
    assert plan.rate == plan_of(scenario, {}).rate
    assert 0 < plan.warmup_seconds <= 1


def test_large_events_are_measured_in_a_second_half_of_their_own() -> None:
    plan = plan_of("large", {"seconds": 10.0, "warmup_seconds": 2.0})
    assert plan.phases() == [
        ("without", 2_000_000, 7_000_000),
        ("with", 7_000_000, 12_000_000),
    ]


def test_an_open_loop_sends_each_event_at_its_time_and_none_twice() -> None:
    rate = 3_000.0
    sent = 0
    for elapsed_us in range(0, 1_000_001, 777):
        until = due(rate, elapsed_us)
        for number in range(sent, until):
            assert intended_us(rate, number) <= elapsed_us
        sent = max(sent, until)
    assert sent == due(rate, 1_000_000 // 777 * 777)


@pytest.mark.parametrize("events", [0, 1, 7, 100])
def test_the_producers_share_all_events_between_them(events: int) -> None:
    shares = [sent_by(producer, 4, events) for producer in range(4)]
    assert sum(shares) == events
    assert max(shares) - min(shares) <= 1


def test_disk_is_asked_for_in_proportion_to_the_events() -> None:
    short = plan_of("batched", {"rate": 10_000.0, "seconds": 10.0, "warmup_seconds": 0.0})
    long = plan_of("batched", {"rate": 10_000.0, "seconds": 20.0, "warmup_seconds": 0.0})
    assert long.disk_bytes() - short.disk_bytes() >= 100_000 * 2 * short.size
