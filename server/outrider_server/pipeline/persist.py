"""Persist: events and whom they go to, made durable in one transaction of many frames; then the frames are answered.

Group commit: one transaction is under way, and what arrives meanwhile forms the next. Large events have a transaction of
their own beside it, or 50 ms of TOAST would delay every small one. A producer's frames stay in order: while one waits or
is under way in either, those behind it wait. So do events whose idempotency key is under way in the other.

Rules:
- Nobody is answered before the commit returned. When a commit fails, its outcome is unknown: the error rises, the tenure
  ends, the frames are refused for a passing reason, and the log is read anew.
- A sequence is given out here and nowhere else; the window knows it from then on.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from outrider_server.domain.errors import Aborted, OutriderError, Unavailable
from outrider_server.domain.event import Event
from outrider_server.domain.frame import EventRefusal, FrameResult
from outrider_server.domain.sequence import sequence_of, shard_of
from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.pipeline.match import TenantEntry
from outrider_server.policy.lane import Lane
from outrider_server.policy.obligations import Obligations
from outrider_server.storage import event_log
from outrider_server.storage.database import Connection
from outrider_server.telemetry.counters import IngestCounters, LaneCounters, PersistCounters
from outrider_server.telemetry.logs import PipelineLog


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """How much one transaction takes, and how long idempotency keys are looked up."""

    events_max: int = 5000
    bytes_max: int = 8 * 1024 * 1024
    idempotency_hours: int = 24


FRAME_ANSWER_SECONDS = 86_400
"""How long what frames were answered with is known (see `upkeep.prune`)."""

FRAME_ANSWER_MARGIN_US = (FRAME_ANSWER_SECONDS - 3600) * 1_000_000


class Session:
    """What this node knows of a producer: per shard its latest session and the last durable frame of that.

    Shared by the producer's streams. `line`: its frames that wait for a transaction, in order, whichever queue they are
    in. `busy`: some are under way.
    """

    __slots__ = ("busy", "line", "producer", "reach")

    def __init__(self, producer: str) -> None:
        self.producer = producer
        self.reach: dict[int, tuple[int, int]] = {}
        self.busy = False
        self.line: deque[PendingFrame] = deque()

    def idle(self) -> bool:
        """Whether nothing refers to it but the memory of what the log says anyway."""
        return not self.busy and not self.line


@dataclass(slots=True)
class Portion:
    """The part of a frame that lives on one node; mostly the whole of it.

    `events` with their tenants `entries` and their indexes in the frame, `places`. `refusals`: events that the edge
    refused already, which are in none of these. `shards`: those that it writes to; `previous`: for each the number of the
    stream's frame before this one that had something for it, 0 for none.
    """

    events: list[Event]
    entries: list[TenantEntry]
    places: Sequence[int]
    shards: set[int]
    refusals: list[EventRefusal] = field(default_factory=list)
    previous: Mapping[int, int] = field(default_factory=dict)


class PendingFrame:
    """A checked portion of a frame on its way into the log.

    `events` are its good ones, with `places` and `entries` as in the portion. `session` is None for a unary publish.
    `answer` gets the `FrameResult`, or an `OutriderError` for a refusal. `durable` are those of `shards` that the
    producer's row is not moved in, for it stands there or further on; `earlier` is the answer to events that were durable
    already.
    """

    __slots__ = (
        "answer",
        "durable",
        "earlier",
        "entries",
        "events",
        "large",
        "number",
        "places",
        "portion",
        "refusals",
        "result",
        "session",
        "session_number",
        "shards",
        "size",
    )

    def __init__(
        self,
        session: Session | None,
        session_number: int,
        number: int,
        portion: Portion,
        refusals: list[EventRefusal],
        answer: asyncio.Future[FrameResult],
        *,
        large: bool,
    ) -> None:
        self.session = session
        self.session_number = session_number
        self.number = number
        self.portion = portion
        self.shards = portion.shards
        self.events: Sequence[Event] = portion.events
        self.places: Sequence[int] = portion.places
        self.entries: Sequence[TenantEntry] = portion.entries
        self.refusals = portion.refusals + refusals
        if refusals:
            bad = {refusal.index for refusal in refusals}
            self._keep(lambda _, place: place not in bad)
        self.answer = answer
        self.large = large
        self.size = sum(event.size for event in self.events)
        self.result: FrameResult | None = None
        self.earlier: FrameResult | None = None
        self.durable: set[int] = set()

    def named_in(self, answer: FrameResult) -> set[int]:
        """The places of its events that an earlier answer to the frame names: these are durable, or refused for good.

        A range names all events of its tenant: it was given while the tenant lived in one shard.
        """
        named = {place for place, _ in (*answer.duplicates, *answer.singles)}
        named.update(refusal.index for refusal in answer.refusals)
        whole = {name for name, _, _ in answer.ranges}
        portion = self.portion
        named.update(
            place
            for place, entry in zip(portion.places, portion.entries, strict=True)
            if entry.name in whole
        )
        return named.intersection(portion.places)

    def drop(self, gone: set[int]) -> None:
        """Drop the events at these places: they are durable."""
        self._keep(lambda _, place: place not in gone)
        self.refusals = [refusal for refusal in self.refusals if refusal.index not in gone]

    def refuse(self, bad: set[int], reason: str, message: str) -> int:
        """Refuse the events of these identities for good; returns how many they were."""
        refused = [
            EventRefusal(place, reason, message)
            for event, place in zip(self.events, self.places, strict=True)
            if id(event) in bad
        ]
        if refused:
            self.refusals += refused
            self._keep(lambda event, _: id(event) not in bad)
        return len(refused)

    def _keep(self, wanted: Callable[[Event, int], bool]) -> None:
        rows = [
            row
            for row in zip(self.events, self.places, self.entries, strict=True)
            if wanted(row[0], row[1])
        ]
        self.events = [event for event, _, _ in rows]
        self.places = [place for _, place, _ in rows]
        self.entries = [entry for _, _, entry in rows]


class Persister:
    """Owns the two queues of frames and the two connections they are written over."""

    def __init__(
        self,
        *,
        obligations: Obligations,
        clock: DatabaseClock,
        limits: GroupLimits,
        enqueued: Callable[[Iterable[Lane]], None],
        relieved: Callable[[Iterable[Lane]], None],
        ingest: IngestCounters,
        counters: PersistCounters,
        lanes: LaneCounters,
        log: PipelineLog,
        monotonic: Callable[[], float],
    ) -> None:
        self._obligations = obligations
        self._clock = clock
        self._limits = limits
        self._enqueued = enqueued
        self._relieved = relieved
        self._ingest = ingest
        self._counters = counters
        self._lanes = lanes
        self._log = log
        self._monotonic = monotonic
        self._small: deque[PendingFrame] = deque()
        self._large: deque[PendingFrame] = deque()
        self._wake_small = asyncio.Event()
        self._wake_large = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._under_way: dict[bool, list[PendingFrame]] = {}
        self._closed: OutriderError | None = None
        self._keys: dict[bool, list[tuple[int, UUID]]] = {}
        self._keys_free = asyncio.Event()

    def submit(self, frame: PendingFrame) -> None:
        """Queue a frame. Bounded by the callers' byte budget and windows."""
        if self._closed is not None:
            _refuse(frame, self._closed)
            return
        self._idle.clear()
        if frame.session is not None:
            frame.session.line.append(frame)
        if frame.large:
            self._large.append(frame)
            self._wake_large.set()
        else:
            self._small.append(frame)
            self._wake_small.set()

    def waiting(self) -> int:
        """Events that wait for a transaction."""
        return sum(len(frame.events) for queue in (self._small, self._large) for frame in queue)

    def record_time(self, shard: int) -> int:
        """A record's time as a sequence: now, and never below a sequence that the shard gave out."""
        return max(
            sequence_of(self._clock.now_us(), shard), self._obligations.windows[shard].clock.last()
        )

    def concerns(self, shard: int) -> bool:
        """Whether a frame that waits or is under way writes to a shard."""
        frames = (self._small, self._large, *self._under_way.values())
        return any(shard in frame.shards for some in frames for frame in some)

    async def drained(self) -> None:
        """Wait until every frame submitted so far is answered."""
        await self._idle.wait()

    async def run(self, connection: Connection, *, large: bool) -> None:
        """Write groups for ever; rises with the first transaction whose outcome is unknown."""
        queue, wake = (self._large, self._wake_large) if large else (self._small, self._wake_small)
        while True:
            await wake.wait()
            wake.clear()
            while group := self._next_group(queue):
                self._under_way[large] = group
                await self._write(connection, group, large=large)
                del self._under_way[large]
                for frame in group:
                    if frame.session is not None:
                        frame.session.busy = False
                # A producer may have waited in the other queue for this group.
                (self._wake_small if large else self._wake_large).set()
            if not self._small and not self._large and not self._under_way:
                self._idle.set()

    def refuse_all(self, error: OutriderError) -> None:
        """The tenure ends: refuse what waits, and what still comes. What is under way is refused by its writer."""
        self._closed = error
        for queue in (self._small, self._large):
            while queue:
                _refuse(queue.popleft(), error)

    def _next_group(self, queue: deque[PendingFrame]) -> list[PendingFrame]:
        """Take frames in order, up to the limits; those of a producer that is busy in the other transaction stay."""
        group: list[PendingFrame] = []
        stay: list[PendingFrame] = []
        mine: set[Session] = set()
        events = size = 0
        while queue:
            frame = queue[0]
            session = frame.session
            if session is not None and (
                session.line[0] is not frame or (session.busy and session not in mine)
            ):
                stay.append(queue.popleft())
                continue
            events += len(frame.events)
            size += frame.size
            if group and (events > self._limits.events_max or size > self._limits.bytes_max):
                break
            if session is not None:
                session.line.popleft()
                session.busy = True
                mine.add(session)
            group.append(queue.popleft())
        queue.extendleft(reversed(stay))
        return group

    async def _write(
        self, connection: Connection, group: list[PendingFrame], *, large: bool
    ) -> None:
        try:
            started = self._monotonic()
            fresh, again = await self._without_duplicates(connection, group)
            if fresh:
                await self._commit_all(connection, fresh, large=large)
                self._counters.commits += 1
                seconds = self._monotonic() - started
                self._counters.commit_seconds.observe(seconds)
                self._log.log_batch(
                    "persist",
                    events=sum(len(frame.events) for frame in fresh),
                    seconds=seconds,
                    frames=len(fresh),
                    large=large,
                )
        except BaseException:
            self._counters.failures += 1
            error = Unavailable(
                "STORAGE_UNAVAILABLE",
                "the database did not confirm; sending again is safe",
                retry_after_seconds=0.2,
            )
            for frame in group:
                _refuse(frame, error)
            raise
        finally:
            self._keys.pop(large, None)
            self._keys_free.set()
        for frame in fresh:
            if frame.session is not None:
                for shard in frame.shards - frame.durable:
                    frame.session.reach[shard] = (frame.session_number, frame.number)
        self._enqueue(fresh)
        for frame in fresh:
            assert frame.result is not None
            _answer(frame, frame.result.joined(frame.earlier) if frame.earlier else frame.result)
        for frame, first in again:
            assert first.result is not None
            self._ingest.frames_duplicate += 1
            _answer(frame, replace(first.result, duplicate=True))

    async def _without_duplicates(
        self, connection: Connection, group: list[PendingFrame]
    ) -> tuple[list[PendingFrame], list[tuple[PendingFrame, PendingFrame]]]:
        """Answer frames that are durable already, refuse those out of sequence; return the rest.

        Also returned, with its first copy: a frame that this very group holds twice (two streams of one producer). It
        must not be answered before the group is durable. Decided here, where earlier frames of the producer are
        settled, not where frames arrive; and per shard, for a frame may have been stored in some of its shards only.
        """
        fresh: list[PendingFrame] = []
        again: list[tuple[PendingFrame, PendingFrame]] = []
        reach: dict[tuple[Session, int], tuple[int, int]] = {}
        firsts: dict[tuple[Session, int, int], PendingFrame] = {}
        for frame in group:
            session = frame.session
            if session is None:
                fresh.append(frame)
                continue
            first = firsts.get((session, frame.session_number, frame.number))
            if first is not None and first.shards == frame.shards:
                again.append((frame, first))
                continue
            try:
                durable = _durable_shards(session, frame, reach)
            except OutriderError as error:
                _refuse(frame, error)
                continue
            if first is not None and durable:
                # Copies that were split differently: what is not committed yet cannot be answered.
                _refuse(frame, Unavailable("FRAME_OUT_OF_SEQUENCE", "an earlier copy is under way"))
                continue
            frame.durable = durable
            if durable or any(map(self._was_spread, frame.entries)):
                frame.earlier = await self._earlier(connection, frame)
                if frame.earlier is not None and not frame.events and durable == frame.shards:
                    self._ingest.frames_duplicate += 1
                    _answer(frame, frame.earlier)
                    continue
            firsts[session, frame.session_number, frame.number] = frame
            for shard in frame.shards - frame.durable:
                reach[session, shard] = (frame.session_number, frame.number)
            fresh.append(frame)
        return fresh, again

    def _was_spread(self, entry: TenantEntry) -> bool:
        """Whether a frame that comes again may have been stored in other shards than its events go to now."""
        return bool(entry.spread_us) and (
            self._clock.now_us() - entry.spread_us < FRAME_ANSWER_SECONDS * 1_000_000
        )

    async def _earlier(self, connection: Connection, frame: PendingFrame) -> FrameResult | None:
        """Drop the events of a frame that are durable; what they were answered with. None where none of it is.

        Decided event by event: a shard that has seen the frame's number need not have seen all that goes to it now, for
        its tenants may have been split differently then.
        """
        session = frame.session
        assert session is not None
        known = await event_log.read_frames(
            connection, session.producer, frame.session_number, [frame.number]
        )
        found = known.get(frame.number)
        if found is None:
            if not frame.durable or not await event_log.is_forgotten(
                connection, session.producer, frame.session_number, frame.number,
                sequence_of(self._clock.now_us() - FRAME_ANSWER_MARGIN_US, 0),
            ):  # fmt: skip
                return None
            # So long ago that its answer is not kept: then it is durable in all that has seen its number.
            frame.drop(
                {
                    place
                    for place, event in zip(frame.portion.places, frame.portion.events, strict=True)
                    if event.shard in frame.durable
                }
            )
            return FrameResult(duplicate=True)
        named = frame.named_in(found)
        frame.drop(named)
        shards = {shard_of(first) for _, first, _ in found.ranges}
        names = {
            entry.name
            for place, entry in zip(frame.portion.places, frame.portion.entries, strict=True)
            if place in named
        }
        answer = found.of(shards, named)
        answer.ranges = [item for item in answer.ranges if item[0] in names]
        return answer.joined(FrameResult(refusals=frame.portion.refusals, duplicate=True))

    async def _commit_all(
        self, connection: Connection, group: list[PendingFrame], *, large: bool
    ) -> None:
        """Commit a group. A row that passed every check but that Postgres refuses is left out, and costs the others nothing.

        Ends: each further round has fewer events.
        """
        while True:
            assigned: list[Event] = []
            try:
                await self._commit(connection, group, assigned, large=large)
            except event_log.DataRefused:
                bad = set(map(id, await event_log.refused_alone(connection, assigned)))
                if not bad:
                    raise
                self._leave_out(group, bad)
            else:
                return

    async def _commit(
        self,
        connection: Connection,
        group: list[PendingFrame],
        assigned: list[Event],
        *,
        large: bool,
    ) -> None:
        """One transaction. On a data error it is rolled back, and no trace of it is left in memory but in `assigned`."""
        windows = self._obligations.windows
        shards = set[int]().union(*(frame.shards for frame in group))
        await event_log.begin(connection, [(shard, windows[shard].epoch) for shard in shards])
        try:
            producers = _producer_rows(group)
            if producers:
                await event_log.set_producers(connection, producers)
            keys = await self._deduplicate(connection, group, large=large)
            self._assign(group, assigned)
            key_rows = [(event.tenant, key, event.sequence) for event, key in keys]
            at = max(
                (event.sequence for event in assigned), default=sequence_of(self._clock.now_us(), 0)
            )
            frames = [
                (
                    at,
                    f.session.producer,
                    f.session_number,
                    f.number,
                    event_log.encode_answer(f.result),
                )
                for f in group
                if f.session is not None and f.result is not None
            ]
            await event_log.append(connection, assigned, key_rows, frames, large=large)
        except event_log.DataRefused:
            for event in reversed(assigned):
                self._obligations.aborted(event)
            await event_log.rollback(connection)
            raise
        await event_log.commit(connection)
        self._counters.events += len(assigned)

    def _leave_out(self, group: list[PendingFrame], bad: set[int]) -> None:
        """Refuse the events of these identities for good."""
        for frame in group:
            refused = frame.refuse(
                bad, "INVALID_ARGUMENT", "the database refuses this event's data"
            )
            if refused:
                self._ingest.events_refused.add("INVALID_ARGUMENT", count=refused)

    async def _deduplicate(
        self, connection: Connection, group: list[PendingFrame], *, large: bool
    ) -> list[tuple[Event, UUID]]:
        """Find events whose idempotency key is known; returns the others that have a key, with its hash.

        A known one is left out of the frame's rows: `event.sequence` holds the first one's id, or, where the first is in
        this very group, `event.deliveries` holds that event until it has its sequence.
        """
        keyed = [
            (event, _key_hash(event))
            for frame in group
            for event in frame.events
            if event.idempotency_key
        ]
        if not keyed:
            return []
        await self._claim_keys([(event.tenant, key) for event, key in keyed], large=large)
        since = sequence_of(
            self._clock.now_us() - self._limits.idempotency_hours * 3_600_000_000, 0
        )
        known = await event_log.find_idempotent(
            connection, [(event.tenant, key) for event, key in keyed], since
        )
        first: dict[tuple[int, UUID], Event] = {}
        fresh: list[tuple[Event, UUID]] = []
        for event, key in keyed:
            event.sequence, event.deliveries = 0, None
            stored = known.get((event.tenant, key))
            if stored is not None:
                event.sequence = stored
            elif (event.tenant, key) in first:
                event.deliveries = first[event.tenant, key]
            else:
                first[event.tenant, key] = event
                fresh.append((event, key))
        return fresh

    async def _claim_keys(self, keys: list[tuple[int, UUID]], *, large: bool) -> None:
        """Wait while the other transaction stores an event under one of these keys: a look-up would not see it yet."""
        if large not in self._keys:
            while not set(self._keys.get(not large, ())).isdisjoint(keys):
                self._keys_free.clear()
                await self._keys_free.wait()
            self._keys[large] = keys

    def _assign(self, group: list[PendingFrame], assigned: list[Event]) -> None:
        """Give sequences: per frame and tenant one unbroken range. Fills each frame's result and `assigned`."""
        now_us = self._clock.now_us()
        obligations = self._obligations
        for frame in group:
            by_home: dict[TenantEntry | tuple[TenantEntry, int], list[Event]] = {}
            repeated: list[tuple[int, Event]] = []
            for event, place, entry in zip(frame.events, frame.places, frame.entries, strict=True):
                if event.idempotency_key and (event.sequence or event.deliveries is not None):
                    repeated.append((place, event))
                    continue
                home = entry if entry.whole else (entry, event.shard)
                events = by_home.get(home)
                if events is None:
                    events = by_home[home] = []
                events.append(event)
            result = FrameResult(refusals=sorted(frame.refusals, key=lambda r: r.index))
            for home, events in by_home.items():
                window = obligations.windows[events[0].shard]
                first = window.clock.take(now_us, len(events))
                obligations.assigned(window, events, first)
                assigned += events
                if isinstance(home, TenantEntry):
                    result.ranges.append((home.name, first, len(events)))
            if any(isinstance(home, tuple) for home in by_home):
                result.singles = [
                    (place, event.sequence)
                    for event, place, entry in zip(
                        frame.events, frame.places, frame.entries, strict=True
                    )
                    if not entry.whole and (place, event) not in repeated
                ]
            for place, event in repeated:
                original = event.deliveries
                result.duplicates.append(
                    (place, original.sequence if original is not None else event.sequence)
                )
                event.deliveries = None
            frame.result = result

    def _enqueue(self, group: list[PendingFrame]) -> None:
        """Straight from memory into the lanes."""
        obligations = self._obligations
        woken: set[Lane] = set()
        for frame in group:
            assert frame.result is not None
            repeated = {place for place, _ in frame.result.duplicates}
            events = frame.events
            if repeated:
                events = [
                    event
                    for event, place in zip(events, frame.places, strict=True)
                    if place not in repeated
                ]
            for event in events:
                obligations.committed(event, woken)
                self._lanes.offered += len(event.targets)
            self._ingest.events_duplicate += len(repeated)
        self._relieved(obligations.relieve())
        self._enqueued(woken)


