"""The index: patterns, states, order, budgets, sharing, and no memory of names it has merely seen."""

from __future__ import annotations

import sys

import pytest

from outrider_server.domain.event import NewEvent
from outrider_server.domain.subscription import Subscription, SubscriptionState
from outrider_server.matching.filter import check_filter
from outrider_server.matching.index import BrokenSubscription, Index, Match


def subscription(
    number: int,
    *types: str,
    text: str = "",
    state: SubscriptionState = SubscriptionState.ACTIVE,
    tenant: int = 1,
) -> Subscription:
    return Subscription(
        id=number,
        tenant=tenant,
        name=f"s{number}",
        endpoint=1,
        types=types,
        filter_text=text,
        filter_ast=check_filter(text).ast if text else None,
        state=state,
    )


def event(event_type: str) -> NewEvent:
    return NewEvent(tenant=1, type=event_type, data=b"{}", time_us=0)


def targets(index: Index, event_type: str, document: object = None) -> tuple[int, ...]:
    return index.match(event(event_type), document).targets


def test_exact_prefix_and_star_meet_at_any_depth() -> None:
    index = Index.build(
        [
            subscription(5, "a.b"),
            subscription(4, "a.*"),
            subscription(3, "*"),
            subscription(2, "a.b.*"),
            subscription(1, "c"),
        ]
    )
    assert targets(index, "a.b") == (3, 4, 5)
    assert targets(index, "a") == (3,)
    assert targets(index, "a.x") == (3, 4)
    assert targets(index, "a.b.c") == (2, 3, 4)
    assert targets(index, "a.b.c.d") == (2, 3, 4)
    assert targets(index, "ab.c") == (3,)
    assert targets(index, "c") == (1, 3)
    assert targets(index, "c.d") == (3,)


def test_a_subscription_with_overlapping_patterns_is_named_once() -> None:
    index = Index.build(
        [
            subscription(1, "a.b", "a.*", "a.b.*", "*"),
            subscription(2, "a.b", "a.b", "a.*"),
            subscription(3, "a.b.*", "a.*", "a.b.c"),
        ]
    )
    assert targets(index, "a.b") == (1, 2, 3)
    assert targets(index, "a.b.c") == (1, 2, 3)
    assert targets(index, "z") == (1,)


def test_paused_ones_match_and_deleted_ones_do_not() -> None:
    index = Index.build(
        [
            subscription(1, "a", state=SubscriptionState.PAUSED),
            subscription(2, "a", state=SubscriptionState.DELETED),
            subscription(3, "a"),
        ]
    )
    assert targets(index, "a") == (1, 3)


def test_targets_ascend_whatever_the_order_of_filters() -> None:
    index = Index.build(
        [
            subscription(9, "a", text="x == 1"),
            subscription(2, "a", text="x > 0"),
            subscription(7, "*", text="x == 1"),
            subscription(4, "a"),
        ]
    )
    assert targets(index, "a", {"x": 1}) == (2, 4, 7, 9)
    assert targets(index, "a", {"x": 2}) == (2, 4)
    assert targets(index, "a", {}) == (4,)


def test_interested_says_whether_anyone_may_want_a_type() -> None:
    index = Index.build([subscription(1, "a.b"), subscription(2, "c.*", text="false")])
    assert index.interested("a.b")
    assert index.interested("c.d.e")
    assert not any(index.interested(name) for name in ("a", "a.b.c", "c", "cc.d", ""))
    assert not Index.build([]).interested("a")
    assert Index.build([subscription(1, "*")]).interested("anything.at_all")


def test_a_filter_over_budget_is_no_match_and_is_named() -> None:
    index = Index.build(
        [
            subscription(3, "a", text="l.exists(i, i == 1)"),
            subscription(1, "a", text="l.all(i, i == 1)"),
            subscription(2, "a"),
        ]
    )
    assert index.match(event("a"), {"l": [1]}) == Match((1, 2, 3), ())
    assert index.match(event("a"), {"l": [1] * 1001}) == Match((2,), (1, 3))


def test_nothing_is_remembered_about_types_that_merely_occur() -> None:
    index = Index.build([subscription(1, "a.*"), subscription(2, "b.c")])
    before = sum(sys.getsizeof(getattr(index, slot)) for slot in ("_exact", "_prefixes"))
    for number in range(5000):
        assert targets(index, f"a.made_up.{number}") == (1,)
        assert targets(index, f"z{number}") == ()
    assert sum(sys.getsizeof(getattr(index, slot)) for slot in ("_exact", "_prefixes")) == before


def test_equal_filters_are_one_predicate_and_outlive_a_rebuild() -> None:
    first = Index.build([subscription(n, "a", text="x == 1") for n in range(3)])
    assert len(first.predicates) == 1
    second = Index.build([subscription(8, "b", text="x == 1")], previous=first)
    assert second.predicates[0] is first.predicates[0]
    third = Index.build([subscription(8, "b")], previous=second)
    assert third.predicates == ()


def test_an_index_is_of_one_tenant() -> None:
    with pytest.raises(ValueError, match="one tenant"):
        Index.build([subscription(1, "a"), subscription(2, "a", tenant=2)])


@pytest.mark.parametrize("ast", [None, b"", b"garbage"])
def test_a_filter_that_cannot_be_loaded_matches_nothing_and_spoils_nothing(
    ast: bytes | None,
) -> None:
    broken = Subscription(
        id=7, tenant=1, name="s", endpoint=1, types=("a",), filter_text="x == 1", filter_ast=ast
    )
    index = Index.build([subscription(6, "a", text="x == 1"), broken, subscription(8, "a")])
    assert targets(index, "a", {"x": 1}) == (6, 8)
    assert [each.subscription for each in index.broken] == [7]
    assert all(isinstance(each, BrokenSubscription) and each.problem for each in index.broken)
    assert not Index.build([broken]).interested("a")
    mended = Index.build([subscription(7, "a", text="x == 1")], previous=index)
    assert mended.broken == ()
    assert targets(mended, "a", {"x": 1}) == (7,)


def test_a_payload_that_is_no_object_is_still_matched() -> None:
    index = Index.build(
        [
            subscription(1, "a", text="data[0] == 1"),
            subscription(2, "a", text="x == 1"),
            subscription(3, "a", text="event.type == 'a'"),
        ]
    )
    assert targets(index, "a", [1]) == (1, 3)
    assert targets(index, "a", None) == (3,)
