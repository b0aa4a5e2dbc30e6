"""A publisher among several nodes: tenants go to their homes, in order, and come back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.scripted_cluster import (
    KEY,
    Cluster,
    event,
    publish_until_at,
    publisher,
    running_cluster,
)
from tests.support.scripted_ingest import (
    Drop,
)

from outrider import errors
from outrider.channel import open_channel
from outrider.publisher import Ack, FrameReport, Publisher
from outrider.spool import Spool

NOBODY = "127.0.0.1:1"


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster() as running:
        yield running


async def test_after_an_ack_that_names_the_home_events_go_there_directly(cluster: Cluster) -> None:
    cluster.at_home("b", cluster.second)
    async with publisher(cluster.first) as p:
        number = await publish_until_at(cluster, p, "b", cluster.second)
        assert cluster.arrivals("b")[0] == cluster.first.target
        acks = await p.publish_many(event("b", i) for i in range(number, number + 1000))
        assert p.stats.streams_open == 2
    assert cluster.arrivals("b")[number:] == [cluster.second.target] * 1000
    assert [ack.event_id for ack in acks if isinstance(ack, Ack)] == [
        id_ for _, id_, _ in cluster.log.events[number:]
    ]
    assert cluster.second.opened_by == ["test-1~1"]
    assert cluster.second.sessions == cluster.first.sessions


async def test_a_tenants_events_keep_their_order_while_it_moves_under_load(
    cluster: Cluster,
) -> None:
    cluster.at_home("b", cluster.second)
    async with publisher(cluster.first, frame_events=10, window_events=300) as p:
        handles = []
        for i in range(6000):
            handles.append(await p.send(event("b", i)))
            handles.append(await p.send(event("a", i)))
        acks = [await handle for handle in handles]
        assert p.stats.events_held == p.stats.bytes_held == 0
    assert cluster.numbers("b") == cluster.numbers("a") == list(range(6000))
    assert set(cluster.arrivals("a")) == {cluster.first.target}
    # It moved although it was never idle, and once only.
    arrivals = cluster.arrivals("b")
    moved = arrivals.index(cluster.second.target)
    assert moved < 3000
    assert set(arrivals[moved:]) == {cluster.second.target}
    ids = {(tenant, int(e.data.strip(b'"'))): id_ for tenant, id_, e in cluster.log.events}
    assert [ack.event_id for ack in acks] == [ids[t, i] for i in range(6000) for t in "ba"]


async def test_while_a_tenant_waits_to_cross_the_others_are_not_held_up(cluster: Cluster) -> None:
    cluster.at_home("b", cluster.second)
    async with publisher(cluster.first) as p:
        await p.publish(event("b", 0))
        # The first node answers no more: what "b" has there stands in the way of its crossing.
        cluster.first.answering.clear()
        stuck = await p.send(event("b", 1))
        cluster.at_home("c", cluster.second)
        number = 2
        while p._routes.places.get("b") is None:
            _ = await p.send(event("b", number))
            number += 1
            await asyncio.sleep(0)
        waiting = await p.send(event("b", number))
        assert not cluster.second.frames_received
        p._places["c"] = p._routes.lines[1]
        await asyncio.wait_for(p.publish(event("c", 0)), 5)
        assert not stuck.done()
        assert not waiting.done()
        cluster.first.answering.set()
        await p.flush()
        assert waiting.done()
    assert cluster.numbers("b") == list(range(number + 1))
    assert cluster.arrivals("b")[-1] == cluster.second.target


async def test_tenants_spread_over_their_homes(cluster: Cluster) -> None:
    cluster.at_home("a", cluster.first)
    cluster.at_home("b", cluster.second)
    cluster.at_home("c", cluster.third)
    async with publisher(cluster.first, frame_events=7) as p:
        for tenant, node in (("b", cluster.second), ("c", cluster.third)):
            await publish_until_at(cluster, p, tenant, node, first=-500)
        before = len(cluster.log.events)
        await p.publish_many(event("abc"[i % 3], i // 3) for i in range(900))
        assert p.stats.streams_open == 3
    for tenant, node in zip("abc", cluster.nodes, strict=True):
        assert cluster.numbers(tenant)[-300:] == list(range(300))
        assert cluster.arrivals(tenant)[-300:] == [node.target] * 300
    assert len(cluster.log.events) == before + 900
    assert sorted(cluster.second.opened_by + cluster.third.opened_by) == ["test-1~1", "test-1~2"]


@pytest.mark.parametrize("stored", [False, True])
async def test_what_a_dead_home_left_unanswered_goes_through_the_target_under_its_own_numbers(
    cluster: Cluster, stored: bool
) -> None:
    cluster.at_home("b", cluster.second)
    async with publisher(cluster.first, frame_events=5) as p:
        number = await publish_until_at(cluster, p, "b", cluster.second)
        cluster.second.script = lambda _: Drop(stored)
        handles = [await p.send(event("b", i)) for i in range(number, number + 50)]
        async with cluster.second.received:
            await cluster.second.received.wait_for(lambda: cluster.second.frames_received > 1)
        await cluster.second.stop()
        acks = [await handle for handle in handles]
        await p.publish(event("b", number + 50))
        assert p.stats.frames_resent
    assert acks[0].duplicate is stored
    assert cluster.numbers("b") == list(range(number + 51))
    assert cluster.first.opened_by == ["test-1", "test-1~1"]
    assert len(set(cluster.first.sessions + cluster.second.sessions)) == 1
    assert cluster.arrivals("b")[-1] == cluster.first.target


async def test_a_line_whose_tenants_went_back_ends_and_serves_the_next_home(
    cluster: Cluster,
) -> None:
    cluster.at_home("b", cluster.second)
    async with publisher(cluster.first) as p:
        number = await publish_until_at(cluster, p, "b", cluster.second)
        cluster.at_home("b", cluster.first)
        await cluster.second.stop()
        number = await publish_until_at(cluster, p, "b", cluster.first, number)
        while not p._routes.lines[1].is_at_rest:
            await asyncio.sleep(0)
        cluster.at_home("b", cluster.third)
        number = await publish_until_at(cluster, p, "b", cluster.third, number)
        assert [line.number for line in p._routes.lines] == [0, 1]
        assert p._routes.lines[1].queue.number > 1  # numbering goes on where it stood
    assert cluster.numbers("b") == list(range(number))
    assert cluster.third.opened_by == ["test-1~1"]


async def test_a_tenant_that_another_home_took_over_follows_it_and_its_old_line_ends(
    cluster: Cluster,
) -> None:
    cluster.at_home("b", cluster.second)
    async with publisher(cluster.first, frame_events=10, window_events=100) as p:
        number = await publish_until_at(cluster, p, "b", cluster.second)
        cluster.at_home("b", cluster.third)
        for i in range(number, number + 4000):
            _ = await p.send(event("b", i))
        await p.flush()
        assert cluster.arrivals("b")[-1] == cluster.third.target
        while cluster.second.streams_open:
            await asyncio.sleep(0)
        # Home again at the node that the target leads to: no line of its own is needed.
        cluster.at_home("b", cluster.first)
        p._routes._left.clear()
        number = await publish_until_at(cluster, p, "b", cluster.first, number + 4000)
        while cluster.third.streams_open or p.stats.streams_open > 1:
            await asyncio.sleep(0)
    assert cluster.numbers("b") == list(range(number))


async def test_a_home_that_cannot_be_used_costs_nothing_and_is_asked_again_ever_later(
    cluster: Cluster,
) -> None:
    now = 100.0
    cluster.second.api_key = "another"
    cluster.at_home("b", cluster.second)
    asked = []
    async with publisher(cluster.first, clock=lambda: now) as p:
        for step in range(8):
            for i in range(40):
                await p.publish(event("b", step * 40 + i))
            while any(line.address for line in p._routes.lines):
                await asyncio.sleep(0)
            asked.append(cluster.second.streams)
            now += 1.01
    # After 1 s, 2 s, 4 s.
    assert asked == [1, 2, 2, 3, 3, 3, 3, 4]
    assert cluster.numbers("b") == list(range(320))
    assert set(cluster.arrivals("b")) == {cluster.first.target}


async def test_a_home_that_nobody_listens_at_costs_nothing(cluster: Cluster) -> None:
    cluster.log.homes["b"] = (NOBODY,)
    async with publisher(cluster.first) as p:
        await p.publish_many(event("b", i) for i in range(2000))
    assert cluster.numbers("b") == list(range(2000))


async def test_the_window_counts_what_is_unanswered_on_all_lines(cluster: Cluster) -> None:
    cluster.at_home("b", cluster.second)
    async with publisher(cluster.first, window_events=20) as p:
        number = await publish_until_at(cluster, p, "b", cluster.second)
        cluster.first.answering.clear()
        cluster.second.answering.clear()
        handles = [await p.send(event("a", i)) for i in range(8)]
        handles += [await p.send(event("b", number + i)) for i in range(12)]
        blocked = [asyncio.ensure_future(p.send(event(t, 1000))) for t in "ab"]
        await asyncio.wait(blocked, timeout=0.05)
        assert not any(task.done() for task in blocked)
        assert p.stats.events_held == 20
        # Room that one line gives back serves the other.
        cluster.second.answering.set()
        await asyncio.gather(*blocked)
        assert not handles[0].done()
        cluster.first.answering.set()
        await p.flush()
        assert p.stats.events_held == p.stats.bytes_held == 0


async def test_flush_and_close_wait_for_all_lines(cluster: Cluster) -> None:
    cluster.at_home("b", cluster.second)
    async with publisher(cluster.first, linger_ms=60_000) as p:
        number = 0
        while not cluster.second.frames_received:
            _ = await p.send(event("b", number))
            number += 1
            await p.flush()
        handles = [await p.send(event(tenant, 10_000)) for tenant in "ab"]
        await p.flush()
        assert all(handle.done() for handle in handles)
        handles = [await p.send(event(tenant, 10_001)) for tenant in "ab"]
    assert all(handle.exception() is None for handle in handles)
    assert cluster.numbers("a") == [10_000, 10_001]
    assert cluster.first.streams_open == cluster.second.streams_open == 0


async def test_close_says_what_a_home_left_unanswered(cluster: Cluster) -> None:
    cluster.at_home("b", cluster.second)
    p = publisher(cluster.first)
    number = await publish_until_at(cluster, p, "b", cluster.second)
    cluster.second.answering.clear()
    handle = await p.send(event("b", number))
    with pytest.raises(errors.PublisherClosed, match="1 events"):
        await p.close(timeout_seconds=0.05)
    assert isinstance(handle.exception(), errors.PublisherClosed)


async def test_close_settles_what_waited_to_cross(cluster: Cluster) -> None:
    cluster.at_home("b", cluster.second)
    p = publisher(cluster.first)
    await p.publish(event("b", 0))
    cluster.first.answering.clear()
    number = 1
    while p._routes.places.get("b") is None:
        _ = await p.send(event("b", number))
        number += 1
        await asyncio.sleep(0)
    waiting = await p.send(event("b", number))
    with pytest.raises(errors.PublisherClosed):
        await p.close(timeout_seconds=0.05)
    assert isinstance(waiting.exception(), errors.PublisherClosed)
    assert p.stats.events_held == p.stats.bytes_held == 0


async def test_a_key_that_the_target_refuses_fails_what_is_on_every_line(cluster: Cluster) -> None:
    cluster.at_home("b", cluster.second)
    p = publisher(cluster.first)
    number = await publish_until_at(cluster, p, "b", cluster.second)
    cluster.second.answering.clear()
    cluster.first.answering.clear()
    handles = [await p.send(event("b", number)), await p.send(event("a", 0))]
    cluster.first.revoke()
    for handle in handles:
        with pytest.raises(errors.Unauthenticated):
            await asyncio.wait_for(handle, 5)
    cluster.second.answering.set()
    with pytest.raises(errors.Unauthenticated):
        await p.close()
    while cluster.second.streams_open:
        await asyncio.sleep(0)


async def test_a_split_tenant_stays_on_the_first_line(cluster: Cluster) -> None:
    cluster.at_home("b", cluster.second, cluster.third)
    async with publisher(cluster.first) as p:
        for i in range(100):
            await p.publish(event("b", i))
    assert cluster.second.streams == cluster.third.streams == 0


async def test_a_tenant_whose_homes_name_each_other_does_not_wander(cluster: Cluster) -> None:
    # Each of its nodes holds a part and names the other one.
    cluster.at_home("b", cluster.first, cluster.second)
    async with publisher(cluster.first) as p:
        for i in range(300):
            await p.publish(event("b", i))
    arrivals = cluster.arrivals("b")
    moves = sum(before != after for before, after in itertools.pairwise(arrivals))
    assert moves <= 1
    assert cluster.numbers("b") == list(range(300))


@pytest.mark.parametrize("reason", ["option", "channel", "spool", "name"])
async def test_homes_are_not_followed_where_they_cannot_or_may_not_be(
    cluster: Cluster, tmp_path: Path, reason: str
) -> None:
    cluster.at_home("b", cluster.second)
    options: dict[str, Any] = {}
    name = "test-1"
    channel = open_channel(cluster.first.target, retries=False)
    if reason == "option":
        options["follow_homes"] = False
    elif reason == "channel":
        options["channel"] = channel
    elif reason == "spool":
        options["spool"] = Spool(tmp_path, fsync="never")
    else:
        name = "n" * 126
    async with Publisher(cluster.first.target, KEY, name, linger_ms=0, **options) as p:
        for i in range(100):
            await p.publish(event("b", i))
    await channel.close()
    assert cluster.second.streams == 0


async def test_a_home_on_the_loopback_is_not_followed_from_elsewhere(cluster: Cluster) -> None:
    cluster.at_home("b", cluster.second)
    p = publisher(cluster.first)
    p._routes._addresses = type(p._routes._addresses)("outrider.example.com:4510")
    for i in range(100):
        await p.publish(event("b", i))
    await p.close()
    assert cluster.second.streams == 0


async def test_reports_tell_line_and_tenants_and_keep_the_order_of_each_tenant(
    cluster: Cluster,
) -> None:
    cluster.at_home("b", cluster.second)
    reports: list[FrameReport] = []
    async with publisher(
        cluster.first, frame_events=10, window_events=100, on_ack=reports.append
    ) as p:
        for i in range(3000):
            _ = await p.send(event("ab"[i % 2], i))
    assert {report.line for report in reports} == {0, 1}
    for tenant in "ab":
        assert sum(report.tenants.get(tenant, 0) for report in reports) == 1500
    for line in (0, 1):
        numbers = [report.number for report in reports if report.line == line]
        assert numbers == list(range(1, len(numbers) + 1))
    moved = next(i for i, report in enumerate(reports) if report.line == 1)
    assert not any("b" in report.tenants for report in reports[moved:] if report.line == 0)
