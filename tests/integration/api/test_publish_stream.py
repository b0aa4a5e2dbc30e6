"""What PublishStream promises, spoken with the generated stub alone, against a whole node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from tests.support.node import RunningNode, errors_of, event, ids_of, running, soon
from tests.support.postgres import Database
from tests.support.receiver import Behaviour, Receiver

from outrider.v1 import api_key_service_pb2, ingest_service_pb2


@pytest.fixture
async def node(database: Database, tmp_path: Path) -> AsyncIterator[RunningNode]:
    async with running(database.dsn, tmp_path) as node:
        yield node


async def test_frames_that_mix_tenants_are_answered_in_order_with_the_ids_of_the_log(
    node: RunningNode,
) -> None:
    demo, other = await node.tenant("demo"), await node.tenant("other")
    async with node.stream(node.admin_key) as stream:
        opened = await stream.open("erp", 7)
        assert (opened.last_frame, opened.window.frames, opened.frame_events_max) == (0, 64, 500)
        assert opened.window.bytes == 4 * 1024 * 1024
        frames = {
            number: [
                event(data=b"%d" % (number * 100 + i), tenant=("", "other")[(i + number) % 2])
                for i in range(7)
            ]
            for number in range(1, 21)
        }
        for number, events in frames.items():
            await stream.send(number, events)
        seen: dict[str, dict[int, bytes]] = {"demo": {}, "other": {}}
        for number, events in frames.items():
            tenants = [e.tenant or "demo" for e in events]
            ids = ids_of(await stream.ack(number), tenants)
            for e, tenant, id_ in zip(events, tenants, ids, strict=True):
                assert id_ is not None
                seen[tenant][id_] = e.data
    assert demo.name == "demo"
    assert other.name == "other"
    for tenant, expected in seen.items():
        stored = await node.stored(tenant)
        assert {id_: row["data"] for id_, row in stored.items()} == expected
        assert list(expected) == sorted(expected)


async def test_each_bad_event_is_refused_with_its_reason_and_the_others_are_stored(
    node: RunningNode,
) -> None:
    await node.tenant("demo")
    await node.tenant("strict", strict_types=True)
    deep = b"[" * 10_000 + b"]" * 10_000
    bad = {
        "PAYLOAD_NOT_JSON": [
            event(data=b"{"),
            event(data=b"1 2"),
            event(data='{"a": NaN}'),
            event(data=b'{"a": "\x00"}'),
            event(data=b'"\\ud800"'),
        ],
        "PAYLOAD_NOT_UTF8": [event(data=b'"\xff"'), event(data=b'{"a": "\xed\xa0\x80"}')],
        "EMPTY_PAYLOAD": [event(data=b""), event(data="")],
        "PAYLOAD_TOO_DEEP": [event(data=deep), event(data=b"[" * 129 + b"]" * 129)],
        "INVALID_TEXT": [
            event(**{name: "a\0b"})
            for name in ("key", "subject", "source", "organization", "actor", "idempotency_key")
        ]
        + [event(attributes={"a": "\0"}), event(attributes={"\0": "a"})],
        "FIELD_TOO_LONG": [
            event(key="k" * 513),
            event(key="ü" * 257),
            event(idempotency_key="k" * 513),
            event(subject="s" * 513),
            event(source="s" * 257),
            event(organization="o" * 257),
            event(actor="a" * 257),
            event(attributes={str(i): "" for i in range(33)}),
            event(attributes={"a": "v" * 8192}),
        ],
        "INVALID_EVENT_TYPE": [event(""), event("Sales"), event("a..b"), event("a" * 129)],
        "UNKNOWN_EVENT_TYPE": [event(tenant="strict")],
        "UNKNOWN_TENANT": [event(tenant="nobody")],
        "INVALID_TIME": [
            event(time={"seconds": 253_402_300_800}),
            event(time={"seconds": -(2**63)}),
            event(time={"seconds": 2**63 - 1, "nanos": 2**31 - 1}),
        ],
    }
    expected: dict[int, str] = {}
    events = []
    for reason, wrong in bad.items():
        for e in wrong:
            events.append(event(data=b"%d" % len(events)))
            expected[len(events)] = reason
            events.append(e)
    # What is at its limit is taken.
    events += [
        event(key="ü" * 256, subject="s" * 512, source="s" * 256, data=b"[" * 128 + b"]" * 128),
        event(attributes={"a": "v" * 8191}, time={"seconds": 253_402_300_799}),
        event("a" * 128, data=b"null", time={"seconds": -62_135_596_800}),
        event(data='"text"'),
    ]
    async with node.stream(node.admin_key) as stream:
        await stream.open()
        await stream.send(1, [event()])
        await stream.send(2, events)
        await stream.send(3, [event()])
        await stream.ack(1)
        ack = await stream.ack(2)
        await stream.ack(3)
    assert errors_of(ack.results) == expected
    ids = [i for i in ids_of(ack, ["demo"] * len(events)) if i is not None]
    good = [e.data or e.data_json.encode() for i, e in enumerate(events) if i not in expected]
    stored = await node.stored()
    assert [stored[id_]["data"] for id_ in ids] == good
    assert len(stored) == len(good) + 2


async def test_a_frame_without_a_good_event_still_takes_its_number(node: RunningNode) -> None:
    demo = await node.tenant()
    async with demo.stream() as stream:
        await stream.open()
        ack = await stream.publish(1, [event(data=b"{")])
        assert errors_of(ack.results) == {0: "PAYLOAD_NOT_JSON"}
        assert not (await stream.publish(2, [])).results
        assert errors_of((await stream.publish(3, [event()], "other")).results) == {
            0: "TENANT_OUT_OF_SCOPE"
        }
        await stream.publish(4, [event()])
    await node.restart()
    async with demo.stream() as stream:
        assert (await stream.open()).last_frame == 4
        again = await stream.publish(1, [event(data=b"{")])
        assert again.duplicate
        assert errors_of(again.results) == {0: "PAYLOAD_NOT_JSON"}


async def test_frames_that_come_again_are_answered_alike_and_stored_once(
    node: RunningNode,
) -> None:
    demo = await node.tenant()
    frames = {n: [event(data=b"%d%d" % (n, i)) for i in range(3)] for n in range(1, 5)}
    async with demo.stream() as stream:
        await stream.open("p", 3)
        first = {n: await stream.publish(n, events) for n, events in frames.items()}
    async with demo.stream() as stream:
        assert (await stream.open("p", 3)).last_frame == 4
        for n, events in frames.items():
            ack = await stream.publish(n, events)
            assert ack.duplicate
            assert list(ack.ids) == list(first[n].ids)
    await node.restart()
    async with demo.stream() as stream:
        assert (await stream.open("p", 3)).last_frame == 4
        for n in (4, 1, 2, 3, 4):
            ack = await stream.publish(n, frames[n])
            assert ack.duplicate
            assert list(ack.ids) == list(first[n].ids)
        assert not (await stream.publish(5, [event()])).duplicate
    assert len(await node.stored()) == 13


async def test_a_number_out_of_sequence_is_refused_until_the_right_one_comes(
    node: RunningNode,
) -> None:
    demo = await node.tenant()
    async with demo.stream() as stream:
        await stream.open()
        await stream.publish(1, [event()])
        for wrong in (0, 3, 4, 2**64 - 1):
            await stream.send(wrong, [event()])
            assert await stream.refused(wrong) == "FRAME_OUT_OF_SEQUENCE"
        await stream.publish(2, [event()])
        await stream.publish(3, [event()])
    assert len(await node.stored()) == 3


async def test_behind_a_refused_frame_all_are_refused_until_it_comes_again(
    node: RunningNode,
) -> None:
    demo = await node.tenant()
    async with demo.stream() as stream:
        await stream.open()
        await stream.publish(1, [event()])
        node.node._tell_disk(True)
        await stream.send(2, [event()])
        assert await stream.refused(2) == "DISK_FULL"
        node.node._tell_disk(False)
        await stream.send(3, [event()])
        assert await stream.refused(3) == "FRAME_OUT_OF_SEQUENCE"
        for number in (2, 3):
            await stream.publish(number, [event()])
    assert len(await node.stored()) == 3


async def test_a_new_stream_takes_the_place_of_its_producers_older_one(node: RunningNode) -> None:
    demo = await node.tenant()
    frames = {n: [event(data=b"%d" % n)] for n in range(1, 41)}
    async with demo.stream() as one, demo.stream() as two:
        await one.open("p", 1)
        for number in range(1, 21):
            await one.send(number, frames[number])
        await two.open("p", 1)
        for number, events in frames.items():
            await two.send(number, events)
        acks = [await two.ack(number) for number in frames]
        error = await one.error()
        assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "STREAM_REPLACED")
    assert all(list(ack.ids) for ack in acks)
    assert [row["data"] for row in (await node.stored()).values()] == [
        e[0].data for e in frames.values()
    ]


async def test_a_later_session_ends_the_streams_of_an_earlier_one(node: RunningNode) -> None:
    demo = await node.tenant()
    async with demo.stream() as old, demo.stream() as new:
        await old.open("p", 5)
        await old.publish(1, [event(data=b"1")])
        await old.publish(2, [event(data=b"2")])
        assert (await new.open("p", 6)).last_frame == 0
        await new.publish(1, [event(data=b"3")])
        error = await old.error()
        assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "SESSION_SUPERSEDED")
        async with demo.stream() as again:
            await again.write(open=ingest_service_pb2.OpenStream(producer="p", session=5))
            assert (await again.error()).reason == "SESSION_SUPERSEDED"
        await new.publish(2, [event(data=b"5")])
    assert [row["data"] for row in (await node.stored()).values()] == [b"1", b"2", b"3", b"5"]


async def test_producers_of_one_name_in_two_tenants_do_not_meet(node: RunningNode) -> None:
    demo, other = await node.tenant("demo"), await node.tenant("other")
    async with demo.stream() as one, other.stream() as two:
        await one.open("p", 9)
        await one.publish(1, [event()])
        assert (await two.open("p", 3)).last_frame == 0
        assert not (await two.publish(1, [event()], "other")).duplicate


async def test_a_duplicate_key_is_answered_with_the_first_events_id(node: RunningNode) -> None:
    demo, other = await node.tenant("demo"), await node.tenant("other")

    def keyed(key: str, data: bytes) -> object:
        return event(data=data, idempotency_key=key)

    async with demo.stream() as stream:
        await stream.open("a", 1)
        ack = await stream.publish(1, [keyed("x", b"1"), keyed("y", b"2"), keyed("x", b"3")])
        ids = ids_of(ack, ["demo"] * 3)
        assert ids[2] == ids[0]
        assert [(r.index, r.duplicate) for r in ack.results] == [(2, True)]
        ack = await stream.publish(2, [keyed("z", b"4"), keyed("y", b"5")])
        assert ids_of(ack, ["demo"] * 2)[1] == ids[1]
        async with demo.stream() as beside:
            await beside.open("b", 1)
            # Together, so that they meet in one transaction or in two.
            for number in range(1, 11):
                await stream.send(number + 2, [keyed(f"k{number}", b"6")])
                await beside.send(number, [keyed(f"k{number}", b"7"), keyed("x", b"8")])
            for number in range(1, 11):
                mine = ids_of(await stream.ack(number + 2), ["demo"])
                theirs = ids_of(await beside.ack(number), ["demo"] * 2)
                assert theirs == [mine[0], ids[0]]
    async with other.stream() as stream:
        await stream.open("a", 1)
        assert not (await stream.publish(1, [keyed("x", b"9")], "other")).results
    await node.restart()
    results = await node.publish(demo.publisher, "demo", [keyed("x", b"10"), keyed("new", b"11")])
    assert [(r.id == ids[0], r.duplicate) for r in results] == [(True, True), (False, False)]
    assert len(await node.stored("demo")) == 14


async def test_more_than_the_window_allows_ends_the_stream(
    database: Database, tmp_path: Path
) -> None:
    async with running(
        database.dsn,
        tmp_path,
        stream_frames_in_flight_max=3,
        frame_bytes_max=64 * 1024,
        large_event_bytes=32 * 1024,
        stream_credit_bytes=256 * 1024,
    ) as node:
        demo = await node.tenant()
        persister = node.tenure.persister
        big = [event(data=b'"%b"' % (b"x" * 30_000)) for _ in range(2)]
        for events, taken in (([event()], 3), (big, 3)):
            async with demo.stream() as stream:
                await stream.open(f"p{taken}{len(events)}")
                persister.submit, submit = lambda _: None, persister.submit  # nothing is answered
                for number in range(1, taken + 2):
                    await stream.send(number, events)
                error = await stream.error()
                persister.submit = submit
                assert (error.code, error.reason) == (
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "CREDIT_EXCEEDED",
                )
        await asyncio.sleep(0)
        assert node.node._admission.room.taken == node.node._admission.large_room.taken == 0


async def test_a_frame_beyond_its_bounds_ends_the_stream_and_stores_nothing(
    node: RunningNode,
) -> None:
    demo = await node.tenant()
    half = b'"%b"' % (b"x" * 600_000)
    for events in ([event()] * 501, [event(data=half)] * 2):
        async with demo.stream() as stream:
            await stream.open()
            await stream.send(1, events)
            error = await stream.error()
            assert (error.code, error.reason) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "FRAME_TOO_LARGE",
            )
    async with demo.stream() as stream:
        await stream.open()
        await stream.publish(1, [event()] * 500)
    assert len(await node.stored()) == 500
    assert node.node._admission.room.taken == node.node._admission.large_room.taken == 0


async def test_a_large_frame_needs_a_grant_and_one_is_given_at_a_time(node: RunningNode) -> None:
    demo = await node.tenant()
    large = event(data=b'"%b"' % (b"x" * 2_000_000))
    size = ingest_service_pb2.Frame(number=1, tenant="demo", events=[large]).ByteSize()
    async with demo.stream() as stream:
        await stream.open()
        await stream.send(1, [large])
        assert (await stream.error()).reason == "CREDIT_EXCEEDED"
    async with demo.stream() as stream:
        await stream.open()
        await stream.grant(size)
        await stream.write(large_frame=ingest_service_pb2.LargeFrameRequest(frame_bytes=size))
        assert (await stream.error()).reason == "CREDIT_EXCEEDED"
    async with demo.stream() as stream:
        await stream.open()
        await stream.write(
            large_frame=ingest_service_pb2.LargeFrameRequest(frame_bytes=12 * 1024 * 1024)
        )
        assert (await stream.error()).reason == "FRAME_TOO_LARGE"
    async with demo.stream() as stream:
        await stream.open()
        await stream.publish(1, [event(data=b"1")])
        await stream.grant(size)
        await stream.send(2, [event(data=b"2")])  # a small one may go first
        await stream.send(3, [large])
        await stream.send(4, [event(data=b"4")])
        for number in (2, 3, 4):
            await stream.ack(number)
        # A grant for a frame that would not have needed one is used by it.
        small = ingest_service_pb2.Frame(number=5, tenant="demo", events=[event()])
        for number in (5, 6):
            await stream.grant(small.ByteSize())
            await stream.publish(number, [event()])
    assert [len(row["data"]) for row in (await node.stored()).values()] == [1, 1, 2_000_002, 1, 12, 12]  # fmt: skip
    assert node.node._admission.room.taken == node.node._admission.large_room.taken == 0


async def test_ten_mebibytes_are_taken_and_one_byte_more_is_refused(node: RunningNode) -> None:
    demo = await node.tenant()
    most = 10 * 1024 * 1024
    async with demo.stream() as stream:
        await stream.open()
        for number, size in ((1, most), (2, most + 1)):
            e = event(data=b'"%b"' % (b"x" * (size - 2)))
            await stream.grant(
                ingest_service_pb2.Frame(number=number, tenant="demo", events=[e]).ByteSize()
            )
            ack = await stream.publish(number, [e])
            assert errors_of(ack.results) == ({} if size == most else {0: "PAYLOAD_TOO_LARGE"})
        await stream.publish(3, [event()])
    assert [len(row["data"]) for row in (await node.stored()).values()] == [most, 12]


async def test_the_first_message_opens_and_no_other_does(node: RunningNode) -> None:
    demo = await node.tenant()
    async with demo.stream() as stream:
        await stream.send(1, [event()])
        error = await stream.error()
        assert (error.code, error.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "STREAM_NOT_OPEN",
        )
    async with demo.stream() as stream:
        await stream.open()
        await stream.write(open=ingest_service_pb2.OpenStream(producer="p", session=1))
        assert (await stream.error()).reason == "STREAM_NOT_OPEN"
    async with demo.stream() as stream:
        await stream.call.done_writing()
        assert (await stream.error()).reason == "STREAM_NOT_OPEN"
    for producer, session in (("", 1), ("p" * 129, 1), ("a\0b", 1), ("p", 0), ("p", 2**63)):
        async with demo.stream() as stream:
            await stream.write(
                open=ingest_service_pb2.OpenStream(producer=producer, session=session)
            )
            error = await stream.error()
            assert (error.code, error.reason) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "INVALID_ARGUMENT",
            )
            assert len(error.violations) == 1


async def test_a_stream_that_ends_gets_its_remaining_answers(node: RunningNode) -> None:
    demo = await node.tenant()
    async with demo.stream() as stream:
        await stream.open()
        for number in range(1, 11):
            await stream.send(number, [event()])
        await stream.call.done_writing()
        for number in range(1, 11):
            await stream.ack(number)
        assert await stream.call.read() is grpc.aio.EOF
        assert await stream.call.code() is grpc.StatusCode.OK
    assert node.node._admission.room.taken == node.node._admission.large_room.taken == 0


async def test_a_missing_or_wrong_key_opens_nothing(node: RunningNode) -> None:
    for key, reason in ((None, "MISSING_API_KEY"), ("ork_wrong", "INVALID_API_KEY")):
        async with node.stream(key) as stream:
            error = await stream.error()
            assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)


async def test_a_revoked_key_ends_its_streams_also_one_that_was_not_opened_yet(
    node: RunningNode,
) -> None:
    demo = await node.tenant()
    async with demo.stream() as stream, demo.stream() as unopened, node.stream(node.admin_key) as s:
        await stream.open()
        await stream.publish(1, [event()])
        await s.open("other")
        await unopened.call.wait_for_connection()
        # Over the database alone, as another node would.
        await node.fetch("UPDATE api_key SET revoked_at = now() WHERE id LIKE '%/publisher'")
        async with asyncio.timeout(2.0):
            for each in (stream, unopened):
                error = await each.error()
                assert (error.code, error.reason) == (
                    grpc.StatusCode.UNAUTHENTICATED,
                    "REVOKED_API_KEY",
                )
        await s.publish(1, [event()])
    with pytest.raises(grpc.aio.AioRpcError, match="revoked"):
        await demo.publish(event())


async def test_a_key_that_is_deleted_over_the_api_ends_its_streams(node: RunningNode) -> None:
    demo = await node.tenant()
    async with demo.stream() as stream:
        await stream.open()
        await demo.admin.call(
            "DeleteApiKey",
            api_key_service_pb2.DeleteApiKeyRequest(name="tenants/demo/apiKeys/publisher"),
        )
        assert (await stream.error()).reason == "REVOKED_API_KEY"


async def test_a_node_that_drains_says_so_and_serves_who_is_there_but_no_newcomer(
    node: RunningNode,
) -> None:
    demo = await node.tenant()
    async with Receiver() as receiver:
        hold = asyncio.Event()
        receiver.always("/hook", Behaviour(hold=hold))
        await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
        async with demo.stream() as stream:
            await stream.open()
            await stream.publish(1, [event()])
            await soon(receiver.wait_for(1))
            node.node.stop()
            response = await stream.answer()
            assert response.WhichOneof("message") == "going_away"
            # What is in flight keeps the tenant's shard here for a while.
            await stream.publish(2, [event()])
            async with demo.stream() as late:
                await late.write(open={"producer": "late", "session": 1})
                assert (await late.error()).reason == "SHUTTING_DOWN"
        hold.set()
        assert await node.ended() is None
        await node.start()
        async with demo.stream() as stream:
            assert (await stream.open()).last_frame == 2
            await stream.publish(3, [event()])
        await soon(receiver.wait_for_deliveries(3))


async def test_a_producer_that_does_not_read_does_not_hold_up_a_drain(node: RunningNode) -> None:
    demo = await node.tenant()
    async with demo.stream() as stream:
        await stream.open()
        streams = list(node.node._ingest._streams)
        assert len(streams) == 1
        await streams[0]._writing.acquire()  # as a write does that waits for the peer's room
        node.node.stop()
        assert await node.ended() is None
    await node.start()


async def test_a_grant_that_is_not_used_is_taken_back(node: RunningNode) -> None:
    demo = await node.tenant()
    async with demo.stream() as stream:
        await stream.open()
        await stream.grant(5_000_000)
        assert node.node._admission.large_room.taken == 5_000_000
        handle = next(iter(node.node._ingest._streams))._grant_ends
        assert handle is not None
        handle._run()  # its time has come
        assert (await stream.error()).reason == "CREDIT_EXCEEDED"
    assert node.node._admission.room.taken == node.node._admission.large_room.taken == 0
