"""The ledger of what a publisher was told and what receivers got, and the oracle that compares the two.

Independent of the server: the filters are evaluated here a second time, in Python; signatures are computed here; what was
acknowledged is what the client was told. `Fault`s are the moments at which something was killed: only they excuse
a delivery that arrives twice.

    A        events whose acknowledgement reached the publisher          U   sent, never answered
    no loss              every subscription that an event of A matches got it, answered with 2xx
    nothing invented     whatever arrived is in A or U and matches; its data, event id and signature are right
    one id               every copy of a delivery has one id, also over crashes and after the publisher sent again
    bounded duplicates   every copy beyond the first follows one that was open at a fault, or had ended at most
                         `UNRECORDED_SECONDS` before it; a fault of one node excuses only what lives in its shards
    order by key         at an endpoint that gets one request at a time, the first arrivals of each key's events keep
                         the order they were sent in
"""

from __future__ import annotations

import asyncio
import hmac
import json
import random
import time
from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

from typing_extensions import override

from outrider import Publisher
from outrider.errors import OutriderError
from outrider.publisher import Handle
from outrider.v1.event_pb2 import Event

UNRECORDED_SECONDS = 0.7
"""How long before a crash an outcome may have come that no durable record holds yet."""

TYPES = ("sales_order.created", "sales_order.changed", "invoice.posted")
REGIONS = ("eu", "us", "apac")
LARGE_ONE_IN = 400
LARGE_CHARACTERS = 300_000
"""Above the size from which the server checks and stores events apart from the small ones."""

Matches = Callable[[str, dict[str, Any]], bool]
"""A filter evaluated a second time: (type, data) -> whether the subscription wants it."""


# What arrives


@dataclass(slots=True)
class Request:
    """One request. `ended`: when it was answered or its connection broke, None while it is open."""

    path: str
    arrived: float
    status: int
    signed: bool
    ids: list[str]
    numbers: list[int]
    answered: bool = False
    ended: float | None = None


@dataclass
class Target:
    """How one path answers: 500 for a `fraction` of its requests, after a delay up to `delay_seconds_max`."""

    secret: bytes
    fraction: float
    delay_seconds_max: float
    dice: random.Random

    def status(self) -> int:
        return 500 if self.dice.random() < self.fraction else 200


class LedgerReceiver:
    """An HTTP receiver that keeps a ledger. Every request is in it before it is answered."""

    def __init__(self, *, seed: int = 0, host: str = "127.0.0.1") -> None:
        self.host = host
        self.requests: list[Request] = []
        self.faults_seen: list[str] = []
        self.targets: dict[str, Target] = {}
        self.delivered: set[str] = set()
        self.events: dict[int, dict[str, Any]] = {}
        self._seed = seed
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), self.host, 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self._connections):
            connection.abort()
        await self._server.wait_closed()

    def url(self, path: str) -> str:
        assert self._server is not None
        return f"http://{self.host}:{self._server.sockets[0].getsockname()[1]}{path}"

    def add(
        self, path: str, secret: bytes, *, fraction: float = 0.0, delay_seconds_max: float = 0.02
    ) -> None:
        dice = random.Random(f"{self._seed} {path}")
        self.targets[path] = Target(secret, fraction, delay_seconds_max, dice)

    def take(self, head: bytes, body: bytes) -> tuple[Request, float]:
        """Enter a request; gives it and how long to hold its answer."""
        lines = head.split(b"\r\n")
        path = lines[0].split(b" ")[1].decode()
        target = self.targets[path]
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        parsed = json.loads(body)
        elements = parsed if isinstance(parsed, list) else [parsed]
        for element in elements:
            self._check(path, element)
        if not isinstance(parsed, list) and headers[b"webhook-id"].decode() != parsed["id"]:
            self.faults_seen.append(f"{path}: webhook-id differs from {parsed['id']}")
        request = Request(
            path,
            time.monotonic(),
            target.status(),
            _is_signed(target.secret, headers, body),
            [element["id"] for element in elements],
            [element["data"]["n"] for element in elements],
        )
        self.requests.append(request)
        return request, target.dice.random() * target.delay_seconds_max

    def _check(self, path: str, element: dict[str, Any]) -> None:
        """Every copy of an event is the same, and its delivery's id names it."""
        if element["id"].split("_")[1] != element["event_id"]:
            self.faults_seen.append(f"{path}: {element['id']} is of event {element['event_id']}")
        number = element["data"]["n"]
        about = {"type": element["type"], "data": element["data"], "id": element["event_id"]}
        known = self.events.setdefault(number, about)
        if known != about:
            ids = sorted({known["id"], about["id"]})
            self.faults_seen.append(f"{path}: event {number} came in two forms, as {ids}")

    def answered(self, request: Request) -> None:
        request.ended = time.monotonic()
        request.answered = True
        if request.status == 200:
            self.delivered.update(request.ids)

    def count(self, path: str) -> int:
        """Deliveries of a path so far, copies and failures included."""
        return sum(len(request.ids) for request in self.requests if request.path == path)


