"""Frames on the wire <-> frames in the domain. Hot: every event of every frame comes through `FrameReader.read`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import cast
from zlib import crc32

from outrider.v1 import error_reason_pb2, ingest_service_pb2
from outrider.v1.event_pb2 import Event as EventMessage
from outrider_server.domain.access import Caller
from outrider_server.domain.errors import Unavailable
from outrider_server.domain.event import Event
from outrider_server.domain.frame import ID_STEP, EventRefusal, FrameResult
from outrider_server.domain.sequence import SHARD_COUNT
from outrider_server.pipeline.homes import Home, Homes
from outrider_server.pipeline.match import Directory, TenantEntry, shard_for
from outrider_server.pipeline.persist import Portion

_REASON_PREFIX = "ERROR_REASON_"


@dataclass(slots=True)
class Elsewhere:
    """The part of a frame that lives on another node: the places of its events, and the shards they go to.

    `settled`: those of its tenants that live nowhere else, so that a publisher can go there.
    """

    places: list[int] = field(default_factory=list)
    shards: set[int] = field(default_factory=set)
    tenants: set[str] = field(default_factory=set)
    settled: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Split:
    """A frame by homes. `portion` lives here; `elsewhere` by the address of its node.

    `homeless`: tenants whose shard nobody holds at the moment. `unknown`: tenants that have to be looked up first.
    """

    portion: Portion
    elsewhere: dict[str, Elsewhere]
    homeless: set[str]
    unknown: set[str]

    def shards(self) -> frozenset[int]:
        """All shards that the frame goes to."""
        return frozenset(self.portion.shards).union(*(p.shards for p in self.elsewhere.values()))


class FrameReader:
    """Reads the events that one caller sends. `now_us` is the time of events that carry none.

    `holds`: whether this node takes events of a shard in.
    """

    def __init__(
        self,
        caller: Caller,
        directory: Directory,
        homes: Homes,
        holds: Callable[[int], bool],
        now_us: Callable[[], int],
    ) -> None:
        self._caller = caller
        self._directory = directory
        self._homes = homes
        self._holds = holds
        self._now_us = now_us

    async def read(
        self, messages: Sequence[EventMessage], tenant: str, producer: str | None
    ) -> Split:
        """The events by homes. `tenant` is that of events that name none.

        A frame of a `producer` in which every event was refused still belongs to a shard, for its number counts.
        Whether a tenant out of reach exists is not told.
        """
        reaches = self._caller.tenant
        if reaches is not None and self._own_name() is None:
            await self._homes.look_up(ids=[reaches])
        split = self._read(messages, tenant)
        if split.unknown:
            asked = split.unknown
            absent = asked - await self._homes.look_up(asked)
            split = self._read(messages, tenant, absent)
            # What was known when it began may have been forgotten meanwhile: that says nothing of whether it exists.
            if split.unknown:
                raise _not_here()
        portion = split.portion
        if producer is not None and not (portion.shards or split.elsewhere or split.homeless):
            self._place_empty(split, crc32(producer.encode()) % SHARD_COUNT)
        return split

    def read_here(
        self, messages: Sequence[EventMessage], tenant: str, places: Sequence[int]
    ) -> Portion:
        """A portion that another node passed on; raises where it does not live here."""
        # Whoever passed it on knows that its tenants exist; here only those are known that live here, or did.
        reaches = self._caller.tenant
        if reaches is not None and self._own_name() is None:
            raise _not_here()
        split = self._read(messages, tenant)
        if split.elsewhere or split.homeless or split.unknown:
            raise _not_here()
        portion = split.portion
        for refusal in portion.refusals if places else ():
            refusal.index = places[refusal.index]
        if places:  # else it is a whole frame
            portion.places = [places[place] for place in portion.places]
        return portion

    def _own_name(self) -> str | None:
        reaches = self._caller.tenant
        assert reaches is not None
        entry = self._directory.by_id.get(reaches) or self._homes.by_id.get(reaches)
        return entry.name if entry is not None else None

    def _read(
        self, messages: Sequence[EventMessage], tenant: str, absent: Collection[str] = ()
    ) -> Split:
        """`absent`: tenants that were asked for and do not exist."""
        events: list[Event] = []
        entries: list[TenantEntry] = []
        places: list[int] = []
        refusals: list[EventRefusal] = []
        shards: set[int] = set()
        split = Split(Portion(events, entries, places, shards, refusals), {}, set(), set())
        own_name = self._own_name() if self._caller.tenant is not None else None
        now_us = self._now_us()
        known: dict[str, tuple[TenantEntry | None, TenantEntry | Home | None, int, bool]] = {}
        for index, message in enumerate(messages):
            name = message.tenant or tenant
            found = known.get(name)
            if found is None:
                found = known[name] = self._find(name, own_name)
            entry, home, shard, here = found
            if home is None:
                if self._caller.tenant is not None and name != own_name:
                    reason, text = (
                        "TENANT_OUT_OF_SCOPE",
                        f"the API key does not reach tenant {name!r}",
                    )
                elif name not in absent:
                    split.unknown.add(name)
                    continue
                else:
                    reason, text = "UNKNOWN_TENANT", "there is no such tenant"
                refusals.append(EventRefusal(index, reason, text))
                continue
            data = message.data or message.data_json.encode()
            if len(home.shards) > 1:
                shard = shard_for(home.shards, message.key, message.idempotency_key, data)
                here = self._holds(shard)
            if not here or entry is None:
                self._place(split, shard, index, name, settled=len(home.shards) == 1)
                continue
            event = Event(
                entry.id,
                message.type,
                data,
                _time_us(message) if message.HasField("time") else now_us,
                message.source,
                message.subject,
                message.key,
                message.organization,
                message.actor,
                message.idempotency_key,
            )
            event.shard = shard
            if message.attributes:
                event.attributes = dict(message.attributes)
            events.append(event)
            entries.append(entry)
            places.append(index)
            shards.add(shard)
        return split

    def _find(
        self, name: str, own_name: str | None
    ) -> tuple[TenantEntry | None, TenantEntry | Home | None, int, bool]:
        """A tenant that the caller reaches: as it is known here, where it lives, its first shard, whether that is here."""
        if self._caller.tenant is not None and name != own_name:
            return None, None, -1, False
        entry = self._directory.by_name.get(name)
        home = entry or self._homes.by_name.get(name)
        if home is None:
            return None, None, -1, False
        return entry, home, home.shards[0], self._holds(home.shards[0])

    def _place(self, split: Split, shard: int, index: int, tenant: str, *, settled: bool) -> None:
        address = self._homes.address_of(shard)
        if address is None:
            split.homeless.add(tenant)
            return
        part = split.elsewhere.setdefault(address, Elsewhere())
        part.places.append(index)
        part.shards.add(shard)
        part.tenants.add(tenant)
        if settled:
            part.settled.add(tenant)

    def _place_empty(self, split: Split, shard: int) -> None:
        if self._holds(shard):
            split.portion.shards.add(shard)
            return
        address = self._homes.address_of(shard)
        if address is None:
            split.homeless.add("")
        else:
            split.elsewhere[address] = Elsewhere(shards={shard})


def _not_here() -> Unavailable:
    return Unavailable(
        "NOT_READY", "a tenant of this frame does not live here", retry_after_seconds=0.2
    )


def _time_us(message: EventMessage) -> int:
    return message.time.seconds * 1_000_000 + message.time.nanos // 1000


def reason_number(reason: str) -> error_reason_pb2.ErrorReason:
    """The enum's value of a reason by its name."""
    value = error_reason_pb2.ErrorReason.Value(_REASON_PREFIX + reason)
    return cast("error_reason_pb2.ErrorReason", value)


