"""One line's events: gathered into frames, numbered in a session, kept until they are answered.

    put -> open frame -> (full, or linger is over) -> sealed -> [spool] -> unanswered -> acknowledged

Rules: a frame is numbered once, without gaps, and is not changed until it is answered, so it may be sent on any stream
of the producer, to any node. Only where the server cannot know any of the unanswered ones do they move to a new
session, all at once. Nothing here touches a network.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from outrider._frames import Frame
from outrider._handle import Handle
from outrider.errors import OutriderError, SessionSuperseded, SpoolError
from outrider.spool import Spool
from outrider.v1.ingest_service_pb2 import FrameAck

_LOG = logging.getLogger("outrider.publisher")

_BACKLOG_LINGER_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all lines of a publisher share: its options, and the time and chance it was given."""

    tenant: str
    metadata: tuple[tuple[str, str], ...]
    linger_seconds: float
    frame_events: int
    frame_bytes: int
    memory_bytes_max: int
    backoff_seconds: float
    backoff_seconds_max: float
    random: Callable[[], float]
    clock: Callable[[], float]
    wall_clock_ns: Callable[[], int]
    sleep: Callable[[float], Awaitable[None]]

    def backoff(self, attempt: int) -> float:
        """A pause that doubles from attempt to attempt, half of it random: a crowd must not come back in step."""
        whole = min(self.backoff_seconds_max, self.backoff_seconds * 2.0 ** min(attempt, 30))
        return whole * (0.5 + 0.5 * self.random())

    def new_session(self) -> int:
        """A session higher than those of earlier lives."""
        return self.wall_clock_ns() // 1000


