"""The real ingest, record and takeover code in worlds where everything goes wrong: every promise holds in each of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.simulation.__main__ import report
from tests.simulation.world import run

BLOCK = 20
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("first", range(0, 240, BLOCK))
def test_every_promise_holds(first: int) -> None:
    for seed in range(first, first + BLOCK):
        result = run(seed)
        assert result.violation is None, report(result)


@pytest.mark.parametrize("first", range(0, 60, BLOCK))
def test_every_promise_holds_in_a_storm(first: int) -> None:
    for seed in range(first, first + BLOCK):
        result = run(seed, stormy=True)
        assert result.violation is None, report(result)


def test_the_worlds_are_not_empty() -> None:
    results = [run(seed) for seed in range(40)]
    assert sum(result.acks for result in results) > 200
    assert sum(result.requests for result in results) > 500
    assert sum(result.repeated for result in results) > 50
    assert sum(result.faults for result in results) > 50


def test_a_seed_is_the_same_world_in_every_process() -> None:
    script = (
        "from tests.simulation.world import run\n"
        "print([run(seed, stormy=seed > 2).digest for seed in range(6)])"
    )
    here = str([run(seed, stormy=seed > 2).digest for seed in range(6)])
    told = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == here


def test_a_broken_world_tells_how_to_see_it_again() -> None:
    from tests.simulation.planted import PLANTS

    with PLANTS["claim_deletes"]():
        result = next(r for r in map(run, range(50)) if r.violation is not None)
    told = report(result)
    assert f"--seeds {result.seed}-{result.seed + 1} --trace" in told
    assert f"{result.digest:08x}" in told
    assert "VIOLATION" in told
