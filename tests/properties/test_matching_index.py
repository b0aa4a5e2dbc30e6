"""The index answers as every subscription asked on its own would."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from outrider_server.domain.event import NewEvent
from outrider_server.domain.subscription import Subscription, SubscriptionState
from outrider_server.matching.filter import check_filter
from outrider_server.matching.index import Index
from outrider_server.matching.predicate import fields_of, load_predicate
from outrider_server.matching.runtime import OverBudget

FILTERS = {
    text: check_filter(text).ast
    for text in (
        "n > 1",
        "n == 1 || s == 'x'",
        "!has(data.n)",
        "l.exists(i, i == n)",
        "l.all(i, i > 0)",
        "event.type.startsWith('a')",
        "event.type == 'a.b' && n != 1",
        "{1: n}[1] == 1",
    )
}
segments = st.sampled_from(["a", "b", "aa"])
names = st.lists(segments, min_size=1, max_size=4).map(".".join)
patterns = st.one_of(names, names.map(lambda name: name + ".*"), st.just("*"))
texts = st.one_of(st.just(""), st.sampled_from(sorted(FILTERS)))
documents = st.one_of(
    st.none(),
    st.just([1]),
    st.fixed_dictionaries(
        {},
        optional={
            "n": st.sampled_from([0, 1, 2, 1.0, "1", None, True]),
            "s": st.sampled_from(["x", "y"]),
            "l": st.one_of(
                st.lists(st.integers(0, 2), max_size=3), st.just([1] * 1001), st.just("x")
            ),
        },
    ),
)


@st.composite
def subscriptions(draw: st.DrawFn) -> list[Subscription]:
    numbers = draw(st.lists(st.integers(1, 1000), unique=True, max_size=12))
    made = []
    for number in numbers:
        text = draw(texts)
        made.append(
            Subscription(
                id=number,
                tenant=1,
                name=f"s{number}",
                endpoint=1,
                types=tuple(draw(st.lists(patterns, min_size=1, max_size=3))),
                filter_text=text,
                filter_ast=FILTERS.get(text),
                state=draw(st.sampled_from(list(SubscriptionState))),
            )
        )
    return made


def covers(pattern: str, name: str) -> bool:
    if pattern == "*":
        return True
    if pattern.endswith(".*"):
        return name.startswith(pattern[:-1])
    return name == pattern


def naive(
    made: list[Subscription], event: NewEvent, document: object
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    matched, over = [], []
    for one in sorted(made, key=lambda s: s.id):
        if one.state is SubscriptionState.DELETED:
            continue
        if not any(covers(pattern, event.type) for pattern in one.types):
            continue
        try:
            if not one.filter_ast or load_predicate(one.filter_ast).test(
                fields_of(document), document, event
            ):
                matched.append(one.id)
        except OverBudget:
            over.append(one.id)
    return tuple(matched), tuple(over)


@settings(max_examples=300, deadline=None)
@given(
    subscriptions(), subscriptions(), st.lists(st.tuples(names, documents), min_size=1, max_size=6)
)
def test_the_index_answers_as_each_subscription_on_its_own(
    before: list[Subscription], made: list[Subscription], asked: list[tuple[str, object]]
) -> None:
    fresh = Index.build(made)
    rebuilt = Index.build(made, previous=Index.build(before))
    for name, document in asked:
        event = NewEvent(tenant=1, type=name, data=b"", time_us=0)
        wanted = naive(made, event, document)
        assert fresh.match(event, document) == wanted
        assert rebuilt.match(event, document) == wanted
        if wanted != ((), ()):
            assert fresh.interested(name)
