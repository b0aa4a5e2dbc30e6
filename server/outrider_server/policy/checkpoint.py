"""The window of a shard: its events above the checkpoint, and how far the checkpoint may move.

Rule: the checkpoint is the lowest open sequence - 1. An event is open while it is not committed, and while a delivery
of it has neither an outcome nor an owed row in the record that moves the checkpoint. `Event.open` counts exactly
that; whoever settles a delivery counts it down, and only `pass_closed` here moves the checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from outrider_server.domain.event import Event
from outrider_server.domain.sequence import SequenceClock, microseconds_of


class Window:
    """One shard's events above the checkpoint, in sequence order. `open`: whether further events may come in."""

    __slots__ = ("_events", "checkpoint", "clock", "epoch", "open", "record_no", "shard")

    def __init__(self, shard: int, epoch: int, checkpoint: int, record_no: int, last: int) -> None:
        self.shard = shard
        self.epoch = epoch
        self.checkpoint = checkpoint
        self.record_no = record_no
        self.clock = SequenceClock(shard, max(last, checkpoint))
        self.open = True
        self._events: deque[Event] = deque()

    def __len__(self) -> int:
        return len(self._events)

    def append(self, event: Event) -> None:
        """Take in an event whose sequence was just given out, before its commit: it keeps the checkpoint back."""
        self._events.append(event)

    def extend(self, events: Iterable[Event]) -> None:
        """Take in several, in order."""
        self._events.extend(events)

    def discard(self, event: Event) -> None:
        """Forget an event whose transaction was rolled back. It is among the last ones, so look from there."""
        behind = []
        while (last := self._events.pop()) is not event:
            behind.append(last)
        self._events.extend(reversed(behind))

    def oldest_us(self) -> int | None:
        """When the oldest event above the checkpoint came, in microseconds since 1970; None when there is none."""
        return microseconds_of(self._events[0].sequence) if self._events else None

    def old_end(self, before_us: int, events_max: int) -> Iterator[Event]:
        """The events that the window has no room for: older than `before_us`, or more than `events_max` behind.

        It ends at an event that is not committed, which nothing may pass.
        """
        surplus = len(self._events) - events_max
        for index, event in enumerate(self._events):
            if index >= surplus and microseconds_of(event.sequence) >= before_us:
                return
            if event.deliveries is None:
                return
            yield event

    def pass_closed(self, matched: dict[int, int]) -> bool:
        """Move the checkpoint past every closed event at the old end; add their targets to `matched` per tenant.

        Returns whether it moved.
        """
        events = self._events
        moved = False
        event = None
        while events and events[0].open == 0:
            event = events.popleft()
            event.deliveries = None
            if event.targets:
                matched[event.tenant] = matched.get(event.tenant, 0) + len(event.targets)
        if event is not None:
            self.checkpoint = event.sequence
            moved = True
        return moved
