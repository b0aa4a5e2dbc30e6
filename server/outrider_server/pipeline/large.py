"""Large events: checked and matched in a child process.

Why: parsing 10 MiB of JSON takes 64 ms with the interpreter's lock held, in a thread as on the loop, and every other
event of the node would wait for it. The child holds each tenant's index by version; one child, so the order of calls is
the order of work, and the parent knows what the child holds.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial

from outrider_server.domain.errors import Unavailable
from outrider_server.domain.event import Event
from outrider_server.domain.frame import EventRefusal
from outrider_server.domain.subscription import Subscription
from outrider_server.matching.index import Index
from outrider_server.pipeline.ingest import EventChecker, IngestLimits, Refused, parse_payload
from outrider_server.pipeline.match import TenantEntry
from outrider_server.telemetry.counters import MatchCounters

_held: dict[int, tuple[int, Index]] = {}
"""In the child: the index of each tenant, and its version."""


class LargeEvents:
    """Owns the child process. Make it once, close it."""

    def __init__(self, limits: IngestLimits, counters: MatchCounters) -> None:
        self._limits = limits
        self._checker = EventChecker(limits)
        self._counters = counters
        self._sent: dict[int, int] = {}
        self._pool: ProcessPoolExecutor | None = None

    async def check_and_match(self, event: Event, entry: TenantEntry) -> None:
        """As `pipeline.ingest.check_and_match` for one event; raises `Refused`, or `Unavailable` if the child died."""
        self._checker.check(event, entry)
        pool = self._started()
        subscriptions = (
            None if self._sent.get(entry.id) == entry.version else entry.configuration.subscriptions
        )
        self._sent[entry.id] = entry.version
        call = partial(
            _match_in_child,
            replace(event, deliveries=None),
            entry.version,
            subscriptions,
            self._limits.json_depth_max,
        )
        try:
            result = await asyncio.get_running_loop().run_in_executor(pool, call)
        except BrokenProcessPool:
            await asyncio.to_thread(self.close)
            raise Unavailable(
                "OVERLOADED", "the process for large events ended; try again"
            ) from None
        if isinstance(result, EventRefusal):
            raise Refused(result.reason, result.message)
        event.targets, event.over_budget = result
        event.config_version = entry.version
        self._counters.events += 1
        self._counters.targets += len(event.targets)
        self._counters.unmatched += not event.targets
        self._counters.over_budget += len(event.over_budget)

    def close(self) -> None:
        """End the child."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None
        self._sent.clear()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Spawned, not forked: a fork would copy the event loop's and gRPC's threads in an undefined state.
            self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        return self._pool


def _match_in_child(
    event: Event, version: int, subscriptions: tuple[Subscription, ...] | None, depth_max: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | EventRefusal:
    if subscriptions is not None:
        _held[event.tenant] = (version, Index.build(subscriptions))
    try:
        document = parse_payload(event.data, depth_max)
    except Refused as refused:
        return EventRefusal(0, refused.reason, refused.message)
    targets, over_budget = _held[event.tenant][1].match(event, document)
    return targets, over_budget
