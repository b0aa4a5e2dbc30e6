"""Publish events: `send` waits only for room, the acknowledgement settles the handle.

    send -> room -> the tenant's line -> frame -> stream -> acknowledged -> handles settled

Rules: the events of a tenant keep the order they were sent in. There is one line, to the target, until acknowledgements
name nodes that are the home of some tenants; those get lines of their own. What is not acknowledged yet is bounded in
events and bytes over all lines; beyond it `send` waits. A condition that passes is waited out, with growing, jittered
pauses; one that cannot pass fails every handle with its error.
"""

from __future__ import annotations

import asyncio
import logging
import random as random_module
import time
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from outrider._frames import (
    EVENT_BYTES_MAX,
    FRAME_BYTES_MAX,
    FRAME_EVENTS_MAX,
    Ack,
    Frame,
)
from outrider._handle import Handle, settled
from outrider._line import Line, Listener
from outrider._queue import Settings
from outrider._reports import FrameReport, Stats
from outrider._routes import LINES_MAX, Routes
from outrider._stream import Counts
from outrider.channel import bearer, open_channel
from outrider.errors import EventRejected, OutriderError, PublisherClosed
from outrider.spool import Spool
from outrider.v1.event_pb2 import Event
from outrider.v1.ingest_service_pb2 import FrameAck

__all__ = ["Ack", "FrameReport", "Handle", "Publisher", "Stats"]

_LOG = logging.getLogger("outrider.publisher")

_PRODUCER_BYTES_MAX = 128
# Beside its bytes an event costs a handle's and a record's share.
_EVENT_COST = 64
# Fields beside the payload are bounded by the server; this is far above their sum.
_EVENT_ENVELOPE_BYTES_MAX = 64 * 1024


