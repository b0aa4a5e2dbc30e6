"""The ledger finds what is lost, double, astray or under another id, and nothing where all is well."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.ledger import SAMPLE_EVERY, Arrivals, compare, merge_seen
from benchmarks.scenario import NUMBER_BASE, TIME_BASE, Plan, Topology, plan_of, topology_of

PRODUCERS = 2


@pytest.fixture
def plan() -> Plan:
    return plan_of("fanout", {"subscriptions": 30})


@pytest.fixture
def topology(plan: Plan) -> Topology:
    return topology_of(plan, "test")


@pytest.fixture
def arrivals(plan: Plan, topology: Topology) -> Arrivals:
    return Arrivals(topology, plan.copies)


def delivery(number: int, copy: int, topology: Topology, **fields: Any) -> dict[str, Any]:
    """A copy of an event as the server sends it; its subscription's number is route and copy."""
    route = number % len(topology.routes)
    return {
        "id": f"dlv_{5_000 + number}_{route * 10 + copy}",
        "event_id": str(5_000 + number),
        "data": {"n": NUMBER_BASE + number, "t": TIME_BASE + 10 * number},
        **fields,
    }


def endpoint(number: int, copy: int, topology: Topology) -> int:
    return topology.routes[number % len(topology.routes)].endpoints[copy]


def deliver_all(arrivals: Arrivals, topology: Topology, events: int, copies: int = 3) -> None:
    for number in range(events):
        for copy in range(copies):
            arrivals.take(endpoint(number, copy, topology), [delivery(number, copy, topology)])


def lost(arrivals: Arrivals, acked: dict[int, int], sent: dict[int, int] | None = None) -> int:
    return compare(arrivals.seen, acked, sent or acked, PRODUCERS, {}, {}).lost


def test_all_copies_of_all_events_are_no_loss(arrivals: Arrivals, topology: Topology) -> None:
    deliver_all(arrivals, topology, 40)
    assert lost(arrivals, {0: 20, 1: 20}) == 0
    assert (arrivals.deliveries, arrivals.duplicates, arrivals.astray) == (120, 0, 0)


def test_a_missing_copy_is_a_loss_and_its_event_is_named(
    arrivals: Arrivals, topology: Topology
) -> None:
    deliver_all(arrivals, topology, 40)
    arrivals.seen[1][17] = 0
    found = compare(arrivals.seen, {0: 20, 1: 20}, {0: 20, 1: 20}, PRODUCERS, {}, {})
    assert (found.lost, found.numbers) == (1, [17])


def test_events_of_which_nothing_came_at_all_are_lost_in_every_copy(
    arrivals: Arrivals, topology: Topology
) -> None:
    deliver_all(arrivals, topology, 10)
    for seen in arrivals.seen:
        del seen[10:]
    assert lost(arrivals, {0: 7, 1: 5}) == 2 * 3


def test_what_was_not_acknowledged_is_not_a_loss_but_told(arrivals: Arrivals) -> None:
    found = compare(arrivals.seen, {0: 0, 1: 0}, {0: 3, 1: 0}, PRODUCERS, {}, {})
    assert (found.lost, found.unacknowledged) == (0, 3)


def test_a_copy_that_comes_again_is_a_duplicate(arrivals: Arrivals, topology: Topology) -> None:
    deliver_all(arrivals, topology, 5)
    arrivals.take(endpoint(3, 1, topology), [delivery(3, 1, topology)])
    assert (arrivals.duplicates, arrivals.deliveries) == (1, 15)


def test_a_delivery_at_an_endpoint_that_its_event_does_not_match_is_astray(
    arrivals: Arrivals, topology: Topology
) -> None:
    arrivals.take(endpoint(4, 0, topology), [delivery(3, 0, topology)])
    assert (arrivals.astray, arrivals.deliveries) == (1, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "dlv_5013_999"},  # of another subscription than the route's events before
        {"event_id": "1"},  # the delivery's id is of another event
        {"id": "bat_5013_30"},
    ],
)
def test_ids_that_do_not_fit_are_astray(
    arrivals: Arrivals, topology: Topology, fields: dict[str, str]
) -> None:
    deliver_all(arrivals, topology, 10)
    arrivals.take(endpoint(13, 0, topology), [delivery(13, 0, topology, **fields)])
    assert arrivals.astray == 1


def test_the_times_that_events_were_meant_to_be_sent_at_are_told_in_order(
    arrivals: Arrivals, topology: Topology
) -> None:
    at = endpoint(0, 0, topology)
    numbers = [n for n in range(100) if endpoint(n, 0, topology) == at][:3]
    elements = [delivery(number, 0, topology) for number in numbers]
    assert arrivals.take(at, elements) == [10 * number for number in numbers]


def test_sampled_ids_are_compared_with_those_acknowledged(
    arrivals: Arrivals, topology: Topology
) -> None:
    deliver_all(arrivals, topology, SAMPLE_EVERY + 1)
    told: dict[int, int | None] = {0: 5_000, SAMPLE_EVERY: 4, 2 * SAMPLE_EVERY: 9}
    found = compare(arrivals.seen, {}, {}, PRODUCERS, told, arrivals.event_ids)
    assert (found.ids_compared, found.ids_wrong) == (2, 1)


def test_ledgers_of_several_processes_are_one(topology: Topology, plan: Plan) -> None:
    one, other = Arrivals(topology, plan.copies), Arrivals(topology, plan.copies)
    for number in range(50):
        for copy in range(3):
            at = endpoint(number, copy, topology)
            (one if at % 2 else other).take(at, [delivery(number, copy, topology)])
    seen = merge_seen([one.seen, other.seen])
    assert compare(seen, {0: 25, 1: 25}, {0: 25, 1: 25}, PRODUCERS, {}, {}).lost == 0
    assert compare(one.seen, {0: 25, 1: 25}, {0: 25, 1: 25}, PRODUCERS, {}, {}).lost > 0
