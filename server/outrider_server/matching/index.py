"""One tenant's subscriptions as an index over event types: immutable, replaced whole when a subscription changes.

Exact types are found by one dict lookup. A type that no subscription names exactly gets what the deepest known prefix
above it gets, found by walking up its dots; so nothing is remembered about types that merely occur, and a stream of
made-up names costs a few lookups each and no memory. Equal filters of the tenant share one predicate and are
evaluated once per event and bucket. An index holds one tenant only; nothing in it is shared with another's.

A subscription whose stored filter cannot be loaded is set apart: it matches nothing, and `broken` names it, so that it
takes neither its tenant's other subscriptions nor another tenant down with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple, Self

from outrider_server.domain.event import NewEvent
from outrider_server.domain.subscription import Subscription, SubscriptionState
from outrider_server.matching.checked_ast import MalformedAst
from outrider_server.matching.predicate import Predicate, Test, fields_of, load_predicate
from outrider_server.matching.runtime import OverBudget


class Match(NamedTuple):
    """Which subscriptions want an event.

    `targets` are their ids, ascending. `over_budget` are those whose filter needed more than an evaluation may cost:
    no match, but to be counted and named on the event's row.
    """

    targets: tuple[int, ...]
    over_budget: tuple[int, ...]


NOTHING: Final = Match((), ())


class BrokenSubscription(NamedTuple):
    """A subscription whose stored filter cannot be loaded, and why."""

    subscription: int
    problem: str


class _Bucket(NamedTuple):
    """The subscriptions of one exact type or one prefix: those without a filter, and those of each filter."""

    always: tuple[int, ...]
    filtered: tuple[tuple[Test, tuple[int, ...]], ...]


_Chain = tuple[_Bucket, ...]
"""What a type is matched against: its own bucket, then that of each known prefix above it."""


class Index:
    """The subscriptions of one tenant. Made by `build`; never changed afterwards, so any reader may hold it."""

    __slots__ = ("_exact", "_predicates", "_prefixes", "_root", "broken")

    def __init__(
        self,
        exact: Mapping[str, _Chain],
        prefixes: Mapping[str, _Chain],
        root: _Chain,
        predicates: Mapping[bytes, Predicate],
        broken: tuple[BrokenSubscription, ...],
    ) -> None:
        self.broken = broken
        self._exact = exact
        self._prefixes = prefixes
        self._root = root
        self._predicates = predicates

    @classmethod
    def build(cls, subscriptions: Iterable[Subscription], *, previous: Index | None = None) -> Self:
        """The index of one tenant's subscriptions; deleted ones take no part, paused ones match.

        `previous` is the same tenant's index before: filters it holds are not compiled again.
        """
        taking_part = [s for s in subscriptions if s.state is not SubscriptionState.DELETED]
        if len({subscription.tenant for subscription in taking_part}) > 1:
            raise ValueError("an index holds the subscriptions of one tenant")
        known = previous._predicates if previous is not None else {}  # noqa: SLF001 - same class
        predicates: dict[bytes, Predicate] = {}
        exact: defaultdict[str, _Draft] = defaultdict(_Draft)
        prefixes: defaultdict[str, _Draft] = defaultdict(_Draft)
        broken = []
        for subscription in taking_part:
            try:
                predicate = _predicate_of(subscription, known, predicates)
            except MalformedAst as error:
                broken.append(BrokenSubscription(subscription.id, str(error)))
                continue
            for pattern in _distinct(subscription.types):
                draft = prefixes[pattern[:-1]] if pattern.endswith("*") else exact[pattern]
                draft.add(subscription.id, predicate)
        buckets = {prefix: draft.bucket() for prefix, draft in prefixes.items()}
        root = (buckets[""],) if "" in buckets else ()
        chains = {
            prefix: tuple(
                buckets[above] for above in reversed(_prefixes_of(prefix)) if above in buckets
            )
            for prefix in buckets
        }
        return cls(
            {name: (draft.bucket(), *_above(name, chains, root)) for name, draft in exact.items()},
            chains,
            root,
            predicates,
            tuple(broken),
        )

    @property
    def predicates(self) -> tuple[Predicate, ...]:
        """Every distinct filter of this index."""
        return tuple(self._predicates.values())

    def interested(self, event_type: str) -> bool:
        """Whether any subscription may want events of this type."""
        return bool(self._exact.get(event_type) or _above(event_type, self._prefixes, self._root))

    def match(self, event: NewEvent, document: object) -> Match:
        """The subscriptions that want `event`, whose payload was parsed to `document`."""
        chain = self._exact.get(event.type)
        if chain is None:
            chain = _above(event.type, self._prefixes, self._root)
        if not chain:
            return NOTHING
        fields = document if document.__class__ is dict else fields_of(document)
        targets: list[int] = []
        over_budget: tuple[int, ...] = ()
        for always, filtered in chain:
            targets += always
            for test, ids in filtered:
                try:
                    if test(fields, document, event):
                        targets += ids
                except OverBudget:
                    over_budget += ids
        if len(targets) > 1:
            targets.sort()
        elif not targets and not over_budget:
            return NOTHING
        return Match(tuple(targets), tuple(sorted(over_budget)))


class _Draft:
    """A bucket while it is filled."""

    __slots__ = ("_always", "_filtered")

    def __init__(self) -> None:
        self._always: list[int] = []
        self._filtered: defaultdict[Predicate, list[int]] = defaultdict(list)

    def add(self, subscription: int, predicate: Predicate | None) -> None:
        if predicate is None:
            self._always.append(subscription)
        else:
            self._filtered[predicate].append(subscription)

    def bucket(self) -> _Bucket:
        return _Bucket(
            tuple(sorted(self._always)),
            tuple(
                (predicate.test, tuple(sorted(ids))) for predicate, ids in self._filtered.items()
            ),
        )


def _predicate_of(
    subscription: Subscription,
    known: Mapping[bytes, Predicate],
    predicates: dict[bytes, Predicate],
) -> Predicate | None:
    if not subscription.filter_text:
        return None
    ast = subscription.filter_ast
    if ast is None:
        raise MalformedAst("its filter was never checked")
    predicate = predicates.get(ast) or known.get(ast) or load_predicate(ast)
    predicates[ast] = predicate
    return predicate


def _distinct(types: tuple[str, ...]) -> set[str]:
    """The patterns without those that another one covers, so that no type finds a subscription twice."""
    patterns = {pattern for pattern in types if pattern.endswith("*")}
    return {
        pattern
        for pattern in types
        if not any(
            above + "*" in patterns
            for above in _prefixes_of(pattern.removesuffix("*"))
            if above + "*" != pattern
        )
    }


def _prefixes_of(name: str) -> list[str]:
    """The prefixes of a name that end in a dot, and the empty one; shortest first."""
    return ["", *(name[: at + 1] for at, letter in enumerate(name) if letter == ".")]


def _above(name: str, chains: Mapping[str, _Chain], root: _Chain) -> _Chain:
    """The chain of the deepest known prefix above `name`."""
    if chains:
        at = name.rfind(".")
        while at > 0:
            chain = chains.get(name[: at + 1])
            if chain is not None:
                return chain
            at = name.rfind(".", 0, at)
    return root
