"""A publisher whose nodes drain, move tenants and fail under it: nothing is lost, doubled or reordered."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import grpc
import pytest
from tests.support.scripted_cluster import (
    Cluster,
    event,
    publish_until_at,
    publisher,
    running_cluster,
)
from tests.support.scripted_ingest import (
    Action,
    Drop,
    End,
    Refuse,
    SayGoingAway,
    Take,
)

from outrider import _stream
from outrider.v1.ingest_service_pb2 import Frame


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster() as running:
        yield running


async def test_a_home_that_drains_is_left_at_once_and_nothing_is_lost(cluster: Cluster) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    cluster.at_home("b", cluster.second)
    async with publisher(cluster.first, frame_events=5, window_events=60, sleep=sleep) as p:
        number = await publish_until_at(cluster, p, "b", cluster.second)
        for i in range(number, number + 600):
            if i == number + 300:
                cluster.second.go_away()
                cluster.at_home("b", cluster.first)
            _ = await p.send(event("b", i))
        await p.flush()
        while cluster.second.streams_open or p.stats.streams_open > 1:
            await asyncio.sleep(0)
    assert pauses == []
    assert cluster.numbers("b") == list(range(number + 600))
    assert cluster.arrivals("b")[-1] == cluster.first.target


async def test_a_target_that_drains_is_left_on_a_new_connection_without_a_pause(
    cluster: Cluster,
) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    server = cluster.first
    async with publisher(server, sleep=sleep) as p:
        await p.publish(event("a", 0))
        server.go_away()  # idle: even then the next stream is opened at once
        while server.streams < 2:
            await asyncio.sleep(0)
        handles = [await p.send(event("a", i)) for i in range(1, 500)]
        server.go_away()
        for handle in handles:
            await handle
        await p.publish(event("a", 500))
    assert len(server.peers) == server.streams == 3
    assert pauses == []
    assert cluster.numbers("a") == list(range(501))


async def test_targets_that_only_drain_are_not_asked_without_a_pause(cluster: Cluster) -> None:
    pauses: list[float] = []
    server = cluster.first

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0)

    async with publisher(server, sleep=sleep, random=lambda: 0.5) as p:
        for round_ in range(1, 7):
            while server.streams < round_ or not p.stats.streams_open:
                await asyncio.sleep(0)
            server.go_away()
        await p.publish(event("a", 0))
    assert pauses[:4] == pytest.approx([1.5e-3, 3e-3, 6e-3, 12e-3])


async def test_a_draining_node_that_does_not_answer_the_rest_is_left_all_the_same(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_stream, "DRAIN_SECONDS_MAX", 0.02)
    cluster.at_home("b", cluster.second)
    async with publisher(cluster.first, frame_events=5) as p:
        number = await publish_until_at(cluster, p, "b", cluster.second)
        cluster.second.answering.clear()
        handles = [await p.send(event("b", i)) for i in range(number, number + 50)]
        received = cluster.second.frames_received
        async with cluster.second.received:
            await cluster.second.received.wait_for(
                lambda: cluster.second.frames_received > received
            )
        cluster.second.go_away()
        for handle in handles:
            await handle
    assert cluster.numbers("b") == list(range(number + 50))


async def test_a_home_that_says_it_is_not_ready_is_absorbed(cluster: Cluster) -> None:
    cluster.at_home("b", cluster.second)
    async with publisher(cluster.first) as p:
        number = await publish_until_at(cluster, p, "b", cluster.second)
        cluster.second.script = lambda _: End(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        await p.publish_many(event("b", i) for i in range(number, number + 100))
    assert cluster.numbers("b") == list(range(number + 100))


@pytest.mark.parametrize("seed", range(12))
async def test_under_random_faults_and_moves_each_tenants_events_are_stored_once_in_order(
    cluster: Cluster, seed: int
) -> None:
    chance = random.Random(seed)
    tenants = "abcde"

    def script(_: Frame) -> Action:
        roll = chance.random()
        if roll < 0.04:
            return Drop(stored=chance.random() < 0.5)
        if roll < 0.10:
            return Refuse("OVERLOADED", chance.choice([0.0, 0.001]))
        if roll < 0.14:
            return SayGoingAway()
        if roll < 0.16:
            return End(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN", stored=True)
        return Take()

    async def disturb() -> None:
        while True:
            node = chance.choice(cluster.nodes)
            what = chance.random()
            if what < 0.5:
                cluster.at_home(chance.choice(tenants), chance.choice(cluster.nodes))
            elif what < 0.6:
                node.go_away()
            elif what < 0.7:
                node.break_streams()
            elif what < 0.8 and node is not cluster.first:
                await node.stop()
                await asyncio.sleep(0.002)
                await node.restart()
            p._routes._addresses._failed.clear()
            p._routes._left.clear()
            await asyncio.sleep(0.003)

    async def no_pause(_: float) -> None:
        await asyncio.sleep(0)

    for tenant in tenants:
        cluster.at_home(tenant, chance.choice(cluster.nodes))
    for node in cluster.nodes:
        node.script = script
    async with publisher(
        cluster.first,
        frame_events=10,
        window_events=chance.choice([30, 200]),
        random=chance.random,
        sleep=no_pause,
    ) as p:
        disturbing = asyncio.ensure_future(disturb())
        handles = []
        for i in range(2500):
            handles.append(await p.send(event(tenants[i % 5], i)))
            if chance.random() < 0.02:
                await asyncio.sleep(0.001)
        acks = [await asyncio.wait_for(handle, 20) for handle in handles]
        disturbing.cancel()
        await asyncio.wait([disturbing])
        for node in cluster.nodes:
            if not node.listening:
                await node.restart()
        assert p.stats.events_held == p.stats.bytes_held == 0
    for k, tenant in enumerate(tenants):
        assert cluster.numbers(tenant) == list(range(k, 2500, 5))
    ids = {int(e.data.strip(b'"')): id_ for _, id_, e in cluster.log.events}
    assert [ack.event_id for ack in acks] == [ids[i] for i in range(2500)]
    assert cluster.second.frames_received
    assert cluster.third.frames_received
