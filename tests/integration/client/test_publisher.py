from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.scripted_ingest import (
    Action,
    Drop,
    End,
    Refuse,
    Resize,
    SayGoingAway,
    ScriptedIngest,
    Take,
)
from typing_extensions import override

from outrider import errors
from outrider.publisher import Ack, FrameReport, Publisher
from outrider.spool import BYTES_MIN, Spool
from outrider.v1.event_pb2 import Event
from outrider.v1.ingest_service_pb2 import Frame

KEY = "or_test_key"


def event(number: int, *, tenant: str = "", size: int = 0) -> Event:
    return Event(tenant=tenant, type="sales_order.created", data=b'"%d%s"' % (number, b"x" * size))


def number_of(stored: bytes) -> int:
    return int(stored.strip(b'"x'))


async def no_pause(_: float) -> None:
    await asyncio.sleep(0)


def publisher(server: ScriptedIngest, **options: Any) -> Publisher:
    settings: dict[str, Any] = {"tenant": "demo", "backoff_ms": 1, "backoff_ms_max": 20}
    return Publisher(server.target, KEY, "test-1", **(settings | options))


def script_of(*actions: tuple[int, Action]) -> Callable[[Frame], Action]:
    """Each action once, when its frame comes first; everything else is taken."""
    left = list(actions)

    def script(frame: Frame) -> Action:
        for entry in left:
            if entry[0] == frame.number:
                left.remove(entry)
                return entry[1]
        return Take()

    return script


@pytest.fixture
async def server() -> AsyncIterator[ScriptedIngest]:
    async with ScriptedIngest(api_key=KEY) as running:
        yield running
        assert running.violations == []


async def test_publish_waits_for_the_ack_and_returns_the_id(server: ScriptedIngest) -> None:
    async with publisher(server) as p:
        first = await p.publish(event(1))
        second = await p.publish(event(2))
    assert [(tenant, id_) for tenant, id_, _ in server.log] == [
        ("demo", first.event_id),
        ("demo", second.event_id),
    ]
    assert not first.duplicate
    assert server.streams == 1


async def test_events_sent_together_share_frames_and_keep_their_order(
    server: ScriptedIngest,
) -> None:
    async with publisher(server) as p:
        handles = [await p.send(event(i, tenant="ab"[i % 2])) for i in range(1200)]
        await p.flush()
        assert all(handle.done() for handle in handles)
        acks = [await handle for handle in handles]
    assert server.frames_received == 3
    stored = {number_of(e.data): (tenant, id_) for tenant, id_, e in server.log}
    assert [number_of(e.data) for _, _, e in server.log] == list(range(1200))
    for i, ack in enumerate(acks):
        assert (("ab"[i % 2]), ack.event_id) == stored[i]


async def test_a_frame_leaves_after_the_linger_without_being_full(server: ScriptedIngest) -> None:
    async with publisher(server, linger_ms=1) as p:
        handle = await p.send(event(1))
        assert (await handle).event_id


async def test_flush_does_not_wait_for_the_linger(server: ScriptedIngest) -> None:
    async with publisher(server, linger_ms=3_600_000) as p:
        _ = await p.send(event(1))
        await p.flush()
        assert server.payloads() == [b'"1"']


async def test_publish_many_tells_each_outcome_in_order(server: ScriptedIngest) -> None:
    server.script = script_of((1, Take(rejected=((1, "PAYLOAD_NOT_JSON", "line 1"),))))
    async with publisher(server) as p:
        first, second, third = await p.publish_many(event(i) for i in range(3))
        assert p.stats.events_rejected == 1
    assert isinstance(second, errors.EventRejected)
    assert (second.reason, second.message) == ("PAYLOAD_NOT_JSON", "line 1")
    assert isinstance(first, Ack)
    assert isinstance(third, Ack)
    assert [id_ for _, id_, _ in server.log] == [first.event_id, third.event_id]


async def test_an_event_may_be_changed_after_it_was_sent(server: ScriptedIngest) -> None:
    async with publisher(server) as p:
        reused = event(1)
        _ = await p.send(reused)
        reused.data = b'"2"'
        _ = await p.send(reused)
    assert server.payloads() == [b'"1"', b'"2"']