class FrameQueue:
    """The unanswered frames of one line, oldest first, and the one that still takes events.

    `sealed` is called for each frame that is closed, `failed` when the spool cannot take one. `unsent` tells how many
    frames wait to be sent.
    """

    def __init__(
        self,
        settings: Settings,
        producer: str,
        session: int,
        *,
        spool: Spool | None,
        sealed: Callable[[], None],
        failed: Callable[[OutriderError], None],
    ) -> None:
        self.producer = producer
        self.spool = spool
        self.frames: deque[Frame] = deque(spool.resumed if spool else ())
        self.session = max(session, spool.session_min if spool else 1)
        self.number = 0
        self.sent_number = 0
        self.open: Frame | None = None
        self.error: OutriderError | None = None
        """Why nothing more is taken."""
        self.wake = asyncio.Event()
        """Set when there may be something new to send."""
        self.unsent: Callable[[], int] = self._all
        self.frame_events = settings.frame_events
        self.frame_room = 0
        self._settings = settings
        self._clock = settings.clock
        self._sealed = sealed
        self._failed = failed
        self._linger: asyncio.TimerHandle | None = None
        self._memory_bytes = 0
        self._flush_due = asyncio.Event()
        self._flush_waiters: list[asyncio.Future[None]] = []
        self._flushed = (self.frames[-1].session, self.frames[-1].number) if self.frames else (0, 0)
        self.fit_frames(self.frame_events, settings.frame_bytes)

    @property
    def is_empty(self) -> bool:
        """Whether everything put in is answered."""
        return not self.frames and self.open is None

    def _all(self) -> int:
        return len(self.frames)

    # Gathering

    def fit_frames(self, frame_events_max: int, frame_bytes_max: int) -> None:
        """Fill coming frames to what both sides allow, so that only single large events have to ask for room."""
        # The header's number takes up to 11 bytes, the tenant its text.
        header = 32 + len(self._settings.tenant.encode())
        self.frame_events = min(self._settings.frame_events, frame_events_max)
        self.frame_room = max(512, min(self._settings.frame_bytes, frame_bytes_max) - header)

    def put(self, data: bytes, tenant: str, cost: int) -> Handle:
        """Take an event that was counted in."""
        frame = self.open
        if frame is not None and frame.bytes + len(data) + 6 > self.frame_room:
            self.seal_open()
            frame = None
        if frame is None:
            if self.error is not None:
                raise self.error.again()
            frame = self.open = Frame(tenant, self._clock())
            self._linger = asyncio.get_running_loop().call_later(
                self._settings.linger_seconds, self._linger_over, 0.0
            )
        index = frame.add(data, tenant)
        frame.cost += cost
        if frame.events >= self.frame_events or frame.bytes >= self.frame_room:
            self.seal_open()
        return Handle(frame, index)

    def adopt(self, frames: deque[Frame]) -> None:
        """Take frames that were filled elsewhere and never numbered, in order."""
        if frames:
            self.seal_open()
        for frame in frames:
            self._number(frame)

    def seal_open(self) -> None:
        """Close the frame that takes events, if there is one."""
        frame, self.open = self.open, None
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if frame is not None:
            self._number(frame)

    def last_with(self, tenant: str) -> Frame | None:
        """The last unanswered frame that holds events of the tenant; closed, if it still took some."""
        if self.open is not None and self.open.holds(tenant):
            self.seal_open()
        for frame in reversed(self.frames):
            if frame.holds(tenant):
                return frame
        return None

    def _number(self, frame: Frame) -> None:
        self.number += 1
        frame.seal(self.session, self.number, self._settings.tenant)
        self.frames.append(frame)
        self._sealed()
        if self.spool is not None:
            try:
                self.spool.append(frame)
            except OutriderError as error:
                self._failed(error)
                return
            if self._memory_bytes + frame.size > self._settings.memory_bytes_max:
                frame.message = None
            else:
                self._memory_bytes += frame.size
            self._flush_due.set()
        self.wake.set()

    def _linger_over(self, waited_seconds: float) -> None:
        if self.unsent() and waited_seconds < _BACKLOG_LINGER_SECONDS:
            # It could not leave now anyway: larger frames serve a server that is behind better.
            self._linger = asyncio.get_running_loop().call_later(
                _BACKLOG_LINGER_SECONDS, self._linger_over, _BACKLOG_LINGER_SECONDS
            )
            return
        self._linger = None
        self.seal_open()

    # Answers

    def acknowledged(self, frame: Frame, ack: FrameAck) -> None:
        """The frame has left `frames`: settle it, and let the spool's copy go."""
        in_memory = frame.message is not None
        # First those who wait: they have their answer, whatever becomes of the spool.
        frame.settle(ack)
        if self.spool is not None:
            if in_memory:
                self._memory_bytes -= frame.size
            self.spool.acknowledged(frame)

    def abandon(self, error: OutriderError) -> list[Frame]:
        """Take nothing more and settle everything unanswered with `error`; returns it. A spool keeps its frames."""
        if self.spool is not None and self.error is None and not isinstance(error, SpoolError):
            self.error = error
            self.seal_open()  # what still gathered is kept as well
        self.error = error
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        frames = [*self.frames, *([self.open] if self.open else [])]
        self.frames.clear()
        self.open = None
        for frame in frames:
            frame.settle(None, error)
        self.wake.set()
        self._flush_due.set()
        self._wake_flush_waiters()
        return frames

    # What the server knows of the session

    def is_known(self, last_frame: int, session: int) -> bool:
        """Whether what the server knows of the session fits what was sent and acknowledged."""
        if self.frames and self.frames[0].session == session:
            acked = self.frames[0].number - 1
        else:
            acked = self.number
        if last_frame < acked:
            return False
        # Of a session from an earlier life the server may know frames that the spool's last moments lost.
        return session != self.session or last_frame <= self.sent_number

    def renew_session(self, last_frame: int, session: int) -> None:
        """Go on in a new session, where the old one can carry no further frame.

        Either the server's data went back behind what it acknowledged: then none of the unanswered frames is stored,
        for they follow what it lost. Or the session was used by an earlier life: then nothing was sent in it yet.
        """
        if session == self.session and self.sent_number and last_frame > self.sent_number:
            raise SessionSuperseded(
                "another process publishes in this session of the producer",
                reason="SESSION_SUPERSEDED",
                code="ABORTED",
            )
        renewed = max(self._settings.new_session(), self.session + 1)
        _LOG.error(
            "publisher %s: the server knows frame %d of session %d, which does not fit; going on in session %d",
            self.producer,
            last_frame,
            session,
            renewed,
        )
        self.session = renewed
        if self.spool is not None:
            self.spool.renumber(self.frames, renewed)
        else:
            for number, frame in enumerate(self.frames, 1):
                frame.renumber(renewed, number, self.message(frame))
        self.number = len(self.frames)
        self.sent_number = 0
        self._flushed = (renewed, self.number)

    # The spool

    def message(self, frame: Frame) -> bytes:
        """The frame's bytes, from memory or from the spool."""
        if frame.message is not None:
            return frame.message
        assert self.spool is not None, "only a spool lets a message go"
        return self.spool.message(frame)

    def is_durable(self, frame: Frame) -> bool:
        """Whether the frame may leave: not before a spool that flushes always has flushed it."""
        spool = self.spool
        if spool is None or spool.fsync == "never":
            return True
        return (frame.session, frame.number) <= self._flushed

    async def spooled(self) -> None:
        """Wait until everything put in is in the spool."""
        self.seal_open()
        if self.frames and not self.is_durable(self.frames[-1]):
            waiter = asyncio.get_running_loop().create_future()
            self._flush_waiters.append(waiter)
            await waiter

    async def keep_flushing(self, spool: Spool) -> None:
        """Flush the spool for all frames appended meanwhile at once; they may leave then."""
        while self.error is None:
            await self._flush_due.wait()
            self._flush_due.clear()
            if not self.frames:
                self._wake_flush_waiters()
                continue
            last = (self.frames[-1].session, self.frames[-1].number)
            try:
                await asyncio.to_thread(spool.flush)
            except OutriderError as error:
                self._failed(error)
                return
            self._flushed = max(self._flushed, last)
            self._wake_flush_waiters()
            self.wake.set()

    def _wake_flush_waiters(self) -> None:
        last = self.frames[-1] if self.frames else None
        if self.error is None and last is not None and not self.is_durable(last):
            return  # more was appended meanwhile; the next flush is due already
        waiters, self._flush_waiters = self._flush_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
