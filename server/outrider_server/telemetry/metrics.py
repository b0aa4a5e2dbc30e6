"""The counters of one node, read in two ways: as Prometheus text and by OpenTelemetry instruments.

Both readers go over the same table (`telemetry.counters`) when asked, and only then. Without a reader the OpenTelemetry
side costs nothing: its instruments are observable ones, whose callbacks nobody calls.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from typing_extensions import override

from outrider_server.telemetry.counters import (
    ApiCounters,
    CatchUpCounters,
    DeliverCounters,
    Gauges,
    Histogram,
    HomesCounters,
    IngestCounters,
    LaneCounters,
    MatchCounters,
    PersistCounters,
    PruneCounters,
    RecordCounters,
    Tally,
    TelemetryCounters,
    quantile,
)

QUANTILES = (0.5, 0.9, 0.99)
OTLP_EXPORTER_MODULE = "opentelemetry.exporter.otlp.proto.http.metric_exporter"
UNITS = {"bytes": "By", "seconds": "s"}


class ExporterMissingError(Exception):
    """Metrics are to be pushed, and the package that does it is not installed."""


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric: its name without suffix, its help, and where its value is kept."""

    name: str
    help: str
    holder: object
    attribute: str

    @property
    def value(self) -> object:
        return getattr(self.holder, self.attribute)

    @property
    def unit(self) -> str:
        return next((unit for word, unit in UNITS.items() if word in self.name.split("_")), "1")


class Metrics:
    """Every counter, latency and level of one node; made once, by `app`, which hands each stage its part.

    `readers` are OpenTelemetry's: none (the default) means that nothing is pushed anywhere.
    """

    def __init__(self, *, node: str = "", readers: Sequence[MetricReader] = ()) -> None:
        self.ingest = IngestCounters()
        self.match = MatchCounters()
        self.persist = PersistCounters()
        self.lanes = LaneCounters()
        self.deliver = DeliverCounters()
        self.record = RecordCounters()
        self.catch_up = CatchUpCounters()
        self.homes = HomesCounters()
        self.prune = PruneCounters()
        self.api = ApiCounters()
        self.telemetry = TelemetryCounters()
        self.gauges = Gauges()
        self.counted = tuple(self._counted())
        self.levels = tuple(_instruments("outrider", self.gauges))
        self._registry = CollectorRegistry()
        self._registry.register(_PrometheusCollector(self))
        # Memory, CPU and file descriptors of this process, read from /proc where there is one.
        ProcessCollector(registry=self._registry)
        self._provider = MeterProvider(
            metric_readers=readers,
            resource=Resource.create({"service.name": "outrider", "service.instance.id": node}),
            # `close` flushes; at exit the loop and what the levels are read from would be gone.
            shutdown_on_exit=False,
        )
        self._closed = False
        _observe(self, self._provider)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The Prometheus text and its content type, in the form that an Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def snapshot(self) -> dict[str, float]:
        """Every counter's total and every level, by name, for a display or a test; latencies as their count."""
        values: dict[str, float] = {}
        for instrument in self.counted:
            value = instrument.value
            if isinstance(value, int):
                values[f"{instrument.name}_total"] = value
            elif isinstance(value, Tally):
                values[f"{instrument.name}_total"] = value.total()
            elif isinstance(value, Histogram):
                values[f"{instrument.name}_count"] = value.count
        for instrument in self.levels:
            level = self.level(instrument)
            if level is not None:
                values[instrument.name] = level
        return values

    def level(self, instrument: Instrument) -> float | None:
        """A level now, or None where no owner tells it."""
        read = instrument.value
        if not callable(read):
            return None
        try:
            return float(read())
        except Exception:  # noqa: BLE001  # one owner's mistake must not cost the operator every other figure
            self.telemetry.gauges_failed += 1
            return None

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Push what is left. Blocks for as long as that takes, so a loop calls it in a thread."""
        if not self._closed:
            self._closed = True
            self._provider.shutdown(timeout_millis=timeout_seconds * 1_000)

    def _counted(self) -> Iterator[Instrument]:
        for stage, holder in (
            ("ingest", self.ingest),
            ("match", self.match),
            ("persist", self.persist),
            ("lanes", self.lanes),
            ("deliver", self.deliver),
            ("record", self.record),
            ("catch_up", self.catch_up),
            ("homes", self.homes),
            ("prune", self.prune),
            ("api", self.api),
            ("telemetry", self.telemetry),
        ):
            yield from _instruments(f"outrider_{stage}", holder)


def otlp_reader(endpoint: str, interval_seconds: float) -> MetricReader:
    """A reader that pushes to an OTLP/HTTP endpoint, from a thread of its own.

    Raises ExporterMissingError where the exporter, which only those who push need, is not installed.
    """
    return PeriodicExportingMetricReader(
        otlp_exporter_module().OTLPMetricExporter(endpoint=endpoint),
        export_interval_millis=interval_seconds * 1_000,
    )


def otlp_exporter_module() -> Any:
    """The exporter's module; asked for alone before a start, so that nothing is started without it."""
    try:
        return importlib.import_module(OTLP_EXPORTER_MODULE)
    except ImportError as error:
        raise ExporterMissingError(
            "otlp_endpoint is set, but the package that pushes is not installed: run"
            " pip install opentelemetry-exporter-otlp-proto-http, or leave otlp_endpoint unset"
        ) from error