async def test_send_waits_while_the_window_is_full_and_keeps_the_order_of_those_who_wait(
    server: ScriptedIngest,
) -> None:
    server.answering.clear()
    async with publisher(server, window_events=3) as p:
        for i in range(3):
            _ = await p.send(event(i))
        waiting = [asyncio.ensure_future(p.send(event(i))) for i in range(3, 8)]
        async with server.received:
            await server.received.wait_for(lambda: server.frames_received >= 1)
        assert not any(task.done() for task in waiting)
        assert p.stats.events_held == 3
        cancelled = waiting.pop(1)
        cancelled.cancel()
        server.answering.set()
        await asyncio.gather(*waiting)
        await p.flush()
        assert p.stats.events_held == 0
        assert p.stats.bytes_held == 0
    assert [number_of(data) for data in server.payloads()] == [0, 1, 2, 3, 5, 6, 7]


async def test_the_window_bounds_bytes_too_and_lets_one_larger_event_pass(
    server: ScriptedIngest,
) -> None:
    async with publisher(server, window_bytes=10_000) as p:
        for i in range(20):
            _ = await p.send(event(i, size=4000))
            assert p.stats.bytes_held <= 10_000
        _ = await p.send(event(20, size=50_000))
        assert p.stats.events_held == 1
    assert len(server.log) == 21


async def test_a_busy_sender_lets_the_loop_write(server: ScriptedIngest) -> None:
    async with publisher(server) as p:
        await p.publish(event(0))
        for i in range(1, 20_001):
            _ = await p.send(event(i))
        # Nothing here waited for room, and yet most of it is on its way.
        assert server.frames_received > 10
        await p.flush()
    assert len(server.log) == 20_001


async def test_small_server_windows_are_kept(server: ScriptedIngest) -> None:
    server.window_frames, server.window_bytes = 2, 3000
    async with publisher(server, frame_bytes=1024) as p:
        for i in range(300):
            _ = await p.send(event(i, size=100))
    assert [number_of(data) for data in server.payloads()] == list(range(300))
    assert server.unanswered_frames_max <= 2


async def test_a_window_that_shrinks_and_grows_is_followed(server: ScriptedIngest) -> None:
    server.script = script_of((3, Resize(1, 1200)), (6, Resize(50, 10_000)))
    async with publisher(server, frame_bytes=1024) as p:
        for i in range(300):
            _ = await p.send(event(i, size=100))
    assert [number_of(data) for data in server.payloads()] == list(range(300))


async def test_large_events_ask_for_room_and_go_alone(server: ScriptedIngest) -> None:
    server.window_bytes = 2 * 1024 * 1024
    megabyte = 1024 * 1024
    async with publisher(server) as p:
        sizes = [10, 1_000, 3 * megabyte, 10, 10 * megabyte - 50, 700_000, 10, 2 * megabyte]
        for i, size in enumerate(sizes):
            _ = await p.send(event(i, size=size))
    assert [number_of(data) for data in server.payloads()] == list(range(len(sizes)))


async def test_an_event_too_large_for_any_frame_is_refused_at_once(server: ScriptedIngest) -> None:
    async with publisher(server) as p:
        with pytest.raises(errors.EventRejected) as caught:
            _ = await p.send(event(1, size=10 * 1024 * 1024))
        assert caught.value.reason == "PAYLOAD_TOO_LARGE"
        assert p.stats.events_held == 0
        await p.publish(event(2))


async def test_a_refused_frame_comes_again_with_all_behind_it(server: ScriptedIngest) -> None:
    server.script = script_of((2, Refuse()), (2, Refuse("NOT_READY", 0.01)), (5, Refuse()))
    async with publisher(server, frame_events=10) as p:
        for i in range(100):
            _ = await p.send(event(i))
        await p.flush()
        assert p.stats.frames_refused >= 3
    assert [number_of(data) for data in server.payloads()] == list(range(100))
    assert server.streams == 1


@pytest.mark.parametrize("stored", [False, True])
async def test_a_broken_stream_loses_and_doubles_nothing(
    server: ScriptedIngest, stored: bool
) -> None:
    server.script = script_of((3, Drop(stored)), (7, Drop(stored)))
    async with publisher(server, frame_events=10) as p:
        handles = [await p.send(event(i)) for i in range(100)]
        acks = [await handle for handle in handles]
        assert p.stats.streams_opened == 3
    assert [number_of(data) for data in server.payloads()] == list(range(100))
    assert [id_ for _, id_, _ in server.log] == [ack.event_id for ack in acks]
    assert acks[20].duplicate is stored
    assert len(set(server.sessions)) == 1


