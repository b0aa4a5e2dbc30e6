"""A good run has no problems; each thing that can be wrong is told, and fails the run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from benchmarks.latency import Percentiles
from benchmarks.machine import Machine
from benchmarks.report import (
    Correctness,
    Floors,
    Part,
    Rates,
    Result,
    problems,
    remarks,
    table,
)
from benchmarks.scenario import plan_of

GOOD = Correctness(
    sent=1_000,
    acked=1_000,
    rejected=0,
    lost=0,
    unacknowledged=0,
    duplicates=0,
    astray=0,
    bad_requests={},
    ids_compared=10,
    ids_wrong=0,
    ledger_delivered=1_000,
    ledger_expected=1_000,
    drained=True,
    drain_seconds=0.2,
    frames_refused=0,
    frames_resent=0,
    streams_opened=4,
    large_sent=0,
    large_delivered=0,
)
FLOORS = Floors(recorded_per_second=10_000, ack_p99_ms=50)


def percentiles(p99: float) -> Percentiles:
    return Percentiles(1_000, p99 / 4, p99 / 2, p99, p99 * 2, p99 * 3)


def result(**changed: Any) -> Result:
    """A good run, with what is given in place of its own."""
    values: dict[str, Any] = {
        "plan": plan_of("batched", {"rate": 12_000.0}),
        "started_at": "2026-01-31T12:00:00+00:00",
        "command": "python -m benchmarks run batched",
        "machine": Machine("a CPU", 4, (0, 1), 2**34, "Linux 6", "CPython 3.11", {}, 0.5),
        "server_settings": {},
        "database": {"fsync": "on"},
        "measured_seconds": 60.0,
        "rates": Rates(12_000, 12_000, 12_000, 12_000, 12_000, "the database's ledger"),
        "ack": {"": percentiles(8.0)},
        "end_to_end": {"": percentiles(40.0)},
        "large_ack": None,
        "large_end_to_end": None,
        "frame_events_mean": 55.0,
        "batch_events_mean": 22.5,
        "requests_per_second": 533.0,
        "parts": {"server": Part(30.0, 0.5, 41.7, 2**27, 2**27, (1.0, 1.0, 1.0, 1.01), 0.01)},
        "cpu_others": 0.01,
        "cpu_stolen": 0.0,
        "correctness": GOOD,
        "counters": {},
    }
    return Result(**{**values, **changed})


def test_a_good_run_has_no_problems_and_its_table_no_wrongs() -> None:
    assert problems(result(), FLOORS) == []
    told = table(result(), [])
    assert "WRONG" not in told
    assert "12,000 events/s" in told
    assert remarks(result()) == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"lost": 3, "first_lost": [7]}, "3 deliveries of acknowledged events never came"),
        ({"duplicates": 1}, "1 duplicates"),
        ({"unacknowledged": 5}, "never acknowledged"),
        ({"rejected": 2}, "2 events were rejected"),
        ({"astray": 1}, "wrong place"),
        ({"bad_requests": {"signature": 4}}, "signature"),
        ({"ids_wrong": 1}, "event ids differ"),
        ({"drained": False}, "not everything was delivered"),
        ({"ledger_delivered": 999}, "the ledger tells 999"),
        ({"large_sent": 2, "large_delivered": 1}, "1 large events never came"),
    ],
)
def test_whatever_is_not_right_with_the_deliveries_fails_the_run(
    changed: dict[str, Any], told: str
) -> None:
    (problem,) = problems(result(correctness=replace(GOOD, **changed)), FLOORS)
    assert told in problem
    assert f"WRONG: {problem}" in table(result(), [problem])


def test_a_ledger_that_could_not_be_read_is_not_compared() -> None:
    assert problems(result(correctness=replace(GOOD, ledger_delivered=None)), FLOORS) == []


@pytest.mark.parametrize("recorded", [9_999.0, None])
def test_under_the_floor_or_not_known_to_be_above_it_fails(recorded: float | None) -> None:
    rates = Rates(0, 12_000, 12_000, 12_000, recorded, "")
    (problem,) = problems(result(rates=rates), FLOORS)
    assert "at least 10,000 wanted" in problem


def test_a_slow_acknowledgement_fails_only_where_a_limit_is_set() -> None:
    slow = result(ack={"": percentiles(50.1)})
    assert len(problems(slow, FLOORS)) == 1
    assert problems(slow, Floors()) == []


@pytest.mark.parametrize(
    "rates",
    [
        Rates(12_000, 11_000, 11_000, 11_000, 11_000, ""),
        Rates(12_000, 12_000, 12_000, 11_000, 11_000, ""),
    ],
)
def test_an_open_loop_that_falls_behind_fails(rates: Rates) -> None:
    (problem,) = problems(result(rates=rates), FLOORS)
    assert "fell behind" in problem


@pytest.mark.parametrize(("beside", "count"), [(23.9, 0), (24.1, 1)])
def test_small_events_may_take_three_times_as_long_beside_large_ones(
    beside: float, count: int
) -> None:
    compared = result(ack={"without": percentiles(8.0), "with": percentiles(beside)})
    assert len(problems(compared, Floors())) == count
    assert "with : without" in table(compared, [])


def test_a_closed_loop_says_that_it_is_one() -> None:
    closed = result(plan=plan_of("batched", {}), rates=Rates(0, 30_000, 30_000, 30_000, 30_000, ""))
    assert problems(closed, FLOORS) == []
    assert "closed loop" in remarks(closed)[0]


def test_memory_that_drifts_is_remarked_in_a_long_run_only() -> None:
    part = Part(30.0, 0.5, 41.7, 2**27, 2**27, (1.0, 1.0, 1.0, 1.06), 0.06)
    assert "resident memory of server" in remarks(result(parts={"server": part}))[0]
    assert remarks(result(parts={"server": part}, measured_seconds=10.0)) == []


def test_other_work_on_the_machine_is_remarked() -> None:
    assert "not ours alone" in remarks(result(cpu_others=0.2))[0]
    assert "not ours alone" in remarks(result(cpu_stolen=0.2))[0]


def test_a_result_becomes_json_and_back_to_the_same_figures() -> None:
    told = json.loads(json.dumps(result().to_json()))
    assert told["rates"]["recorded"] == 12_000
    assert told["plan"]["scenario"] == "batched"
    assert told["machine"]["cpus_used"] == [0, 1]
