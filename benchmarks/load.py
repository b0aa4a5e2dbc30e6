"""A process that publishes through the real client: several producers, an open loop at a rate or a closed one at the limit.

Open loop: event `n` is meant to be sent `n / rate` seconds after the start, and every latency counts from there, so time
that a full window costs is in the figures. Closed loop (`rate` 0): each producer sends as fast as its window lets it, while
the events published and not yet delivered stay below a bound; its latencies tell of the bound rather than of the server.

    python -m benchmarks.load SPECIFICATION     (started by `benchmarks.run`; ends when its standard input does)
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.board import Board, Received, Sent
from benchmarks.latency import Latencies
from benchmarks.ledger import SAMPLE_EVERY
from benchmarks.loop import run_loop, until_told
from benchmarks.scenario import (
    LARGE_BYTES,
    LARGE_TYPE,
    Plan,
    due,
    intended_us,
    large_tail,
    payload,
    payload_tail,
    topology_of,
)
from outrider import FrameReport, Handle, OutriderError, Publisher
from outrider.v1.event_pb2 import Event

SOURCE = "benchmarks"
TICK_SECONDS = 0.001
FLUSH_SECONDS_MAX = 60.0
CHECK_EVERY = 64
"""Events a producer of the closed loop sends between two looks at how far the deliveries are."""


class Producer:
    """One publisher, and the intended times of what it has not had acknowledged yet. `number` is that of the run."""

    def __init__(
        self,
        load: Load,
        number: int,
        target: str,
        key: str,
        name: str,
        linger_ms: float,
        *,
        follow_homes: bool,
    ) -> None:
        self.number = number
        self.sent = 0
        self.acked = 0
        self.rejected = 0
        self.duplicate_frames = 0
        self.times: defaultdict[str, deque[int]] = defaultdict(deque)
        self._acked_of: Counter[str] = Counter()
        self._load = load
        self.publisher = Publisher(
            target,
            key,
            name,
            linger_ms=linger_ms,
            follow_homes=follow_homes,
            on_ack=self._acked,
        )

    def _acked(self, report: FrameReport) -> None:
        """A tenant's events are acknowledged in order, so its oldest times are those of this frame's events."""
        load = self._load
        now_us = load.now_us()
        of_frame: list[int] = []
        for tenant, events in report.tenants.items():
            times = self.times[tenant]
            of_frame += [times.popleft() for _ in range(events)]
            self._acked_of[tenant] += events
        self.acked += report.events
        self.rejected += report.rejected
        self.duplicate_frames += report.duplicate
        load.acknowledged(of_frame, now_us, report)

    def acked_in_order(self, tenants: Iterable[str]) -> int:
        """How many of its first events are acknowledged without a gap; `tenants` are those of its events, in order.

        Over several lines a later event may be acknowledged before an earlier one of another tenant.
        """
        if self.acked == self.sent:
            return self.acked
        left = Counter(self._acked_of)
        for count, tenant in enumerate(tenants):
            if not left[tenant]:
                return count
            left[tenant] -= 1
        return self.acked


class Load:
    """One generator of a run: numbers that are its own modulo the count of generators, in order."""

    def __init__(self, specification: Mapping[str, Any]) -> None:
        self.plan = plan = Plan.from_json(specification["plan"])
        self.index: int = specification["index"]
        self.acks = [Latencies() for _ in plan.phases()]
        self.frames = 0
        self.frame_events = 0
        self.samples: dict[int, int | None] = {}
        self._sampled: deque[tuple[int, Handle]] = deque()
        self._phases = plan.phases()
        self._board = Board(Path(specification["board"]))
        self._row = self._board.row(specification["process"])
        first = specification["receivers_first"]
        self._receivers = range(first, first + plan.receivers)
        routes = topology_of(plan, specification["mark"]).routes
        self._tails = [
            payload_tail(route, plan.size, serial) for serial, route in enumerate(routes)
        ]
        self._kinds = [(route.tenant, route.type) for route in routes]
        self._epoch_us = 0
        self._end_us = int(plan.load_seconds * 1e6)
        self.producers = [
            Producer(
                self,
                number,
                specification["target"],
                specification["key"],
                f"bench-{specification['mark']}-{number}",
                plan.publisher_linger_ms,
                follow_homes=plan.follow_homes,
            )
            for number in range(self.index, plan.producers, plan.generators)
        ]

    def now_us(self) -> int:
        """Microseconds since the start of the load."""
        return time.monotonic_ns() // 1000 - self._epoch_us

    def acknowledged(self, times: list[int], now_us: int, report: FrameReport) -> None:
        """A frame was answered."""
        at = times[0]
        for (_, begin, end), latencies in zip(self._phases, self.acks, strict=True):
            if begin <= at < end:
                self.frames += 1
                self.frame_events += report.events
                latencies.add([now_us - time_us for time_us in times])

    async def run(self, epoch_us: int) -> None:
        """Publish until the time is over, then until everything is answered."""
        self._epoch_us = epoch_us
        await asyncio.sleep(max(0.0, -self.now_us() / 1e6))
        async with asyncio.TaskGroup() as tasks:
            shower = tasks.create_task(self._show())
            if self.plan.rate:
                await self._open_loop()
            else:
                async with asyncio.TaskGroup() as closed:
                    for producer in self.producers:
                        closed.create_task(self._closed_loop(producer))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS_MAX):
                    for producer in self.producers:
                        await producer.publisher.flush()
            shower.cancel()
        self._look()

    async def _open_loop(self) -> None:
        plan = self.plan
        rate, step = plan.rate, plan.generators
        by_number = {producer.number: producer for producer in self.producers}
        number = self.index
        events = plan.events()
        while number < events:
            until = min(due(rate, self.now_us()), events)
            while number < until:
                producer = by_number[number % plan.producers]
                await self._send(producer, number, intended_us(rate, number))
                number += step
            self._row[Sent.SENT] = sum(producer.sent for producer in self.producers)
            await asyncio.sleep(TICK_SECONDS)

    async def _closed_loop(self, producer: Producer) -> None:
        plan = self.plan
        most = plan.events()
        number = producer.number
        while self.now_us() < self._end_us and number < most:
            # A look at shared memory each millisecond: no message could wake us.
            while self._ahead() > plan.outstanding and self.now_us() < self._end_us:  # noqa: ASYNC110
                await asyncio.sleep(TICK_SECONDS)
            for _ in range(CHECK_EVERY):
                await self._send(producer, number, self.now_us())
                number += plan.producers

    def _ahead(self) -> int:
        """Events published and not yet delivered, by all generators."""
        plan, board = self.plan, self._board
        self._row[Sent.SENT] = sum(producer.sent for producer in self.producers)
        sent = board.total(range(plan.generators), Sent.SENT)
        return sent - board.total(self._receivers, Received.DELIVERIES) // plan.copies

    async def _send(self, producer: Producer, number: int, time_us: int) -> None:
        route = number % len(self._tails)
        tenant, type_ = self._kinds[route]
        # A new one each time: a message keeps every value that a field of it ever had.
        event = Event(
            tenant=tenant,
            type=type_,
            source=SOURCE,
            data=payload(number, time_us, self._tails[route]),
        )
        # Before the call: the frame may be answered before the call returns to us.
        producer.times[tenant].append(time_us)
        producer.sent += 1
        handle = await producer.publisher.send(event)
        if number % SAMPLE_EVERY == 0:
            self._sampled.append((number, handle))

    async def _show(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            self._look()

    def _look(self) -> None:
        row = self._row
        row[Sent.SENT] = sum(producer.sent for producer in self.producers)
        row[Sent.ACKED] = sum(producer.acked for producer in self.producers)
        row[Sent.REJECTED] = sum(producer.rejected for producer in self.producers)
        stats = [producer.publisher.stats for producer in self.producers]
        row[Sent.FRAMES] = sum(one.frames_acked for one in stats)
        row[Sent.REFUSED] = sum(one.frames_refused for one in stats)
        row[Sent.RESENT] = sum(one.frames_resent for one in stats)
        while self._sampled and self._sampled[0][1].done():
            number, handle = self._sampled.popleft()
            if handle.exception() is None:
                self.samples[number] = handle.result().event_id

    def report(self) -> dict[str, Any]:
        """The end's account."""
        stats = [producer.publisher.stats for producer in self.producers]
        return {
            "sent": {str(producer.number): producer.sent for producer in self.producers},
            "acked": {
                str(producer.number): producer.acked_in_order(self._tenants_of(producer))
                for producer in self.producers
            },
            "rejected": sum(producer.rejected for producer in self.producers),
            "duplicate_frames": sum(producer.duplicate_frames for producer in self.producers),
            "frames": self.frames,
            "frame_events": self.frame_events,
            "frames_refused": sum(one.frames_refused for one in stats),
            "frames_resent": sum(one.frames_resent for one in stats),
            "streams_opened": sum(one.streams_opened for one in stats),
            "event_ids": {str(number): told for number, told in self.samples.items()},
            "acks": [latencies.encode() for latencies in self.acks],
        }

    def _tenants_of(self, producer: Producer) -> Iterator[str]:
        """The tenant of each event that the producer sent."""
        step, kinds = self.plan.producers, self._kinds
        for place in range(producer.sent):
            yield kinds[(producer.number + place * step) % len(kinds)][0]

    async def close(self) -> None:
        """End the streams. What is unanswered by now is told in the report already."""
        for producer in self.producers:
            with contextlib.suppress(OutriderError):
                await producer.publisher.close(timeout_seconds=1.0)