async def test_a_draining_node_is_left_after_its_last_answer(server: ScriptedIngest) -> None:
    server.script = script_of((2, SayGoingAway()))
    server.window_frames = 1  # else every frame might be under way before the announcement
    async with publisher(server, frame_events=10) as p:
        for i in range(100):
            _ = await p.send(event(i))
    assert [number_of(data) for data in server.payloads()] == list(range(100))
    assert server.streams == 2


async def test_a_server_that_restarts_is_found_again(server: ScriptedIngest) -> None:
    async with publisher(server) as p:
        await p.publish(event(0))
        await server.stop()
        handle = await p.send(event(1))
        await server.restart()
        await handle
    assert server.payloads() == [b'"0"', b'"1"']


async def test_a_stream_that_breaks_while_idle_is_opened_again(server: ScriptedIngest) -> None:
    async with publisher(server) as p:
        await p.publish(event(0))
        server.break_streams()
        await p.publish(event(1))
    assert server.streams == 2


async def test_pauses_between_attempts_double_with_jitter_and_end_with_success(
    server: ScriptedIngest,
) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 5:
            server.script = script_of((2, Drop(stored=False)))
        await asyncio.sleep(0)

    server.script = lambda _: Drop(stored=False)
    async with publisher(
        server, backoff_ms=100, backoff_ms_max=1000, random=lambda: 0.5, sleep=sleep
    ) as p:
        await p.publish(event(1))
        await p.publish(event(2))
    # A stream that brought an answer starts the count anew: the sixth loss is not paused for.
    assert pauses == pytest.approx([0.075, 0.15, 0.3, 0.6, 0.75])


async def test_a_revoked_key_fails_every_handle_with_its_reason(server: ScriptedIngest) -> None:
    p = publisher(server)
    await p.publish(event(0))
    server.answering.clear()
    handles = [await p.send(event(i)) for i in range(1, 1001)]
    waiting = asyncio.ensure_future(_wait(handles[-1]))
    async with server.received:
        await server.received.wait_for(lambda: server.frames_received >= 2)
    server.answering.set()
    server.revoke()
    with pytest.raises(errors.Unauthenticated) as caught:
        await waiting
    assert caught.value.reason in ("REVOKED_API_KEY", "INVALID_API_KEY")
    failed = [handle for handle in handles if handle.exception() is not None]
    assert failed
    assert all(isinstance(handle.exception(), errors.Unauthenticated) for handle in failed)
    with pytest.raises(errors.Unauthenticated):
        _ = await p.send(event(2000))
    with pytest.raises(errors.Unauthenticated):
        await p.flush()
    with pytest.raises(errors.Unauthenticated):
        await p.close()
    assert p.stats.events_held == 0


async def _wait(handle: Any) -> Ack:
    ack: Ack = await handle
    return ack


async def test_a_failure_reaches_those_who_wait_for_room(server: ScriptedIngest) -> None:
    server.script = lambda _: End(grpc.StatusCode.PERMISSION_DENIED, "TENANT_OUT_OF_SCOPE")
    p = publisher(server, window_events=1)
    _ = await p.send(event(0))
    with pytest.raises(errors.PermissionDenied):
        _ = await p.send(event(1))
    with pytest.raises(errors.PermissionDenied):
        await p.close()


async def test_a_later_session_of_the_producer_ends_the_earlier_one(
    server: ScriptedIngest,
) -> None:
    first = publisher(server, session=1000)
    await first.publish(event(0))
    async with publisher(server, session=2000) as second:
        await second.publish(event(1))
        with pytest.raises(errors.SessionSuperseded):
            await first.publish(event(2))
        with pytest.raises(errors.SessionSuperseded):
            await first.close()
        await second.publish(event(3))
    assert [number_of(data) for data in server.payloads()] == [0, 1, 3]


async def test_a_session_used_by_an_earlier_life_is_not_mistaken_for_this_one(
    server: ScriptedIngest,
) -> None:
    async with publisher(server, session=1000) as first:
        await first.publish_many(event(i) for i in range(3))
    async with publisher(server, session=1000) as second:
        # Frame 1 of session 1000 is durable already: under that number this would count as a duplicate.
        ack = await second.publish(event(3))
    assert not ack.duplicate
    assert [number_of(data) for data in server.payloads()] == [0, 1, 2, 3]


