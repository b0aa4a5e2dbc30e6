"""A line: one ordered, numbered run of frames to one node at a time, under a producer name of its own.

    address None: streams go to the publisher's target     address given: to that home, until it fails or drains

Rules: a line keeps its name, session and numbers for as long as its publisher lives, wherever its streams lead, so a
frame that one node stored is known to every other. A home that fails or drains is left at once for the target, which
leads to a node that takes everything; only what fails there, too, decides whether the publisher can go on. A stream that
brought nothing is followed by one on a new connection: the old one may lead to the same sick process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from outrider._frames import Frame
from outrider._queue import FrameQueue, Settings
from outrider._stream import Counts, Stream
from outrider.errors import CallFailed, OutriderError, PublisherFailed
from outrider.spool import Spool
from outrider.v1.ingest_service_pb2 import FrameAck, StreamOpened

_LOG = logging.getLogger("outrider.publisher")

_END_SECONDS_MAX = 2.0
_STEADY_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """What a line tells its publisher, in the loop and at once."""

    sealed: Callable[[], None]
    """A frame was closed."""
    acknowledged: Callable[[Line, Frame, FrameAck, int], None]
    """A frame is durable; with the number of its events that were rejected."""
    opened: Callable[[Line], None]
    """A stream opened; `node` tells where it leads."""
    astray: Callable[[Line, str, bool], None]
    """A home was left; with its address, and whether anything was acknowledged there."""
    failed: Callable[[OutriderError], None]
    """Nothing can go on."""


class Line:
    """Frames of one numbering, and the task that carries them. Line 0 is that of the publisher's own name.

    `connect(address)` opens a channel, to the target where the address is None. A `channel` that is given is used
    instead, and is neither closed nor renewed. `tenants` is the publisher's: those whose events go here, for lines
    other than the first.
    """

    def __init__(
        self,
        number: int,
        producer: str,
        session: int,
        settings: Settings,
        counts: Counts,
        listener: Listener,
        *,
        connect: Callable[[str | None], grpc.aio.Channel],
        channel: grpc.aio.Channel | None = None,
        spool: Spool | None = None,
    ) -> None:
        self.number = number
        self.producer = producer
        self.address: str | None = None
        self.node = ""
        """The address of the node that the open stream leads to."""
        self.tenants: set[str] = set()
        self.queue = FrameQueue(
            settings,
            producer,
            session,
            spool=spool,
            sealed=listener.sealed,
            failed=listener.failed,
        )
        self.put = self.queue.put
        self._settings = settings
        self._counts = counts
        self._listener = listener
        self._connect = connect
        self._channel = channel
        self._own_channel = channel is None
        self._stream: Stream | None = None
        self._life: asyncio.Task[None] | None = None
        self._ending = False
        self._acked = 0

    @property
    def is_open(self) -> bool:
        """Whether a stream is open, so that frames are answered."""
        return self._stream is not None and self._stream.is_open

    @property
    def is_at_rest(self) -> bool:
        """Whether it was started and ended: it may be started again, to any address."""
        return self._life is not None and self._life.done()

    @property
    def is_ending(self) -> bool:
        """Whether it ends, or is at rest."""
        return self._ending

    def start(self, address: str | None = None) -> None:
        """Begin to carry frames, by a task that the line owns until it is at rest or stopped."""
        self.address = address
        self._ending = False
        self._life = asyncio.get_running_loop().create_task(
            self._live(), name=f"publisher {self.producer}"
        )

    def rest(self) -> None:
        """End the stream in order once everything is answered. Only while nobody puts anything in."""
        self._ending = True
        if self._stream is not None:
            self._stream.end()
        self.queue.wake.set()

    async def stop(self) -> None:
        """End the stream in order, cut it if the server does not follow, and end the task."""
        opened = self.is_open
        self.rest()
        task = self._life
        if task is not None and not task.done():
            if opened and self._stream is not None:
                await asyncio.wait([task], timeout=_END_SECONDS_MAX)
                if self._stream is not None:
                    self._stream.cut()
                    await asyncio.wait([task], timeout=_END_SECONDS_MAX)
            task.cancel()
            await asyncio.wait([task])
        await self._close_channel()

    # Life

    async def _live(self) -> None:
        spool = self.queue.spool
        try:
            async with asyncio.TaskGroup() as group:
                flusher = None
                if spool is not None and spool.fsync == "always":
                    flusher = group.create_task(self.queue.keep_flushing(spool))
                await self._keep_streaming()
                if flusher is not None:
                    flusher.cancel()
            await self._close_channel()
        except Exception as error:  # noqa: BLE001
            # A fault of ours must reach those who wait, or they would wait for ever.
            _LOG.exception("publisher %s stopped by a fault", self.producer)
            failed = PublisherFailed(f"the publisher stopped by a fault: {error!r}")
            failed.__cause__ = error
            self._listener.failed(failed)

    async def _keep_streaming(self) -> None:
        clock = self._settings.clock
        fruitless = 0
        while self._goes_on():
            before, began = self._acked, clock()
            error: OutriderError | None = None
            stream = self._new_stream()
            try:
                await stream.run()
            except OutriderError as failed:
                error = failed
            finally:
                self._stream = None
                self.node = ""
            if not self._goes_on():
                return
            brought = self._acked != before
            steady = clock() - began >= _STEADY_SECONDS
            fruitless = 0 if steady or brought else fruitless + 1
            # The first stream may end only to go on in another session.
            if self.address is not None and (error or stream.drained or fruitless > 1):
                await self._leave_home(error, brought=brought)
                fruitless = 0
                continue
            if error is not None and error.permanent:
                _LOG.error("publisher %s cannot go on: %s", self.producer, error)
                self._listener.failed(error)
                return
            if error is not None:
                _LOG.warning("publisher %s lost its stream: %s", self.producer, error)
            if stream.drained or fruitless:
                await self._close_channel()
            pause = (error.retry_after_seconds or 0.0) if isinstance(error, CallFailed) else 0.0
            # A node that drains is left without a pause, unless the next one does so, too.
            if fruitless > stream.drained:
                pause = max(pause, self._settings.backoff(fruitless - 1))
            if pause:
                await self._settings.sleep(pause)

    def _goes_on(self) -> bool:
        return not self._ending and self.queue.error is None

    def _new_stream(self) -> Stream:
        if self._channel is None:
            self._channel = self._connect(self.address)
        self._stream = Stream(
            self._channel,
            self.queue,
            self._settings,
            self._counts,
            opened=self._opened,
            acknowledged=self._acknowledged,
        )
        return self._stream

    async def _leave_home(self, error: OutriderError | None, *, brought: bool) -> None:
        address, self.address = self.address, None
        assert address is not None, "only a home is left"
        _LOG.info(
            "publisher %s leaves the node at %s: %s", self.producer, address, error or "it ended"
        )
        await self._close_channel()
        self._listener.astray(self, address, brought)

    async def _close_channel(self) -> None:
        if self._own_channel and self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    def _opened(self, opened: StreamOpened) -> None:
        self.node = opened.node
        self._listener.opened(self)

    def _acknowledged(self, frame: Frame, ack: FrameAck) -> None:
        rejected = sum(1 for result in ack.results if result.HasField("error"))
        self._acked += 1
        counts = self._counts
        counts.frames_acked += 1
        counts.events_acked += frame.events - rejected
        counts.events_rejected += rejected
        self.queue.acknowledged(frame, ack)
        self._listener.acknowledged(self, frame, ack, rejected)
