"""What a run does, as data: how much is offered, who subscribes to what, and which payload each event carries.

Rules: pure, and the same numbers give the same tenants, filters and payloads in every process of a run, so that none of
it has to be passed around. Event `number` takes route `number % len(routes)` and is published by producer
`number % producers`; a route is matched by exactly `copies` subscriptions, each on an endpoint of its own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

TENANTS = 10
ENDPOINTS = 100
TYPES = 10
SIZE_MIN = 200
SIZE_MAX = 64 * 1024
SECONDS_MAX = 3_600.0
RATE_MAX = 200_000.0
EVENTS_MAX = 50_000_000
"""Bounds the ledgers of one run: a byte an event and copy."""

SATURATED_RATE = 60_000.0
"""What a closed loop is taken to reach where its events must be guessed: for the disk, not for the result."""

LARGE_BYTES = 10 * 1024 * 1024
LARGE_REGION = "large"
LARGE_TYPE = "sales_order.archived"

NUMBER_BASE = 1_000_000_000
TIME_BASE = 1_000_000_000_000
"""Added to numbers and times in payloads, so that each has the same width in every event."""


class PlanError(ValueError):
    """A run that cannot be: said in one sentence."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. `rate` 0 is a closed loop: publish as fast as deliveries come out, `outstanding` events ahead of them.

    `follow_homes`: publishers go to the nodes where their tenants live; else what lands elsewhere is passed on.
    """

    scenario: str
    rate: float
    seconds: float
    size: int
    subscriptions: int
    workers: int = 1
    cpus: int = 2
    warmup_seconds: float = 2.0
    drain_seconds: float = 30.0
    generators: int = 1
    receivers: int = 1
    producers: int = 4
    publisher_linger_ms: float = 2.0
    endpoint_linger_ms: float = 20.0
    batch_events: int = 100
    outstanding: int = 30_000
    copies: int = 1
    single: bool = False
    large: bool = False
    follow_homes: bool = True

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise PlanError(
                f"there is no scenario {self.scenario}; there are {', '.join(SCENARIOS)}"
            )
        _within("--rate", self.rate, 0, RATE_MAX)
        _within("--seconds", self.seconds, 0.5, SECONDS_MAX)
        _within("--size", self.size, SIZE_MIN, SIZE_MAX)
        _within("--subscriptions", self.subscriptions, TENANTS * self.copies, 20_000)
        _within("--workers", self.workers, 1, 64)
        _within("--cpus", self.cpus, 1, 1_024)
        _within("--warmup", self.warmup_seconds, 0, 600)
        _within("--drain", self.drain_seconds, 1, 600)
        _within("--generators", self.generators, 1, 32)
        _within("--receivers", self.receivers, 1, 32)
        _within("--producers", self.producers, self.generators, 256)
        _within("--publisher-linger-ms", self.publisher_linger_ms, 0, 1_000)
        _within("--endpoint-linger-ms", self.endpoint_linger_ms, 0, 60_000)
        _within("--batch", self.batch_events, 1, 1_000)
        _within("--outstanding", self.outstanding, 1, 1_000_000)
        if self.subscriptions % self.copies:
            raise PlanError(f"--subscriptions must be a multiple of {self.copies} here")
        if self.large and not self.rate:
            raise PlanError("the scenario large compares acknowledgements at a fixed --rate")
        if self.events() > EVENTS_MAX:
            raise PlanError(
                f"{self.events():,} events are more than one run counts ({EVENTS_MAX:,})"
            )

    @property
    def load_seconds(self) -> float:
        """How long events are published."""
        return self.warmup_seconds + self.seconds

    def events(self) -> int:
        """Events of the whole run: exact for an open loop, the most that is provided for in a closed one."""
        return int((self.rate or SATURATED_RATE) * self.load_seconds)

    def disk_bytes(self) -> int:
        """About what the run writes: rows, indexes and log of each event, the log's own room, the server's floor."""
        large = self.seconds * LARGE_BYTES * 2.5 if self.large else 0
        return int(self.events() * (2.5 * self.size + 900) + large) + 3 * 1024**3

    def phases(self) -> list[tuple[str, int, int]]:
        """What is measured: name, begin and end in microseconds from the start of the load."""
        begin, end = int(self.warmup_seconds * 1e6), int(self.load_seconds * 1e6)
        if not self.large:
            return [("", begin, end)]
        middle = (begin + end) // 2
        return [("without", begin, middle), ("with", middle, end)]

    def to_json(self) -> dict[str, Any]:
        """All fields, for another process or a result."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The plan that `to_json` gave."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})


