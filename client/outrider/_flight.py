"""One stream's life: what may be sent next, and what an answer means. Pure: no loop, no socket, no clock.

    unanswered frames:  [ sent on this stream, each owed one answer | not yet sent here ]
                          ^ answers arrive in this order             ^ position

Rules kept, as the contract has them: frames go in order; what is unanswered stays inside the window in frames and
bytes (large frames count as frames only, they have grants of their own); after a refusal nothing is sent until every
frame behind it is answered, then everything from the refused one on is sent again, unchanged. At most one large frame
is under way, so a grant always belongs to the frame it was asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from outrider._frames import FRAME_BYTES_MAX, Frame
from outrider.errors import ProtocolBroken


class AskRoom(NamedTuple):
    """Ask for a grant for the frame that comes next."""

    frame_bytes: int


class Flight:
    """What is under way on one stream of `session`. `frames` is the publisher's queue of unanswered ones, shared."""

    __slots__ = (
        "_asked",
        "_backoff",
        "_granted",
        "_large",
        "_refusals",
        "_refused",
        "_sent",
        "_sent_bytes",
        "frame_bytes_max",
        "frames",
        "going_away",
        "position",
        "resume_at",
        "session",
        "window_bytes",
        "window_frames",
    )

    def __init__(
        self,
        frames: deque[Frame],
        session: int,
        *,
        window_frames: int,
        window_bytes: int,
        frame_bytes_max: int,
        backoff: Callable[[int], float],
    ) -> None:
        self.frames = frames
        self.session = session
        self.window_frames = window_frames
        self.window_bytes = window_bytes
        self.frame_bytes_max = frame_bytes_max or FRAME_BYTES_MAX
        self.position = 0
        self.going_away = False
        self.resume_at: float | None = None
        self._backoff = backoff
        self._sent: deque[tuple[Frame, int]] = deque()
        self._sent_bytes = 0
        self._large = 0
        self._asked: Frame | None = None
        self._granted = False
        self._refused = False
        self._refusals = 0

    @property
    def finished(self) -> bool:
        """Nothing more can happen on this stream: it drains, or only frames of another session are left."""
        if self._sent:
            return False
        return self.going_away or bool(self.frames and self.frames[0].session != self.session)

    @property
    def unsent(self) -> int:
        """Frames that wait to be sent here."""
        return len(self.frames) - self.position

    def next(self, now: float, durable: Callable[[Frame], bool]) -> Frame | AskRoom | None:
        """What to send now; None while there is nothing or no room (`resume_at` tells when time alone changes that).

        `durable` tells whether a frame may leave already: one that a spool has yet to flush may not.
        """
        if self.going_away:
            return None
        if self._refused and not self._rewind(now):
            return None
        if self.position >= len(self.frames) or len(self._sent) >= self.window_frames:
            return None
        frame = self.frames[self.position]
        if frame.session != self.session or not durable(frame):
            return None
        if frame is self._asked or self._is_large(frame):
            return self._next_large(frame)
        if self._sent_bytes + frame.size > self.window_bytes:
            return None
        self._under_way(frame, frame.size)
        return frame

    def _rewind(self, now: float) -> bool:
        if self._sent or (self.resume_at is not None and now < self.resume_at):
            return False
        self._refused = False
        self.resume_at = None
        self.position = 0
        return True

    def _is_large(self, frame: Frame) -> bool:
        return frame.size > self.frame_bytes_max or frame.size > self.window_bytes

    def _next_large(self, frame: Frame) -> Frame | AskRoom | None:
        if self._asked is None:
            if self._large:
                return None
            self._asked = frame
            return AskRoom(frame.size)
        if self._asked is not frame:
            # A smaller window made a refused frame large while a later one has, or awaits, the only grant. A new stream
            # has no grants.
            self.going_away = True
            return None
        if not self._granted:
            return None
        self._asked = None
        self._granted = False
        self._under_way(frame, 0)
        return frame

    def _under_way(self, frame: Frame, counted: int) -> None:
        self.position += 1
        self._sent.append((frame, counted))
        self._sent_bytes += counted
        self._large += not counted

    def acknowledged(self, number: int) -> Frame:
        """The oldest unanswered frame is durable; it leaves the queue."""
        frame = self._answered(number)
        if self._refused:
            raise ProtocolBroken(f"frame {number} was acknowledged behind a refused one")
        self._refusals = 0
        self.frames.popleft()
        self.position -= 1
        return frame

    def refused(self, number: int, retry_after_seconds: float, now: float) -> Frame:
        """A frame was not taken. The first one decides when to go on; those behind it are refused in its wake."""
        frame = self._answered(number)
        if not self._refused:
            self._refused = True
            # The first time the server's word is enough; a server that goes on refusing gets growing pauses.
            own = self._backoff(self._refusals) if self._refusals else 0.0
            self._refusals += 1
            self.resume_at = now + max(retry_after_seconds, own)
        return frame

    def granted(self, frame_bytes: int) -> None:
        """Room for the large frame that was asked for."""
        if self._asked is None or self._granted or frame_bytes < self._asked.size:
            raise ProtocolBroken(f"a grant of {frame_bytes} bytes that was not asked for")
        self._granted = True

    def window(self, frames: int, byte_count: int) -> None:
        """A new window, valid at once; what is under way already stays."""
        self.window_frames = frames
        self.window_bytes = byte_count

    def _answered(self, number: int) -> Frame:
        if not self._sent or self._sent[0][0].number != number:
            due = self._sent[0][0].number if self._sent else None
            raise ProtocolBroken(f"an answer to frame {number} where {due} is due")
        frame, counted = self._sent.popleft()
        self._sent_bytes -= counted
        self._large -= not counted
        return frame
