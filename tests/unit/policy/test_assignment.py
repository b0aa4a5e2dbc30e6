"""Who takes what and who gives what away: each rule alone, then several nodes together in any order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider_server.domain.sequence import SHARD_COUNT
from outrider_server.policy.assignment import (
    GRACE_RENEWALS,
    Assignment,
    NodeView,
    ShardView,
    View,
)

RENEW = 3.0
ALL = range(SHARD_COUNT)


def node(name: str, *, live: bool = True, draining: bool = False) -> NodeView:
    return NodeView(name, f"{name}:1", live=live, draining=draining)


def shard(number: int, holder: str | None = None, *, live: bool = True) -> ShardView:
    return ShardView(
        number, 1, holder, live=live and holder is not None, dead=False, lease=(holder, "first")
    )


def held_by(holders: dict[str | None, Collection[int]], *nodes: NodeView) -> View:
    """All shards: those of `holders` as it says, the rest nobody's. A holder that is no live node has lost its lease."""
    live = {each.name for each in nodes if each.live}
    of = {number: holder for holder, numbers in holders.items() for number in numbers}
    return View(
        tuple(shard(number, of.get(number), live=of.get(number) in live) for number in ALL),
        nodes,
    )


def numbers(taken: list[ShardView]) -> set[int]:
    return {each.shard for each in taken}


def one(workers: int = 1) -> Assignment:
    return Assignment("one", workers, RENEW)


# The fair share.


def test_a_share_is_the_shards_over_the_nodes_that_can_take_some_rounded_up() -> None:
    me, two, three = node("one"), node("two"), node("three")
    assert one().share(held_by({}, me)) == 64
    assert one().share(held_by({}, me, two)) == 32
    assert one().share(held_by({}, me, two, three)) == 22
    # This node's own row may not be there yet, or anything may stand in it.
    assert one().share(held_by({}, two)) == 32
    assert one().share(held_by({}, replace(me, live=False), two)) == 32
    assert one().share(held_by({}, me, node("two", live=False), node("three", draining=True))) == 64


def test_workers_that_are_still_to_come_count() -> None:
    me, two = node("one"), node("two")
    assert one(workers=4).share(held_by({}, me)) == 16
    assert one(workers=4).share(held_by({}, me, two)) == 16
    # Those of other hosts beside them.
    others = [node(f"n{number}") for number in range(7)]
    assert one(workers=4).share(held_by({}, me, *others)) == 8


def test_no_more_is_taken_at_once_than_the_share_leaves_room_for() -> None:
    view = held_by({"one": range(30)}, node("one"), node("two"))
    assert len(one().to_take(view, 0.0, range(30))) == 2
    view = held_by({"one": range(40)}, node("one"), node("two"))
    assert one().to_take(view, 0.0, range(40)) == []


def test_a_node_alone_takes_all_there_is() -> None:
    assert numbers(one().to_take(held_by({}), 0.0, ())) == set(ALL)


def test_what_others_hold_alive_is_never_taken() -> None:
    assignment = one()
    for view_no in range(100):
        view = held_by({"two": ALL}, node("one"), node("two"))
        assert assignment.to_take(view, view_no * RENEW, ()) == []


def test_its_own_are_taken_at_once_whatever_the_share() -> None:
    """They were given to it, or it held them before its tenure ended."""
    view = held_by({"one": range(50), "two": range(50, 60)}, node("one"), node("two"))
    assert numbers(one().to_take(view, 0.0, range(10))) == set(range(10, 50))
    # And they count: what is free beside them must wait.
    assert numbers(one().to_take(view, 0.0, ())) == set(range(50))