class _Connection(asyncio.Protocol):
    """HTTP/1.1 with Content-Length: what the server under test sends."""

    def __init__(self, receiver: LedgerReceiver) -> None:
        self._receiver = receiver
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._open: Request | None = None
        self._timer: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._receiver._connections.add(self)

    @override
    def connection_lost(self, error: Exception | None) -> None:
        self._receiver._connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._open is not None:
            self._open.ended = time.monotonic()
            self._open = None

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @override
    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[:end])
        at = head.lower().index(b"content-length:") + 15
        length = int(head[at:].split(b"\r\n", 1)[0])
        if len(self._buffer) < end + 4 + length:
            return
        body = bytes(self._buffer[end + 4 : end + 4 + length])
        del self._buffer[: end + 4 + length]
        request, delay = self._receiver.take(head, body)
        self._open = request
        self._timer = asyncio.get_running_loop().call_later(delay, self._answer, request)

    def _answer(self, request: Request) -> None:
        assert self._transport is not None
        if self._transport.is_closing():
            return
        self._receiver.answered(request)  # the ledger first
        self._open = None
        self._transport.write(b"HTTP/1.1 %d Ledger\r\nContent-Length: 0\r\n\r\n" % request.status)


def _is_signed(secret: bytes, headers: dict[bytes, bytes], body: bytes) -> bool:
    """Whether the request carries the signature that Standard Webhooks asks for."""
    text = headers[b"webhook-id"] + b"." + headers[b"webhook-timestamp"] + b"." + body
    expected = b"v1," + b64encode(hmac.new(secret, text, "sha256").digest())
    return expected in headers[b"webhook-signature"].split(b" ")


# What is published


@dataclass(slots=True)
class Sent:
    """One published event."""

    type: str
    data: dict[str, Any]
    handle: Handle


class Load:
    """Publishes numbered events at a steady rate, chosen by `seed`, until it is stopped.

    Every second one has an idempotency key; now and then one is large.
    """

    def __init__(
        self, publisher: Publisher, *, rate: float, seed: int, first: int = 0, stride: int = 1
    ) -> None:
        self.sent: dict[int, Sent] = {}
        self._publisher = publisher
        self._rate = rate
        self._dice = random.Random(seed)
        self._next = first
        self._stride = stride
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    async def run(self) -> None:
        began = time.monotonic()
        made = 0
        while not self._stopped:
            due = int((time.monotonic() - began) * self._rate)
            while made < due and not self._stopped:
                await self._send()
                made += 1
            await asyncio.sleep(0.01)  # the pace of the load

    async def _send(self) -> None:
        number, self._next = self._next, self._next + self._stride
        event, data = self._make(number, self._dice)
        handle = await self._publisher.send(event)
        self.sent[number] = Sent(event.type, data, handle)

    def _make(self, number: int, dice: random.Random) -> tuple[Event, dict[str, Any]]:
        """The next event, and what its data says."""
        type_ = dice.choice(TYPES)
        data = {"n": number, "total": dice.randrange(100), "region": dice.choice(REGIONS)}
        if dice.randrange(LARGE_ONE_IN) == 0:
            data["pad"] = "x" * LARGE_CHARACTERS
        event = Event(type=type_, data=json.dumps(data).encode())
        if number % 2:
            event.idempotency_key = f"event {number}"
        return event, data


