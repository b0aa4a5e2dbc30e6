"""Group commit: order, answers only after the commit, poison rows, and what happens when a transaction fails."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import asyncpg
import orjson
import pytest
from tests.support.node import RunningNode, TestTenant, errors_of, event, soon, until
from tests.support.receiver import Receiver

from outrider_server.domain.errors import OutriderError
from outrider_server.domain.event import EVENT_OVERHEAD_BYTES, Event
from outrider_server.domain.frame import FrameResult
from outrider_server.pipeline import persist
from outrider_server.pipeline.match import match
from outrider_server.pipeline.persist import PendingFrame, Portion
from outrider_server.pipeline.tenure import Tenure
from outrider_server.storage import event_log


def checked(
    tenure: Tenure, data: bytes = b'{"total": 1}', tenant: str = "demo", **texts: Any
) -> Event:
    """An event that passed every check and was matched, whatever its texts are."""
    entry = tenure.parts.directory.by_name[tenant]
    made = Event(entry.id, "sales.made", data, 0, size=len(data) + EVENT_OVERHEAD_BYTES, **texts)
    match(entry, made, orjson.loads(data), tenure.parts.metrics.match)
    return made


async def submit(
    tenure: Tenure,
    events: Iterable[Event],
    producer: str | None = None,
    session: int = 0,
    number: int = 0,
    *,
    large: bool = False,
) -> asyncio.Future[FrameResult]:
    """Queue a frame of checked events."""
    events = list(events)
    answer: asyncio.Future[FrameResult] = asyncio.get_running_loop().create_future()
    entries = [tenure.parts.directory.by_id[e.tenant] for e in events]
    for one, entry in zip(events, entries, strict=True):
        one.shard = entry.shard
    shards = {entry.shard for entry in entries}
    portion = Portion(events, entries, range(len(events)), shards)
    portion.previous = dict.fromkeys(shards, number - 1)
    known = await tenure.session(producer, shards) if producer is not None else None
    tenure.persister.submit(PendingFrame(known, session, number, portion, [], answer, large=large))
    return answer


async def reason(answer: asyncio.Future[FrameResult]) -> str:
    with pytest.raises(OutriderError) as caught:
        await soon(answer)
    return caught.value.reason


async def one_subscription(node: RunningNode, receiver: Receiver) -> TestTenant:
    demo = await node.tenant()
    await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
    return demo


@pytest.mark.parametrize(
    "poison",
    [
        {"key": "a\0b"},
        {"subject": "\ud800"},
        {"attributes": {"a": "\ud800"}},
        {"idempotency_key": "a\0b"},
    ],
    ids=lambda texts: next(iter(texts)),
)
async def test_a_row_that_postgres_refuses_costs_the_others_nothing(
    node: RunningNode, receiver: Receiver, poison: dict[str, Any]
) -> None:
    demo = await one_subscription(node, receiver)
    stored = (await demo.publish(event(idempotency_key="known")))[0].id
    tenure = node.tenure
    frames = [
        [checked(tenure, b"1"), checked(tenure, b"2", **poison), checked(tenure, b"3")],
        # Also beside events that are not stored again, and two that would be the same one.
        [
            checked(tenure, b"4", idempotency_key="known"),
            checked(tenure, b"5", idempotency_key="new"),
            checked(tenure, b"6", **poison),
            checked(tenure, b"7", idempotency_key="new"),
        ],
        [checked(tenure, b"8")],
    ]
    answers = [await submit(tenure, e, "p", 1, n) for n, e in enumerate(frames, 1)]
    first, second, third = [await soon(answer) for answer in answers]
    assert [(r.index, r.reason) for r in first.refusals] == [(1, "INVALID_ARGUMENT")]
    assert [(r.index, r.reason) for r in second.refusals] == [(2, "INVALID_ARGUMENT")]
    new = second.ranges[0][1]
    assert second.duplicates == [(0, stored), (3, new)]
    assert third.refusals == []
    assert node.tenure is tenure
    rows = await node.stored()
    assert [row["data"] for row in rows.values()] == [b'{"total": 1}', b"1", b"3", b"5", b"8"]
    await soon(receiver.wait_for_deliveries(5))
    await node.balance_when(lambda b: b.delivered == 5 == b.matched)
    # What a frame was answered with is kept with its poison.
    unchanged = [checked(tenure, b"9") for _ in frames[1]]
    again = await soon(await submit(tenure, unchanged, "p", 1, 2))
    assert again.duplicate
    assert (again.refusals, again.duplicates) == (second.refusals, second.duplicates)


async def test_a_poison_original_leaves_its_place_to_the_next_of_its_key(
    node: RunningNode, receiver: Receiver
) -> None:
    await one_subscription(node, receiver)
    tenure = node.tenure
    answer = await submit(
        tenure,
        [
            checked(tenure, b"1", idempotency_key="k", subject="\0"),
            checked(tenure, b"2", idempotency_key="k", subject="\0"),
            checked(tenure, b"3", idempotency_key="k"),
            checked(tenure, b"4", idempotency_key="k"),
        ],
    )
    result = await soon(answer)
    assert [r.index for r in result.refusals] == [0, 1]
    assert [index for index, _ in result.duplicates] == [3]
    assert [row["data"] for row in (await node.stored()).values()] == [b"3"]
    await soon(receiver.wait_for_deliveries(1))


async def test_a_frame_that_is_twice_in_a_group_is_answered_twice_after_its_commit(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.tenant()
    tenure = node.tenure
    committing, go_on = asyncio.Event(), asyncio.Event()
    commit = event_log.commit

    async def held(connection: Any) -> None:
        committing.set()
        await go_on.wait()
        await commit(connection)

    monkeypatch.setattr(persist.event_log, "commit", held)
    first = await submit(tenure, [checked(tenure, b"1")], "p", 1, 1)
    second = await submit(tenure, [checked(tenure, b"1")], "p", 1, 1)
    await soon(committing.wait())
    assert not first.done()
    assert not second.done()
    go_on.set()
    one, two = await soon(first), await soon(second)
    assert not one.duplicate
    assert two.duplicate
    assert one.ranges == two.ranges != []
    assert len(await node.stored()) == 1


async def test_two_sessions_in_one_group_do_not_mix(node: RunningNode) -> None:
    await node.tenant()
    tenure = node.tenure
    await soon(await submit(tenure, [checked(tenure, b"1")], "p", 5, 1))
    answers = [
        await submit(tenure, [checked(tenure, b"%d" % data)], "p", session, number)
        for data, session, number in ((2, 5, 2), (3, 6, 1), (4, 5, 3), (5, 6, 2), (6, 6, 1))
    ]
    two, three = await soon(answers[0]), await soon(answers[1])
    assert not two.duplicate
    assert not three.duplicate
    assert await reason(answers[2]) == "SESSION_SUPERSEDED"
    assert not (await soon(answers[3])).duplicate
    again = await soon(answers[4])
    assert again.duplicate
    assert again.ranges == three.ranges
    assert [row["data"] for row in (await node.stored()).values()] == [b"1", b"2", b"3", b"5"]


async def test_small_frames_wait_for_a_large_one_of_their_producer_and_for_no_other(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.tenant()
    tenure = node.tenure
    go_on = asyncio.Event()
    commit, began = event_log.commit, asyncio.Event()

    async def held(connection: Any) -> None:
        if not began.is_set():
            began.set()
            await go_on.wait()
        await commit(connection)

    monkeypatch.setattr(persist.event_log, "commit", held)
    # The large queue is busy with somebody else when it comes.
    other = await submit(tenure, [checked(tenure, b"0")], "other", 1, 1, large=True)
    await soon(began.wait())
    answers = [
        await submit(tenure, [checked(tenure, b"%d" % n)], "p", 1, n, large=n in {2, 4})
        for n in range(1, 6)
    ]
    await soon(answers[0])
    assert not (await soon(await submit(tenure, [checked(tenure, b"9")], "q", 1, 1))).duplicate
    assert not any(answer.done() for answer in answers[1:])
    go_on.set()
    for answer in (other, *answers):
        assert len((await soon(answer)).ranges) == 1
    rows = await node.stored()
    by_p = [row["data"] for row in rows.values() if row["data"] not in (b"0", b"9")]
    assert by_p == [b"1", b"2", b"3", b"4", b"5"]


async def test_one_key_in_a_small_and_a_large_frame_at_once_is_stored_once(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.tenant()
    tenure = node.tenure
    began, go_on = asyncio.Event(), asyncio.Event()
    commit = event_log.commit

    async def held(connection: Any) -> None:
        if not began.is_set():
            began.set()
            await go_on.wait()
        await commit(connection)

    monkeypatch.setattr(persist.event_log, "commit", held)
    large = await submit(tenure, [checked(tenure, b"1", idempotency_key="k")], large=True)
    await soon(began.wait())
    small = await submit(tenure, [checked(tenure, b"2", idempotency_key="k")])
    free = await submit(tenure, [checked(tenure, b"3", idempotency_key="other")])
    await until(lambda: tenure.persister._keys_free._waiters)
    go_on.set()
    first = (await soon(large)).ranges[0][1]
    assert (await soon(small)).duplicates == [(0, first)]
    assert (await soon(free)).duplicates == []
    assert [row["data"] for row in (await node.stored()).values()] == [b"1", b"3"]


async def test_a_group_stays_within_its_limits(node: RunningNode) -> None:
    await node.tenant()
    tenure = node.tenure
    limits = tenure.parts.groups
    frames = [[checked(tenure, b"%d" % i) for i in range(500)] for _ in range(15)]
    before = tenure.parts.metrics.persist.commits
    answers = [await submit(tenure, e, "p", 1, n) for n, e in enumerate(frames, 1)]
    for answer in answers:
        await soon(answer)
    assert limits.events_max == 5000
    assert tenure.parts.metrics.persist.commits - before >= 2
    assert len(await node.stored()) == 7500


async def test_a_shard_that_was_taken_over_is_written_no_more_and_taken_up_again(
    node: RunningNode, receiver: Receiver
) -> None:
    demo = await one_subscription(node, receiver)
    tenure = node.tenure
    async with demo.stream() as stream:
        await stream.open()
        await stream.publish(1, [event(data=b"1")])
        await node.fetch("UPDATE shard SET epoch = epoch + 1")
        await stream.send(2, [event(data=b"2")])
        assert await stream.refused(2) in {"STORAGE_UNAVAILABLE", "NOT_READY"}
        await node.next_tenure(tenure)
        ack = await stream.publish(2, [event(data=b"2")])
        assert not ack.duplicate
    await soon(receiver.wait_for_deliveries(2))
    assert [row["data"] for row in (await node.stored()).values()] == [b"1", b"2"]
    await node.balance_when(lambda b: b.delivered == 2)


async def test_a_record_number_that_does_not_fit_ends_the_tenure_and_loses_nothing(
    node: RunningNode, receiver: Receiver
) -> None:
    demo = await one_subscription(node, receiver)
    tenure = node.tenure
    await node.fetch("UPDATE shard SET record_no = record_no + 7")
    await demo.publish(*[event(data=b"%d" % i) for i in range(20)])
    await node.next_tenure(tenure)
    await soon(receiver.wait_for_deliveries(20))
    await node.balance_when(lambda b: b.delivered == 20 == b.matched)
    assert tenure.parts.metrics.record.failures >= 1


async def test_a_connection_lost_before_the_commit_is_durable_stores_nothing_twice(
    node: RunningNode, receiver: Receiver
) -> None:
    demo = await one_subscription(node, receiver)
    tenure = node.tenure
    # The server ends the connection while it is in COMMIT, before anything is durable.
    connection = await asyncpg.connect(node.dsn)
    await connection.execute(
        """
        CREATE TABLE trap (on_ boolean);
        INSERT INTO trap VALUES (true);
        CREATE FUNCTION fall() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF EXISTS (SELECT FROM trap) THEN
                PERFORM pg_terminate_backend(pg_backend_pid());
                PERFORM pg_sleep(0);
            END IF;
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER trap AFTER INSERT OR UPDATE ON producer
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fall();
        """
    )
    async with demo.stream() as stream:
        await stream.open()
        await stream.send(1, [event(data=b"1", idempotency_key="k")])
        assert await stream.refused(1) == "STORAGE_UNAVAILABLE"
        assert await node.stored() == {}
        await connection.execute("DELETE FROM trap")
        await node.next_tenure(tenure)
        assert not (await stream.publish(1, [event(data=b"1", idempotency_key="k")])).results
    await connection.close()
    await soon(receiver.wait_for_deliveries(1))
    assert len(await node.stored()) == 1


async def test_a_commit_whose_answer_is_lost_is_found_in_the_log(
    node: RunningNode, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = await one_subscription(node, receiver)
    tenure = node.tenure
    commit, lost = event_log.commit, []

    async def without_answer(connection: Any) -> None:
        await commit(connection)
        if not lost:
            lost.append(True)
            raise ConnectionResetError

    monkeypatch.setattr(persist.event_log, "commit", without_answer)
    async with demo.stream() as stream:
        await stream.open()
        await stream.send(1, [event(data=b"1", idempotency_key="k")])
        assert await stream.refused(1) == "STORAGE_UNAVAILABLE"
        stored = await node.stored()
        assert len(stored) == 1
        await node.next_tenure(tenure)
        ack = await stream.publish(1, [event(data=b"1", idempotency_key="k")])
        assert ack.duplicate
        assert [r.first for r in ack.ids] == list(stored)
        assert not (await stream.publish(2, [event(data=b"2")])).duplicate
    # What was never answered is delivered all the same, once.
    await soon(receiver.wait_for_deliveries(2))
    balance = await node.balance_when(lambda b: b.delivered == 2)
    assert balance.matched == 2
    assert len(receiver.requests) == 2


async def test_what_comes_while_a_tenure_ends_is_refused_and_not_left_without_answer(
    node: RunningNode,
) -> None:
    await node.tenant()
    tenure = node.tenure
    await node.fetch("UPDATE shard SET epoch = epoch + 1")
    first = await submit(tenure, [checked(tenure)])
    assert await reason(first) == "STORAGE_UNAVAILABLE"
    await node.next_tenure(tenure)
    late = await submit(tenure, [checked(tenure)])
    assert await reason(late) == "NOT_READY"


async def test_a_producer_whose_row_is_ahead_is_read_again(node: RunningNode) -> None:
    demo = await node.tenant()
    tenure = node.tenure
    async with demo.stream() as stream:
        await stream.open("p", 1)
        await stream.publish(1, [event()])
        await node.fetch("UPDATE producer SET last_frame = 2")
        await node.fetch(
            "INSERT INTO producer_frame SELECT at, producer, session, 2, ack FROM producer_frame"
        )
        await stream.send(2, [event()])
        assert await stream.refused(2) == "STORAGE_UNAVAILABLE"
        await node.next_tenure(tenure)
        ack = await stream.publish(2, [event()])
        assert ack.duplicate
        assert not errors_of(ack.results)
        await stream.publish(3, [event()])
    assert len(await node.stored()) == 2


async def two_tenants(node: RunningNode) -> tuple[int, int]:
    """The ids of two tenants of different shards."""
    await node.tenant("a")
    await node.tenant("b")
    directory = node.tenure.parts.directory
    assert directory.by_name["a"].shard != directory.by_name["b"].shard
    return directory.by_name["a"].id, directory.by_name["b"].id


async def put(
    node: RunningNode, number: int, previous: dict[int, int], *events: tuple[int, bytes, int]
) -> asyncio.Future[FrameResult]:
    """Queue the part of a frame that holds these (tenant, data, place); `previous` by tenant."""
    tenure = node.tenure
    by_id = tenure.parts.directory.by_id
    made = [checked(tenure, data, tenant=by_id[tenant].name) for tenant, data, _ in events]
    for one in made:
        one.shard = by_id[one.tenant].shard
    shards = {one.shard for one in made}
    portion = Portion(made, [by_id[one.tenant] for one in made], [e[2] for e in events], shards)
    portion.previous = {by_id[tenant].shard: last for tenant, last in previous.items()}
    known = await tenure.session("p", shards)
    answer: asyncio.Future[FrameResult] = asyncio.get_running_loop().create_future()
    tenure.persister.submit(PendingFrame(known, 1, number, portion, [], answer, large=False))
    return answer


async def test_a_frame_that_was_stored_in_some_shards_only_is_completed_when_it_comes_again(
    node: RunningNode,
) -> None:
    a, b = await two_tenants(node)
    part = await soon(await put(node, 1, {a: 0}, (a, b"1", 0), (a, b"2", 2)))
    whole = (a, b"1", 0), (b, b"3", 1), (a, b"2", 2), (b, b"4", 3)
    answer = await soon(await put(node, 1, {a: 0, b: 0}, *whole))
    assert part.ranges[0] in answer.ranges
    assert [(name, count) for name, _, count in answer.ranges] == [("b", 2), ("a", 2)]
    again = await soon(await put(node, 1, {a: 0, b: 0}, *whole))
    assert again.duplicate
    assert sorted(again.ranges) == sorted(answer.ranges)
    # Also where only one of its shards is asked, and after the node has forgotten what it knew.
    await node.restart()
    only = await soon(await put(node, 1, {b: 0}, (b, b"3", 1), (b, b"4", 3)))
    assert only.duplicate
    assert [name for name, _, _ in only.ranges] == ["b"]
    assert len(await node.stored("a")) == len(await node.stored("b")) == 2


async def test_a_frame_is_taken_by_a_shard_only_after_the_one_before_it_there(
    node: RunningNode,
) -> None:
    a, b = await two_tenants(node)
    await soon(await put(node, 1, {a: 0}, (a, b"1", 0)))
    # Frame 2 was for b alone and has not come: a does not care, b does.
    await soon(await put(node, 3, {a: 1}, (a, b"3", 0)))
    late = await put(node, 4, {a: 3, b: 2}, (a, b"4", 0), (b, b"4", 1))
    assert await reason(late) == "FRAME_OUT_OF_SEQUENCE"
    await soon(await put(node, 2, {b: 0}, (b, b"2", 0)))
    answer = await soon(await put(node, 4, {a: 3, b: 2}, (a, b"4", 0), (b, b"4", 1)))
    assert not answer.duplicate
    assert [int(row["data"]) for row in (await node.stored("a")).values()] == [1, 3, 4]
    assert [int(row["data"]) for row in (await node.stored("b")).values()] == [2, 4]
