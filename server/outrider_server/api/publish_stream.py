"""One publish stream: reads frames, answers them in order, and ends when it must.

Rules:
- What a producer may have unanswered is its window; more ends the stream. Room in the node's budget is taken before the
  next frame is read, and for a large frame before it is granted, so HTTP/2's flow control holds the producer back.
- Answers go out in the order of the frames. A refusal for a passing reason leaves the stream open.
- `end` and `going_away` come from outside: a key that was revoked, a node that drains.
- Frames are split by the homes of their tenants. Each part says which frame of this stream its shard must have seen before
  it, so that a home never takes a frame while an earlier one is missing, whatever way the earlier one went.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import grpc
from google.protobuf.duration_pb2 import Duration

from outrider.v1 import ingest_service_pb2
from outrider_server.api.errors import ServicerContext
from outrider_server.api.frames import FrameReader, ack_of, reason_number
from outrider_server.api.portions import PortionRouter
from outrider_server.domain.errors import (
    Aborted,
    Exhausted,
    InvalidArgument,
    OutriderError,
    Unavailable,
)
from outrider_server.domain.frame import FrameResult
from outrider_server.pipeline.admission import Admission

PRODUCER_BYTES_MAX = 128
SESSION_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """The window of a stream and the bounds of a frame. `frame_bytes_max` is for frames of several events.

    Room for a large frame is kept for `grant_seconds_max`, and as long as it takes at `grant_bytes_per_second_min`, for a
    producer that does not send it. `open_seconds_max`: how long a stream may take to say who it is.
    """

    frames_max: int = 64
    bytes_max: int = 4 * 1024 * 1024
    frame_events_max: int = 500
    frame_bytes_max: int = 1024 * 1024
    large_frame_bytes_max: int = 11 * 1024 * 1024
    grant_seconds_max: float = 3.0
    grant_bytes_per_second_min: float = 1024 * 1024
    open_seconds_max: float = 10.0


@dataclass(slots=True)
class _Unanswered:
    """A frame that was read and is not answered. `release` gives its room in the node's budget back.

    `attempt` counts how often the producer had gone back to a refused frame when it was read.
    """

    number: int
    size: int
    release: Callable[[], None]
    answer: asyncio.Future[FrameResult]
    shards: frozenset[int]
    attempt: int


class PublishStream:
    """One stream of one producer."""

    def __init__(
        self,
        *,
        context: ServicerContext,
        admission: Admission,
        reader: FrameReader,
        scope: str,
        owner: str,
        limits: StreamLimits,
        node: str,
        router: PortionRouter,
        named: Callable[[PublishStream], None],
    ) -> None:
        self._context = context
        self._named = named
        self._admission = admission
        self._reader = reader
        self._scope = scope
        self._owner = owner
        self._limits = limits
        self._node = node
        self._router = router
        self.producer = ""
        self.session = 0
        self._answers: asyncio.Queue[_Unanswered | None] = asyncio.Queue()
        self._frames = 0
        self._bytes = 0
        self._granted = 0
        self._refused: int | None = None
        self._attempt = 0
        self._last = 0
        self._sent: dict[int, int] = {}
        self._settled: dict[int, int] = {}
        self._grant_ends: asyncio.TimerHandle | None = None
        self._opened = False
        self._writing = asyncio.Lock()
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, error: OutriderError) -> None:
        """End the stream with this error."""
        if not self._end.done():
            self._end.set_exception(error)

    async def going_away(self) -> None:
        """Tell the producer that the node drains."""
        if self._opened:
            await self._write(
                ingest_service_pb2.PublishStreamResponse(going_away=ingest_service_pb2.GoingAway())
            )

    async def run(self) -> None:
        """Serve the stream until the producer ends it; raises the error that ends it otherwise."""
        try:
            async with asyncio.TaskGroup() as tasks:
                ending = tasks.create_task(self._wait_for_end())
                await self._open()
                writer = tasks.create_task(self._write_answers())
                await self._read_frames()
                self._answers.put_nowait(None)
                await writer
                ending.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            self._give_up()
            await self._router.close()

    async def _open(self) -> None:
        request = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.open_seconds_max):
                request = await self._context.read()
        if request in (None, grpc.aio.EOF) or request.WhichOneof("message") != "open":
            raise InvalidArgument("STREAM_NOT_OPEN", "the first message of a stream must be `open`")
        producer = request.open.producer
        if not producer or len(producer.encode()) > PRODUCER_BYTES_MAX or "\0" in producer:
            raise InvalidArgument(
                "INVALID_ARGUMENT", f"open.producer has 1 to {PRODUCER_BYTES_MAX} bytes and no NUL",
                violations=[("open.producer", "1 to 128 bytes, no NUL")],
            )  # fmt: skip
        if not 0 < request.open.session <= SESSION_MAX:
            raise InvalidArgument(
                "INVALID_ARGUMENT", "open.session is a positive number of at most 63 bits",
                violations=[("open.session", "1 to 2^63 - 1")],
            )  # fmt: skip
        # Producers of different tenants may have the same name.
        self.producer = f"{self._scope}/{producer}"
        self.session = request.open.session
        last_frame = await self._admission.last_frame(self.producer, self.session)
        self._last = last_frame
        self._named(self)
        limits = self._limits
        await self._write(
            ingest_service_pb2.PublishStreamResponse(
                opened=ingest_service_pb2.StreamOpened(
                    last_frame=last_frame,
                    window=ingest_service_pb2.Window(
                        frames=limits.frames_max, bytes=limits.bytes_max
                    ),
                    frame_events_max=limits.frame_events_max,
                    frame_bytes_max=limits.frame_bytes_max,
                    node=self._node,
                )
            )
        )
        self._opened = True

    async def _read_frames(self) -> None:
        while True:
            request = await self._context.read()
            if request is grpc.aio.EOF:
                return
            kind = request.WhichOneof("message")
            if kind == "frame":
                await self._take(request.frame)
            elif kind == "large_frame":
                await self._grant(request.large_frame.frame_bytes)
            else:
                raise InvalidArgument(
                    "STREAM_NOT_OPEN", "after `open` only frames and large-frame requests may come"
                )

    async def _take(self, frame: ingest_service_pb2.Frame) -> None:
        """Check a frame's bounds, then queue it; whatever comes of it goes to the queue of answers."""
        size = frame.ByteSize()
        limits = self._limits
        if size <= limits.frame_bytes_max and size != self._granted:
            await self._admission.room.take(size)
            release: Callable[[], None] = partial(self._admission.room.give_back, size)
        else:
            release = self._use_grant(frame, size)
            size = 0  # large frames count by their grants
        self._frames += 1
        self._bytes += size
        try:
            if len(frame.events) > limits.frame_events_max:
                raise InvalidArgument(
                    "FRAME_TOO_LARGE",
                    f"a frame holds at most {limits.frame_events_max} events, this one {len(frame.events)}",
                )
            if self._frames > limits.frames_max or self._bytes > limits.bytes_max:
                raise Exhausted(
                    "CREDIT_EXCEEDED", "more frames or bytes are unanswered than the window allows"
                )
        except OutriderError:
            release()
            raise
        shards: frozenset[int] = frozenset()
        try:
            self._keep_order(frame.number)
            split = await self._reader.read(frame.events, frame.tenant, self.producer)
            shards = split.shards()
            previous = self._precede(frame.number, shards)
            answer = await self._router.submit(self.producer, self.session, frame, split, previous)
        except OutriderError as error:
            answer = _failed(error)
        except BaseException:
            release()
            raise
        answer.add_done_callback(partial(self._note_refusal, frame.number))
        self._answers.put_nowait(
            _Unanswered(frame.number, size, release, answer, shards, self._attempt)
        )

    def _precede(self, number: int, shards: Collection[int]) -> dict[int, int]:
        """For each shard the number of the stream's frame before this one that had something for it; 0 for none.

        Noted before anything is sent: whatever becomes of this frame, later ones come after it.
        """
        if number <= self._last:  # it comes again, and all before it are answered
            self._sent = dict(self._settled)
        self._last = number
        previous = {shard: self._sent.get(shard, 0) for shard in shards}
        for shard in shards:
            self._sent[shard] = number
        return previous

    def _keep_order(self, number: int) -> None:
        """Behind a refused frame nothing is taken until it comes again.

        The log's own order is not enough: where a commit's outcome was unknown, the refused frame may be stored, and a
        later one would fit behind it.
        """
        if not 0 < number <= self._last + 1:
            raise Unavailable(
                "FRAME_OUT_OF_SEQUENCE", f"frame {number} does not follow frame {self._last}"
            )
        if self._refused is None or number < self._refused:
            return
        if number > self._refused:
            raise Unavailable(
                "FRAME_OUT_OF_SEQUENCE", f"frame {self._refused} was refused and comes first"
            )
        self._refused = None
        self._attempt += 1

    def _note_refusal(self, number: int, answer: asyncio.Future[FrameResult]) -> None:
        error = None if answer.cancelled() else answer.exception()
        # A number that was out of sequence is nobody's place in the order.
        if isinstance(error, OutriderError) and error.reason != "FRAME_OUT_OF_SEQUENCE":
            self._refused = number if self._refused is None else min(number, self._refused)

    def _use_grant(self, frame: ingest_service_pb2.Frame, size: int) -> Callable[[], None]:
        if size > self._limits.frame_bytes_max and len(frame.events) != 1:
            raise InvalidArgument(
                "FRAME_TOO_LARGE",
                f"a frame of several events has at most {self._limits.frame_bytes_max} bytes, this one {size}",
            )
        if size > self._granted:
            raise Exhausted(
                "CREDIT_EXCEEDED", f"a frame of {size} bytes needs a grant of that size first"
            )
        return partial(self._admission.large_room.give_back, self._owner, self._end_grant())

    async def _grant(self, size: int) -> None:
        """Take room for one large frame, then let it come."""
        if size > self._limits.large_frame_bytes_max:
            raise InvalidArgument(
                "FRAME_TOO_LARGE",
                f"a frame has at most {self._limits.large_frame_bytes_max} bytes, asked for were {size}",
            )
        if self._granted:
            raise Exhausted("CREDIT_EXCEEDED", "a grant is waiting to be used")
        if not size:
            raise InvalidArgument("INVALID_ARGUMENT", "large_frame.frame_bytes is a frame's size")
        await self._admission.large_room.take(self._owner, size)
        self._granted = size
        self._grant_ends = asyncio.get_running_loop().call_later(
            self._limits.grant_seconds_max + size / self._limits.grant_bytes_per_second_min,
            self.end,
            Exhausted("CREDIT_EXCEEDED", "room for a large frame was asked for and not used"),
        )
        await self._write(
            ingest_service_pb2.PublishStreamResponse(
                large_frame=ingest_service_pb2.LargeFrameGrant(frame_bytes=size)
            )
        )

    def _end_grant(self) -> int:
        granted, self._granted = self._granted, 0
        if self._grant_ends is not None:
            self._grant_ends.cancel()
            self._grant_ends = None
        return granted

    async def _write_answers(self) -> None:
        refused_in = -1
        while (unanswered := await self._answers.get()) is not None:
            number = unanswered.number
            try:
                result = await unanswered.answer
                if unanswered.attempt == refused_in:
                    # A frame before it was refused. It may be stored, in shards that the other one does not concern; the
                    # producer is told in order, and learns of it when it comes again.
                    response = _refusal(number, _behind())
                else:
                    response = ack_of(number, result)
                    for shard in unanswered.shards:
                        self._settled[shard] = number
            except (
                Aborted
            ):  # a later session took over: no frame of this stream can be taken any more
                raise
            except OutriderError as error:
                if error.reason != "FRAME_OUT_OF_SEQUENCE":
                    refused_in = unanswered.attempt
                response = _refusal(number, error)
            finally:
                unanswered.release()
            self._frames -= 1
            self._bytes -= unanswered.size
            await self._write(response)

    async def _write(self, response: ingest_service_pb2.PublishStreamResponse) -> None:
        async with self._writing:
            await self._context.write(response)

    async def _wait_for_end(self) -> None:
        await self._end

    def _give_up(self) -> None:
        """Return the room of everything unanswered; what was submitted is stored or not without this stream."""
        if granted := self._end_grant():
            self._admission.large_room.give_back(self._owner, granted)
        while not self._answers.empty():
            unanswered = self._answers.get_nowait()
            if unanswered is None:
                continue
            unanswered.release()
            unanswered.answer.add_done_callback(_look_at)


def _refusal(number: int, error: OutriderError) -> ingest_service_pb2.PublishStreamResponse:
    refused = ingest_service_pb2.FrameRefused(
        number=number, reason=reason_number(error.reason), message=error.message
    )
    if error.retry_after_seconds is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        refused.retry_after.CopyFrom(delay)
    return ingest_service_pb2.PublishStreamResponse(refused=refused)


def _behind() -> Unavailable:
    return Unavailable("FRAME_OUT_OF_SEQUENCE", "an earlier frame was refused and comes first")


def _failed(error: OutriderError) -> asyncio.Future[FrameResult]:
    failed: asyncio.Future[FrameResult] = asyncio.get_running_loop().create_future()
    failed.set_exception(error)
    return failed


def _look_at(answer: asyncio.Future[FrameResult]) -> None:
    """Nobody waits for this answer any more; its error is nobody's surprise."""
    if not answer.cancelled():
        answer.exception()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended the stream: a domain error before anything else."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            leaves.append(error)
    return next((error for error in leaves if isinstance(error, OutriderError)), leaves[0])
