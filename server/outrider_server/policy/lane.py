"""A lane: the bounded queue of one endpoint in memory.

Rules:
- Sequence order: while anything of the lane waits in owed rows (backlog, waiting rows, `spill`), new events join that
  tail instead of overtaking it. Due retries mix in.
- Bounded by count and bytes; what has no room is spilled, and owed rows stand for it from the next record on.
- Deciding only: `take` returns deliveries to send, or nothing with the time to ask again.
- Concurrency and rate limit are the endpoint's, or the lane's part of them where several lanes divide them; both are
  worked out when they change, so a lane without a rate limit pays nothing for it.
"""

from __future__ import annotations

from collections import deque

from outrider_server.domain.delivery import Delivery, DeliveryState, OwedRow
from outrider_server.domain.endpoint import DeliveryMode, Endpoint
from outrider_server.domain.sequence import microseconds_of
from outrider_server.policy.rate_limit import RateLimiter


class Lane:
    """One endpoint's deliveries of one shard in memory, and what is known of those in owed rows.

    - `subscriptions`: the active ones. Rows of paused subscriptions count nowhere here but in `rows`.
    - `rows`: claimed rows by (shard, id); `waiting_rows`: those of them with sequences that are not in the queue yet;
      `loading`: deliveries whose events are being read.
    - `backlog`: unclaimed rows that could be sent at once; `unrecorded`: those of them that the record under way writes,
      so that no reader can find them yet. `retry_us`: when the next unclaimed retry is due, None for none.
    - `horizon`: while there is a backlog, sequences above it wait until the rows between are read; None for no limit.
    - `owing`: the next record writes rows for deliveries that have left memory already; `owing_now`: the record under
      way does. Until they can be read nothing may be loaded before them.
    - `concurrency`: requests in flight at most. `limiter`: when the next may start, None for no limit; whoever sends asks
      it besides `ready_in_us` and tells it of each request, for it counts on another clock, one that nobody sets.
    """

    __slots__ = (
        "backlog",
        "bytes_max",
        "catching_up",
        "concurrency",
        "deliveries_max",
        "endpoint",
        "horizon",
        "in_flight",
        "limiter",
        "loading",
        "owing",
        "owing_now",
        "parts",
        "paused",
        "queue",
        "queue_bytes",
        "retry_us",
        "rows",
        "shard",
        "spill",
        "subscriptions",
        "unrecorded",
        "waiting_rows",
    )

    def __init__(
        self, endpoint: Endpoint, deliveries_max: int, bytes_max: int, shard: int = 0
    ) -> None:
        self.shard = shard
        self.endpoint = endpoint
        self.deliveries_max = deliveries_max
        self.bytes_max = bytes_max
        self.queue: deque[Delivery] = deque()
        self.queue_bytes = 0
        self.in_flight = 0
        self.spill: deque[Delivery] = deque()
        self.rows: dict[tuple[int, int], OwedRow] = {}
        self.backlog = 0
        self.unrecorded = 0
        self.retry_us: int | None = None
        self.paused = False
        self.catching_up = False
        self.owing = False
        self.owing_now = False
        self.loading = 0
        self.subscriptions: dict[int, None] = {}
        self.waiting_rows: list[OwedRow] = []
        self.horizon: int | None = None
        self.parts = 1
        self.concurrency = endpoint.concurrency
        self.limiter = _limiter(endpoint, self.parts)

    def configure(self, endpoint: Endpoint, parts: int = 1) -> bool:
        """Take over the endpoint as it is from now on; whether anything changed, so that it may be ready sooner.

        `parts`: over how many lanes its limits are divided. The limiter stays as long as its limit does: another one
        begins with its burst used up.
        """
        changed = endpoint != self.endpoint or parts != self.parts
        if endpoint.rate_limit != self.endpoint.rate_limit or parts != self.parts:
            self.limiter = _limiter(endpoint, parts)
        self.concurrency = max(1, endpoint.concurrency // parts)
        self.endpoint = endpoint
        self.parts = parts
        return changed

    def has_room(self) -> bool:
        """Whether one more delivery fits."""
        return len(self.queue) < self.deliveries_max and self.queue_bytes < self.bytes_max

    def room(self) -> tuple[int, int]:
        """How many deliveries and bytes fit."""
        return self.deliveries_max - len(self.queue), self.bytes_max - self.queue_bytes

    def drains(self) -> bool:
        """Whether something older than a new event waits outside the queue."""
        return bool(
            self.backlog
            or self.spill
            or self.waiting_rows
            or self.loading
            or self.owing
            or self.owing_now
        )

    def may_reclaim(self) -> bool:
        """Whether spilled deliveries are next: nothing older waits outside the queue."""
        return bool(self.spill) and not (
            self.backlog
            or self.waiting_rows
            or self.loading
            or self.owing
            or self.owing_now
            or self.paused
        )

    def may_load(self, row: OwedRow, sequence: int) -> bool:
        """Whether a sequence of a claimed row may come into the queue now. Retries mix in at any time."""
        if row.retry:
            return True
        if self.owing or self.owing_now:
            return False
        return not self.backlog or self.horizon is None or sequence <= self.horizon

    def push(self, delivery: Delivery) -> None:
        """Queue a delivery behind the others."""
        delivery.state = DeliveryState.QUEUED
        self.queue.append(delivery)
        self.queue_bytes += delivery.event.size

    def wants_catch_up(self, now_us: int) -> bool:
        """Whether owed rows should be read or loaded for this lane: there are some to send, and half of it is free."""
        if (
            self.paused
            or self.catching_up
            or len(self.queue) * 2 > self.deliveries_max
            or not self.has_room()
        ):
            return False
        return (
            any(self.may_load(row, row.waiting[-1]) for row in self.waiting_rows)
            or self.wants_backlog()
            or self.wants_retries(now_us)
        )

    def wants_backlog(self) -> bool:
        """Whether unclaimed rows should be read: some can be found, and no claimed one may be loaded before them."""
        return (
            self.backlog > self.unrecorded
            and not (self.owing or self.owing_now)
            and not any(self.may_load(row, row.waiting[-1]) for row in self.waiting_rows)
        )

    def wants_retries(self, now_us: int) -> bool:
        """Whether a retry is due."""
        return self.retry_us is not None and self.retry_us <= now_us

    def ready_in_us(self, now_us: int) -> int | None:
        """Microseconds until a request should be sent; 0 for now, None when nothing is queued or the lane is paused.

        The oldest event waits for company at most as long as the batch policy lets it, counted from its arrival.
        """
        if self.paused:
            return None
        if not self.queue:
            return 0 if self.may_reclaim() else None
        endpoint = self.endpoint
        if endpoint.mode is DeliveryMode.SINGLE:
            return 0
        policy = endpoint.batch
        if len(self.queue) >= policy.events_max or self.queue_bytes >= policy.bytes_max:
            return 0
        ripe_us = microseconds_of(self.queue[0].event.sequence) + int(policy.linger_ms * 1000)
        return max(0, ripe_us - now_us)

    def take(self) -> list[Delivery]:
        """Take what one request carries: one delivery, or a batch within its policy; empty when nothing is queued.

        A single event above the batch's bytes travels alone.
        """
        if not self.queue:
            return []
        if self.endpoint.mode is DeliveryMode.SINGLE:
            events_max, bytes_max = 1, 0
        else:
            events_max, bytes_max = self.endpoint.batch.events_max, self.endpoint.batch.bytes_max
        queue = self.queue
        in_flight = DeliveryState.IN_FLIGHT
        taken: list[Delivery] = []
        size = 0
        while queue and len(taken) < events_max:
            delivery = queue[0]
            size += delivery.event.size
            if taken and size > bytes_max:
                break
            queue.popleft()
            self.queue_bytes -= delivery.event.size
            delivery.state = in_flight
            taken.append(delivery)
        self.in_flight += 1
        return taken


def _limiter(endpoint: Endpoint, parts: int) -> RateLimiter | None:
    return None if endpoint.rate_limit is None else RateLimiter(endpoint.rate_limit, parts)