def _instruments(prefix: str, holder: object) -> Iterator[Instrument]:
    for declared in fields(holder):  # type: ignore[arg-type]  # every holder is a dataclass
        yield Instrument(
            f"{prefix}_{declared.name}", declared.metadata["help"], holder, declared.name
        )


class _PrometheusCollector(Collector):
    """Turns the table into Prometheus families at each scrape."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    @override
    def collect(self) -> Iterable[Metric]:
        for instrument in self._metrics.counted:
            value = instrument.value
            if isinstance(value, Tally):
                family = CounterMetricFamily(instrument.name, instrument.help, labels=value.labels)
                for labels, count in value.items():
                    family.add_metric(labels, count)
                yield family
            elif isinstance(value, Histogram):
                yield _histogram_family(instrument, value)
            elif isinstance(value, int):
                yield CounterMetricFamily(instrument.name, instrument.help, value=value)
        for instrument in self._metrics.levels:
            level = self._metrics.level(instrument)
            if level is not None:
                yield GaugeMetricFamily(instrument.name, instrument.help, value=level)


def _histogram_family(instrument: Instrument, histogram: Histogram) -> HistogramMetricFamily:
    buckets: list[tuple[str, float]] = []
    running = 0
    for bound, count in zip((*histogram.bounds, "+Inf"), list(histogram.counts), strict=True):
        running += count
        buckets.append((str(bound), running))
    return HistogramMetricFamily(
        instrument.name, instrument.help, buckets=buckets, sum_value=histogram.sum
    )


def _observe(metrics: Metrics, provider: MeterProvider) -> None:
    """Give OpenTelemetry an observable instrument for everything in the table."""
    meter = provider.get_meter("outrider")
    for instrument in metrics.counted:
        if isinstance(instrument.value, Histogram):
            # There is no observable histogram: its count, its sum, and quantiles since the reading before.
            meter.create_observable_counter(
                f"{instrument.name}_count", [_counts(instrument)], description=instrument.help
            )
            meter.create_observable_counter(
                f"{instrument.name}_sum",
                [_sums(instrument)],
                unit=instrument.unit,
                description=instrument.help,
            )
            meter.create_observable_gauge(
                f"{instrument.name}_quantile",
                [_quantiles(instrument)],
                unit=instrument.unit,
                description=f"{instrument.help} Quantiles of what was new at each reading.",
            )
        else:
            meter.create_observable_counter(
                f"{instrument.name}_total",
                [_totals(instrument)],
                unit=instrument.unit,
                description=instrument.help,
            )
    for instrument in metrics.levels:
        meter.create_observable_gauge(
            instrument.name,
            [_levels(metrics, instrument)],
            unit=instrument.unit,
            description=instrument.help,
        )


Callback = Callable[[CallbackOptions], Iterable[Observation]]


def _totals(instrument: Instrument) -> Callback:
    def observe(_options: CallbackOptions) -> Iterable[Observation]:
        value = instrument.value
        if isinstance(value, Tally):
            for labels, count in value.items():
                yield Observation(count, dict(zip(value.labels, labels, strict=True)))
        elif isinstance(value, int):
            yield Observation(value)

    return observe


def _counts(instrument: Instrument) -> Callback:
    def observe(_options: CallbackOptions) -> Iterable[Observation]:
        value = instrument.value
        if isinstance(value, Histogram):
            yield Observation(value.count)

    return observe


def _sums(instrument: Instrument) -> Callback:
    def observe(_options: CallbackOptions) -> Iterable[Observation]:
        value = instrument.value
        if isinstance(value, Histogram):
            yield Observation(value.sum)

    return observe


def _quantiles(instrument: Instrument) -> Callback:
    before: list[int] = []

    def observe(_options: CallbackOptions) -> Iterable[Observation]:
        value = instrument.value
        if not isinstance(value, Histogram):
            return
        now = list(value.counts)
        new = [n - b for n, b in zip(now, before or [0] * len(now), strict=True)]
        before[:] = now
        for fraction in QUANTILES:
            seconds = quantile(value.bounds, new, fraction)
            if seconds is not None:
                yield Observation(seconds, {"quantile": str(fraction)})

    return observe


def _levels(metrics: Metrics, instrument: Instrument) -> Callback:
    def observe(_options: CallbackOptions) -> Iterable[Observation]:
        level = metrics.level(instrument)
        if level is not None:
            yield Observation(level)

    return observe