class Publisher:
    """Publishes the events of one producer. Belongs to one event loop; `ThreadPublisher` is its twin for threads.

    `producer` names this process among all that publish with the key: one live process, one name. `tenant` is that of
    events that name none. An event waits up to `linger_ms` for company in its frame of up to `frame_events` and
    `frame_bytes`. `window_events` and `window_bytes` bound what is not acknowledged yet; with a `spool` its own bounds
    take their place, and `window_bytes` bounds how much of it is held in memory as well.

    `follow_homes`: send a tenant's events to the node that is its home, once acknowledgements name it, on streams of
    their own under the names `<producer>~1`, `<producer>~2`, ... with the same credentials; where such a node cannot be
    reached, through the target. Not with a `spool`, whose frames belong to one numbering, nor with a `channel` of the
    caller's, nor with a producer's name of more than 125 bytes.

    `session` (default: microseconds since 1970) must be higher in each life of a producer. A `spool` that is given is
    closed with the publisher. `on_ack` is called in the loop for each acknowledged frame and should be quick.
    """

    def __init__(
        self,
        target: str,
        api_key: str,
        producer: str,
        *,
        tenant: str = "",
        linger_ms: float = 2.0,
        frame_events: int = FRAME_EVENTS_MAX,
        frame_bytes: int = 512 * 1024,
        window_events: int = 100_000,
        window_bytes: int = 64 * 1024 * 1024,
        session: int | None = None,
        spool: Spool | None = None,
        follow_homes: bool = True,
        credentials: grpc.ChannelCredentials | None = None,
        channel: grpc.aio.Channel | None = None,
        channel_options: Sequence[tuple[str, Any]] = (),
        backoff_ms: float = 100.0,
        backoff_ms_max: float = 5_000.0,
        on_ack: Callable[[FrameReport], None] | None = None,
        random: Callable[[], float] = random_module.random,
        clock: Callable[[], float] = time.monotonic,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if not 1 <= len(producer.encode()) <= _PRODUCER_BYTES_MAX:
            raise ValueError("producer is 1 to 128 bytes")
        if not 1 <= frame_events <= FRAME_EVENTS_MAX:
            raise ValueError(f"frame_events is 1 to {FRAME_EVENTS_MAX}")
        if not 1024 <= frame_bytes <= FRAME_BYTES_MAX:
            raise ValueError(f"frame_bytes is 1024 to {FRAME_BYTES_MAX}")
        if window_events < 1 or window_bytes < 1:
            raise ValueError("window_events and window_bytes are at least 1")
        if linger_ms < 0 or backoff_ms <= 0 or backoff_ms_max < backoff_ms:
            raise ValueError("linger_ms is at least 0, and 0 < backoff_ms <= backoff_ms_max")
        self._target = target
        self._producer = producer
        self._tenant = tenant
        self._events_max = spool.events_max if spool else window_events
        self._bytes_max = spool.unanswered_bytes_max if spool else window_bytes
        self._credentials = credentials
        self._channel_options = channel_options
        self._on_ack = on_ack
        self._clock = clock
        self._spool = spool
        self._settings = settings = Settings(
            tenant=tenant,
            metadata=bearer(api_key),
            linger_seconds=linger_ms / 1000,
            frame_events=frame_events,
            frame_bytes=frame_bytes,
            memory_bytes_max=window_bytes,
            backoff_seconds=backoff_ms / 1000,
            backoff_seconds_max=backoff_ms_max / 1000,
            random=random,
            clock=clock,
            wall_clock_ns=wall_clock_ns,
            sleep=sleep,
        )
        self._session = settings.new_session() if session is None else session
        self._counts = Counts()
        self._listener = Listener(
            sealed=self._sealed,
            acknowledged=self._acknowledged,
            opened=self._opened,
            astray=self._astray,
            failed=self._fail,
        )
        self._first = Line(
            0,
            producer,
            self._session,
            settings,
            self._counts,
            self._listener,
            connect=self._connect,
            channel=channel,
            spool=spool,
        )
        self._routes = Routes(self._first, self._new_line, target=target, clock=clock)
        self._places = self._routes.places
        self._follow = (
            follow_homes
            and spool is None
            and channel is None
            and len(f"{producer}~{LINES_MAX}".encode()) <= _PRODUCER_BYTES_MAX
        )

        resumed = self._first.queue.frames
        self._held_events = sum(frame.events for frame in resumed)
        self._held_bytes = sum(frame.cost for frame in resumed)
        # True while `send` must look closer: not started, over, full, others wait, or a turn for the loop is due.
        self._gate = True
        self._turn_due = False
        self._waiters: deque[tuple[asyncio.Future[None], int]] = deque()
        self._failure: OutriderError | None = None
        self._started = False
        self._closing = False

    # Sending

    async def send(self, event: Event) -> Handle:
        """Take the event; waits only while there is no room.

        The event may be changed afterwards, but make a new one for each: a message keeps the memory of every value a
        field ever had.

        Raises `EventRejected` for one that is too large for any frame, and the publisher's own error once it failed.
        If the wait is cancelled, the event was not taken.
        """
        data = event.SerializeToString()
        return await self._send(data, event.tenant or self._tenant)

    async def publish(self, event: Event) -> Ack:
        """Take the event and wait until it is durable; raises its error."""
        return await (await self.send(event))

    async def publish_many(
        self, events: Iterable[Event] | AsyncIterable[Event]
    ) -> list[Ack | OutriderError]:
        """Take the events and wait for all of them: each one's acknowledgement or error, in order."""
        if isinstance(events, AsyncIterable):
            handles = [await self.send(event) async for event in events]
        else:
            handles = [await self.send(event) for event in events]
        outcomes: list[Ack | OutriderError] = []
        for handle in handles:
            if not handle.done():
                await handle.wait()
            error = handle.exception()
            outcomes.append(handle.result() if error is None else error)
        return outcomes

    async def flush(self) -> None:
        """Wait until everything taken before is answered. Errors of single events stay with their handles.

        Raises the publisher's own error if it failed.
        """
        self._start()
        for frame in self._routes.last_frames():
            await settled(frame)
        if self._failure is not None:
            raise self._failure.again()

    async def spooled(self) -> None:
        """Wait until everything taken before is in the spool (and on the disk, where it flushes always)."""
        if self._spool is None:
            raise ValueError("this publisher has no spool")
        self._start()
        await self._first.queue.spooled()
        if self._failure is not None:
            raise self._failure.again()

    async def close(self, timeout_seconds: float | None = 30.0) -> None:
        """Take nothing more, wait until all is answered, end the stream.

        What is still unanswered after `timeout_seconds` fails with `PublisherClosed`, which is raised here, too; with
        a spool it stays there for the next life instead, and nothing is raised.
        """
        if self._closing:
            return
        self._closing = True
        self._update_gate()
        self._fail_waiters(PublisherClosed("the publisher is closed"))
        unanswered = self._routes.last_frames()
        try:
            if unanswered and self._failure is None:
                self._start(closing=True)
                async with asyncio.timeout(timeout_seconds):
                    for frame in unanswered:
                        await settled(frame)
        except TimeoutError:
            pass
        finally:
            left = self._held_events
            await self._stop()
        if self._failure is not None:
            raise self._failure.again()
        if left and self._spool is None:
            raise PublisherClosed(f"closed with {left} events not acknowledged")

    async def __aenter__(self) -> Self:
        self._start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.close()
        except OutriderError:
            # An error of the block itself must not be hidden by its consequence.
            if exc is None:
                raise

    @property
    def stats(self) -> Stats:
        """Counts since the start, and what is held now."""
        counts = self._counts
        return Stats(
            counts.events_acked,
            counts.events_rejected,
            counts.frames_acked,
            counts.frames_refused,
            counts.frames_resent,
            counts.streams_opened,
            self._held_events,
            self._held_bytes,
            sum(line.is_open for line in self._routes.lines),
        )

    async def _send(self, data: bytes, tenant: str) -> Handle:
        cost = len(data) + _EVENT_COST
        if self._gate or self._held_bytes + cost > self._bytes_max:
            await self._admit(cost)
        else:
            self._held_events += 1
            self._held_bytes += cost
            if self._held_events >= self._events_max:
                self._gate = True
        if cost > EVENT_BYTES_MAX:
            self._check_size(data, cost)
        # Most publishers have one line, and no tenant is elsewhere.
        place = self._places.get(tenant, self._first) if self._places else self._first
        return place.put(data, tenant, cost)

    def _check_size(self, data: bytes, cost: int) -> None:
        event = Event.FromString(data)
        payload = len(event.data) or len(event.data_json.encode())
        if payload > EVENT_BYTES_MAX:
            self._release(1, cost)
            raise EventRejected(
                f"the payload has {payload} bytes, more than {EVENT_BYTES_MAX}",
                reason="PAYLOAD_TOO_LARGE",
            )
        if len(data) > EVENT_BYTES_MAX + _EVENT_ENVELOPE_BYTES_MAX:
            self._release(1, cost)
            raise EventRejected("the event's texts are too long", reason="FIELD_TOO_LONG")

    async def _admit(self, cost: int) -> None:
        """The slow way in: everything that `_gate` stands for. Counts the event in."""
        self._start()
        if self._turn_due:
            # A sender that never has to wait would else keep the loop from writing what it sent.
            self._turn_due = False
            await asyncio.sleep(0)
        self._check_usable()
        if self._waiters or not self._fits(cost):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append((waiter, cost))
            self._update_gate()
            # What is waited for may be in a frame that still takes events.
            for line in self._routes.lines:
                line.queue.seal_open()
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.cancelled() or waiter.exception() is not None:
                    self._let_in()
                else:
                    self._release(1, cost)
                raise
            try:
                # It may have failed, or been closed, since this one was let in.
                self._check_usable()
            except OutriderError:
                self._release(1, cost)
                raise
        else:
            self._held_events += 1
            self._held_bytes += cost
        self._update_gate()

    def _fits(self, cost: int) -> bool:
        if not self._held_events:
            return True  # whatever its size: else one larger than the window would wait for ever
        return self._held_events < self._events_max and self._held_bytes + cost <= self._bytes_max

    def _update_gate(self) -> None:
        self._gate = (
            not self._started
            or self._closing
            or self._failure is not None
            or self._turn_due
            or bool(self._waiters)
            or self._held_events >= self._events_max
        )

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure.again()
        if self._closing:
            raise PublisherClosed("the publisher is closed")

    def _release(self, events: int, cost: int) -> None:
        self._held_events -= events
        self._held_bytes -= cost
        self._let_in()

    def _let_in(self) -> None:
        """Give room to those who wait, in order, counted in by this side so that none can overtake."""
        waiters = self._waiters
        while waiters:
            waiter, cost = waiters[0]
            if not waiter.done():
                if not self._fits(cost):
                    break
                self._held_events += 1
                self._held_bytes += cost
                waiter.set_result(None)
            waiters.popleft()
        self._update_gate()

    def _fail_waiters(self, error: OutriderError) -> None:
        while self._waiters:
            waiter, _ = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(error.again())

    # Life

    def _start(self, *, closing: bool = False) -> None:
        if self._started or (self._closing and not closing):
            return
        self._started = True
        self._first.start()
        self._update_gate()

    async def _stop(self) -> None:
        async with asyncio.TaskGroup() as group:
            for line in self._routes.lines:
                group.create_task(line.stop())
        self._settle_all(
            self._failure
            or PublisherClosed(
                "closed before the acknowledgement"
                + ("; the event is kept in the spool" if self._spool else "")
            )
        )
        if self._spool is not None:
            try:
                await asyncio.to_thread(self._spool.flush)
            finally:
                self._spool.close()

    def _settle_all(self, error: OutriderError) -> None:
        self._fail_waiters(error)
        for frame in self._routes.abandon(error):
            self._release(frame.events, frame.cost)
        self._update_gate()

    # Lines

    def _connect(self, address: str | None) -> grpc.aio.Channel:
        # A connection of its own each time: one that is shared with an earlier channel leads to the same process, be it
        # the one that drains.
        return open_channel(
            address or self._target,
            credentials=self._credentials,
            options=(("grpc.use_local_subchannel_pool", 1), *self._channel_options),
            retries=False,
        )

    def _new_line(self, number: int) -> Line:
        return Line(
            number,
            f"{self._producer}~{number}",
            self._session,
            self._settings,
            self._counts,
            self._listener,
            connect=self._connect,
        )

    def _sealed(self) -> None:
        self._turn_due = True
        self._gate = True

    def _acknowledged(self, line: Line, frame: Frame, ack: FrameAck, rejected: int) -> None:
        self._release(frame.events, frame.cost)
        if self._follow and ack.homes and not self._closing:
            self._routes.told(line, ack)
        if line is not self._first and line.queue.is_empty:
            self._routes.rest_if_unused(line)
        if self._on_ack is not None:
            report = FrameReport(
                frame.number,
                frame.events,
                frame.size,
                frame.opened_at,
                frame.sent_at,
                self._clock(),
                rejected,
                ack.duplicate,
                line.number,
                frame.tenant_events(),
            )
            try:
                self._on_ack(report)
            except Exception:  # noqa: BLE001 - a fault of the hook is not one of the stream
                _LOG.exception("on_ack failed")

    def _opened(self, line: Line) -> None:
        self._routes.opened(line)

    def _astray(self, line: Line, address: str, after_success: bool) -> None:  # noqa: FBT001
        self._routes.astray(line, address, after_success=after_success)

    def _fail(self, error: OutriderError) -> None:
        """End by an error that cannot pass: everything unanswered gets it. A spool keeps its frames."""
        if self._failure is not None:
            return
        self._failure = error
        self._settle_all(error)
        for line in self._routes.lines:
            line.rest()