SCENARIOS: dict[str, dict[str, Any]] = {
    # Batches fill to their limit before the linger ends once the rate is high; below it they go out after it.
    "batched": {"endpoint_linger_ms": 100.0, "publisher_linger_ms": 5.0},
    "single": {"single": True, "publisher_linger_ms": 5.0, "outstanding": 10_000},
    "latency": {"rate": 10_000.0, "publisher_linger_ms": 2.0, "producers": 2},
    "fanout": {
        "copies": 3,
        "subscriptions": 999,
        "endpoint_linger_ms": 100.0,
        "publisher_linger_ms": 5.0,
    },
    # Room beside the large events: what is compared must not be at its limit already.
    "large": {"rate": 2_000.0, "large": True, "publisher_linger_ms": 1.0},
}
DEFAULTS: dict[str, Any] = {"rate": 0.0, "seconds": 20.0, "size": 400, "subscriptions": 1_000}


def plan_of(scenario: str, given: Mapping[str, Any]) -> Plan:
    """The scenario's plan with what was given in place of its defaults; None counts as not given."""
    values = {**DEFAULTS, **SCENARIOS.get(scenario, {})}
    values |= {name: value for name, value in given.items() if value is not None}
    values.setdefault("warmup_seconds", min(2.0, values["seconds"] / 5))
    return Plan(scenario=scenario, **values)


@dataclass(frozen=True, slots=True)
class EndpointPlan:
    """One endpoint: `index` names its path, `copy` which of an event's copies it gets."""

    index: int
    tenant: str
    name: str
    path: str
    copy: int
    large: bool = False


@dataclass(frozen=True, slots=True)
class SubscriptionPlan:
    """One subscription of an endpoint."""

    tenant: str
    name: str
    endpoint: int
    type: str
    filter: str


@dataclass(frozen=True, slots=True)
class Route:
    """A kind of event: who gets it follows from tenant, type and region alone."""

    tenant: str
    type: str
    region: str
    endpoints: tuple[int, ...]
    """One for each copy, in order of the copies."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Everything that is set up for a run, and the routes its events take."""

    tenants: tuple[str, ...]
    endpoints: tuple[EndpointPlan, ...]
    subscriptions: tuple[SubscriptionPlan, ...]
    routes: tuple[Route, ...]

    def routes_of(self, endpoint: int) -> dict[int, int]:
        """Which routes reach the endpoint: route to copy."""
        return {
            number: route.endpoints.index(endpoint)
            for number, route in enumerate(self.routes)
            if endpoint in route.endpoints
        }


