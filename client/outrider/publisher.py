"""Publish events over one stream: `send` waits only for room, the acknowledgement settles the handle.

    send -> open frame -> (full, or linger is over) -> sealed -> [spool] -> sent -> acknowledged -> handles settled

Rules: events keep the order they were sent in. A frame is numbered once and sent again unchanged until it is answered,
over refusals and over streams, so nothing is lost and nothing stored twice. What is not acknowledged yet is bounded
in events and bytes; beyond it `send` waits. A condition that passes is waited out, with growing, jittered pauses; one
that cannot pass fails every handle with its error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random as random_module
import time
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc

from outrider._flight import AskRoom, Flight
from outrider._frames import (
    EVENT_BYTES_MAX,
    FRAME_BYTES_MAX,
    FRAME_EVENTS_MAX,
    Ack,
    Frame,
)
from outrider._handle import Handle, settled
from outrider.channel import bearer, open_channel
from outrider.errors import (
    CallFailed,
    EventRejected,
    OutriderError,
    ProtocolBroken,
    PublisherClosed,
    PublisherFailed,
    SessionSuperseded,
    SpoolError,
    Unavailable,
    from_rpc,
)
from outrider.spool import Spool
from outrider.v1.error_reason_pb2 import ErrorReason
from outrider.v1.event_pb2 import Event
from outrider.v1.ingest_service_pb2 import (
    FrameAck,
    FrameRefused,
    LargeFrameRequest,
    OpenStream,
    PublishStreamRequest,
    PublishStreamResponse,
    StreamOpened,
)

__all__ = ["Ack", "FrameReport", "Handle", "Publisher", "Stats"]

_LOG = logging.getLogger("outrider.publisher")

_METHOD = "/outrider.v1.IngestService/PublishStream"
_OPEN_SECONDS_MAX = 20.0
_END_SECONDS_MAX = 2.0
_BACKLOG_LINGER_SECONDS = 0.1
# Beside its bytes an event costs a handle's and a record's share.
_EVENT_COST = 64
# Fields beside the payload are bounded by the server; this is far above their sum.
_EVENT_ENVELOPE_BYTES_MAX = 64 * 1024
_STEADY_SECONDS = 10.0

_Call = Any  # grpc.aio.StreamStreamCall over bytes; its stubs know only message types


class FrameReport(NamedTuple):
    """What `on_ack` is told of one acknowledged frame; times are those of the publisher's clock.

    Frames are acknowledged in order, so the n-th event reported is the n-th event sent.
    """

    number: int
    events: int
    frame_bytes: int
    opened_at: float
    sent_at: float
    acked_at: float
    rejected: int
    duplicate: bool


class Stats(NamedTuple):
    """Plain counts of a publisher since its start, and what it holds now."""

    events_acked: int
    events_rejected: int
    frames_acked: int
    frames_refused: int
    frames_resent: int
    streams_opened: int
    events_held: int
    bytes_held: int


class Publisher:
    """Publishes the events of one producer. Belongs to one event loop; `ThreadPublisher` is its twin for threads.

    `producer` names this process among all that publish with the key: one live process, one name. `tenant` is that of
    events that name none. An event waits up to `linger_ms` for company in its frame of up to `frame_events` and
    `frame_bytes`. `window_events` and `window_bytes` bound what is not acknowledged yet; with a `spool` its own bounds
    take their place, and `window_bytes` bounds how much of it is held in memory as well.

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
        if not 1 <= len(producer.encode()) <= 128:
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
        self._metadata = bearer(api_key)
        self._producer = producer
        self._tenant = tenant
        self._linger_seconds = linger_ms / 1000
        self._frame_events = frame_events
        self._frame_bytes = frame_bytes
        self._frame_room = 0
        self._fit_frames(frame_bytes)
        self._memory_bytes_max = window_bytes
        self._events_max = spool.events_max if spool else window_events
        self._bytes_max = spool.unanswered_bytes_max if spool else window_bytes
        self._credentials = credentials
        self._channel = channel
        self._own_channel = channel is None
        self._channel_options = channel_options
        self._backoff_seconds = backoff_ms / 1000
        self._backoff_seconds_max = backoff_ms_max / 1000
        self._on_ack = on_ack
        self._random = random
        self._clock = clock
        self._wall_clock_ns = wall_clock_ns
        self._sleep = sleep

        self._spool = spool
        self._frames: deque[Frame] = deque(spool.resumed if spool else ())
        self._session = max(
            self._new_session() if session is None else session, spool.session_min if spool else 1
        )
        self._number = 0
        self._sent_number = 0
        self._open: Frame | None = None
        self._held_events = sum(frame.events for frame in self._frames)
        self._held_bytes = sum(frame.cost for frame in self._frames)
        self._memory_bytes = 0
        self._flushed = (
            (self._frames[-1].session, self._frames[-1].number) if self._frames else (0, 0)
        )

        # True while `send` must look closer: not started, over, full, others wait, or a turn for the loop is due.
        self._gate = True
        self._turn_due = False
        self._waiters: deque[tuple[asyncio.Future[None], int]] = deque()
        self._failure: OutriderError | None = None
        self._closing = False
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._life_task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._flush_due = asyncio.Event()
        self._flush_waiters: list[asyncio.Future[None]] = []
        self._linger: asyncio.TimerHandle | None = None
        self._call: _Call | None = None
        self._flight: Flight | None = None
        self._released: Callable[[int, int], None] | None = None

        self._events_acked = 0
        self._events_rejected = 0
        self._frames_acked = 0
        self._frames_refused = 0
        self._frames_resent = 0
        self._streams_opened = 0

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
        self._seal_open()
        if self._frames:
            await settled(self._frames[-1])
        if self._failure is not None:
            raise self._failure.again()

    async def spooled(self) -> None:
        """Wait until everything taken before is in the spool (and on the disk, where it flushes always)."""
        if self._spool is None:
            raise ValueError("this publisher has no spool")
        self._start()
        self._seal_open()
        if self._frames and not self._is_durable(self._frames[-1]):
            waiter = asyncio.get_running_loop().create_future()
            self._flush_waiters.append(waiter)
            await waiter
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
        self._seal_open()
        try:
            if self._frames and self._failure is None:
                self._start(closing=True)
                async with asyncio.timeout(timeout_seconds):
                    await settled(self._frames[-1])
        except TimeoutError:
            pass
        finally:
            unanswered = self._held_events
            await self._stop()
        if self._failure is not None:
            raise self._failure.again()
        if unanswered and self._spool is None:
            raise PublisherClosed(f"closed with {unanswered} events not acknowledged")

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
        return Stats(
            self._events_acked,
            self._events_rejected,
            self._frames_acked,
            self._frames_refused,
            self._frames_resent,
            self._streams_opened,
            self._held_events,
            self._held_bytes,
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
        return self._put(data, tenant, cost)

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
            # What is waited for may be in the open frame.
            self._seal_open()
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.cancelled() or waiter.exception() is not None:
                    self._let_in()
                else:
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
            self._life_task is None
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
        if self._released is not None:
            self._released(events, cost)

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

    # Frames

    def _fit_frames(self, frame_bytes_max: int) -> None:
        """Fill coming frames to what both sides allow, so that only single large events have to ask for room."""
        # The header's number takes up to 11 bytes, the tenant its text.
        header = 32 + len(self._tenant.encode())
        self._frame_room = max(512, min(self._frame_bytes, frame_bytes_max) - header)

    def _put(self, data: bytes, tenant: str, cost: int) -> Handle:
        frame = self._open
        if frame is not None and frame.bytes + len(data) + 6 > self._frame_room:
            self._seal_open()
            frame = None
        if frame is None:
            self._check_usable()
            frame = self._open = Frame(tenant, self._clock())
            self._linger = self._the_loop.call_later(self._linger_seconds, self._linger_over, 0.0)
        index = frame.add(data, tenant)
        frame.cost += cost
        if frame.events >= self._frame_events or frame.bytes >= self._frame_room:
            self._seal_open()
        return Handle(frame, index)

    def _linger_over(self, waited_seconds: float) -> None:
        flight = self._flight
        backlog = flight.unsent if flight is not None else len(self._frames)
        if backlog and waited_seconds < _BACKLOG_LINGER_SECONDS:
            # It could not leave now anyway: larger frames serve a server that is behind better.
            self._linger = self._the_loop.call_later(
                _BACKLOG_LINGER_SECONDS, self._linger_over, _BACKLOG_LINGER_SECONDS
            )
            return
        self._linger = None
        self._seal_open()

    def _seal_open(self) -> None:
        frame, self._open = self._open, None
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if frame is None:
            return
        self._number += 1
        frame.seal(self._session, self._number, self._tenant)
        self._frames.append(frame)
        self._turn_due = True
        self._gate = True
        if self._spool is not None:
            try:
                self._spool.append(frame)
            except OutriderError as error:
                self._fail(error)
                return
            if self._memory_bytes + frame.size > self._memory_bytes_max:
                frame.message = None
            else:
                self._memory_bytes += frame.size
            self._flush_due.set()
        self._wake.set()

    def _is_durable(self, frame: Frame) -> bool:
        spool = self._spool
        if spool is None or spool.fsync == "never":
            return True
        return (frame.session, frame.number) <= self._flushed

    def _message(self, frame: Frame) -> bytes:
        if frame.message is not None:
            return frame.message
        assert self._spool is not None, "only a spool lets a message go"
        return self._spool.message(frame)

    # Life

    @property
    def _the_loop(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None, "started"
        return self._loop

    def _start(self, *, closing: bool = False) -> None:
        if self._life_task is not None or (self._closing and not closing):
            return
        self._loop = asyncio.get_running_loop()
        if self._channel is None:
            self._channel = open_channel(
                self._target,
                credentials=self._credentials,
                options=self._channel_options,
                retries=False,
            )
        # The publisher owns this one task, and `close` ends it: its caller has no group to give.
        self._life_task = self._loop.create_task(self._life(), name=f"publisher {self._producer}")
        self._update_gate()

    async def _life(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                flusher = None
                if self._spool is not None and self._spool.fsync == "always":
                    flusher = group.create_task(self._flush_spool(self._spool))
                await self._keep_streaming()
                if flusher is not None:
                    flusher.cancel()
        except Exception as error:  # noqa: BLE001
            # A fault of ours must reach those who wait, or they would wait for ever.
            _LOG.exception("publisher %s stopped by a fault", self._producer)
            failed = PublisherFailed(f"the publisher stopped by a fault: {error!r}")
            failed.__cause__ = error
            self._fail(failed)

    async def _flush_spool(self, spool: Spool) -> None:
        """Flush the spool for all frames appended meanwhile at once; they may leave then."""
        while self._failure is None:
            await self._flush_due.wait()
            self._flush_due.clear()
            if not self._frames:
                self._wake_flush_waiters()
                continue
            last = (self._frames[-1].session, self._frames[-1].number)
            try:
                await asyncio.to_thread(spool.flush)
            except OutriderError as error:
                self._fail(error)
                return
            self._flushed = max(self._flushed, last)
            self._wake_flush_waiters()
            self._wake.set()

    def _wake_flush_waiters(self) -> None:
        last = self._frames[-1] if self._frames else None
        if self._failure is None and last is not None and not self._is_durable(last):
            return  # more was appended meanwhile; the next flush is due already
        waiters, self._flush_waiters = self._flush_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _keep_streaming(self) -> None:
        fruitless = 0
        while not self._stopping and self._failure is None:
            before = self._frames_acked
            began = self._clock()
            pause = 0.0
            try:
                await self._stream()
            except OutriderError as error:
                if error.permanent:
                    _LOG.error("publisher %s cannot go on: %s", self._producer, error)
                    self._fail(error)
                    return
                if isinstance(error, CallFailed):
                    pause = error.retry_after_seconds or 0.0
                _LOG.warning("publisher %s lost its stream: %s", self._producer, error)
            steady = self._clock() - began >= _STEADY_SECONDS
            fruitless = 0 if steady or self._frames_acked != before else fruitless + 1
            if fruitless:
                pause = max(pause, self._backoff(fruitless - 1))
            if pause and not self._stopping:
                await self._sleep(pause)

    def _backoff(self, attempt: int) -> float:
        """A pause that doubles from attempt to attempt, half of it random: a crowd must not come back in step."""
        whole = min(self._backoff_seconds_max, self._backoff_seconds * 2.0 ** min(attempt, 30))
        return whole * (0.5 + 0.5 * self._random())

    def _fail(self, error: OutriderError) -> None:
        """End by an error that cannot pass: everything unanswered gets it. A spool keeps its frames."""
        if self._failure is not None:
            return
        self._failure = error
        if self._spool is not None and not isinstance(error, SpoolError):
            self._seal_open()  # what still gathered is kept as well
        self._settle_all(error)
        self._wake.set()
        self._flush_due.set()
        self._wake_flush_waiters()

    def _settle_all(self, error: OutriderError) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        frames = [*self._frames, *([self._open] if self._open else [])]
        self._frames.clear()
        self._open = None
        self._fail_waiters(error)
        for frame in frames:
            frame.settle(None, error)
            self._release(frame.events, frame.cost)
        self._update_gate()

    async def _stop(self) -> None:
        self._stopping = True
        task = self._life_task
        if task is not None and not task.done():
            self._wake.set()
            call = self._call
            if call is not None and self._flight is not None:
                # The writer ends the stream in order; the call is cut only if the server does not follow. The call
                # and not the task, because grpc leaks what a cancelled task was waiting for.
                await asyncio.wait([task], timeout=_END_SECONDS_MAX)
                call.cancel()
                await asyncio.wait([task], timeout=_END_SECONDS_MAX)
            task.cancel()
            await asyncio.wait([task])
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
        if self._own_channel and self._channel is not None:
            await self._channel.close()

    # Streams

    async def _stream(self) -> None:
        """One stream from its opening to its end; returns when it ended without an error."""
        assert self._channel is not None, "started"
        session = self._frames[0].session if self._frames else self._session
        # Bytes in: a frame is its own message already, and is not built again for each stream.
        call: _Call = self._channel.stream_stream(
            _METHOD, response_deserializer=PublishStreamResponse.FromString
        )(metadata=self._metadata)
        self._call = call
        error: OutriderError | None = None
        try:
            opened = await self._open_stream(call, session)
            self._streams_opened += 1
            if not self._is_known(opened.last_frame, session):
                self._renew_session(opened.last_frame, session)
                return
            flight = self._flight = Flight(
                self._frames,
                session,
                window_frames=opened.window.frames,
                window_bytes=opened.window.bytes,
                frame_bytes_max=opened.frame_bytes_max,
                backoff=self._backoff,
            )
            self._frame_events = min(
                self._frame_events, opened.frame_events_max or FRAME_EVENTS_MAX
            )
            self._fit_frames(min(flight.frame_bytes_max, flight.window_bytes))
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._write(call, flight))
                error = await self._read(call, flight)
                flight.going_away = True
                call.cancel()
                self._wake.set()
            error = writer.result() or error
        except grpc.aio.AioRpcError as failed:
            raise from_rpc(failed) from failed
        finally:
            self._flight = None
            self._call = None
            call.cancel()
        if error is not None:
            raise error

    async def _open_stream(self, call: _Call, session: int) -> StreamOpened:
        opening = PublishStreamRequest(open=OpenStream(producer=self._producer, session=session))
        try:
            async with asyncio.timeout(_OPEN_SECONDS_MAX):
                # Where it ended already, reading tells why.
                with contextlib.suppress(asyncio.InvalidStateError):
                    await call.write(opening.SerializeToString())
                response = await call.read()
        except TimeoutError as error:
            raise Unavailable(
                f"the server did not open the stream in {_OPEN_SECONDS_MAX:.0f} s",
                code="DEADLINE_EXCEEDED",
            ) from error
        if response is grpc.aio.EOF or response.WhichOneof("message") != "opened":
            raise ProtocolBroken("the server did not answer the opening of the stream")
        opened: StreamOpened = response.opened
        return opened

    def _is_known(self, last_frame: int, session: int) -> bool:
        """Whether what the server knows of the session fits what was sent and acknowledged."""
        if self._frames and self._frames[0].session == session:
            acked = self._frames[0].number - 1
        else:
            acked = self._number
        if last_frame < acked:
            return False
        # Of a session from an earlier life the server may know frames that the spool's last moments lost.
        return session != self._session or last_frame <= self._sent_number

    def _renew_session(self, last_frame: int, session: int) -> None:
        """Go on in a new session, where the old one can carry no further frame.

        Either the server's data went back behind what it acknowledged: then none of the unanswered frames is stored,
        for they follow what it lost. Or the session was used by an earlier life: then nothing was sent in it yet.
        """
        if session == self._session and self._sent_number and last_frame > self._sent_number:
            raise SessionSuperseded(
                "another process publishes in this session of the producer",
                reason="SESSION_SUPERSEDED",
                code="ABORTED",
            )
        renewed = max(self._new_session(), self._session + 1)
        _LOG.error(
            "publisher %s: the server knows frame %d of session %d, which does not fit; going on in session %d",
            self._producer,
            last_frame,
            session,
            renewed,
        )
        self._session = renewed
        if self._spool is not None:
            self._spool.renumber(self._frames, renewed)
        else:
            for number, frame in enumerate(self._frames, 1):
                frame.renumber(renewed, number, self._message(frame))
        self._number = len(self._frames)
        self._sent_number = 0
        self._flushed = (renewed, self._number)

    def _new_session(self) -> int:
        return self._wall_clock_ns() // 1000

    async def _write(self, call: _Call, flight: Flight) -> OutriderError | None:
        """Send what the flight gives, until the stream is over. Why it is over is for the reader to tell."""
        timer: asyncio.TimerHandle | None = None
        try:
            while True:
                now = self._clock()
                step = flight.next(now, self._is_durable)
                if step is None:
                    if flight.going_away:
                        if flight.finished:
                            call.cancel()  # no answer is due that would wake the reader
                        return None
                    if self._stopping:
                        await call.done_writing()
                        return None
                    self._wake.clear()
                    if flight.resume_at is not None:
                        timer = self._the_loop.call_later(
                            max(0.0, flight.resume_at - now), self._wake.set
                        )
                    await self._wake.wait()
                    if timer is not None:
                        timer.cancel()
                        timer = None
                elif isinstance(step, AskRoom):
                    ask = PublishStreamRequest(
                        large_frame=LargeFrameRequest(frame_bytes=step.frame_bytes)
                    )
                    await call.write(ask.SerializeToString())
                else:
                    message = self._message(step)
                    if step.sent_at:
                        self._frames_resent += 1
                    step.sent_at = now
                    if step.session == self._session:
                        self._sent_number = max(self._sent_number, step.number)
                    await call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return None
        except asyncio.CancelledError:
            if flight.going_away:
                return None  # the call was cancelled, not this task
            raise
        except OutriderError as error:
            call.cancel()
            return error

    async def _read(self, call: _Call, flight: Flight) -> OutriderError | None:
        """Take the answers until the stream is over; returns why, None where it ended in order."""
        try:
            while True:
                response = await call.read()
                if response is grpc.aio.EOF:
                    return None
                self._take(response, flight)
                self._wake.set()
                if flight.finished or (not self._frames and flight.session != self._session):
                    return None
        except grpc.aio.AioRpcError as failed:
            return from_rpc(failed)
        except OutriderError as error:
            return error
        except asyncio.CancelledError:
            if call.cancelled() and not _is_being_cancelled():
                return None  # cut by `close` or the writer
            raise

    def _take(self, response: PublishStreamResponse, flight: Flight) -> None:
        match response.WhichOneof("message"):
            case "ack":
                self._take_ack(response.ack, flight)
            case "refused":
                self._take_refusal(response.refused, flight)
            case "window":
                flight.window(response.window.frames, response.window.bytes)
                self._fit_frames(min(flight.frame_bytes_max, flight.window_bytes))
            case "large_frame":
                flight.granted(response.large_frame.frame_bytes)
            case "going_away":
                flight.going_away = True
            case "opened":
                raise ProtocolBroken("the server opened the stream twice")
            case _:
                pass  # a kind that a later server knows

    def _take_ack(self, ack: FrameAck, flight: Flight) -> None:
        frame = flight.acknowledged(ack.number)
        rejected = sum(1 for result in ack.results if result.HasField("error"))
        self._frames_acked += 1
        self._events_acked += frame.events - rejected
        self._events_rejected += rejected
        in_memory = frame.message is not None
        # First those who wait: they have their answer, whatever becomes of the spool.
        frame.settle(ack)
        if self._spool is not None:
            if in_memory:
                self._memory_bytes -= frame.size
            self._spool.acknowledged(frame)
        self._release(frame.events, frame.cost)
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
            )
            try:
                self._on_ack(report)
            except Exception:  # noqa: BLE001 - a fault of the hook is not one of the stream
                _LOG.exception("on_ack failed")

    def _take_refusal(self, refused: FrameRefused, flight: Flight) -> None:
        retry = refused.retry_after
        flight.refused(refused.number, retry.seconds + retry.nanos / 1e9, self._clock())
        self._frames_refused += 1
        _LOG.debug(
            "frame %d refused: %s %s",
            refused.number,
            ErrorReason.Name(refused.reason),
            refused.message,
        )


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
