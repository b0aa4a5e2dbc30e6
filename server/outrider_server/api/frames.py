"""Frames on the wire <-> frames in the domain. Hot: every event of every frame comes through `FrameReader.read`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

from outrider.v1 import error_reason_pb2, ingest_service_pb2
from outrider.v1.event_pb2 import Event as EventMessage
from outrider_server.domain.access import Caller
from outrider_server.domain.event import Event
from outrider_server.domain.frame import ID_STEP, EventRefusal, FrameResult
from outrider_server.pipeline.match import Directory, TenantEntry

_REASON_PREFIX = "ERROR_REASON_"


class FrameReader:
    """Reads the events that one caller sends. `now_us` is the time of events that carry none."""

    def __init__(self, caller: Caller, directory: Directory, now_us: Callable[[], int]) -> None:
        self._caller = caller
        self._directory = directory
        self._now_us = now_us

    def read(
        self, messages: Iterable[EventMessage], tenant: str
    ) -> tuple[list[Event], list[TenantEntry | None], list[EventRefusal]]:
        """The events, their tenants, and refusals of those whose tenant the caller does not reach.

        `tenant` is that of events that name none. Whether a tenant out of reach exists is not told.
        """
        events: list[Event] = []
        entries: list[TenantEntry | None] = []
        refusals: list[EventRefusal] = []
        by_name = self._directory.by_name
        reaches = self._caller.tenant
        now_us = self._now_us()
        for index, message in enumerate(messages):
            name = message.tenant or tenant
            entry = by_name.get(name)
            if reaches is not None and (entry is None or entry.id != reaches):
                entry = None
                refusals.append(
                    EventRefusal(
                        index, "TENANT_OUT_OF_SCOPE", f"the API key does not reach tenant {name!r}"
                    )
                )
            event = Event(
                entry.id if entry is not None else 0,
                message.type,
                message.data or message.data_json.encode(),
                _time_us(message) if message.HasField("time") else now_us,
                message.source,
                message.subject,
                message.key,
                message.organization,
                message.actor,
                message.idempotency_key,
            )
            if message.attributes:
                event.attributes = dict(message.attributes)
            events.append(event)
            entries.append(entry)
        return events, entries, refusals


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
    return ingest_service_pb2.PublishStreamResponse(ack=ack)


def results_of(result: FrameResult, count: int) -> list[ingest_service_pb2.EventResult]:
    """One result an event, in order: of a call with `count` events of one tenant."""
    results: dict[int, ingest_service_pb2.EventResult] = {
        r.index: _refused(r) for r in result.refusals
    }
    for index, sequence in result.duplicates:
        results[index] = ingest_service_pb2.EventResult(index=index, id=sequence, duplicate=True)
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
