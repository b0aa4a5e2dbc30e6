"""When a request starts: never without the lease, never beyond a bound, and in turns among those that wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog
from tests.support.node import until

from outrider_server.domain.endpoint import (
    BatchPolicy,
    DeliveryMode,
    Endpoint,
    RateLimit,
    RetryPolicy,
)
from outrider_server.domain.event import EVENT_OVERHEAD_BYTES, Event
from outrider_server.domain.outcome import AttemptError, Outcome, Verdict
from outrider_server.domain.sequence import sequence_of
from outrider_server.domain.subscription import Subscription
from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.pipeline.deliver import TURNS_MAX, Deliverer, DeliverLimits
from outrider_server.policy.checkpoint import Window
from outrider_server.policy.lane import Lane
from outrider_server.policy.obligations import Limits, Obligations
from outrider_server.telemetry.counters import DeliverCounters, TelemetryCounters
from outrider_server.telemetry.logs import PipelineLog

START_US = 1_700_000_000_000_000
DELIVERED = Outcome(Verdict.DELIVERED, 200, AttemptError.NONE, 1.0)
FAILED = Outcome(Verdict.RETRY, 500, AttemptError.STATUS, 1.0)


@dataclass
class FakeSender:
    """Keeps what it is given; answers when told."""

    requests: list[tuple[int, str, bytes]] = field(default_factory=list)
    answers: list[asyncio.Future[Outcome]] = field(default_factory=list)

    async def send(
        self, endpoint: Endpoint, message_id: str, body: bytes, content_type: str, timestamp: int
    ) -> Outcome:
        self.requests.append((endpoint.id, message_id, body))
        self.answers.append(asyncio.get_running_loop().create_future())
        return await self.answers[-1]

    @property
    def open(self) -> list[asyncio.Future[Outcome]]:
        return [answer for answer in self.answers if not answer.done()]


@dataclass
class Bench:
    """A deliverer over real obligations, a fake sender and a clock that a test turns."""

    sender: FakeSender
    obligations: Obligations
    deliverer: Deliverer
    counters: DeliverCounters
    now_us: list[int]
    holds: list[bool]
    steady_us: list[int]
    published: int = 0

    def configure(self, *endpoints: Endpoint) -> None:
        """These are the endpoints, each with a subscription of the same number."""
        woken = self.obligations.configure(
            0, 1, endpoints, [Subscription(e.id, 1, f"s{e.id}", e.id, ("*",)) for e in endpoints]
        )
        self.deliverer.wake_all(woken)

    def wake(self) -> None:
        """Let every lane look whether it may send."""
        self.deliverer.wake_all(self.obligations.lanes.values())

    def publish(self, *subscriptions: int, count: int = 1) -> None:
        woken: set[Lane] = set()
        for _ in range(count):
            self.published += 1
            event = Event(
                1, "a.b", b"1", 0, sequence=sequence_of(self.now_us[0] + self.published, 0),
                targets=subscriptions, size=1 + EVENT_OVERHEAD_BYTES,
            )  # fmt: skip
            self.obligations.assigned(
                self.obligations.windows[event.sequence & 63], [event], event.sequence
            )
            self.obligations.committed(event, woken)
        self.deliverer.wake_all(woken)

    def record(self) -> None:
        plan = self.obligations.plan_record(self.now_us[0])
        if plan is not None:
            self.obligations.recorded(plan)
        self.deliverer.recorded()

    async def started(self, count: int) -> None:
        """Until so many requests have started in all, and no more."""
        await until(lambda: len(self.sender.requests) >= count)
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(self.sender.requests) == count

    def answer(self, outcome: Outcome = DELIVERED, count: int = 1) -> None:
        for answer in self.sender.open[:count]:
            answer.set_result(outcome)


@asynccontextmanager
async def bench(
    *endpoints: Endpoint, wants: Callable[[Lane], None] = lambda _: None, **limits: int
) -> AsyncIterator[Bench]:
    now_us, holds, steady_us, sender = [START_US], [True], [0], FakeSender()
    obligations = Obligations(Limits())
    obligations.windows[0] = Window(0, 1, 0, 0, 0)
    counters = DeliverCounters()
    async with asyncio.TaskGroup() as tasks:
        deliverer = Deliverer(
            obligations=obligations,
            sender=sender,
            clock=DatabaseClock(lambda: now_us[0]),
            limits=DeliverLimits(**limits),
            lease_holds=lambda: holds[0],
            wants_catch_up=wants,
            random=lambda: 0.5,
            counters=counters,
            log=PipelineLog(clock=lambda: 0.0, counters=TelemetryCounters(), lines_per_second=1000),
            tasks=tasks,
            steady_us=lambda: steady_us[0],
        )
        made = Bench(sender, obligations, deliverer, counters, now_us, holds, steady_us)
        made.configure(*endpoints)
        try:
            with structlog.testing.capture_logs():
                yield made
        finally:
            deliverer.stop()
            made.answer(count=10_000)


def endpoint(number: int, concurrency: int = 8, **fields: object) -> Endpoint:
    return Endpoint(number, 1, f"e{number}", "http://x/", (), concurrency=concurrency, **fields)  # type: ignore[arg-type]


async def test_an_endpoint_gets_as_many_requests_as_its_concurrency_allows() -> None:
    async with bench(endpoint(1, 2), endpoint(2, 8)) as b:
        b.publish(1, 2, count=5)
        await b.started(7)
        assert [number for number, _, _ in b.sender.requests].count(1) == 2
        first = next(i for i, (number, _, _) in enumerate(b.sender.requests) if number == 1)
        b.sender.answers[first].set_result(DELIVERED)
        await b.started(8)


async def test_nothing_starts_without_the_lease_and_all_goes_on_with_it() -> None:
    async with bench(endpoint(1), endpoint(2)) as b:
        b.holds[0] = False
        b.publish(1, 2, count=3)
        await b.started(0)
        b.record()
        await b.started(0)
        b.holds[0] = True
        b.record()
        await b.started(6)


async def test_the_nodes_bound_is_kept_and_lanes_take_turns() -> None:
    async with bench(*(endpoint(n, 100) for n in range(1, 4)), requests_in_flight_max=2) as b:
        for n in range(1, 4):
            b.publish(n, count=4)
        await b.started(2)
        for sent in range(3, 10):
            b.answer()
            await b.started(sent)
            assert b.deliverer.in_flight == 2
        # Two had waited while one filled the bound: neither waits for the other's whole queue.
        order = [number for number, _, _ in b.sender.requests]
        assert order.index(2) <= 8
        assert order.index(3) <= 8


async def test_a_lane_that_hangs_leaves_room_for_every_other() -> None:
    async with bench(*(endpoint(n, 100) for n in range(1, 5)), requests_in_flight_max=12) as b:
        b.publish(1, count=50)
        await b.started(6)  # half of what there is
        b.publish(2, count=50)
        await b.started(9)  # a half of the rest: two that hang leave a third
        b.publish(3)
        b.publish(4)
        await b.started(11)
        assert [number for number, _, _ in b.sender.requests][-2:] == [3, 4]
        assert b.deliverer.in_flight == 11


async def test_sending_stops_while_too_much_is_not_recorded() -> None:
    async with bench(endpoint(1, 1), outcomes_unrecorded_max=3, requests_in_flight_max=1) as b:
        b.publish(1, count=10)
        for sent in range(1, 4):
            await b.started(sent)
            b.answer()
        await b.started(3)
        b.record()
        await b.started(4)


async def test_a_batch_waits_for_its_linger_or_for_its_size() -> None:
    policy = BatchPolicy(events_max=3, linger_ms=1.0)
    async with bench(endpoint(1, mode=DeliveryMode.BATCH, batch=policy)) as b:
        b.publish(1, count=2)
        await asyncio.sleep(0)
        assert b.sender.requests == []
        b.publish(1)
        await b.started(1)
        b.publish(1)
        b.now_us[0] += 2000
        await b.started(2)
        assert [body.count(b'"id"') for _, _, body in b.sender.requests] == [3, 1]


async def test_a_failure_is_owed_for_its_time_and_counted() -> None:
    wanted: list[Lane] = []
    retry = RetryPolicy(base_seconds=1, jitter=0, attempts_max=2)
    async with bench(endpoint(1, retry=retry), wants=wanted.append) as b:
        b.publish(1)
        await b.started(1)
        b.answer(FAILED)
        await until(lambda: b.counters.deliveries_retried == 1)
        plan = b.obligations.plan_record(b.now_us[0])
        assert plan is not None
        (row,) = plan.owed_inserts
        assert (row.attempt, row.due_us) == (1, START_US + 1_000_000)
        assert b.deliverer.in_flight == 0
        assert b.counters.errors.counts == {("status",): 1}


async def test_quiet_comes_when_the_last_request_has_ended() -> None:
    async with bench(endpoint(1)) as b:
        await asyncio.wait_for(b.deliverer.quiet(), 5)
        b.publish(1, count=2)
        await b.started(2)
        b.deliverer.stop()
        quiet = asyncio.ensure_future(b.deliverer.quiet())
        b.answer()
        await asyncio.sleep(0)
        b.publish(1)
        assert not quiet.done()
        b.answer()
        await asyncio.wait_for(quiet, 5)
        assert len(b.sender.requests) == 2


PER_MS = RateLimit(1000, 1_000_000)


async def test_an_endpoint_with_a_rate_limit_is_called_at_its_pace() -> None:
    async with bench(endpoint(1, rate_limit=PER_MS)) as b:
        b.publish(1, count=3)
        for sent in range(3):
            b.steady_us[0] += 999
            b.wake()
            await b.started(sent)
            b.steady_us[0] += 1
            await b.started(sent + 1)


async def test_a_step_of_the_databases_clock_lets_nothing_more_through() -> None:
    async with bench(endpoint(1, rate_limit=PER_MS)) as b:
        b.publish(1, count=3)
        b.steady_us[0] += 1000
        await b.started(1)
        b.now_us[0] += 3_600_000_000
        b.wake()
        await b.started(1)


async def test_a_batch_counts_as_one_request() -> None:
    policy = BatchPolicy(events_max=3, linger_ms=1000)
    batched = endpoint(1, mode=DeliveryMode.BATCH, batch=policy, rate_limit=PER_MS)
    async with bench(batched) as b:
        b.publish(1, count=6)
        b.steady_us[0] += 1000
        b.wake()
        await b.started(1)
        b.steady_us[0] += 1000
        await b.started(2)
        assert [body.count(b'"id"') for _, _, body in b.sender.requests] == [3, 3]


async def test_endpoints_that_wait_for_their_pace_take_no_turn_from_others() -> None:
    paced = [endpoint(n, rate_limit=RateLimit(1)) for n in range(3, 3 + 2 * TURNS_MAX)]
    async with bench(endpoint(1), endpoint(2), *paced, requests_in_flight_max=1) as b:
        b.publish(1)
        await b.started(1)
        for each in paced:
            b.publish(each.id)
        b.publish(2)
        await b.started(1)
        b.answer()
        await b.started(2)
        assert b.sender.requests[-1][0] == 2


async def test_a_limit_that_is_raised_holds_from_then_on() -> None:
    """The timer that waits for the old one is far away."""
    async with bench(endpoint(1, rate_limit=RateLimit(1, 86_400_000_000))) as b:
        b.publish(1)
        await b.started(0)
        b.configure(endpoint(1, rate_limit=PER_MS))
        b.steady_us[0] += 1000
        await b.started(1)
