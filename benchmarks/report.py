"""What a run found, as data, as a table for people, and as the list of what is wrong with it.

Rule: a figure that could not be taken is None and printed as `-`; nothing is made up from others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.latency import Percentiles
from benchmarks.machine import Machine
from benchmarks.scenario import Plan
from benchmarks.watch import RSS_DRIFT_MAX

ACK_RATIO_MAX = 3.0
"""How much slower acknowledgements of small events may get beside large ones, by their p99."""

BEHIND = 0.97
"""An open loop that sends or records less than this share of what is offered measures its own backlog."""

OTHERS_MAX = 0.03
"""Of the CPUs; more is worth a remark."""

DRIFT_SECONDS_MIN = 30.0
"""Below it memory is still growing into its caches, and a drift tells nothing."""


@dataclass(frozen=True, slots=True)
class Floors:
    """What a run must reach; None: not asked."""

    recorded_per_second: float | None = None
    ack_p99_ms: float | None = None
    duplicates_max: int = 0


@dataclass(frozen=True, slots=True)
class Rates:
    """Events a second within the measured time. `offered` is 0 for a closed loop."""

    offered: float
    sent: float
    acked: float
    delivered: float
    recorded: float | None
    recorded_from: str


@dataclass(frozen=True, slots=True)
class Part:
    """What the processes of one part used within the measured time."""

    cpu_seconds: float
    cpu_share: float
    """Of one CPU."""
    cpu_us_per_event: float
    rss_bytes: int
    rss_bytes_max: int
    rss_quarters: tuple[float, ...]
    rss_drift: float


@dataclass(frozen=True, slots=True)
class Correctness:
    """Whether everything acknowledged arrived, once, signed, in the right place, and is recorded."""

    sent: int
    acked: int
    rejected: int
    lost: int
    unacknowledged: int
    duplicates: int
    astray: int
    bad_requests: dict[str, int]
    ids_compared: int
    ids_wrong: int
    ledger_delivered: int | None
    ledger_expected: int
    drained: bool
    drain_seconds: float
    frames_refused: int
    frames_resent: int
    streams_opened: int
    large_sent: int
    large_delivered: int
    first_lost: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Result:
    """One run."""

    plan: Plan
    started_at: str
    command: str
    machine: Machine
    server_settings: dict[str, str]
    database: dict[str, str]
    measured_seconds: float
    rates: Rates
    ack: dict[str, Percentiles]
    end_to_end: dict[str, Percentiles]
    large_ack: Percentiles | None
    large_end_to_end: Percentiles | None
    frame_events_mean: float
    batch_events_mean: float
    requests_per_second: float
    parts: dict[str, Part]
    cpu_others: float
    """The share of the run's CPUs that work outside the run took: it makes every figure worse."""
    cpu_stolen: float
    correctness: Correctness
    counters: dict[str, float]
    """How much each of the server's counters grew within the measured time."""

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    @property
    def ack_ratio(self) -> float | None:
        """p99 of small acknowledgements with large events beside them, over that without."""
        if "with" not in self.ack or not self.ack["without"].p99:
            return None
        return self.ack["with"].p99 / self.ack["without"].p99


def problems(result: Result, floors: Floors) -> list[str]:
    """What a run did wrong, one sentence each; empty for a good one."""
    found: list[str] = []
    c = result.correctness
    if c.lost:
        found.append(
            f"{c.lost:,} deliveries of acknowledged events never came (first events: {c.first_lost})"
        )
    if c.large_delivered != c.large_sent:
        found.append(f"{c.large_sent - c.large_delivered} large events never came")
    if c.duplicates > floors.duplicates_max:
        found.append(f"{c.duplicates:,} duplicates, {floors.duplicates_max} allowed")
    if c.unacknowledged:
        found.append(f"{c.unacknowledged:,} events were never acknowledged")
    if c.rejected:
        found.append(f"{c.rejected:,} events were rejected")
    if c.astray:
        found.append(f"{c.astray:,} deliveries came to the wrong place or under a wrong id")
    if c.bad_requests:
        found.append(f"requests that do not verify: {c.bad_requests}")
    if c.ids_wrong:
        found.append(
            f"{c.ids_wrong:,} of {c.ids_compared:,} event ids differ from those acknowledged"
        )
    if not c.drained:
        found.append(
            f"not everything was delivered and recorded {c.drain_seconds:.0f} s after the end"
        )
    if c.ledger_delivered is not None and c.ledger_delivered != c.ledger_expected:
        found.append(
            f"the ledger tells {c.ledger_delivered:,} delivered, acknowledged were {c.ledger_expected:,}"
        )
    rate = result.rates.recorded
    if floors.recorded_per_second is not None and (
        rate is None or rate < floors.recorded_per_second
    ):
        found.append(
            f"{_number(rate)} events/s delivered and recorded, at least {floors.recorded_per_second:,.0f} wanted"
        )
    offered = result.rates.offered
    if offered and (result.rates.sent < BEHIND * offered or (rate or offered) < BEHIND * offered):
        found.append(
            f"the load fell behind: {result.rates.sent:,.0f} events/s sent and {_number(rate)} recorded of"
            f" {offered:,.0f} offered"
        )
    if floors.ack_p99_ms is not None:
        for name, ack in result.ack.items():
            if ack.p99 > floors.ack_p99_ms:
                found.append(
                    f"ack p99 {name} {ack.p99:.1f} ms, at most {floors.ack_p99_ms:.0f} ms wanted"
                )
    if result.ack_ratio is not None and result.ack_ratio > ACK_RATIO_MAX:
        found.append(
            f"ack p99 beside large events is {result.ack_ratio:.1f} times that without, at most {ACK_RATIO_MAX:g} wanted"
        )
    return found


