"""Deliver: what a lane's policies allow goes out in one signed request, and its outcome is noted.

Rules:
- A request starts only while the lease holds, by the local clock, and while the outcomes not yet recorded and the requests
  in flight are within their bounds. Lanes that must wait for that queue up and take turns.
- One task sends for a lane request after request for as long as it is ready, so tasks are few; none waits idle.
- One endpoint cannot hold another back: every lane has its own concurrency, and turns are in order of arrival.
- A lane that is not ready (a batch that waits for company, a rate limit) holds no turn: it has one timer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from outrider_server.domain.delivery import Delivery
from outrider_server.domain.endpoint import DeliveryMode, Endpoint
from outrider_server.domain.outcome import AttemptError, Outcome, Verdict
from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.policy import envelope
from outrider_server.policy.lane import Lane
from outrider_server.policy.obligations import Obligations
from outrider_server.policy.retry import next_attempt_at
from outrider_server.telemetry.counters import DeliverCounters
from outrider_server.telemetry.logs import PipelineLog

TURNS_MAX = 16
"""Waiting lanes looked at when a request ends: each may have its share already. The rest have their turn soon."""

TIMER_SECONDS_MAX = 60.0
"""A timer is set anew at least so often: it holds the lane of a deleted endpoint no longer than that."""

_TIMER_SLACK_SECONDS = 0.001
"""A timer that fires so much too late is not worth another."""


class Sender(Protocol):
    """Sends one request; see `transport.webhook.WebhookSender.send`."""

    async def send(
        self, endpoint: Endpoint, message_id: str, body: bytes, content_type: str, timestamp: int
    ) -> Outcome:
        """One signed request and its outcome; raises nothing but cancellation."""
        ...


@dataclass(frozen=True, slots=True)
class DeliverLimits:
    """Bounds over all lanes of the node."""

    requests_in_flight_max: int = 2000
    outcomes_unrecorded_max: int = 200_000


class Deliverer:
    """Starts requests for lanes and settles them. `random` gives numbers in [0, 1).

    `steady_us` paces endpoints with a rate limit. Nobody sets that clock, unlike those of the machine and the database, so
    no step of theirs lets more through.
    """

    def __init__(
        self,
        *,
        obligations: Obligations,
        sender: Sender,
        clock: DatabaseClock,
        limits: DeliverLimits,
        lease_holds: Callable[[], bool],
        wants_catch_up: Callable[[Lane], None],
        random: Callable[[], float],
        counters: DeliverCounters,
        log: PipelineLog,
        tasks: asyncio.TaskGroup,
        steady_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ) -> None:
        self._obligations = obligations
        self._sender = sender
        self._clock = clock
        self._limits = limits
        self._lease_holds = lease_holds
        self._wants_catch_up = wants_catch_up
        self._random = random
        self._counters = counters
        self._log = log
        self._tasks = tasks
        self._steady_us = steady_us
        self._loop = asyncio.get_running_loop()
        self._in_flight = 0
        # With the time it was set for: not every loop's handle tells that of a timer that is due at once.
        self._timers: dict[Lane, tuple[float, asyncio.TimerHandle]] = {}
        self._turns: dict[Lane, None] = {}
        self._stopped = False
        self._quiet = asyncio.Event()
        self._quiet.set()

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return self._in_flight

    def wake_all(self, lanes: Iterable[Lane]) -> None:
        """These lanes got something to send."""
        for lane in lanes:
            self.wake(lane)

    def wake(self, lane: Lane) -> None:
        """Start as many requests of the lane as it is ready for and its concurrency allows."""
        while deliveries := self._take(lane):
            sending = self._send_on(lane, deliveries)
            try:
                self._tasks.create_task(sending)
            except RuntimeError:  # the tenure is ending; everything here is about to be forgotten
                sending.close()
                self._stopped = True

    def recorded(self) -> None:
        """Outcomes became durable: those that waited for it, or for the lease, may go on."""
        self._next_turns()

    def stop(self) -> None:
        """Start no more requests."""
        self._stopped = True
        for _, timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    async def quiet(self) -> None:
        """Wait until no request is under way."""
        await self._quiet.wait()

    def _take(self, lane: Lane) -> list[Delivery]:
        """What the lane's next request carries, now; else nothing, with whatever is needed to come back to it."""
        if self._stopped or lane.in_flight >= lane.concurrency:
            return []
        if not lane.queue and not lane.spill:
            return []
        wait_us = lane.ready_in_us(self._clock.now_us())
        if wait_us is None:
            return []
        limiter = lane.limiter
        if limiter is not None:
            wait_us = max(wait_us, limiter.ready_in_us(self._steady_us()))
        if wait_us:
            self._come_back(lane, wait_us)
            return []
        # A lane may hold as many requests as are left for all others: one that hangs gets half of them, n of them leave
        # one part in n + 1, so the next lane always finds room.
        if (
            self._closed()
            or lane.in_flight >= self._limits.requests_in_flight_max - self._in_flight
        ):
            self._turns[lane] = None
            return []
        deliveries = self._obligations.take(lane)
        if deliveries:
            if limiter is not None:
                limiter.take(self._steady_us())
            self._in_flight += 1
            self._quiet.clear()
        return deliveries

    def _come_back(self, lane: Lane, wait_us: int) -> None:
        """Wake the lane then: by the timer it has, unless it is ready sooner now than when that was set."""
        at = self._loop.time() + min(wait_us / 1e6, TIMER_SECONDS_MAX)
        when, timer = self._timers.get(lane, (at, None))
        if timer is not None:
            if when <= at + _TIMER_SLACK_SECONDS:
                return
            timer.cancel()
        self._timers[lane] = at, self._loop.call_at(at, self._ripe, lane)

    def _ripe(self, lane: Lane) -> None:
        self._timers.pop(lane, None)
        self.wake(lane)

    async def _send_on(self, lane: Lane, deliveries: list[Delivery]) -> None:
        """Send request after request of a lane for as long as it is ready."""
        while deliveries:
            endpoint = lane.endpoint
            try:
                message_id, body = _message(endpoint, deliveries)
            except Exception as error:  # noqa: BLE001 - one event that cannot be written must not end the tenure
                outcome, body = _unwritable(error), b""
            else:
                outcome = await self._sender.send(
                    endpoint,
                    message_id,
                    body,
                    envelope.CONTENT_TYPE,
                    self._clock.now_us() // 1_000_000,
                )
            self._settle(lane, endpoint, deliveries, outcome, len(body))
            if self._turns:
                self._next_turns()
            deliveries = self._take(lane)
        if lane.queue:
            self.wake(lane)

    def _settle(
        self,
        lane: Lane,
        endpoint: Endpoint,
        deliveries: list[Delivery],
        outcome: Outcome,
        body_bytes: int,
    ) -> None:
        now_us = self._clock.now_us()
        counters = self._counters
        self._in_flight -= 1
        if self._in_flight == 0:
            self._quiet.set()
        counters.attempts += 1
        counters.bytes += body_bytes
        counters.attempt_seconds.observe(outcome.duration_ms / 1000)
        first = deliveries[0].event.sequence

        spread = (
            self._random()
        )  # one for the whole request: what failed together comes back together

        def retry_due(attempt: int, event_us: int) -> int | None:
            due = next_attempt_at(endpoint.retry, attempt, spread, now_us / 1e6, event_us / 1e6)
            return None if due is None else int(due * 1e6)

        if outcome.verdict is Verdict.DELIVERED:
            counters.deliveries_delivered += len(deliveries)
            for delivery in deliveries:
                counters.end_to_end_seconds.observe(
                    (now_us - (delivery.event.sequence >> 10)) / 1e6
                )
            self._obligations.settle(lane, deliveries, outcome, retry_due)
        else:
            counters.errors.add(outcome.error.name.lower())
            attempt = max(d.attempt for d in deliveries) + 1
            result = self._obligations.settle(lane, deliveries, outcome, retry_due)
            counters.deliveries_retried += result.retried
            counters.deliveries_dead += result.dead
            self._log.log_attempt_failed(
                tenant=endpoint.tenant,
                endpoint=endpoint.id,
                outcome=outcome,
                deliveries=len(deliveries),
                attempt=attempt,
                first_sequence=first,
                retry_seconds=None
                if result.due_us is None
                else max(0.0, (result.due_us - now_us) / 1e6),
            )
        if lane.wants_catch_up(now_us):
            self._wants_catch_up(lane)

    def _closed(self) -> bool:
        """Whether no request of any lane may start now."""
        return (
            self._in_flight >= self._limits.requests_in_flight_max
            or self._obligations.unrecorded() >= self._limits.outcomes_unrecorded_max
            or not self._lease_holds()
        )

    def _next_turns(self) -> None:
        """Let lanes that wait for a common bound go on, in the order in which they came."""
        for lane in list(islice(self._turns, TURNS_MAX)):
            if self._closed():
                return
            del self._turns[lane]
            self.wake(lane)


def _unwritable(error: Exception) -> Outcome:
    return Outcome(
        Verdict.RETRY,
        0,
        AttemptError.INTERNAL,
        0.0,
        f"the request could not be written: {type(error).__name__}",
    )


def _message(endpoint: Endpoint, deliveries: list[Delivery]) -> tuple[str, bytes]:
    """A request's id and body."""
    elements = []
    for delivery in deliveries:
        event = delivery.event
        shared = event.envelope
        if shared is None:
            shared = event.envelope = envelope.shared_part_of(event.sequence, event)
        elements.append(envelope.element(event.sequence, delivery.subscription, shared, event.data))
    if endpoint.mode is DeliveryMode.SINGLE:
        only = deliveries[0]
        return envelope.delivery_id(only.event.sequence, only.subscription), elements[0]
    named = [(d.event.sequence, d.subscription) for d in deliveries]
    return envelope.batch_id(named), envelope.batch_body(elements)
