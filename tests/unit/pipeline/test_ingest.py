"""Every rule of the contract for one event, at its edge; and that long work gives way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from outrider_server.domain.event import EVENT_OVERHEAD_BYTES, Event
from outrider_server.domain.subscription import Subscription
from outrider_server.domain.tenant import Tenant, TenantConfiguration
from outrider_server.pipeline.ingest import (
    KNOWN_TYPES_MAX,
    TIME_US_MAX,
    TIME_US_MIN,
    EventChecker,
    IngestLimits,
    Refused,
    check_and_match,
    parse_payload,
)
from outrider_server.pipeline.match import TenantEntry
from outrider_server.telemetry.counters import IngestCounters, MatchCounters


def entry(*, strict: bool = False, types: frozenset[str] = frozenset()) -> TenantEntry:
    subscription = Subscription(id=7, tenant=1, name="s", endpoint=1, types=("sales.*",))
    tenant = Tenant(1, "demo", 0, strict_types=strict, config_version=3)
    return TenantEntry(TenantConfiguration(tenant, (), (subscription,), types), None)


def made(data: bytes = b"1", **fields: Any) -> Event:
    return Event(**{"tenant": 1, "type": "sales.made", "data": data, "time_us": 0, **fields})


def refusal(event: Event, of: TenantEntry | None = None) -> str:
    with pytest.raises(Refused) as caught:
        EventChecker(IngestLimits(event_bytes_max=100)).check(event, of or entry())
    assert caught.value.message
    return caught.value.reason


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("key", 512),
        ("subject", 512),
        ("source", 256),
        ("organization", 256),
        ("actor", 256),
        ("idempotency_key", 512),
    ],
)
def test_texts_are_bounded_in_bytes_and_hold_no_nul(name: str, limit: int) -> None:
    checker = EventChecker(IngestLimits())
    for text in ("x" * limit, "ü" * (limit // 2)):
        checker.check(made(**{name: text}), entry())
    for text in ("x" * (limit + 1), "ü" * (limit // 2 + 1), "\U0001f600" * (limit // 4 + 1)):
        assert refusal(made(**{name: text})) == "FIELD_TOO_LONG"
    assert refusal(made(**{name: "\0"})) == "INVALID_TEXT"


def test_payloads_are_bounded_and_there_must_be_one() -> None:
    checker, event = EventChecker(IngestLimits(event_bytes_max=100)), made(b"1" * 100)
    checker.check(event, entry())
    assert event.size == 100 + EVENT_OVERHEAD_BYTES
    assert refusal(made(b"1" * 101)) == "PAYLOAD_TOO_LARGE"
    assert refusal(made(b"")) == "EMPTY_PAYLOAD"


def test_attributes_are_bounded_together() -> None:
    checker = EventChecker(IngestLimits())
    checker.check(made(attributes={f"{n:02}": "x" * 254 for n in range(32)}), entry())
    assert refusal(made(attributes={f"{n:02}": "" for n in range(33)})) == "FIELD_TOO_LONG"
    assert refusal(made(attributes={"a": "ü" * 4096})) == "FIELD_TOO_LONG"
    assert refusal(made(attributes={"a\0": ""})) == "INVALID_TEXT"
    assert refusal(made(attributes={"a": "\0"})) == "INVALID_TEXT"


def test_a_strict_tenant_takes_the_types_it_knows() -> None:
    strict = entry(strict=True, types=frozenset({"sales.made"}))
    EventChecker(IngestLimits()).check(made(), strict)
    assert refusal(made(type="sales.lost"), strict) == "UNKNOWN_EVENT_TYPE"
    assert refusal(made(type="Sales"), strict) == "INVALID_EVENT_TYPE"
    EventChecker(IngestLimits()).check(made(type="sales.lost"), entry(types=frozenset({"a"})))


def test_times_lie_in_the_years_1_to_9999() -> None:
    checker = EventChecker(IngestLimits())
    for time_us in (TIME_US_MIN, TIME_US_MAX):
        checker.check(made(time_us=time_us), entry())
    for time_us in (TIME_US_MIN - 1, TIME_US_MAX + 1):
        assert refusal(made(time_us=time_us)) == "INVALID_TIME"


def test_remembered_types_are_bounded() -> None:
    checker = EventChecker(IngestLimits())
    for n in range(KNOWN_TYPES_MAX + 10):
        checker.check(made(type=f"a{n}"), entry())
    assert len(checker._known_types) <= KNOWN_TYPES_MAX


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "PAYLOAD_NOT_JSON"),
        (b"{", "PAYLOAD_NOT_JSON"),
        (b"1 2", "PAYLOAD_NOT_JSON"),
        (b"NaN", "PAYLOAD_NOT_JSON"),
        (b"\xef\xbb\xbf1", "PAYLOAD_NOT_JSON"),
        (b'"\x00"', "PAYLOAD_NOT_JSON"),
        (b'"\\ud800"', "PAYLOAD_NOT_JSON"),
        (b'"\xff"', "PAYLOAD_NOT_UTF8"),
        (b'"\xed\xa0\x80"', "PAYLOAD_NOT_UTF8"),
        (b"[[[[[1]]]]]", "PAYLOAD_TOO_DEEP"),
        (b'[{"a": [{"b": []}]}]', "PAYLOAD_TOO_DEEP"),
        # The parser's own limit, of which it tells in words of its own.
        (b"[" * 10_000 + b"]" * 10_000, "PAYLOAD_TOO_DEEP"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "PAYLOAD_TOO_DEEP"),
    ],
)
def test_what_is_no_payload_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_payload(data, 4)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "data",
    [
        b"[[[[]]]]",
        b'{"a": {"b": {"c": {}}}}',
        b'"[[[[[[{{{{{{"',
        b"[[],[],[],[],[],[],[]]",
        b'"\\u0000"',
        b" null ",
        b"-0.0",
    ],
)
def test_what_is_a_payload_is_parsed(data: bytes) -> None:
    parse_payload(data, 4)


async def test_a_refused_event_costs_the_others_nothing() -> None:
    events = [made(b"1"), made(b"{"), made(b"2"), made(b"x" * 101), made(type="other")]
    counted, matched = IngestCounters(), MatchCounters()
    refusals = await check_and_match(
        events,
        [entry() for _ in events],
        [0, 2, 5, 6, 9],  # a portion: the events between them live elsewhere
        EventChecker(IngestLimits(event_bytes_max=100)),
        counted,
        matched,
        lambda: 0.0,
    )
    assert [(r.index, r.reason) for r in refusals] == [
        (2, "PAYLOAD_NOT_JSON"),
        (6, "PAYLOAD_TOO_LARGE"),
    ]
    assert [e.targets for e in events] == [(7,), (), (7,), (), ()]
    assert [e.config_version for e in events] == [3, 0, 3, 0, 3]
    assert (matched.events, matched.targets, matched.unmatched) == (3, 2, 1)
    assert counted.events_refused.counts == {
        ("PAYLOAD_NOT_JSON",): 1,
        ("PAYLOAD_TOO_LARGE",): 1,
    }


async def test_long_work_gives_way_every_two_milliseconds() -> None:
    now, turns = [0.0], [0]

    def monotonic() -> float:
        now[0] += 0.0005
        return now[0]

    async def others() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    beside = asyncio.get_running_loop().create_task(others())
    events = [made() for _ in range(100)]
    of = entry()
    await check_and_match(
        events,
        [of] * 100,
        range(100),
        EventChecker(IngestLimits()),
        IngestCounters(),
        MatchCounters(),
        monotonic,
    )
    beside.cancel()
    assert 10 <= turns[0] <= 30