def topology_of(plan: Plan, mark: str) -> Topology:
    """The topology of a plan; `mark` keeps the tenants of two runs on one server apart."""
    tenants = tuple(f"bench-{mark}-{number}" for number in range(TENANTS))
    routes_count = plan.subscriptions // plan.copies
    # Endpoints come in groups, one for each copy of an event; a group belongs to one tenant.
    groups = min(ENDPOINTS // plan.copies // TENANTS * TENANTS, routes_count)
    endpoints = [
        EndpointPlan(
            index=group * plan.copies + copy,
            tenant=tenants[group % TENANTS],
            name=f"endpoint-{group}-{copy}",
            path=f"/{group * plan.copies + copy}",
            copy=copy,
        )
        for group in range(groups)
        for copy in range(plan.copies)
    ]
    subscriptions: list[SubscriptionPlan] = []
    routes: list[Route] = []
    for number in range(routes_count):
        group = number % groups
        tenant = tenants[group % TENANTS]
        # Within a tenant, type and region together are unique, so exactly this route's filters fit its events.
        within = number // TENANTS
        type_ = f"sales_order.step_{within % TYPES}"
        region = f"region-{within // TYPES}"
        routes.append(
            Route(
                tenant,
                type_,
                region,
                tuple(group * plan.copies + copy for copy in range(plan.copies)),
            )
        )
        subscriptions.extend(
            SubscriptionPlan(
                tenant,
                f"subscription-{number}-{copy}",
                group * plan.copies + copy,
                type_,
                f'order.region == "{region}" && order.total > 100.0 && order.currency in ["EUR", "USD"]',
            )
            for copy in range(plan.copies)
        )
    # So that neighbours in time differ in tenant, type and endpoint.
    random.Random(20_261).shuffle(routes)
    if plan.large:
        index = len(endpoints)
        endpoints.append(EndpointPlan(index, tenants[0], "large", f"/{index}", 0, large=True))
        subscriptions.append(
            SubscriptionPlan(
                tenants[0],
                "large",
                index,
                LARGE_TYPE,
                f'order.region == "{LARGE_REGION}" && order.total > 100.0',
            )
        )
    return Topology(tenants, tuple(endpoints), tuple(subscriptions), tuple(routes))


def payload_tail(route: Route, size: int, serial: int) -> bytes:
    """What follows number and time in the payloads of a route: `payload` makes `size` bytes of it."""
    order = (
        f'"order":{{"id":"SO-{serial:06}","region":"{route.region}","total":{1_000 + serial}.25,'
        f'"currency":"EUR","customer":"C-{serial % 97:04}","lines":[{{"sku":"A-{serial % 53:03}","quantity":2}}]}}'
    )
    tail = f'{order},"note":"'
    # {"n":1234567890,"t":1234567890123,  and the closing quote and brace.
    room = size - len('{"n":,"t":,') - 10 - 13 - len(tail) - len('"}')
    if room < 0:
        raise PlanError(f"--size must be at least {size - room} here")
    words = "delivered with care, paid in time, nothing to add. "
    return f'{tail}{(words * (room // len(words) + 1))[:room]}"}}'.encode()


def payload(number: int, time_us: int, tail: bytes) -> bytes:
    """The payload of an event: its number and the time it was meant to be sent at, in front."""
    return b'{"n":%d,"t":%d,%b' % (NUMBER_BASE + number, TIME_BASE + time_us, tail)


def large_tail(size: int) -> bytes:
    """As `payload_tail`, for one large event of many order lines."""
    head = f'"order":{{"id":"SO-1","region":"{LARGE_REGION}","total":1000.5,"lines":['
    end = "]}}"
    line = '{"sku":"A-0001","quantity":2,"price":12.5,"note":"as ordered, in one piece"}'
    room = size - len('{"n":,"t":,') - 10 - 13 - len(head) - len(end)
    count = room // (len(line) + 1)
    filler = " " * (room - count * (len(line) + 1) + 1)
    return f"{head}{','.join([line] * count)}{filler}{end}".encode()


def due(rate: float, elapsed_us: int) -> int:
    """How many events an open loop should have sent by now."""
    return int(rate * elapsed_us / 1e6)


def intended_us(rate: float, number: int) -> int:
    """When an open loop means to send an event, in microseconds from the start."""
    return int(number * 1e6 / rate)


def sent_by(producer: int, producers: int, events: int) -> int:
    """How many of the first `events` numbers are a producer's."""
    return len(range(producer, events, producers))


def _within(flag: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise PlanError(f"{flag} is {low:,g} to {high:,g}, not {value:g}")