# The oracle


@dataclass(frozen=True, slots=True)
class Wanted:
    """A subscription as the oracle knows it. `number` is its id in deliveries' ids."""

    name: str
    number: int
    path: str
    matches: Matches


@dataclass(slots=True)
class Fault:
    """Something was killed at `began`; from `ended` on everything is as it was.

    `shards`: what lives elsewhere is none of its business; None where all may be touched.
    """

    what: str
    began: float
    ended: float = float("inf")
    shards: frozenset[int] | None = None

    def excuses(self, name: str, first: Request, second: Request) -> bool:
        """Whether the fault may have made `second` out of the delivery `name` that `first` brought already."""
        if self.shards is not None and shard_of(name) not in self.shards:
            return False
        open_or_unrecorded = first.arrived <= self.ended and (
            first.ended is None or first.ended >= self.began - UNRECORDED_SECONDS
        )
        return open_or_unrecorded and second.arrived >= self.began

    def bound(self, requests: Iterable[Request]) -> int:
        """G2's bound: deliveries that were open at the fault or had ended since the last durable record."""
        return sum(
            sum(self.shards is None or shard_of(name) in self.shards for name in request.ids)
            for request in requests
            if request.status == 200
            and request.arrived <= self.ended
            and (request.ended is None or request.ended >= self.began - UNRECORDED_SECONDS)
        )


def shard_of(name: str) -> int:
    """The slice of the log that a delivery's event lives in: the last ten bits of its sequence."""
    return int(name.split("_")[1]) & 1023


@dataclass
class Findings:
    """What the oracle found. Everything that must not be stands in `wrong`."""

    acknowledged: int = 0
    unanswered: int = 0
    expected: int = 0
    deliveries: int = 0
    requests: int = 0
    duplicates: int = 0
    bound: int = 0
    lost: list[str] = field(default_factory=list)
    invented: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    unexcused: list[str] = field(default_factory=list)
    disordered: list[str] = field(default_factory=list)

    def wrong(self) -> str:
        """Everything that is wrong, a line each kind; empty when all is well."""
        kinds = {
            "lost": self.lost,
            "invented": self.invented,
            "stored twice": self.doubled,
            "broken": self.broken,
            "duplicates without a fault": self.unexcused,
            "out of order": self.disordered,
        }
        lines = [
            f"{len(found)} {kind}, such as {found[:3]}" for kind, found in kinds.items() if found
        ]
        if self.duplicates > self.bound:
            lines.append(f"{self.duplicates} duplicates, more than {self.bound}")
        return "\n".join(lines)

    @override
    def __str__(self) -> str:
        return (
            f"{self.acknowledged} acknowledged, {self.unanswered} unanswered, {self.expected} deliveries expected, "
            f"{self.deliveries} came in {self.requests} requests; {len(self.lost)} lost, "
            f"{self.duplicates} duplicates (bound {self.bound})"
        )


def missing(
    receiver: LedgerReceiver, sent: dict[int, Sent], subscriptions: Iterable[Wanted]
) -> set[str]:
    """Deliveries of acknowledged events that were not answered with 2xx yet."""
    return {
        name for name, _ in _expected(sent, list(subscriptions)) if name not in receiver.delivered
    }


def _expected(sent: dict[int, Sent], subscriptions: list[Wanted]) -> list[tuple[str, str]]:
    """(delivery's id, in words) of everything that acknowledged events match."""
    expected = []
    for number, event in sent.items():
        event_id = acknowledged(event.handle)
        if event_id is None:
            continue
        expected += [
            (f"dlv_{event_id}_{wanted.number}", f"event {number} to {wanted.name} ({event_id})")
            for wanted in subscriptions
            if wanted.matches(event.type, event.data)
        ]
    return expected


def acknowledged(handle: Handle) -> int | None:
    """The id that the event is durable under; None where no acknowledgement came."""
    if not handle.done() or handle.exception() is not None:
        return None
    event_id = handle.result().event_id
    assert event_id is not None, "the server keeps answers for a day"
    return event_id


