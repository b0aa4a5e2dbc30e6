"""Large events: checked and matched in a child process.

Why: parsing 10 MiB of JSON takes 64 ms with the interpreter's lock held, in a thread as on the loop, and every other
event of the node would wait for it. The child holds tenants' indexes by version, and asks for one that it lacks: the
parent never assumes what it holds, for a call may be cancelled before it begins.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import connection
from threading import Thread

from outrider_server.domain.errors import Unavailable
from outrider_server.domain.event import Event
from outrider_server.domain.frame import EventRefusal
from outrider_server.domain.subscription import Subscription
from outrider_server.matching.index import Index
from outrider_server.pipeline.ingest import EventChecker, IngestLimits, Refused, parse_payload
from outrider_server.pipeline.match import TenantEntry
from outrider_server.telemetry.counters import MatchCounters

INDEXES_MAX = 256
"""Tenants whose index the child keeps."""

_held: OrderedDict[int, tuple[int, Index]] = OrderedDict()
"""In the child: the index of each tenant, and its version; the one used last at the end."""


class LargeEvents:
    """Owns the child process. Make it once, close it."""

    def __init__(self, limits: IngestLimits, counters: MatchCounters) -> None:
        self._limits = limits
        self._checker = EventChecker(limits)
        self._counters = counters
        self._pool: ProcessPoolExecutor | None = None

    async def check_and_match(self, event: Event, entry: TenantEntry) -> None:
        """As `pipeline.ingest.check_and_match` for one event; raises `Refused`, or `Unavailable` if the child died."""
        self._checker.check(event, entry)
        result = await self._ask(event, entry, None)
        if result is None:
            result = await self._ask(event, entry, entry.configuration.subscriptions)
        assert result is not None
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
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    async def _ask(
        self, event: Event, entry: TenantEntry, subscriptions: tuple[Subscription, ...] | None
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | EventRefusal | None:
        pool = self._started()
        call = partial(
            _match_in_child,
            replace(event, deliveries=None),
            entry.version,
            subscriptions,
            self._limits.json_depth_max,
        )
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, call)
        except (BrokenProcessPool, OSError):  # its pipe may break before the pool knows that it is
            if self._pool is pool:  # the first to learn of it; another may have been started since
                self._pool = None
                await asyncio.to_thread(pool.shutdown)
            raise Unavailable(
                "OVERLOADED",
                "the process for large events ended; try again",
                retry_after_seconds=0.2,
            ) from None

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Spawned, not forked: a fork would copy the event loop's and gRPC's threads in an undefined state.
            self._pool = ProcessPoolExecutor(
                1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_child
            )
        return self._pool


def _begin_child() -> None:
    """A Ctrl-C in a terminal is the parent's to answer; and a child must not outlive a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(0)

    Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _match_in_child(
    event: Event, version: int, subscriptions: tuple[Subscription, ...] | None, depth_max: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | EventRefusal | None:
    """The targets, or the refusal, of an event; None where the index of this version is needed first."""
    held = _held.get(event.tenant)
    if subscriptions is not None:
        held = _held[event.tenant] = (version, Index.build(subscriptions))
        if len(_held) > INDEXES_MAX:
            _held.popitem(last=False)
    if held is None or held[0] != version:
        return None
    _held.move_to_end(event.tenant)
    try:
        document = parse_payload(event.data, depth_max)
    except Refused as refused:
        return EventRefusal(0, refused.reason, refused.message)
    targets, over_budget = held[1].match(event, document)
    return targets, over_budget