def remarks(result: Result) -> list[str]:
    """What a reader should know and what does not fail a run."""
    told: list[str] = []
    if not result.rates.offered:
        told.append(
            f"closed loop: producers send as fast as up to {result.plan.outstanding:,} events published and not yet"
            " delivered allow; its latencies tell of that bound, the rate tells of the server"
        )
    if result.cpu_others > OTHERS_MAX or result.cpu_stolen > OTHERS_MAX:
        told.append(
            f"the machine was not ours alone: other work took {result.cpu_others:.0%} of the CPUs, and a host"
            f" {result.cpu_stolen:.0%}"
        )
    if result.measured_seconds >= DRIFT_SECONDS_MIN:
        for name, part in result.parts.items():
            if abs(part.rss_drift) > RSS_DRIFT_MAX:
                told.append(
                    f"resident memory of {name}: last quarter {part.rss_drift:+.1%} against the second"
                )
    told.extend(
        f"{name} {result.counters[name]:,.0f}"
        for name in (
            "outrider_lanes_spilled_total",
            "outrider_deliver_deliveries_retried_total",
            "outrider_persist_failures_total",
            "outrider_record_failures_total",
            "outrider_ingest_frames_refused_total",
        )
        if result.counters.get(name)
    )
    if result.correctness.streams_opened > result.plan.producers:
        told.append(
            f"{result.correctness.streams_opened} streams were opened by {result.plan.producers} producers"
        )
    return told


def table(result: Result, wrong: list[str]) -> str:
    """The result for people."""
    plan, rates, c = result.plan, result.rates, result.correctness
    loop = f"open loop, {plan.rate:,.0f} events/s offered" if plan.rate else "closed loop"
    lines = [
        f"{plan.scenario}: {loop}, {result.measured_seconds:.1f} s after {plan.warmup_seconds:g} s to warm up, "
        f"{plan.size}-byte events, {plan.subscriptions:,} subscriptions",
        "",
        _row(
            "delivered and recorded",
            f"{_number(rates.recorded)} events/s",
            f"({rates.recorded_from})",
        ),
        _row(
            "sent / acked / delivered",
            f"{rates.sent:,.0f} / {rates.acked:,.0f} / {rates.delivered:,.0f} events/s",
        ),
        _row(
            "requests",
            f"{result.requests_per_second:,.0f}/s",
            f"mean batch {result.batch_events_mean:.1f}, limit {1 if plan.single else plan.batch_events},"
            f" linger {plan.endpoint_linger_ms:g} ms",
        ),
        _row(
            "frames",
            f"mean {result.frame_events_mean:.1f} events",
            f"linger {plan.publisher_linger_ms:g} ms, {plan.producers} producers",
        ),
        "",
        f"{'milliseconds':<26}{'p50':>9}{'p90':>9}{'p99':>9}{'p99.9':>9}{'max':>9}{'events':>13}",
    ]
    for label, phases in (("acknowledged", result.ack), ("end to end", result.end_to_end)):
        for name, figures in phases.items():
            lines.append(_latency(f"{label} {name}".strip(), figures))
    if result.large_ack is not None and result.large_end_to_end is not None:
        lines.append(_latency("acknowledged, 10 MiB", result.large_ack))
        lines.append(_latency("end to end, 10 MiB", result.large_end_to_end))
    if result.ack_ratio is not None:
        lines.append(_row("ack p99, with : without", f"{result.ack_ratio:.2f}"))
    lines += [
        "",
        f"{'processes':<26}{'CPU s':>9}{'of a CPU':>10}{'us/event':>10}{'MiB':>8}{'max':>8}{'drift':>9}",
    ]
    for name, part in result.parts.items():
        lines.append(
            f"{name:<26}{part.cpu_seconds:>9.2f}{part.cpu_share:>10.0%}{part.cpu_us_per_event:>10.1f}"
            f"{part.rss_bytes / 2**20:>8.0f}{part.rss_bytes_max / 2**20:>8.0f}{part.rss_drift:>+9.1%}"
        )
    lines += [
        "",
        _row("events", f"{c.sent:,} sent, {c.acked:,} acknowledged"),
        _row("lost / duplicates", f"{c.lost:,} / {c.duplicates:,}"),
        _row(
            "ledger",
            "-"
            if c.ledger_delivered is None
            else f"{c.ledger_delivered:,} of {c.ledger_expected:,} delivered",
            f"drained in {c.drain_seconds:.1f} s",
        ),
        _row("ids compared", f"{c.ids_compared:,}, {c.ids_wrong} wrong"),
        _row(
            "machine",
            f"{result.machine.cpu}, {len(result.machine.cpus_used)} of {result.machine.cores} CPUs",
        ),
        _row("", f"{result.machine.kernel}, {result.machine.python}"),
        _row(
            "durability",
            ", ".join(f"{name} {value}" for name, value in result.database.items()) or "-",
            f"a flush takes {result.machine.flush_ms:.2f} ms",
        ),
    ]
    lines += [f"note: {remark}" for remark in remarks(result)]
    lines += [f"WRONG: {problem}" for problem in wrong]
    return "\n".join(lines)


def _row(label: str, value: str, remark: str = "") -> str:
    return f"{label:<26}{value}{f'  ({remark})' if remark and remark[0] != '(' else f'  {remark}'}".rstrip()


def _latency(label: str, p: Percentiles) -> str:
    return f"{label:<26}{p.p50:>9.2f}{p.p90:>9.2f}{p.p99:>9.2f}{p.p999:>9.2f}{p.max:>9.1f}{p.count:>13,}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