def test_nodes_that_start_together_each_find_their_share() -> None:
    """Two workers at a cold start: each takes its half at the second look at the latest, none is left over."""
    log: dict[int, str] = {}
    workers = {name: Assignment(name, 2, RENEW) for name in ("one", "two")}
    held: dict[str, set[int]] = {name: set() for name in workers}
    wanted = {}
    for _ in range(2):
        # Both look before either takes.
        of = {name: {n for n, holder in log.items() if holder == name} for name in workers}
        view = held_by(dict(of), node("one"), node("two"))
        for name, assignment in workers.items():
            wanted[name] = numbers(assignment.to_take(view, 0.0, held[name]))
        assert all(len(want) <= 32 for want in wanted.values())
        for name, want in wanted.items():
            held[name] |= {n for n in want if log.setdefault(n, name) == name}
    assert {name: len(mine) for name, mine in held.items()} == {"one": 32, "two": 32}


@pytest.mark.parametrize("names", [("one", "two"), ("host.1", "host.2"), ("vm-1.1", "vm-2.1")])
def test_nodes_do_not_want_the_same_ones_first(names: tuple[str, str]) -> None:
    """A half of a half is 16 where each has an order of its own."""
    first, second = (
        numbers(Assignment(name, 2, RENEW).to_take(held_by({}), 0.0, ())) for name in names
    )
    assert len(first & second) <= 24


def test_the_first_of_two_workers_leaves_the_second_its_half() -> None:
    first = one(workers=2)
    view = held_by({}, node("one"))
    held = numbers(first.to_take(view, 0.0, ()))
    assert len(held) == 32
    late = GRACE_RENEWALS * RENEW - 0.1
    view = held_by({"one": held}, node("one"))
    assert first.to_take(view, late, held) == []
    second = Assignment("two", 2, RENEW)
    view = held_by({"one": held}, node("one"), node("two"))
    assert numbers(second.to_take(view, late, ())) == set(ALL) - held


# Beyond the share.


def test_what_stays_free_beyond_the_share_is_taken_after_a_while() -> None:
    assignment = one(workers=2)
    held = numbers(assignment.to_take(held_by({}), 100.0, ()))
    view = held_by({"one": held}, node("one"))
    for now in (100.5, 100.0 + GRACE_RENEWALS * RENEW - 0.01):
        assert assignment.to_take(view, now, held) == []
    assert numbers(assignment.to_take(view, 100.0 + GRACE_RENEWALS * RENEW, held)) == (
        set(ALL) - held
    )


def test_the_while_begins_anew_when_somebody_held_it_meanwhile() -> None:
    assignment = one(workers=2)
    held = set(range(32))
    free = held_by({"one": held}, node("one"))
    assert assignment.to_take(free, 0.0, held) == []
    taken = held_by({"one": held, "two": {40}}, node("one"), node("two"))
    assert assignment.to_take(taken, 3.0, held) == []
    grace = GRACE_RENEWALS * RENEW
    assert numbers(assignment.to_take(free, grace, held)) == set(range(32, 64)) - {40}
    assert numbers(assignment.to_take(free, 2 * grace - 0.1, set(ALL) - {40})) == set()
    assert numbers(assignment.to_take(free, 2 * grace, set(ALL) - {40})) == {40}


def test_the_while_begins_anew_after_it_held_it_itself() -> None:
    assignment = one(workers=2)
    held = set(range(32))
    view = held_by({"one": held}, node("one"))
    assert assignment.to_take(view, 0.0, held) == []
    grace = GRACE_RENEWALS * RENEW
    more = numbers(assignment.to_take(view, grace, held)) | held
    assert more == set(ALL)
    assert assignment.to_take(held_by({"one": ALL}, node("one")), grace, ALL) == []
    # It gave them up again, to nobody.
    assert assignment.to_take(view, grace + 1, held) == []


# Leases that are over.


def expired(*changed: int) -> View:
    """What `two` held under a lease that is over; those in `changed` under a later one."""
    view = held_by({"two": ALL}, node("one"), node("two", live=False))
    return replace(
        view,
        shards=tuple(
            replace(each, lease=("two", "later")) if each.shard in changed else each
            for each in view.shards
        ),
    )


def test_an_expired_lease_is_over_when_it_was_seen_so_for_a_whole_renewal() -> None:
    assignment = one()
    for now in (10.0, 10.5, 12.9):
        assert assignment.to_take(expired(), now, ()) == []
    assert numbers(assignment.to_take(expired(), 13.0, ())) == set(ALL)