async def test_a_server_whose_data_went_back_gets_the_unanswered_in_a_new_session(
    server: ScriptedIngest,
) -> None:
    def script(frame: Frame) -> Action:
        if frame.number == 4 and len(set(server.sessions)) == 1:
            server.producers["test-1"].last_frame = 1
            return Drop(stored=False)
        return Take()

    server.script = script
    async with publisher(server, frame_events=10) as p:
        for i in range(3):
            await p.publish(event(i))
        acks = await p.publish_many(event(i) for i in range(3, 40))
    assert all(isinstance(ack, Ack) and not ack.duplicate for ack in acks)
    assert [number_of(data) for data in server.payloads()] == list(range(40))
    assert len(set(server.sessions)) == 2


async def test_close_with_unanswered_events_says_so(server: ScriptedIngest) -> None:
    server.answering.clear()
    p = publisher(server)
    handle = await p.send(event(0))
    with pytest.raises(errors.PublisherClosed, match="1 events"):
        await p.close(timeout_seconds=0.05)
    with pytest.raises(errors.PublisherClosed):
        await handle
    with pytest.raises(errors.PublisherClosed):
        _ = await p.send(event(1))
    await p.close()


async def test_an_error_of_the_block_is_not_hidden_by_the_close(server: ScriptedIngest) -> None:
    server.script = lambda _: End(grpc.StatusCode.PERMISSION_DENIED)

    async def use() -> None:
        async with publisher(server) as p:
            with pytest.raises(errors.PermissionDenied):
                await p.publish(event(0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await use()


async def test_a_cancelled_wait_leaves_the_event_and_other_waits_alone(
    server: ScriptedIngest,
) -> None:
    server.answering.clear()
    async with publisher(server) as p:
        handle = await p.send(event(0))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle, 0.01)
        with pytest.raises(asyncio.InvalidStateError):
            handle.result()
        other = asyncio.ensure_future(_wait(handle))
        server.answering.set()
        assert (await other) == (await handle) == handle.result()


async def test_on_ack_is_told_of_each_frame_in_order(server: ScriptedIngest) -> None:
    reports: list[FrameReport] = []
    server.script = script_of((2, Take(rejected=((0, "EMPTY_PAYLOAD", ""),))))
    async with publisher(server, frame_events=10, on_ack=reports.append) as p:
        for i in range(25):
            _ = await p.send(event(i))
    assert [(r.number, r.events, r.rejected) for r in reports] == [
        (1, 10, 0),
        (2, 10, 1),
        (3, 5, 0),
    ]
    assert all(0 < r.opened_at <= r.sent_at <= r.acked_at for r in reports)


async def test_a_faulty_on_ack_does_not_stop_the_stream(
    server: ScriptedIngest, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(_: FrameReport) -> None:
        raise ZeroDivisionError

    async with publisher(server, on_ack=fault) as p:
        await p.publish(event(0))
        await p.publish(event(1))
    assert "on_ack failed" in caplog.text


async def test_a_fault_of_the_publisher_reaches_those_who_wait(server: ScriptedIngest) -> None:
    async def sleep(_: float) -> None:
        raise ZeroDivisionError

    server.script = lambda _: Drop(stored=False)
    p = publisher(server, sleep=sleep)
    with pytest.raises(errors.PublisherFailed):
        await p.publish(event(0))
    with pytest.raises(errors.PublisherFailed):
        await p.close()


async def test_the_key_is_shown_nowhere(
    server: ScriptedIngest, caplog: pytest.LogCaptureFixture
) -> None:
    p = Publisher(server.target, "or_secret_key", "test-1")
    with pytest.raises(errors.Unauthenticated) as caught:
        await p.publish(event(0))
    with pytest.raises(errors.Unauthenticated):
        await p.close()
    assert "or_secret_key" not in f"{p!r} {caught.value!r} {caplog.text}"


@pytest.mark.parametrize("seed", range(12))
async def test_under_random_faults_every_acked_event_is_stored_exactly_once_in_order(
    server: ScriptedIngest, seed: int
) -> None:
    chance = random.Random(seed)

    def script(_: Frame) -> Action:
        roll = chance.random()
        if roll < 0.06:
            return Drop(stored=chance.random() < 0.5)
        if roll < 0.20:
            return Refuse("OVERLOADED", chance.choice([0.0, 0.001]))
        if roll < 0.23:
            return SayGoingAway()
        if roll < 0.30:
            return Resize(chance.randint(1, 8), chance.choice([2_000, 20_000]))
        if roll < 0.33:
            return End(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", stored=True)
        return Take()

    server.script = script
    server.window_frames, server.window_bytes = 5, 20_000
    acked: list[tuple[int, int | None]] = []
    async with publisher(
        server,
        frame_bytes=4_000,
        frame_events=20,
        window_events=chance.choice([30, 300]),
        linger_ms=0.5,
        random=chance.random,
        sleep=no_pause,
    ) as p:
        handles = []
        for i in range(600):
            size = chance.choice([0, 10, 300, 300, 30_000 if i % 50 == 0 else 0])
            handles.append(await p.send(event(i, tenant=chance.choice(["a", "b"]), size=size)))
            if chance.random() < 0.02:
                await asyncio.sleep(0.002)
        acked = [(i, (await handle).event_id) for i, handle in enumerate(handles)]
    stored = [(number_of(e.data), id_) for _, id_, e in server.log]
    assert stored == acked


# With a spool


async def test_a_dead_modules_events_are_sent_by_its_next_life_once_each(
    server: ScriptedIngest, tmp_path: Path
) -> None:
    # The first life: three frames, of which one is acknowledged, one durable without an answer, one never sent.
    server.window_frames = 1

    def script(frame: Frame) -> Action:
        if frame.number == 1:
            return Take()
        server.answering.clear()
        return Drop(stored=True)

    server.script = script
    first = publisher(server, spool=Spool(tmp_path), frame_events=10, session=1000)
    handles = [await first.send(event(i)) for i in range(30)]
    await handles[0]
    await first.spooled()
    async with server.received:
        await server.received.wait_for(lambda: server.frames_received >= 2)
    await first.close(timeout_seconds=0.05)
    assert isinstance(handles[29].exception(), errors.PublisherClosed)

    server.script = script_of()
    server.answering.set()
    async with publisher(server, spool=Spool(tmp_path), frame_events=10, session=2000) as second:
        assert second.stats.events_held == 20
        handles = [await second.send(event(i)) for i in range(30, 60)]
        acks = [await handle for handle in handles]
    assert [number_of(data) for data in server.payloads()] == list(range(60))
    assert [id_ for _, id_, _ in server.log][30:] == [ack.event_id for ack in acks]
    with Spool(tmp_path) as spool:
        assert spool.resumed == []


async def test_with_a_spool_sending_goes_on_without_a_server_and_memory_stays_bounded(
    server: ScriptedIngest, tmp_path: Path
) -> None:
    await server.stop()
    spool = Spool(tmp_path, fsync="never")
    async with publisher(server, spool=spool, window_bytes=300_000, window_events=10) as p:
        for i in range(2000):
            _ = await p.send(event(i, size=1000))
        await p.spooled()
        held = [frame.message for frame in p._first.queue.frames if frame.message is not None]
        assert sum(map(len, held)) <= 310_000
        assert p.stats.events_held == 2000
        await server.restart()
    assert [number_of(data) for data in server.payloads()] == list(range(2000))


async def test_a_full_spool_makes_send_wait(server: ScriptedIngest, tmp_path: Path) -> None:
    server.answering.clear()
    spool = Spool(tmp_path, bytes_max=BYTES_MIN, fsync="never")
    async with publisher(server, spool=spool) as p:
        size = 1_000_000
        for i in range(spool.unanswered_bytes_max // (size + 100)):
            _ = await p.send(event(i, size=size))
        waiting = asyncio.ensure_future(p.send(event(999, size=size)))
        await asyncio.wait([waiting], timeout=0.05)
        assert not waiting.done()
        assert spool.size <= BYTES_MIN
        server.answering.set()
        _ = await waiting
    assert number_of(server.payloads()[-1]) == 999


async def test_a_frame_leaves_only_after_the_spool_flushed_it(
    server: ScriptedIngest, tmp_path: Path
) -> None:
    class Gated(Spool):
        gate = threading.Event()
        entered = threading.Event()

        @override
        def flush(self) -> None:
            self.entered.set()
            assert self.gate.wait(10)
            super().flush()

    spool = Gated(tmp_path)
    spool.gate.set()
    async with publisher(server, spool=spool, linger_ms=0) as p:
        await p.publish(event(0))
        spool.gate.clear()
        spool.entered.clear()
        handle = await p.send(event(1))
        await asyncio.to_thread(spool.entered.wait, 10)
        # The stream is open and idle: without the rule the writer would have taken the frame by now.
        for _ in range(20):
            await asyncio.sleep(0)
        assert p._first.queue.frames[0].sent_at == 0
        assert not handle.done()
        spool.gate.set()
        await handle


async def test_a_spool_that_cannot_be_written_fails_the_publisher(
    server: ScriptedIngest, tmp_path: Path
) -> None:
    class Full(Spool):
        @override
        def append(self, frame: Any) -> None:
            raise errors.SpoolError("no disk space is left")

    p = publisher(server, spool=Full(tmp_path))
    handle = await p.send(event(0))
    with pytest.raises(errors.SpoolError):
        await handle
    with pytest.raises(errors.SpoolError):
        await p.close()


async def test_a_key_that_fails_leaves_the_events_to_a_later_life(
    server: ScriptedIngest, tmp_path: Path
) -> None:
    server.revoke()
    p = publisher(server, spool=Spool(tmp_path))
    handle = await p.send(event(0))
    with pytest.raises(errors.Unauthenticated):
        await handle
    with pytest.raises(errors.Unauthenticated):
        await p.close()
    server.api_key = KEY
    async with publisher(server, spool=Spool(tmp_path)) as second:
        await second.flush()
    assert server.payloads() == [b'"0"']


async def test_data_that_went_back_is_answered_from_the_spool_too(
    server: ScriptedIngest, tmp_path: Path
) -> None:
    async with publisher(server, spool=Spool(tmp_path), session=1000) as first:
        await first.publish(event(0))
        await first.publish(event(1))
        server.answering.clear()
        _ = await first.send(event(2))
        await first.spooled()
        await first.close(timeout_seconds=0.05)
    server.answering.set()
    server.log.clear()
    server.producers.clear()
    async with publisher(server, spool=Spool(tmp_path), session=2000) as second:
        await second.publish(event(3))
    assert [number_of(data) for data in server.payloads()] == [2, 3]


@pytest.mark.parametrize("seed", range(6))
async def test_over_any_lives_and_faults_spooled_events_are_stored_exactly_once_in_order(
    server: ScriptedIngest, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)

    def script(_: Frame) -> Action:
        roll = chance.random()
        if roll < 0.1:
            return Drop(stored=chance.random() < 0.5)
        if roll < 0.2:
            return Refuse()
        return Take()

    server.script = script
    server.window_frames = 4
    sent = 0
    for life in range(8):
        spool = Spool(tmp_path, fsync=chance.choice(["always", "never"]))
        p = publisher(
            server,
            spool=spool,
            frame_events=7,
            window_bytes=chance.choice([1, 10_000]),
            session=1000 + life,
            sleep=no_pause,
        )
        for _ in range(chance.randint(0, 80)):
            _ = await p.send(event(sent))
            sent += 1
            if chance.random() < 0.05:
                await asyncio.sleep(0.001)
        await p.spooled()
        await p.close(timeout_seconds=chance.choice([0, 0.002, 0.01]))
    async with publisher(server, spool=Spool(tmp_path)) as last:
        await last.flush()
    assert [number_of(data) for data in server.payloads()] == list(range(sent))


_MODULE = """
import asyncio, sys
from outrider import Event, Publisher, Spool

async def main(target, key, folder, first):
    spool = Spool(folder, fsync="never")
    async with Publisher(target, key, "test-1", tenant="demo", spool=spool, frame_events=5) as p:
        for number in range(first, 10**9):
            _ = await p.send(Event(type="a.b", data=b'"%d"' % number))
            if number % 7 == 0:
                await p.spooled()
                print(number, flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
"""


async def test_a_killed_module_loses_nothing_that_was_spooled_and_doubles_nothing(
    server: ScriptedIngest, tmp_path: Path
) -> None:
    chance = random.Random(1)
    server.script = lambda _: (
        Drop(stored=chance.random() < 0.5) if chance.random() < 0.05 else Take()
    )
    first = 0
    kept: list[range] = []
    for life in range(3):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _MODULE, server.target, KEY, str(tmp_path), str(first)),
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        for _ in range(20 + 30 * life):
            spooled = int(await process.stdout.readline())
        process.kill()
        *rest, _ = (await process.stdout.read()).split(b"\n")
        await process.wait()
        spooled = int(rest[-1]) if rest else spooled
        kept.append(range(first, spooled + 1))
        first = spooled + 1000
    server.script = script_of()
    async with publisher(server, spool=Spool(tmp_path)) as last:
        await last.flush()
    stored = [number_of(data) for data in server.payloads()]
    assert len(stored) == len(set(stored))
    assert stored == sorted(stored)
    assert set(stored).issuperset(number for life in kept for number in life)
