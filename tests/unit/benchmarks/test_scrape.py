"""Metrics are read as the server writes them."""

from __future__ import annotations

import pytest
from benchmarks.scrape import deltas, parse

from outrider_server.telemetry.metrics import Metrics


def test_the_servers_own_exposition_is_understood() -> None:
    metrics = Metrics()
    metrics.deliver.deliveries_delivered += 7
    metrics.deliver.errors.add("connect", count=2)
    metrics.deliver.errors.add("timeout", count=3)
    metrics.persist.ack_seconds.observe(0.25)
    text, _ = metrics.exposition("text/plain")
    values = parse(text.decode())
    assert values["outrider_deliver_deliveries_delivered_total"] == 7
    assert values["outrider_deliver_errors_total"] == 5
    assert values["outrider_persist_ack_seconds_count"] == 1
    assert values["outrider_persist_ack_seconds_sum"] == pytest.approx(0.25)
    assert not any(name.endswith("_bucket") for name in values)


def test_labels_are_summed_and_comments_left_out() -> None:
    text = '# HELP a_total words\na_total{x="1 2"} 3\na_total{x="}"} 4.5\nb 1e3\n\nnot a sample at all\n'
    assert parse(text) == {"a_total": 7.5, "b": 1000.0}


def test_only_counters_that_grew_are_told() -> None:
    before = {"a_total": 1.0, "b_total": 2.0, "level": 5.0}
    after = {"a_total": 4.0, "b_total": 2.0, "level": 9.0, "c_count": 1.0}
    assert deltas(before, after) == {"a_total": 3.0, "c_count": 1.0}