def _durable_shards(
    session: Session,
    frame: PendingFrame,
    reach: Mapping[tuple[Session, int], tuple[int, int]],
) -> set[int]:
    """Those of a frame's shards in which it is durable. `reach`: what the group moves its producers to.

    Raises where it cannot be taken: a later session is known, or the frame before it is not durable.
    """
    durable: set[int] = set()
    number = frame.session_number
    for shard in frame.shards:
        known, last = reach.get((session, shard)) or session.reach.get(shard, (0, 0))
        if number < known:
            raise Aborted("SESSION_SUPERSEDED", "a later session of this producer took over")
        if number > known:
            last = 0
        if frame.number <= last:
            durable.add(shard)
        elif frame.portion.previous.get(shard, 0) > last:
            raise Unavailable(
                "FRAME_OUT_OF_SEQUENCE",
                f"frame {frame.portion.previous[shard]}, which comes before {frame.number}, is not durable",
            )
    return durable


def _producer_rows(group: list[PendingFrame]) -> list[tuple[str, int, int, int]]:
    """(producer, shard, session, last frame) that a group moves its producers to."""
    rows: dict[tuple[str, int], tuple[int, int]] = {}
    for frame in group:
        if frame.session is not None:
            for shard in frame.shards - frame.durable:
                rows[frame.session.producer, shard] = (frame.session_number, frame.number)
    return [
        (producer, shard, session, number) for (producer, shard), (session, number) in rows.items()
    ]


def _key_hash(event: Event) -> UUID:
    """Sixteen bytes stand for a key of any length: 2^64 keys of a tenant before two are likely to collide."""
    return UUID(bytes=hashlib.blake2b(event.idempotency_key.encode(), digest_size=16).digest())


def _answer(frame: PendingFrame, result: FrameResult) -> None:
    if not frame.answer.done():
        frame.answer.set_result(result)


def _refuse(frame: PendingFrame, error: OutriderError) -> None:
    if not frame.answer.done():
        frame.answer.set_exception(error)
