"""Catch up: owed rows back into lanes. One way for restart, takeover, resume, overflow and retries.

Rules:
- A lane asks when half of it is free; it gets a page, then goes to the end of the line, so no lane starves another.
- Claiming a row is memory only. Rows change in the record that settles their deliveries, nowhere else.
- What is loaded is bounded by the lane's room, by a page, and by the node's byte budget.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Collection, Iterable
from itertools import count

from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.policy.lane import Lane
from outrider_server.policy.obligations import Obligations
from outrider_server.policy.plans import FoundRow, ToLoad
from outrider_server.storage import event_log, owed
from outrider_server.storage.database import Connection
from outrider_server.telemetry.counters import CatchUpCounters

ROWS_MAX = 32
POLL_SECONDS = 0.05


class CatchUp:
    """The line of lanes that want owed deliveries, and the reader that serves it over one connection."""

    def __init__(
        self,
        *,
        obligations: Obligations,
        connection: Connection,
        clock: DatabaseClock,
        deliveries_max: int,
        bytes_max: int,
        ready: Callable[[Lane], None],
        counters: CatchUpCounters,
    ) -> None:
        self._obligations = obligations
        self._connection = connection
        self._clock = clock
        self._deliveries_max = deliveries_max
        self._bytes_max = bytes_max
        self._ready = ready
        self._counters = counters
        self._line: dict[Lane, None] = {}
        self._retries: list[tuple[int, int, Lane]] = []
        self._scheduled: dict[Lane, int] = {}
        self._tie = count()
        self._wake = asyncio.Event()

    def want(self, lane: Lane) -> None:
        """Put a lane at the end of the line."""
        self._line.setdefault(lane)
        self._wake.set()

    def want_all(self, lanes: Iterable[Lane]) -> None:
        """Put these lanes at the end of the line."""
        for lane in lanes:
            self.want(lane)

    def recorded(self, lanes: Iterable[Lane]) -> None:
        """These lanes got owed rows."""
        for lane in lanes:
            self._note_retry(lane)
            self.want(lane)

    async def run(self) -> None:
        """Serve the line for ever."""
        while True:
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            self._due_retries()
            for lane in list(self._line):
                if lane not in self._line:
                    continue  # its shard was handed off while another lane was served
                del self._line[lane]
                await self._serve(lane)

    def start(self, shards: Collection[int]) -> None:
        """After a takeover: every lane of these shards may have something owed."""
        for lane in self._obligations.lanes.values():
            if lane.shard in shards:
                self._note_retry(lane)
                self.want(lane)

    def forget(self, shard: int) -> None:
        """A shard was handed off: its lanes want nothing any more."""
        for lane in [lane for lane in self._line if lane.shard == shard]:
            del self._line[lane]
        for lane in [lane for lane in self._scheduled if lane.shard == shard]:
            del self._scheduled[lane]

    async def _serve(self, lane: Lane) -> None:
        """One page for one lane."""
        obligations = self._obligations
        now_us = self._clock.now_us()
        window = obligations.windows.get(lane.shard)
        if window is None or not window.open:
            return  # on its way to another node; or its window is still being read, and everyone asks at the end of that
        if not lane.wants_catch_up(now_us):
            return  # whoever makes room in it, or takes from it, asks again
        if obligations.held_bytes >= obligations.limits.held_bytes_max:
            self._line.setdefault(lane)  # other lanes hold the room: nobody tells this one of it
            return
        lane.catching_up = True
        try:
            query = obligations.catch_up_query(lane, now_us)
            if query is not None:
                rows: list[FoundRow] = []
                horizon, retry_us = None, None
                if query.backlog:
                    rows, horizon = await owed.find_backlog(
                        self._connection, query.shard, query.subscriptions, query.claimed, ROWS_MAX
                    )
                if query.retries:
                    found, retry_us = await owed.find_retries(
                        self._connection,
                        query.shard,
                        query.subscriptions,
                        query.claimed,
                        ROWS_MAX,
                        now_us,
                    )
                    rows += found
                obligations.claim(lane, query, rows, horizon, retry_us)
            loading = obligations.to_load(lane, self._deliveries_max)
            if loading:
                await self._load(lane, loading)
        finally:
            lane.catching_up = False
        self._note_retry(lane)
        self._ready(lane)
        if lane.wants_catch_up(self._clock.now_us()):
            self.want(lane)

    async def _load(self, lane: Lane, loading: list[ToLoad]) -> None:
        """Read the events of `loading` and queue their deliveries; an event that several want is read once."""
        budget = max(1, min(self._bytes_max, lane.room()[1]))
        sequences = sorted({item.sequence for item in loading})
        found = await event_log.load_events(
            self._connection, loading[0].row.tenant, sequences, budget
        )
        events = {event.sequence: event for event in found}
        # Stopped by the budget, not at the end: what lies beyond may exist.
        cut = sum(event.size for event in found) >= budget and found[-1].sequence < sequences[-1]
        last = found[-1].sequence if cut else None
        self._obligations.loaded(lane, loading, events, last)
        self._counters.pages += 1
        self._counters.deliveries += len(loading)

    def _note_retry(self, lane: Lane) -> None:
        """Remember when to look at a lane for retries; one entry a lane, renewed only for an earlier time."""
        due_us = lane.retry_us
        if due_us is not None and due_us < self._scheduled.get(lane, due_us + 1):
            self._scheduled[lane] = due_us
            heapq.heappush(self._retries, (due_us, next(self._tie), lane))

    def _due_retries(self) -> None:
        """Lanes whose next retry is due join the line."""
        now_us = self._clock.now_us()
        while self._retries and self._retries[0][0] <= now_us:
            due_us, _, lane = heapq.heappop(self._retries)
            if self._scheduled.get(lane) == due_us:
                del self._scheduled[lane]
            if lane.wants_retries(now_us):
                self._line.setdefault(lane)
            elif lane.retry_us is not None and lane.retry_us > now_us:
                self._note_retry(lane)
            # else it loads those that it claimed before, and is asked again at the end of that
