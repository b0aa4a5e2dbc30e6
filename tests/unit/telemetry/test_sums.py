"""The metrics of several nodes add up to what one node would tell that had done it all."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from outrider_server.telemetry import sums
from outrider_server.telemetry.metrics import Metrics

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def node(events: int, seconds: tuple[float, ...], levels: dict[str, float]) -> Metrics:
    metrics = Metrics()
    metrics.ingest.events = events
    for value in seconds:
        metrics.persist.commit_seconds.observe(value)
    for _ in range(events):
        metrics.api.calls.add("Publish", "OK")
    for name, value in levels.items():
        setattr(metrics.gauges, name, lambda value=value: value)
    return metrics


def summed(*nodes: Metrics, accept: str = "") -> tuple[str, str]:
    families = sums.add_up(sums.read(each.exposition()[0].decode()) for each in nodes)
    body, content_type = sums.write(families, accept)
    return body.decode(), content_type


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counters_histograms_and_levels_are_added() -> None:
    text, content_type = summed(
        node(3, (0.001, 5.0), {"streams_open": 2, "shards_owned": 40}),
        node(4, (0.001,), {"streams_open": 1, "shards_owned": 24}),
    )
    alone = node(7, (0.001, 5.0, 0.001), {"streams_open": 3, "shards_owned": 64})
    expected = samples(alone.exposition()[0].decode())
    got = samples(text)
    ours = [key for key in expected if key[0].startswith("outrider_")]
    assert len(ours) > 100
    assert {key: got[key] for key in ours} == {key: pytest.approx(expected[key]) for key in ours}
    assert {key for key in got if key[0].startswith("outrider_")} == set(ours)
    assert content_type.startswith("text/plain")


def test_what_a_sum_would_make_nonsense_is_the_one_that_matters() -> None:
    text, _ = summed(
        node(0, (), {"lease_remaining_seconds": 7, "free_disk_bytes": 5, "owed_deliveries": 9}),
        node(0, (), {"lease_remaining_seconds": 2, "free_disk_bytes": 6, "owed_deliveries": 8}),
    )
    got = samples(text)
    assert got["outrider_lease_remaining_seconds", ()] == 2
    assert got["outrider_free_disk_bytes", ()] == 5
    assert got["outrider_owed_deliveries", ()] == 17


def test_every_name_in_the_tables_is_a_level_that_exists() -> None:
    known = {f"outrider_{name}" for name in Metrics().gauges.__slots__}
    for name in sums.SMALLEST | sums.LARGEST:
        assert name.startswith("process_") or name in known


def test_what_only_one_node_tells_is_told() -> None:
    text, _ = summed(node(1, (), {"lanes": 4}), node(2, (), {}))
    assert samples(text)["outrider_lanes", ()] == 4


def test_a_sum_can_be_had_in_openmetrics_and_be_read_again() -> None:
    text, content_type = summed(
        node(1, (0.1,), {}), node(2, (), {}), accept="application/openmetrics-text; version=1.0.0"
    )
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")
    assert "outrider_ingest_events_total 3.0" in text


def test_a_family_of_another_type_is_left_out_of_the_sum() -> None:
    families = sums.add_up(
        [
            sums.read("# TYPE x_total counter\nx_total 3\n"),
            sums.read("# TYPE x gauge\nx 5\n"),
        ]
    )
    assert [(f.name, f.type, [s.value for s in f.samples]) for f in families] == [
        ("x", "counter", [3.0])
    ]


@pytest.mark.parametrize("text", ["x{ 1", "x one", "{}", "<html>"])
def test_what_is_no_exposition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no exposition"):
        sums.read(text)
