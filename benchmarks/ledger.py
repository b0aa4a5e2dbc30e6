"""What receivers got, compared with what was acknowledged: losses, duplicates, and deliveries that went astray.

Rule: every delivery is looked at. One byte an event and copy remembers that it came; a sample of event ids is kept, to be
compared with the ids that the publishers were told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.scenario import NUMBER_BASE, TIME_BASE, Topology

SAMPLE_EVERY = 97
"""A prime: the sample meets every route and every producer."""


class Arrivals:
    """The ledger of one receiving process."""

    def __init__(self, topology: Topology, copies: int) -> None:
        self.requests = 0
        self.deliveries = 0
        self.duplicates = 0
        self.astray = 0
        """Deliveries at the wrong endpoint, under another subscription's id, or with ids that do not fit each other."""
        self.event_ids: dict[int, str] = {}
        self.seen = [bytearray() for _ in range(copies)]
        self._routes = len(topology.routes)
        # Of each endpoint: route -> [copy, the subscription's number once it is known].
        self._expected: list[dict[int, list[Any]]] = [
            {route: [copy, ""] for route, copy in topology.routes_of(endpoint.index).items()}
            for endpoint in topology.endpoints
        ]

    def take(self, endpoint: int, elements: Sequence[Mapping[str, Any]]) -> list[int]:
        """Enter the deliveries of one request; returns the times their events were meant to be sent at."""
        expected = self._expected[endpoint]
        routes = self._routes
        times: list[int] = []
        self.requests += 1
        for element in elements:
            data = element["data"]
            number = data["n"] - NUMBER_BASE
            times.append(data["t"] - TIME_BASE)
            event_id = element["event_id"]
            prefix, _, subscription = element["id"].rpartition("_")
            known = expected.get(number % routes)
            if known is None or prefix != "dlv_" + event_id:
                self.astray += 1
                continue
            if known[1] != subscription:
                if known[1]:
                    self.astray += 1
                    continue
                known[1] = subscription
            seen = self.seen[known[0]]
            if number >= len(seen):
                seen.extend(bytes(number - len(seen) + 65_536))
            if seen[number]:
                self.duplicates += 1
                continue
            seen[number] = 1
            self.deliveries += 1
            if number % SAMPLE_EVERY == 0:
                self.event_ids[number] = event_id
        return times


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is missing. `numbers` are the first few of the lost events."""

    lost: int
    unacknowledged: int
    """Events sent whose acknowledgement never came; they may have been delivered or not."""
    ids_compared: int
    ids_wrong: int
    numbers: list[int] = field(default_factory=list)


def compare(
    seen: Sequence[bytes | bytearray],
    acked: Mapping[int, int],
    sent: Mapping[int, int],
    producers: int,
    told_ids: Mapping[int, int | None],
    got_ids: Mapping[int, str],
) -> Comparison:
    """Compare what was seen of each copy with the counts of events that each producer had acknowledged, in its order."""
    lost = 0
    numbers: list[int] = []
    for producer, count in acked.items():
        for copy in seen:
            came = copy[producer::producers][:count]
            missing = count - len(came) + came.count(0)
            lost += missing
            if missing and len(numbers) < 10:
                numbers += [
                    place * producers + producer
                    for place in range(count)
                    if place >= len(came) or not came[place]
                ][:10]
    compared = [number for number in told_ids if number in got_ids]
    wrong = sum(1 for number in compared if str(told_ids[number]) != got_ids[number])
    return Comparison(
        lost,
        sum(sent.values()) - sum(acked.values()),
        len(compared),
        wrong,
        sorted(numbers)[:10],
    )


def merge_seen(parts: Sequence[Sequence[bytes | bytearray]]) -> list[bytes]:
    """The ledgers of all receiving processes as one: each delivery belongs to one of them."""
    merged: list[bytes] = []
    for copies in zip(*parts, strict=True):
        length = max(map(len, copies))
        bits = 0
        for one in copies:
            bits |= int.from_bytes(one, "little")
        merged.append(bits.to_bytes(length, "little"))
    return merged