def test_two_looks_are_needed_however_late_the_first_is() -> None:
    assert one().to_take(expired(), 1e9, ()) == []


def test_a_lease_that_was_renewed_between_two_looks_is_not_over() -> None:
    """It came back, and is expired again: its holder is only late."""
    assignment = one()
    assert assignment.to_take(expired(), 10.0, ()) == []
    assert numbers(assignment.to_take(expired(7, 8), 13.0, ())) == set(ALL) - {7, 8}
    assert assignment.to_take(expired(*ALL), 13.1, range(7)) == []
    assert {7, 8} <= numbers(assignment.to_take(expired(7, 8), 16.0, ()))


def test_a_lease_seen_alive_again_counts_from_anew() -> None:
    assignment = one()
    assert assignment.to_take(expired(), 10.0, ()) == []
    alive = held_by({"two": ALL}, node("one"), node("two"))
    assert assignment.to_take(alive, 11.0, ()) == []
    assert assignment.to_take(expired(), 13.0, ()) == []
    assert numbers(assignment.to_take(expired(), 16.0, ())) == set(ALL)


def test_a_lease_that_was_ended_needs_no_waiting() -> None:
    view = expired()
    dead = replace(view, shards=tuple(replace(each, dead=True) for each in view.shards))
    assert numbers(one().to_take(dead, 0.0, ())) == set(ALL)


def test_what_a_dead_node_leaves_is_shared_too() -> None:
    """Three nodes, one is killed: the others take what is theirs of it, not the quickest everything."""
    view = held_by(
        {"one": range(22), "two": range(22, 43), "three": range(43, 64)},
        node("one"),
        node("two"),
        node("three", live=False),
    )
    view = replace(
        view, shards=tuple(replace(each, dead=each.node == "three") for each in view.shards)
    )
    taken = numbers(one().to_take(view, 0.0, range(22)))
    assert len(taken) == 10
    assert taken <= set(range(43, 64))


# Giving.


def test_one_shard_goes_to_the_node_with_fewest() -> None:
    view = held_by(
        {"one": range(40), "two": range(40, 60), "three": range(60, 64)},
        node("one"),
        node("two"),
        node("three"),
    )
    given = one().to_give(view, range(40))
    assert given is not None
    number, target = given
    assert number in range(40)
    assert target == "three"


def test_a_difference_of_one_is_left_alone() -> None:
    view = held_by({"one": range(33), "two": range(33, 64)}, node("one"), node("two"))
    assert one().to_give(view, range(33)) == (32, "two")
    view = held_by({"one": range(32), "two": range(32, 63)}, node("one"), node("two"))
    assert one().to_give(view, range(32)) is None


def test_what_was_given_does_not_come_back() -> None:
    """No ping-pong: when one stops giving, none of the others would give to it."""
    names = ("one", "two", "three")
    holders: dict[str, set[int]] = {"one": set(ALL), "two": set(), "three": set()}
    moves = 0
    while True:
        view = held_by(dict(holders), *map(node, names))
        wishes = {n: Assignment(n, 1, RENEW).to_give(view, holders[n]) for n in names}
        assert wishes["two"] is None
        assert wishes["three"] is None
        if wishes["one"] is None:
            break
        number, target = wishes["one"]
        holders["one"].remove(number)
        holders[target].add(number)
        moves += 1
    assert sorted(map(len, holders.values())) == [21, 21, 22]
    assert moves == 42, "no shard moves twice"


def test_nothing_is_given_to_nodes_that_cannot_take_it() -> None:
    for other in (node("two", live=False), node("two", draining=True)):
        view = held_by({"one": ALL}, node("one"), other)
        assert one().to_give(view, ALL) is None
    assert one().to_give(held_by({"one": ALL}, node("one")), ALL) is None
    assert one().to_give(held_by({}, node("one"), node("two")), ()) is None


# Draining.


