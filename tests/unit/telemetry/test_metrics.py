"""One table of metrics, read alike as Prometheus text and by OpenTelemetry."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from types import ModuleType

import pytest
from opentelemetry.sdk.metrics.export import (
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
    NumberDataPoint,
)
from opentelemetry.sdk.metrics.export import MetricsData as Exported
from prometheus_client.parser import text_string_to_metric_families
from typing_extensions import override

from outrider_server.telemetry.counters import Histogram, Tally
from outrider_server.telemetry.metrics import (
    OTLP_EXPORTER_MODULE,
    ExporterMissingError,
    Metrics,
    otlp_reader,
)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scraped(metrics: Metrics) -> Samples:
    body, _ = metrics.exposition()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def pushed(reader: InMemoryMetricReader) -> Samples:
    data = reader.get_metrics_data()
    assert data is not None
    return {
        (metric.name, tuple(sorted((k, str(v)) for k, v in (point.attributes or {}).items()))): point.value
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
        if isinstance(point, NumberDataPoint)
    }  # fmt: skip


def busy() -> Metrics:
    metrics = Metrics(node="a")
    fill(metrics)
    return metrics


def fill(metrics: Metrics) -> None:
    """Make every metric differ from every other, so that a mix-up shows."""
    number = 1
    for instrument in metrics.counted:
        value = instrument.value
        if isinstance(value, int):
            setattr(instrument.holder, instrument.attribute, number)
        elif isinstance(value, Tally):
            value.add(*(f"{label}-{number}" for label in value.labels), count=number)
        elif isinstance(value, Histogram):
            value.observe_many(0.001, number)
        number += 1
    for level in metrics.levels:
        setattr(level.holder, level.attribute, lambda number=number: float(number))
        number += 1


def test_every_counter_and_level_is_in_the_text_under_its_own_name() -> None:
    metrics = busy()
    samples = scraped(metrics)
    number = 1
    for instrument in metrics.counted:
        value = instrument.value
        if isinstance(value, int):
            assert samples[f"{instrument.name}_total", ()] == number
        elif isinstance(value, Tally):
            labels = tuple(sorted((label, f"{label}-{number}") for label in value.labels))
            assert samples[f"{instrument.name}_total", labels] == number
        elif isinstance(value, Histogram):
            assert samples[f"{instrument.name}_count", ()] == number
            assert samples[f"{instrument.name}_sum", ()] == pytest.approx(number / 1000)
        number += 1
    for level in metrics.levels:
        assert samples[level.name, ()] == number
        number += 1


def test_opentelemetry_reads_the_same_values_as_prometheus() -> None:
    reader = InMemoryMetricReader()
    metrics = Metrics(node="a", readers=[reader])
    fill(metrics)
    theirs, ours = pushed(reader), scraped(metrics)
    metrics.close()
    quantiles = {key for key in theirs if key[0].endswith("_quantile")}
    assert {k: v for k, v in theirs.items() if k not in quantiles} == pytest.approx(
        {
            k: v
            for k, v in ours.items()
            if k[0].startswith("outrider_") and not k[0].endswith("_bucket")
        }
    )
    assert len(quantiles) == 3 * sum(key[0].endswith("_seconds_count") for key in ours)


def test_names_are_unique_lower_case_and_have_help() -> None:
    instruments = [*Metrics().counted, *Metrics().levels]
    names = [instrument.name for instrument in instruments]
    assert len(set(names)) == len(names) > 40
    for instrument in instruments:
        assert re.fullmatch(r"outrider_[a-z]+(_[a-z]+)*", instrument.name)
        assert instrument.help.endswith(".")


def test_every_stage_of_the_metrics_is_exposed() -> None:
    metrics = Metrics()
    held = {id(instrument.holder) for instrument in (*metrics.counted, *metrics.levels)}
    stages = [v for v in vars(metrics).values() if hasattr(v, "__dataclass_fields__")]
    assert len(stages) == 12
    assert {id(stage) for stage in stages} == held
    assert sum(len(fields(stage)) for stage in stages) == len(metrics.counted) + len(metrics.levels)


def test_histogram_text_has_running_counts_and_an_endless_bucket() -> None:
    metrics = Metrics()
    for seconds in (0.0004, 0.0009, 0.05, 1_000.0):
        metrics.persist.ack_seconds.observe(seconds)
    samples = scraped(metrics)
    name = "outrider_persist_ack_seconds_bucket"
    running = [
        samples[name, (("le", le),)] for le in ("0.0005", "0.001", "0.04", "0.05", "60.0", "+Inf")
    ]
    assert running == [1, 2, 2, 3, 3, 4]


def test_two_nodes_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.ingest.events += 3
    one.api.calls.add("Publish", "OK")
    assert other.snapshot()["outrider_ingest_events_total"] == 0
    assert other.snapshot()["outrider_api_calls_total"] == 0


def test_level_without_an_owner_is_not_shown() -> None:
    metrics = Metrics()
    assert "outrider_window_events" not in metrics.snapshot()
    metrics.gauges.window_events = lambda: 12
    assert metrics.snapshot()["outrider_window_events"] == 12
    assert ("outrider_window_events", ()) in scraped(metrics)


def test_reading_that_fails_costs_only_itself() -> None:
    metrics = Metrics()

    def broken() -> float:
        raise LookupError("no lanes yet")

    metrics.gauges.lanes = broken
    metrics.gauges.window_events = lambda: 12
    samples = scraped(metrics)
    assert ("outrider_lanes", ()) not in samples
    assert samples["outrider_window_events", ()] == 12
    assert metrics.telemetry.gauges_failed == 1


def test_quantiles_pushed_are_of_what_is_new_since_the_last_push() -> None:
    reader = InMemoryMetricReader()
    metrics = Metrics(readers=[reader])
    metrics.deliver.attempt_seconds.observe_many(0.0001, 1_000)
    key = ("outrider_deliver_attempt_seconds_quantile", (("quantile", "0.99"),))
    assert pushed(reader)[key] <= 0.0005
    metrics.deliver.attempt_seconds.observe_many(9.0, 10)
    assert 5.0 < pushed(reader)[key] <= 10.0
    assert key not in pushed(reader)
    metrics.close()


def test_scrape_may_ask_for_openmetrics() -> None:
    metrics = busy()
    body, content_type = metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert metrics.exposition("text/plain")[1].startswith("text/plain")


def test_label_values_are_escaped() -> None:
    metrics = Metrics()
    metrics.ingest.events_refused.add('a"b\\c\nd')
    assert scraped(metrics)[
        "outrider_ingest_events_refused_total", (("reason", 'a"b\\c\nd'),)
    ] == 1  # fmt: skip


def test_process_memory_is_exposed_where_the_system_tells_it() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux has /proc")
    assert scraped(Metrics())["process_resident_memory_bytes", ()] > 0


def test_closing_twice_is_closing_once(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics(readers=[InMemoryMetricReader()])
    metrics.close()
    metrics.close()
    assert not caplog.records


def test_missing_exporter_is_told_by_package_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, OTLP_EXPORTER_MODULE, None)
    with pytest.raises(ExporterMissingError, match="opentelemetry-exporter-otlp-proto-http"):
        otlp_reader("http://127.0.0.1:1/v1/metrics", 15)


class KeepingExporter(MetricExporter):
    """Stands in for the OTLP exporter and keeps what it is given."""

    made: list[KeepingExporter] = []  # noqa: RUF012  # emptied by the fixture

    def __init__(self, endpoint: str) -> None:
        super().__init__()
        self.endpoint = endpoint
        self.exported: list[Exported] = []
        self.made.append(self)

    @override
    def export(
        self, metrics_data: Exported, timeout_millis: float = 0, **kwargs: object
    ) -> MetricExportResult:
        self.exported.append(metrics_data)
        return MetricExportResult.SUCCESS

    @override
    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    @override
    def shutdown(self, timeout_millis: float = 0, **kwargs: object) -> None:
        pass


@pytest.fixture
def keeping_exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[KeepingExporter]]:
    module = ModuleType(OTLP_EXPORTER_MODULE)
    module.OTLPMetricExporter = KeepingExporter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, OTLP_EXPORTER_MODULE, module)
    KeepingExporter.made.clear()
    yield KeepingExporter.made
    KeepingExporter.made.clear()


def test_closing_pushes_what_is_left(keeping_exporter: list[KeepingExporter]) -> None:
    endpoint = "http://127.0.0.1:1/v1/metrics"
    metrics = Metrics(node="node-7", readers=[otlp_reader(endpoint, 3_600)])
    metrics.ingest.events += 5
    metrics.close()
    (exporter,) = keeping_exporter
    assert exporter.endpoint == endpoint
    (resource,) = exporter.exported[-1].resource_metrics
    assert resource.resource.attributes["service.instance.id"] == "node-7"
    (counted,) = (
        m for m in resource.scope_metrics[0].metrics if m.name == "outrider_ingest_events_total"
    )
    (point,) = counted.data.data_points
    assert isinstance(point, NumberDataPoint)
    assert point.value == 5