def judge(
    receiver: LedgerReceiver,
    sent: dict[int, Sent],
    subscriptions: Iterable[Wanted],
    faults: Iterable[Fault],
) -> Findings:
    """Compare the ledger with what was published. Call it when everything has come to rest."""
    subscriptions = list(subscriptions)
    faults = list(faults)
    found = Findings(requests=len(receiver.requests), broken=list(receiver.faults_seen))
    for event in sent.values():
        found.acknowledged += acknowledged(event.handle) is not None
    found.unanswered = len(sent) - found.acknowledged
    expected = _expected(sent, subscriptions)
    found.expected = len(expected)
    found.lost = [words for name, words in expected if name not in receiver.delivered]
    copies = _invented(receiver, sent, {wanted.number: wanted for wanted in subscriptions}, found)
    for name, requests in copies.items():
        found.deliveries += len(requests)
        found.duplicates += len(requests) - 1
        for first, second in pairwise(requests):
            if not any(fault.excuses(name, first, second) for fault in faults):
                found.unexcused.append(
                    f"{name} at {first.path}: {first.arrived:.3f}-{first.ended} and {second.arrived:.3f}"
                )
    found.bound = sum(fault.bound(receiver.requests) for fault in faults)
    return found


def _invented(
    receiver: LedgerReceiver, sent: dict[int, Sent], by_number: dict[int, Wanted], found: Findings
) -> dict[str, list[Request]]:
    """Check what arrived against what was published; gives the requests of each delivery that were not refused."""
    copies: defaultdict[str, list[Request]] = defaultdict(list)
    ids: defaultdict[tuple[int, int], set[str]] = defaultdict(set)
    for request in receiver.requests:
        if not request.signed:
            found.broken.append(f"{request.path}: a signature of {request.ids[0]} is wrong")
        if len(set(request.ids)) != len(request.ids):
            found.broken.append(f"{request.path}: a batch holds a delivery twice: {request.ids}")
        for name, number in zip(request.ids, request.numbers, strict=True):
            _, event_id, subscription = name.split("_")
            ids[number, int(subscription)].add(name)
            wanted, event = by_number.get(int(subscription)), sent.get(number)
            if wanted is None or wanted.path != request.path or event is None:
                found.invented.append(f"{name} at {request.path}")
            elif not wanted.matches(event.type, event.data):
                found.invented.append(f"{name} at {request.path}, which does not want it")
            elif event.data != receiver.events[number]["data"]:
                found.broken.append(f"{name}: the data is not what was published")
            elif acknowledged(event.handle) not in (None, int(event_id)):
                found.broken.append(f"{name}: acknowledged as {acknowledged(event.handle)}")
            if request.status == 200:
                copies[name].append(request)
    found.doubled = [f"event {key[0]}: {names}" for key, names in ids.items() if len(names) > 1]
    return copies


def out_of_order(
    receiver: LedgerReceiver, sent: dict[int, Sent], wanted: Wanted, key: Callable[[Sent], str]
) -> list[str]:
    """Events whose first copy came to a subscription behind one of the same key that was sent after it."""
    latest: dict[str, int] = {}
    seen: set[str] = set()
    found = []
    for request in receiver.requests:
        if request.path != wanted.path:
            continue
        for name, number in zip(request.ids, request.numbers, strict=True):
            if name in seen or int(name.split("_")[2]) != wanted.number or number not in sent:
                continue
            seen.add(name)
            of = key(sent[number])
            if number < latest.get(of, -1):
                found.append(f"event {number} ({name}) came after {latest[of]} of key {of}")
            latest[of] = max(latest.get(of, -1), number)
    return found


async def answered(sent: dict[int, Sent], publisher: Publisher, seconds: float) -> None:
    """Wait until everything sent so far is acknowledged; raises what the publisher or an event failed with."""
    async with asyncio.timeout(seconds):
        await publisher.flush()
    failed = [error for event in sent.values() if (error := event.handle.exception()) is not None]
    if failed:
        raise OutriderError(f"{len(failed)} events failed, the first with {failed[0]}")
