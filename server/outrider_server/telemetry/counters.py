"""The table of everything counted: one class a stage, one field a metric, its help beside it.

A metric's name is made from stage and field, `outrider_<stage>_<field>` with `_total` for counters, and stands nowhere
else. The stages hold the object and add to its fields (`ingest.events += n`): about 0.05 us, no lock, no call. All
adding is done on the event loop's thread; readers on any thread copy before they look.
"""

# ruff: noqa: RUF009  # the calls in the defaults below make dataclass fields; none makes a shared value

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

LATENCY_BOUNDS_SECONDS = (
    0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08,
    0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Upper bounds that are dense where the targets lie: 20 ms to acknowledge, 60 to 100 ms to deliver."""

DELIVERY_BOUNDS_SECONDS = (*LATENCY_BOUNDS_SECONDS, 300.0, 3_600.0, 21_600.0, 86_400.0)
"""Likewise, and on to a day: what is retried arrives late."""

TALLY_KEYS_MAX = 256
LABEL_CHARACTERS_MAX = 128
OTHER = "other"

Reading = Callable[[], float]
"""Gives a level now. Must be cheap, and safe to call from another thread."""


class Tally:
    """Counts by label values, at most `keys_max` combinations: what comes beyond is counted as `other`.

    Label values come from enumerations, never from what a caller sent; the bound is for when that rule is broken.
    """

    __slots__ = ("counts", "keys_max", "labels")

    def __init__(self, labels: Sequence[str], keys_max: int = TALLY_KEYS_MAX) -> None:
        self.labels = tuple(labels)
        self.keys_max = keys_max
        self.counts: dict[tuple[str, ...], int] = {}

    def add(self, *values: str, count: int = 1) -> None:
        """Count under these label values, given in the order of `labels`."""
        if values in self.counts:
            self.counts[values] += count
        else:
            self._add_unseen(values, count)

    def get(self, *values: str) -> int:
        return self.counts.get(values, 0)

    def total(self) -> int:
        return sum(list(self.counts.values()))

    def items(self) -> list[tuple[tuple[str, ...], int]]:
        """A copy, safe to walk while counting goes on."""
        return list(self.counts.items())

    def _add_unseen(self, values: tuple[str, ...], count: int) -> None:
        if len(values) != len(self.labels):
            raise ValueError(f"{len(values)} values for the labels {', '.join(self.labels)}")
        key = tuple(value[:LABEL_CHARACTERS_MAX] for value in values)
        # One place is kept for `other` itself.
        if key not in self.counts and len(self.counts) >= self.keys_max - 1:
            key = (OTHER,) * len(self.labels)
        self.counts[key] = self.counts.get(key, 0) + count


class Histogram:
    """How often a duration fell between fixed bounds. `bounds` are upper ones, inclusive; above them is one more bucket."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...] = LATENCY_BOUNDS_SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        # Durations between two hosts' clocks can come out negative, and a sum must never shrink.
        if seconds > 0.0:
            self.counts[bisect_left(self.bounds, seconds)] += 1
            self.sum += seconds
        else:
            self.counts[0] += 1

    def observe_many(self, seconds: float, count: int) -> None:
        """Count one duration for each of `count` things that shared it."""
        seconds = max(seconds, 0.0)
        self.counts[bisect_left(self.bounds, seconds)] += count
        self.sum += seconds * count

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile(self, fraction: float) -> float | None:
        """About the duration that `fraction` of all stayed within; None when there were none."""
        return quantile(self.bounds, self.counts, fraction)


def quantile(bounds: Sequence[float], counts: Sequence[int], fraction: float) -> float | None:
    """The quantile of bucketed durations, taken as spread evenly within a bucket; at most the last bound."""
    total = sum(counts)
    if not total:
        return None
    wanted = fraction * total
    lower = 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and wanted <= count:
            return lower + (bound - lower) * max(wanted, 0.0) / count
        wanted -= count
        lower = bound
    return lower


def counter(help_text: str) -> int:
    """A field that only grows."""
    made: int = field(default=0, metadata={"help": help_text})
    return made


def tally(help_text: str, *labels: str) -> Tally:
    """A field that grows by label values."""
    made: Tally = field(default_factory=lambda: Tally(labels), metadata={"help": help_text})
    return made


def histogram(help_text: str, bounds: tuple[float, ...] = LATENCY_BOUNDS_SECONDS) -> Histogram:
    """A field of durations in seconds."""
    made: Histogram = field(default_factory=lambda: Histogram(bounds), metadata={"help": help_text})
    return made


def gauge(help_text: str) -> Reading | None:
    """A field that its owner sets to something that tells the level; until then it is not shown."""
    made: Reading | None = field(default=None, metadata={"help": help_text})
    return made


@dataclass(slots=True)
class IngestCounters:
    """What publishers sent."""

    frames: int = counter("Frames accepted.")
    events: int = counter("Events accepted.")
    bytes: int = counter("Payload bytes of the events accepted.")
    frames_duplicate: int = counter("Frames that had been accepted before and were answered again.")
    events_duplicate: int = counter(
        "Events whose idempotency key was known; answered with the first one's id."
    )
    frames_refused: Tally = tally("Frames refused whole, by reason.", "reason")
    events_refused: Tally = tally("Events refused singly, by reason.", "reason")


@dataclass(slots=True)
class MatchCounters:
    """What the index decided."""

    events: int = counter("Events matched against the index.")
    targets: int = counter("Deliveries that came of it: subscriptions matched, summed over events.")
    unmatched: int = counter("Events that no subscription wanted.")
    over_budget: int = counter("Filter evaluations given up because they went over their budget.")


@dataclass(slots=True)
class PersistCounters:
    """What was made durable."""

    commits: int = counter("Ingest transactions committed.")
    events: int = counter("Events committed.")
    failures: int = counter("Ingest transactions that failed.")
    commit_seconds: Histogram = histogram("Duration of an ingest transaction.")
    ack_seconds: Histogram = histogram("From a frame's arrival to its acknowledgement.")


@dataclass(slots=True)
class LaneCounters:
    """What passed through the lanes."""

    offered: int = counter("Deliveries offered to lanes.")
    spilled: Tally = tally("Deliveries left to owed rows instead of a lane, by cause.", "cause")


@dataclass(slots=True)
class DeliverCounters:
    """What was sent, and what came of it."""

    attempts: int = counter("HTTP requests sent.")
    bytes: int = counter("Bytes of the bodies sent.")
    deliveries_delivered: int = counter("Deliveries that succeeded.")
    deliveries_retried: int = counter("Deliveries that failed and will be tried again.")
    deliveries_dead: int = counter("Deliveries that ended as dead letters.")
    errors: Tally = tally("Failed attempts, by where they broke.", "error")
    attempt_seconds: Histogram = histogram("Duration of an HTTP request.")
    end_to_end_seconds: Histogram = histogram(
        "From an event's arrival to the success of its delivery.", DELIVERY_BOUNDS_SECONDS
    )


@dataclass(slots=True)
class RecordCounters:
    """What was settled."""

    records: int = counter("Record transactions committed.")
    deliveries_delivered: int = counter("Successful deliveries that records hold.")
    deliveries_dead: int = counter("Dead deliveries that records hold, expired ones included.")
    deliveries_cancelled: int = counter("Cancelled deliveries that records hold.")
    owed_inserted: int = counter("Owed rows added.")
    owed_removed: int = counter("Owed rows removed.")
    failures: int = counter("Record transactions that failed.")
    commit_seconds: Histogram = histogram("Duration of a record transaction.")


@dataclass(slots=True)
class CatchUpCounters:
    """What came back from owed rows."""

    pages: int = counter("Pages of owed deliveries drawn.")
    deliveries: int = counter("Owed deliveries put into lanes.")


@dataclass(slots=True)
class HomesCounters:
    """What moved between nodes: frames and calls that belonged elsewhere, and shards."""

    portions_passed_on: int = counter(
        "Frames, or parts of them, passed on to their tenants' homes."
    )
    portions_taken: int = counter("Frames, or parts of them, that other nodes passed on.")
    calls_passed_on: int = counter("Single calls passed on to their tenants' homes.")
    shards_taken: int = counter("Shards taken over, whoever held them before.")
    shards_handed_off: int = counter("Shards given up in order.")
    shards_kept: int = counter(
        "Hand-offs for balance given up because requests did not end in time."
    )
    adopt_seconds: Histogram = histogram(
        "From taking shards to serving them.", DELIVERY_BOUNDS_SECONDS
    )


@dataclass(slots=True)
class PruneCounters:
    """What retention did."""

    partitions_created: int = counter("Partitions made ahead.")
    partitions_dropped: int = counter("Partitions dropped after their retention.")


@dataclass(slots=True)
class ApiCounters:
    """What was called. Only methods that exist are counted by name: callers must not be able to make up labels."""

    calls: Tally = tally("Calls answered, by method and status code.", "method", "code")


@dataclass(slots=True)
class TelemetryCounters:
    """What this room had to leave out."""

    lines_suppressed: int = counter("Log lines held back by the bound on lines a second.")
    lines_lost: int = counter("Log lines that could not be written.")
    gauges_failed: int = counter("Readings of a level that failed and were left out.")


@dataclass(slots=True)
class Gauges:
    """Levels. Each is set by its owner, once, to something that tells it."""

    lanes: Reading | None = gauge("Endpoints with a lane in memory.")
    lanes_deliveries: Reading | None = gauge("Deliveries held in lanes.")
    payload_bytes_held: Reading | None = gauge(
        "Payload bytes held, of those that node_payload_bytes_max allows."
    )
    owed_deliveries: Reading | None = gauge("Deliveries that owed rows stand for.")
    window_events: Reading | None = gauge("Events above the checkpoint, over all shards.")
    window_seconds: Reading | None = gauge("Age of the oldest event above a checkpoint.")
    broken_subscriptions: Reading | None = gauge(
        "Subscriptions that match nothing because their stored filter cannot be loaded."
    )
    requests_in_flight: Reading | None = gauge("HTTP requests under way.")
    outcomes_unrecorded: Reading | None = gauge("Finished deliveries not yet recorded.")
    persist_events_waiting: Reading | None = gauge("Events that wait for a commit.")
    streams_open: Reading | None = gauge("Publish streams open.")
    shards_owned: Reading | None = gauge("Shards that this node owns.")
    held_back_deliveries: Reading | None = gauge(
        "Deliveries that wait for a person, because their shards' owners kept crashing."
    )
    lease_remaining_seconds: Reading | None = gauge("Time until this node would stop sending.")
    free_disk_bytes: Reading | None = gauge("Free disk at the database, where it can be seen.")