def test_a_node_that_drains_spreads_its_shards_evenly() -> None:
    view = held_by(
        {"one": range(30), "two": range(30, 44), "three": range(44, 64)},
        node("one", draining=True),
        node("two"),
        node("three"),
        node("four", draining=True),
        node("five", live=False),
    )
    given = one().spread(view, range(30))
    assert set(given) == set(range(30))
    assert Counter(given.values()) == {"two": 18, "three": 12}


def test_the_last_node_gives_to_nobody() -> None:
    view = held_by({"one": ALL}, node("one", draining=True), node("two", live=False))
    assert one().spread(view, ALL) == dict.fromkeys(ALL)
    assert one().spread(view, ()) == {}


# What it says.


def test_it_says_what_it_waits_for_only_when_something_is_amiss() -> None:
    gone = held_by({"two": ALL}, node("one"), node("two", live=False))
    assert one().waits_for(gone, ()) == "another node holds the shards"
    assert one().waits_for(gone, {3}) == ""
    # Its part will come by balance.
    assert one().waits_for(held_by({"two": ALL}, node("one"), node("two")), ()) == ""


# Several nodes together.

LEASE, MARGIN = 10.0, 3.0


@dataclass
class Row:
    """A shard's row in the log."""

    node: str | None = None
    epoch: int = 0


@dataclass
class Member:
    """A node: what it believes, and when it does what next."""

    name: str
    assignment: Assignment
    held: dict[int, int] = field(default_factory=dict)
    trusted_until: float = 0.0
    look_at: float = 0.0
    renew_at: float = 0.0
    given_at: float = 0.0
    giving: tuple[int, int, str] | None = None
    asleep_until: float = 0.0
    gave: list[float] = field(default_factory=list)


class Cluster:
    """Nodes around a log whose rules are those of `storage.shards`, each with its own steps, in any order."""

    def __init__(self, names: Collection[str], workers: int, chance: random.Random) -> None:
        self.chance = chance
        self.now = 0.0
        self.rows = {number: Row() for number in ALL}
        self.leases: dict[str, float] = {}
        self.members: dict[str, Member] = {}
        self.workers = workers
        for name in names:
            self.join(name)

    def join(self, name: str) -> None:
        # Its looks and those of the others are not in step.
        begins = self.now + self.chance.random()
        member = Member(name, Assignment(name, self.workers, RENEW), look_at=begins)
        member.given_at = begins
        self.members[name] = member
        self.renew(member)

    def kill(self, name: str, *, told: bool) -> None:
        """A process ends. `told`: whoever watched it says so."""
        del self.members[name]
        if told:
            self.leases[name] = float("-inf")

    def view(self) -> View:
        def live(name: str | None) -> bool:
            return name is not None and self.leases.get(name, float("-inf")) >= self.now

        return View(
            tuple(
                ShardView(
                    number,
                    row.epoch,
                    row.node,
                    live(row.node),
                    row.node is not None and self.leases[row.node] == float("-inf"),
                    (row.node, self.leases.get(row.node or "")),
                )
                for number, row in self.rows.items()
            ),
            tuple(NodeView(name, name, live(name)) for name in sorted(self.leases)),
        )

    def renew(self, member: Member) -> None:
        for number, epoch in list(member.held.items()):
            row = self.rows[number]
            if (row.node, row.epoch) != (member.name, epoch):
                member.held.clear()  # another node took some: a new tenure begins
                member.giving = None
                break
        self.leases[member.name] = self.now + LEASE
        member.trusted_until = self.now + LEASE - MARGIN
        member.renew_at = self.now + RENEW

    def look(self, member: Member) -> None:
        member.look_at = self.now + 0.5
        view = self.view()
        self.take(member, member.assignment.to_take(view, self.now, member.held))
        if member.giving is not None:
            number, epoch, target = member.giving
            member.giving = None
            row = self.rows[number]
            member.held.pop(number)
            if (row.node, row.epoch) == (member.name, epoch):
                row.node = target
        elif self.now - member.given_at >= RENEW:
            given = member.assignment.to_give(self.view(), member.held)
            if given is not None:
                # Its requests end first: others do what they do meanwhile.
                member.giving = (given[0], member.held[given[0]], given[1])
                member.given_at = self.now
                member.gave.append(self.now)

    def take(self, member: Member, wanted: list[ShardView]) -> None:
        for each in wanted:
            row = self.rows[each.shard]
            free = row.node is None or self.leases[row.node] < self.now
            if free or row.node == member.name:
                row.node = member.name
                row.epoch += 1
                member.held[each.shard] = row.epoch

    def step(self) -> None:
        """Whoever is due does what is due; in any order where several are."""
        self.now += 0.25
        members = [m for m in self.members.values() if m.asleep_until <= self.now]
        self.chance.shuffle(members)
        for member in members:
            if member.renew_at <= self.now:
                self.renew(member)
            if member.look_at <= self.now:
                self.look(member)
            self.check()

    def check(self) -> None:
        trusted = Counter(
            number
            for member in self.members.values()
            if self.now < member.trusted_until
            for number in member.held
        )
        assert all(count == 1 for count in trusted.values()), "one holder at a time"
        for member in self.members.values():
            if self.now < member.trusted_until:
                for number, epoch in member.held.items():
                    row = self.rows[number]
                    assert (row.node, row.epoch) == (member.name, epoch), "the fence lets it write"

    def settle(self) -> None:
        """Nothing happens for long enough: all is taken, and evenly."""
        for member in self.members.values():
            member.asleep_until = 0.0
        calm = 2 * LEASE + GRACE_RENEWALS * RENEW + 2 * RENEW
        state, since, until = self.state(), self.now, self.now + 2 * SHARD_COUNT * RENEW
        while self.now - since < calm:
            assert self.now < until, "it comes to rest"
            self.step()
            if self.state() != state:
                state, since = self.state(), self.now
        counts = [len(member.held) for member in self.members.values()]
        assert sum(counts) == SHARD_COUNT, "every shard has an owner"
        assert max(counts) - min(counts) <= 1, "evenly"
        for member in self.members.values():
            times = member.gave
            assert all(later - earlier >= RENEW for earlier, later in pairwise(times))

    def state(self) -> list[tuple[str | None, int]]:
        return [(row.node, row.epoch) for row in self.rows.values()]