def ack_of(number: int, result: FrameResult) -> ingest_service_pb2.PublishStreamResponse:
    """The answer to a durable frame."""
    ack = ingest_service_pb2.FrameAck(number=number, duplicate=result.duplicate)
    for tenant, first, count in result.ranges:
        ack.ids.add(tenant=tenant, first=first, count=count, step=ID_STEP)
    for refusal in result.refusals:
        ack.results.append(_refused(refusal))
    for index, sequence in result.duplicates:
        ack.results.add(index=index, id=sequence, duplicate=True)
    for index, sequence in result.singles:
        ack.results.add(index=index, id=sequence)
    for tenant, address in result.homes:
        ack.homes.add(tenant=tenant, address=address)
    return ingest_service_pb2.PublishStreamResponse(ack=ack)


def results_of(result: FrameResult, count: int) -> list[ingest_service_pb2.EventResult]:
    """One result an event, in order: of a call with `count` events of one tenant."""
    results: dict[int, ingest_service_pb2.EventResult] = {
        r.index: _refused(r) for r in result.refusals
    }
    for index, sequence in result.duplicates:
        results[index] = ingest_service_pb2.EventResult(index=index, id=sequence, duplicate=True)
    for index, sequence in result.singles:
        results[index] = ingest_service_pb2.EventResult(index=index, id=sequence)
    next_id = result.ranges[0][1] if result.ranges else 0
    for index in range(count):
        if index not in results:
            results[index] = ingest_service_pb2.EventResult(index=index, id=next_id)
            next_id += ID_STEP
    return [results[index] for index in range(count)]


def _refused(refusal: EventRefusal) -> ingest_service_pb2.EventResult:
    return ingest_service_pb2.EventResult(
        index=refusal.index,
        error=ingest_service_pb2.EventError(
            reason=reason_number(refusal.reason), message=refusal.message
        ),
    )
