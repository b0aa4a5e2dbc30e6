"""One stream of a line, from its opening to its end: what is sent and what the answers mean is `Flight`'s to say.

Rule: a stream ends only in an order that loses nothing: the writer stops first, what is unanswered stays in the queue
and is sent again on the next one. A node that drains gets a while to give its remaining answers; then it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from outrider._flight import AskRoom, Flight
from outrider._frames import FRAME_EVENTS_MAX, Frame
from outrider._queue import FrameQueue, Settings
from outrider.errors import OutriderError, ProtocolBroken, Unavailable, from_rpc
from outrider.v1.error_reason_pb2 import ErrorReason
from outrider.v1.ingest_service_pb2 import (
    FrameAck,
    FrameRefused,
    LargeFrameRequest,
    OpenStream,
    PublishStreamRequest,
    PublishStreamResponse,
    StreamOpened,
)

_LOG = logging.getLogger("outrider.publisher")

_METHOD = "/outrider.v1.IngestService/PublishStream"
_OPEN_SECONDS_MAX = 20.0
_END_SECONDS_MAX = 2.0
DRAIN_SECONDS_MAX = 15.0
"""How long a node that drains may take for its remaining answers."""

_Call = Any  # grpc.aio.StreamStreamCall over bytes; its stubs know only message types


@dataclass(slots=True)
class Counts:
    """What happened on all lines of a publisher since its start."""

    events_acked: int = 0
    events_rejected: int = 0
    frames_acked: int = 0
    frames_refused: int = 0
    frames_resent: int = 0
    streams_opened: int = 0


class Stream:
    """One call on `channel` that carries the frames of `queue`.

    `opened` is called with the server's answer to the opening, `acknowledged` for each frame that became durable.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        queue: FrameQueue,
        settings: Settings,
        counts: Counts,
        *,
        opened: Callable[[StreamOpened], None],
        acknowledged: Callable[[Frame, FrameAck], None],
    ) -> None:
        self._queue = queue
        self._settings = settings
        self._counts = counts
        self._opened = opened
        self._acknowledged = acknowledged
        # Bytes in: a frame is its own message already, and is not built again for each stream.
        self._call: _Call = channel.stream_stream(
            _METHOD, response_deserializer=PublishStreamResponse.FromString
        )(metadata=settings.metadata)
        self._frame_events_max = FRAME_EVENTS_MAX
        self._ending = False
        self._timer: asyncio.TimerHandle | None = None
        self.drained = False
        """Whether the node announced that it goes away."""
        self.is_open = False

    async def run(self) -> None:
        """Carry frames until the stream is over; returns when it ended without an error."""
        queue = self._queue
        session = queue.frames[0].session if queue.frames else queue.session
        error: OutriderError | None = None
        try:
            opened = await self._open(session)
            self._counts.streams_opened += 1
            if not queue.is_known(opened.last_frame, session):
                queue.renew_session(opened.last_frame, session)
                return
            flight = Flight(
                queue.frames,
                session,
                window_frames=opened.window.frames,
                window_bytes=opened.window.bytes,
                frame_bytes_max=opened.frame_bytes_max,
                backoff=self._settings.backoff,
            )
            self._frame_events_max = opened.frame_events_max or FRAME_EVENTS_MAX
            self._fit_frames(flight)
            queue.unsent = lambda: flight.unsent
            self.is_open = True
            self._opened(opened)
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._write(flight))
                error = await self._read(flight)
                flight.going_away = True
                self._call.cancel()
                queue.wake.set()
            error = writer.result() or error
        except grpc.aio.AioRpcError as failed:
            raise from_rpc(failed) from failed
        finally:
            self.is_open = False
            queue.unsent = lambda: len(queue.frames)
            if self._timer is not None:
                self._timer.cancel()
            self._call.cancel()
        if error is not None:
            raise error

    def end(self) -> None:
        """End it in order: the writer says so when nothing is left to send; cut if the server does not follow."""
        self._ending = True
        self._queue.wake.set()
        self._cut_after(_END_SECONDS_MAX)

    def cut(self) -> None:
        """End it at once. The call and not the task, because grpc leaks what a cancelled task was waiting for."""
        self._call.cancel()

    def _cut_after(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._call.cancel)

    def _fit_frames(self, flight: Flight) -> None:
        self._queue.fit_frames(
            self._frame_events_max, min(flight.frame_bytes_max, flight.window_bytes)
        )

    async def _open(self, session: int) -> StreamOpened:
        opening = PublishStreamRequest(
            open=OpenStream(producer=self._queue.producer, session=session)
        )
        try:
            async with asyncio.timeout(_OPEN_SECONDS_MAX):
                # Where it ended already, reading tells why.
                with contextlib.suppress(asyncio.InvalidStateError):
                    await self._call.write(opening.SerializeToString())
                response = await self._call.read()
        except TimeoutError as error:
            raise Unavailable(
                f"the server did not open the stream in {_OPEN_SECONDS_MAX:.0f} s",
                code="DEADLINE_EXCEEDED",
            ) from error
        except asyncio.CancelledError:
            if self._ending and not _is_being_cancelled():
                raise Unavailable("the stream was given up while it opened") from None
            raise
        if response is grpc.aio.EOF or response.WhichOneof("message") != "opened":
            raise ProtocolBroken("the server did not answer the opening of the stream")
        opened: StreamOpened = response.opened
        return opened

    async def _write(self, flight: Flight) -> OutriderError | None:
        """Send what the flight gives, until the stream is over. Why it is over is for the reader to tell."""
        queue, call, clock = self._queue, self._call, self._settings.clock
        timer: asyncio.TimerHandle | None = None
        try:
            while True:
                now = clock()
                step = flight.next(now, queue.is_durable)
                if step is None:
                    if flight.going_away:
                        if flight.finished:
                            call.cancel()  # no answer is due that would wake the reader
                        return None
                    if self._ending:
                        await call.done_writing()
                        return None
                    queue.wake.clear()
                    if flight.resume_at is not None:
                        timer = asyncio.get_running_loop().call_later(
                            max(0.0, flight.resume_at - now), queue.wake.set
                        )
                    await queue.wake.wait()
                    if timer is not None:
                        timer.cancel()
                        timer = None
                elif isinstance(step, AskRoom):
                    ask = PublishStreamRequest(
                        large_frame=LargeFrameRequest(frame_bytes=step.frame_bytes)
                    )
                    await call.write(ask.SerializeToString())
                else:
                    message = queue.message(step)
                    if step.sent_at:
                        self._counts.frames_resent += 1
                    step.sent_at = now
                    if step.session == queue.session:
                        queue.sent_number = max(queue.sent_number, step.number)
                    await call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return None
        except asyncio.CancelledError:
            if flight.going_away or (call.cancelled() and not _is_being_cancelled()):
                return None  # the call was cancelled, not this task
            raise
        except OutriderError as error:
            call.cancel()
            return error

    async def _read(self, flight: Flight) -> OutriderError | None:
        """Take the answers until the stream is over; returns why, None where it ended in order."""
        queue = self._queue
        try:
            while True:
                response = await self._call.read()
                if response is grpc.aio.EOF or queue.error is not None:
                    return None
                self._take(response, flight)
                queue.wake.set()
                if flight.finished or (not queue.frames and flight.session != queue.session):
                    return None
        except grpc.aio.AioRpcError as failed:
            return from_rpc(failed)
        except OutriderError as error:
            return error
        except asyncio.CancelledError:
            if self._call.cancelled() and not _is_being_cancelled():
                return None  # cut by `end`, by the drain's bound or by the writer
            raise

    def _take(self, response: PublishStreamResponse, flight: Flight) -> None:
        match response.WhichOneof("message"):
            case "ack":
                self._acknowledged(flight.acknowledged(response.ack.number), response.ack)
            case "refused":
                self._take_refusal(response.refused, flight)
            case "window":
                flight.window(response.window.frames, response.window.bytes)
                self._fit_frames(flight)
            case "large_frame":
                flight.granted(response.large_frame.frame_bytes)
            case "going_away":
                flight.going_away = self.drained = True
                if not self._ending:
                    self._cut_after(DRAIN_SECONDS_MAX)
            case "opened":
                raise ProtocolBroken("the server opened the stream twice")
            case _:
                pass  # a kind that a later server knows

    def _take_refusal(self, refused: FrameRefused, flight: Flight) -> None:
        retry = refused.retry_after
        flight.refused(refused.number, retry.seconds + retry.nanos / 1e9, self._settings.clock())
        self._counts.frames_refused += 1
        _LOG.debug(
            "frame %d refused: %s %s",
            refused.number,
            ErrorReason.Name(refused.reason),
            refused.message,
        )


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