happenings = st.lists(
    st.tuples(
        st.sampled_from(["join", "kill", "told", "sleep", "sleep"]),
        st.integers(0, 7),
        st.floats(0, 40),
    ),
    max_size=8,
)


@settings(max_examples=15, deadline=None)
@given(
    nodes=st.integers(1, 6),
    workers=st.integers(1, 4),
    happenings=happenings,
    seed=st.integers(0, 2**32),
)
def test_whatever_comes_and_goes_the_shards_end_up_even_and_never_with_two(
    nodes: int, workers: int, happenings: list[tuple[str, int, float]], seed: int
) -> None:
    cluster = Cluster([f"n{number}" for number in range(nodes)], workers, random.Random(seed))
    joined = nodes
    for what, which, seconds in happenings:
        until = cluster.now + seconds
        while cluster.now < until:
            cluster.step()
        names = sorted(cluster.members)
        name = names[which % len(names)]
        if what == "join" and len(names) < 8:
            cluster.join(f"n{joined}")
            joined += 1
        elif what in ("kill", "told") and len(names) > 1:
            cluster.kill(name, told=what == "told")
        elif what == "sleep":
            # Stopped, or its machine is: beyond its lease or not.
            cluster.members[name].asleep_until = cluster.now + seconds
    cluster.settle()


def test_a_cold_start_of_workers_needs_no_move_at_all() -> None:
    for seed in range(20):
        for workers in (2, 3, 4):
            cluster = Cluster([f"n{n}" for n in range(workers)], workers, random.Random(seed))
            while cluster.now < 3.0:
                cluster.step()
            counts = [len(member.held) for member in cluster.members.values()]
            assert sum(counts) == SHARD_COUNT
            assert max(counts) <= -(-SHARD_COUNT // workers)
