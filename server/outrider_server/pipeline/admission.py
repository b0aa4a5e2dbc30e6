"""Admission: the door between the edge and the path. It outlives tenures, and says no while there is none.

Rules:
- Room is taken before a frame is read or granted, and given back when the frame is answered: what is on its way into the
  log never exceeds `bytes_max`, however many streams there are.
- A refusal here is for a passing reason, and nothing of the frame is stored.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from outrider_server.domain.errors import Aborted, Exhausted, OutriderError, Unavailable
from outrider_server.domain.event import EVENT_OVERHEAD_BYTES
from outrider_server.domain.frame import EventRefusal, FrameResult
from outrider_server.pipeline.ingest import EventChecker, IngestLimits, Refused, check_and_match
from outrider_server.pipeline.large import LargeEvents
from outrider_server.pipeline.match import Directory
from outrider_server.pipeline.persist import PendingFrame, Portion
from outrider_server.pipeline.tenure import Tenure
from outrider_server.telemetry.metrics import Metrics


class Room:
    """Bytes of frames on their way into the log. Those who wait get theirs in order."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def taken(self) -> int:
        """Bytes taken now."""
        return self._taken

    async def take(self, size: int) -> None:
        """Wait for room for `size` bytes. More than there is at all is let in alone."""
        size = min(size, self._bytes_max)
        if not self._waiting and self._taken + size <= self._bytes_max:
            self._taken += size
            return
        turn = asyncio.get_running_loop().create_future()
        entry = (size, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(size)
            elif entry in self._waiting:
                self._waiting.remove(entry)
                self._next()
            raise

    def give_back(self, size: int) -> None:
        """Return what was taken."""
        self._taken -= min(size, self._bytes_max)
        self._next()

    def _next(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if self._taken + size > self._bytes_max:
                return
            self._waiting.popleft()
            if not turn.done():
                self._taken += size
                turn.set_result(None)


class LargeRoom:
    """Room for large frames, beside that of all others: a producer that asks for it and dawdles holds up nobody's small ones.

    One owner (a key) has at most `owner_frames_max` at a time; its further ones wait without standing in others' way.
    """

    def __init__(self, bytes_max: int, owner_frames_max: int = 2) -> None:
        self._room = Room(bytes_max)
        self._owner_frames_max = owner_frames_max
        self._owners: dict[str, tuple[asyncio.Semaphore, int]] = {}

    @property
    def taken(self) -> int:
        """Bytes taken now."""
        return self._room.taken

    async def take(self, owner: str, size: int) -> None:
        """Wait for room for one frame of `size` bytes."""
        turns, users = self._owners.get(owner) or (asyncio.Semaphore(self._owner_frames_max), 0)
        self._owners[owner] = (turns, users + 1)
        try:
            await turns.acquire()
            try:
                await self._room.take(size)
            except BaseException:
                turns.release()
                raise
        except BaseException:
            self._leave(owner)
            raise

    def give_back(self, owner: str, size: int) -> None:
        """Return what was taken."""
        self._owners[owner][0].release()
        self._leave(owner)
        self._room.give_back(size)

    def _leave(self, owner: str) -> None:
        turns, users = self._owners[owner]
        if users == 1:
            del self._owners[owner]
        else:
            self._owners[owner] = (turns, users - 1)


class Admission:
    """Takes checked frames to the tenure of the moment."""

    def __init__(
        self,
        *,
        directory: Directory,
        limits: IngestLimits,
        room: Room,
        large_room: LargeRoom,
        forwarded_room: Room,
        large: LargeEvents,
        metrics: Metrics,
        monotonic: Callable[[], float],
        now_us: Callable[[], int],
    ) -> None:
        self.directory = directory
        self.limits = limits
        self.room = room
        self.large_room = large_room
        # What other nodes passed on waits for nobody's room but this: two nodes that forward to each other must not wait
        # for each other.
        self.forwarded_room = forwarded_room
        self.tenure: Tenure | None = None
        self.draining = False
        self.disk_full = False
        self._large = large
        self._metrics = metrics
        self._monotonic = monotonic
        self._now_us = now_us
        self._checker = EventChecker(limits)

    def closed(self) -> OutriderError | None:
        """Why nothing is taken in now; None when the door is open."""
        if self.tenure is None:
            return Unavailable(
                "NOT_READY", "this node does not hold its shards yet", retry_after_seconds=0.2
            )
        if self.disk_full:
            return Exhausted("DISK_FULL", "free disk is under its floor", retry_after_seconds=5.0)
        return None

    def closed_to_newcomers(self) -> OutriderError | None:
        """Why nobody should come here now. While a node drains, those who are here are served as long as it can."""
        if self.draining:
            return Unavailable(
                "SHUTTING_DOWN", "this node is shutting down", retry_after_seconds=1.0
            )
        return self.closed()

    def holds(self, shard: int) -> bool:
        """Whether this node takes events of a shard in."""
        tenure = self.tenure
        if tenure is None:
            return False
        window = tenure.obligations.windows.get(shard)
        return window is not None and window.open

    async def last_frame(self, producer: str, session: int) -> int:
        """The highest frame of a producer's session that is durable in any shard, 0 for none.

        Asked when a stream opens. Raises when a later session is known, and when nobody should come.
        """
        closed = self.closed_to_newcomers()
        if closed is not None:
            raise closed
        reach = await self._open().read_reach(producer)
        if any(known > session for known, _ in reach.values()):
            raise Aborted("SESSION_SUPERSEDED", "a later session of this producer took over")
        return max((last for known, last in reach.values() if known == session), default=0)

    async def submit(
        self, producer: str | None, session: int, number: int, portion: Portion
    ) -> asyncio.Future[FrameResult]:
        """Check and match the events of a portion, and queue it for the next transaction.

        The answer's exception is an `OutriderError`. Raises one when nothing is taken in now.
        """
        tenure = self._open()
        started = self._monotonic()
        for refusal in portion.refusals:
            self._metrics.ingest.events_refused.add(refusal.reason)
        now_us = self._now_us()
        frozen = next((e for e in portion.entries if e.frozen_until_us > now_us), None)
        if frozen is not None:
            raise Unavailable(
                "NOT_READY", f"tenant {frozen.name} changes its shards", retry_after_seconds=0.2
            )
        large = any(len(event.data) > self.limits.large_event_bytes for event in portion.events)
        refusals = await self._check(portion, large=large)
        self._require(tenure)
        # Asked for last: from here to `submit` nothing waits, so the session cannot be forgotten in between.
        known = None
        if producer is not None:
            known = await tenure.session(producer, portion.shards)
        self._require(tenure)
        answer: asyncio.Future[FrameResult] = asyncio.get_running_loop().create_future()
        frame = PendingFrame(known, session, number, portion, refusals, answer, large=large)
        # Also where the session is not known for a shard: that was on its way while it was read.
        unknown = known is not None and not known.reach.keys() >= portion.shards
        if unknown or not all(map(self.holds, portion.shards)):
            raise Unavailable(
                "NOT_READY",
                "a shard that this belongs to is on its way to another node",
                retry_after_seconds=0.2,
            )
        answer.add_done_callback(lambda done: self._answered(done, started, frame))
        tenure.persister.submit(frame)
        return answer

    def _open(self) -> Tenure:
        closed = self.closed()
        if closed is not None:
            raise closed
        assert self.tenure is not None
        return self.tenure

    def _require(self, tenure: Tenure) -> None:
        if tenure is not self.tenure:
            raise Unavailable(
                "NOT_READY", "the node takes its shards up again; retry", retry_after_seconds=0.2
            )

    async def _check(self, portion: Portion, *, large: bool) -> list[EventRefusal]:
        metrics = self._metrics
        if not large:
            return await check_and_match(
                portion.events,
                portion.entries,
                portion.places,
                self._checker,
                metrics.ingest,
                metrics.match,
                self._monotonic,
            )
        refusals = []
        for event, entry, place in zip(
            portion.events, portion.entries, portion.places, strict=True
        ):
            try:
                await self._large.check_and_match(event, entry)
            except Refused as refused:
                refusals.append(EventRefusal(place, refused.reason, refused.message))
                metrics.ingest.events_refused.add(refused.reason)
        return refusals

    def _answered(
        self, answer: asyncio.Future[FrameResult], started: float, frame: PendingFrame
    ) -> None:
        if answer.cancelled():
            return
        error = answer.exception()
        ingest = self._metrics.ingest
        if error is None and answer.result().duplicate:
            return
        if error is None:
            ingest.frames += 1
            ingest.events += len(frame.events)
            ingest.bytes += frame.size - EVENT_OVERHEAD_BYTES * len(frame.events)
            self._metrics.persist.ack_seconds.observe(self._monotonic() - started)
        elif isinstance(error, OutriderError):
            ingest.frames_refused.add(error.reason)