class LargeLoad:
    """The generator of large events: one a second from the begin of the last phase."""

    def __init__(self, specification: Mapping[str, Any]) -> None:
        self.plan = Plan.from_json(specification["plan"])
        self.acks = Latencies()
        self.sent = self.acked = self.rejected = 0
        self._epoch_us = 0
        self._tail = large_tail(LARGE_BYTES)
        self._tenant = topology_of(self.plan, specification["mark"]).tenants[0]
        self._times: deque[int] = deque()
        self._publisher = Publisher(
            specification["target"],
            specification["key"],
            f"bench-{specification['mark']}-large",
            on_ack=self._acked,
        )

    def _now_us(self) -> int:
        return time.monotonic_ns() // 1000 - self._epoch_us

    def _acked(self, report: FrameReport) -> None:
        # One tenant: its events are acknowledged in the order they were sent.
        self.acks.add([self._now_us() - self._times.popleft() for _ in range(report.events)])
        self.acked += report.events
        self.rejected += report.rejected

    async def run(self, epoch_us: int) -> None:
        """Publish one event a second until the time is over."""
        self._epoch_us = epoch_us
        _, begin, end = self.plan.phases()[-1]
        for number, time_us in enumerate(range(begin, end, 1_000_000)):
            await asyncio.sleep(max(0.0, (time_us - self._now_us()) / 1e6))
            event = Event(
                tenant=self._tenant,
                type=LARGE_TYPE,
                source=SOURCE,
                data=payload(number, time_us, self._tail),
            )
            self._times.append(time_us)
            self.sent += 1
            _ = await self._publisher.send(event)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS_MAX):
                await self._publisher.flush()

    def report(self) -> dict[str, Any]:
        """The end's account."""
        return {
            "sent": self.sent,
            "acked": self.acked,
            "rejected": self.rejected,
            "acks": self.acks.encode(),
        }

    async def close(self) -> None:
        """End the stream."""
        with contextlib.suppress(OutriderError):
            await self._publisher.close(timeout_seconds=1.0)


async def _generate(specification: Mapping[str, Any]) -> None:
    load = LargeLoad(specification) if specification["large"] else Load(specification)
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    orders = until_told()
    async for order in orders:
        if order.startswith("start "):
            break
    else:
        return
    running = asyncio.ensure_future(load.run(int(order.split()[1])))
    gone = asyncio.ensure_future(anext(orders, None))
    # The end of the input means that whoever started this is gone.
    await asyncio.wait([running, gone], return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        running.cancel()
        return
    try:
        running.result()
    except (OutriderError, BaseExceptionGroup) as error:
        print(json.dumps({"error": _said(error)}), flush=True)
        return
    print(json.dumps(load.report()), flush=True)
    # Until then its CPU and memory are still looked at.
    await gone
    await load.close()


def _said(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    run_loop(_generate(json.loads(Path(sys.argv[1]).read_text())))
