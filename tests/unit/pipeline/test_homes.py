"""What is known of homes: it may be late, it is bounded, and it never names this node itself."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from outrider_server.domain.errors import Unavailable
from outrider_server.pipeline import homes as module
from outrider_server.pipeline.homes import Home, Homes
from outrider_server.policy.assignment import NodeView, ShardView, View

ROWS = [(1, "acme", (5,)), (2, "beta", (7, 9)), (3, "gone", (5,))]


class Catalogue:
    """Tenants as the log has them; counts who asks, and can be made to wait or to fail."""

    def __init__(self, *rows: tuple[int, str, tuple[int, ...]]) -> None:
        self.rows = list(rows or ROWS)
        self.asked: list[tuple[list[str], list[int]]] = []
        self.ready = asyncio.Event()
        self.ready.set()
        self.error: Exception | None = None

    async def find(
        self, names: Collection[str], ids: Collection[int]
    ) -> list[tuple[int, str, tuple[int, ...]]]:
        self.asked.append((sorted(names), sorted(ids)))
        await self.ready.wait()
        if self.error is not None:
            raise self.error
        return [row for row in self.rows if row[0] in ids or row[1] in names]


def view(holders: dict[int, str | None], *nodes: NodeView) -> View:
    live = {node.name for node in nodes if node.live}
    return View(
        tuple(
            ShardView(shard, 1, node, node in live, dead=False) for shard, node in holders.items()
        ),
        nodes,
    )


ONE = NodeView("one", "127.0.0.1:1", live=True)
TWO = NodeView("two", "127.0.0.1:2", live=True)


async def test_a_tenant_is_known_by_its_name_and_by_its_number() -> None:
    catalogue = Catalogue()
    homes = Homes("one", catalogue.find)
    await homes.look_up(names=["acme"], ids=[2])
    assert homes.by_name == {"acme": Home(1, "acme", (5,)), "beta": Home(2, "beta", (7, 9))}
    assert homes.by_id == {1: homes.by_name["acme"], 2: homes.by_name["beta"]}
    assert catalogue.asked == [(["acme"], [2])]


async def test_who_does_not_exist_stays_unknown_and_is_asked_for_again() -> None:
    catalogue = Catalogue()
    homes = Homes("one", catalogue.find)
    for _ in range(2):
        await homes.look_up(names=["nobody"])
        assert "nobody" not in homes.by_name
    assert len(catalogue.asked) == 2
    catalogue.rows.append((4, "nobody", (1,)))  # it was made since
    await homes.look_up(names=["nobody"])
    assert homes.by_name["nobody"].shards == (1,)


async def test_those_who_ask_for_the_same_wait_for_one_answer() -> None:
    catalogue = Catalogue()
    homes = Homes("one", catalogue.find)
    catalogue.ready.clear()
    async with asyncio.TaskGroup() as tasks:
        asking = [
            tasks.create_task(homes.look_up(names=names))
            for names in (["acme", "beta"], ["beta", "acme"], ["gone"])
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        catalogue.ready.set()
    assert all(task.done() for task in asking)
    assert catalogue.asked == [(["acme", "beta"], []), (["gone"], [])]
    assert set(homes.by_name) == {"acme", "beta", "gone"}
    await homes.look_up(names=["acme", "beta"])
    assert len(catalogue.asked) == 3, "an answer is not kept in the place of a later question"


async def test_one_who_gives_up_does_not_take_the_answer_from_the_others() -> None:
    catalogue = Catalogue()
    homes = Homes("one", catalogue.find)
    catalogue.ready.clear()
    loop = asyncio.get_running_loop()
    first = loop.create_task(homes.look_up(names=["acme"]))
    second = loop.create_task(homes.look_up(names=["acme"]))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    catalogue.ready.set()
    await second
    assert homes.by_name["acme"].id == 1
    assert len(catalogue.asked) == 1


async def test_a_question_that_fails_fails_for_all_who_wait_and_is_forgotten() -> None:
    catalogue = Catalogue()
    homes = Homes("one", catalogue.find)
    catalogue.error = Unavailable("STORAGE_UNAVAILABLE", "down")
    found = await asyncio.gather(
        *(homes.look_up(names=["acme"]) for _ in range(2)), return_exceptions=True
    )
    assert found == [catalogue.error] * 2
    assert len(catalogue.asked) == 1
    catalogue.error = None
    await homes.look_up(names=["acme"])
    assert homes.by_name["acme"].id == 1


async def test_names_and_numbers_that_look_alike_are_not_taken_for_each_other() -> None:
    catalogue = Catalogue((1, "one", (1,)), (2, "1", (2,)))
    homes = Homes("one", catalogue.find)
    catalogue.ready.clear()
    asking = asyncio.gather(homes.look_up(names=["1"]), homes.look_up(ids=[1]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    catalogue.ready.set()
    await asking
    assert set(homes.by_name) == {"one", "1"}


async def test_what_is_forgotten_is_asked_for_again() -> None:
    catalogue = Catalogue()
    homes = Homes("one", catalogue.find)
    await homes.look_up(names=["acme", "beta"])
    homes.forget(["acme", "never-known"])
    assert set(homes.by_name) == {"beta"}
    assert set(homes.by_id) == {2}
    catalogue.rows[0] = (1, "acme", (6,))
    await homes.look_up(names=["acme"])
    assert homes.by_name["acme"].shards == homes.by_id[1].shards == (6,)


async def test_a_number_that_got_another_name_is_known_by_the_new_one() -> None:
    catalogue = Catalogue()
    homes = Homes("one", catalogue.find)
    await homes.look_up(names=["gone"])
    catalogue.rows[2] = (3, "back", (5,))
    await homes.look_up(names=["back"])
    assert homes.by_id[3].name == "back"


async def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TENANTS_MAX", 2)
    homes = Homes("one", Catalogue().find)
    await homes.look_up(names=["acme", "beta"])
    await homes.look_up(names=["gone"])
    assert set(homes.by_name) == {"gone"}
    assert set(homes.by_id) == {3}


def test_nothing_is_known_before_the_first_look() -> None:
    homes = Homes("one", Catalogue().find)
    assert [homes.address_of(shard) for shard in range(64)] == [None] * 64
    assert homes.view == View((), ())


def test_a_shard_is_where_its_live_holder_listens_and_nowhere_when_it_is_this_nodes() -> None:
    homes = Homes("one", Catalogue().find)
    dead = NodeView("three", "127.0.0.1:3", live=False)
    seen = view({0: "one", 1: "two", 2: None, 3: "three", 4: "never-heard-of"}, ONE, TWO, dead)
    homes.looked(seen)
    assert homes.view is seen
    assert [homes.address_of(shard) for shard in range(5)] == [None, TWO.address, None, None, None]


def test_a_node_that_drains_is_still_where_its_shards_are() -> None:
    homes = Homes("one", Catalogue().find)
    homes.looked(view({1: "two"}, ONE, NodeView("two", "h:2", live=True, draining=True)))
    assert homes.address_of(1) == "h:2"


def test_each_look_replaces_the_one_before() -> None:
    homes = Homes("one", Catalogue().find)
    homes.looked(view({0: "two", 1: "two"}, ONE, TWO))
    moved = NodeView("two", "127.0.0.1:9", live=True)
    homes.looked(view({0: "one", 1: "two"}, ONE, moved))
    assert (homes.address_of(0), homes.address_of(1)) == (None, "127.0.0.1:9")
    homes.looked(view({0: "one", 1: "two"}, ONE, NodeView("two", "127.0.0.1:9", live=False)))
    assert homes.address_of(1) is None
