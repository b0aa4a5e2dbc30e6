"""The command line: each scenario's defaults, the suite's floors, and wrong commands answered in one sentence."""

from __future__ import annotations

import pytest
from benchmarks.__main__ import ACK_P99_MS_MAX, RECORDED_FLOOR, SUITE, floors_of, main
from benchmarks.report import Floors
from benchmarks.scenario import plan_of


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "batched", "--seconds", "0"], "--seconds is"),
        (["run", "batched", "--subscriptions", "3"], "--subscriptions is"),
        (["run", "large", "--rate", "0"], "fixed --rate"),
        (["run", "batched", "--target", "10.0.0.1:4510", "--key", "k"], "on this machine"),
        (["run", "batched", "--target", "127.0.0.1:4510"], "needs a system admin's key"),
        (["run", "batched", "--set", "nonsense"], "NAME=VALUE"),
        (["suite", "--seconds", "0"], "--seconds is"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_started(
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OUTRIDER_API_KEY", raising=False)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("benchmarks: ")
    assert error.count("\n") == 1


def test_the_suite_asks_for_the_floor_and_for_the_latency_at_its_rate() -> None:
    assert SUITE == ("batched", "single", "latency")
    assert floors_of("batched", plan_of("batched", {})) == Floors(
        recorded_per_second=RECORDED_FLOOR
    )
    assert floors_of("single", plan_of("single", {})) == Floors()
    latency = plan_of("latency", {})
    assert latency.rate == 10_000
    assert floors_of("latency", latency) == Floors(ack_p99_ms=ACK_P99_MS_MAX)
