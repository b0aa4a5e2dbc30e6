"""The benchmark's whole path in one tiny run: real server, real load, receivers that check, a result, nothing left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.support.processes import is_gone, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]


class Benchmark:
    """One run of the command line, with what it started; ended by process id whatever becomes of the test."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.results = folder / "results"
        self.output = folder / "output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "benchmarks",
                    *arguments,
                    "--subscriptions=30",
                    f"--results={self.results}",
                ],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def text(self) -> str:
        return self.output.read_text()

    def children(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]


@pytest.fixture
def benchmarks() -> Iterator[list[Benchmark]]:
    started: list[Benchmark] = []
    yield started
    for benchmark in started:
        if benchmark.process.poll() is None:
            benchmark.process.terminate()
        benchmark.process.wait(60)


def test_a_short_run_delivers_and_records_everything_and_writes_its_result(
    tmp_path: Path, benchmarks: list[Benchmark]
) -> None:
    # Slow enough for a busy machine: what is tested is the counting, not the speed.
    benchmark = Benchmark(tmp_path, "run", "fanout", "--seconds=3", "--rate=300", "--size=366")
    benchmarks.append(benchmark)
    status = benchmark.process.wait(150)
    text = benchmark.text()
    (file,) = benchmark.results.glob("*-fanout.json")
    result = json.loads(file.read_text())
    correctness = result["correctness"]
    told = f"{text}\n{result['problems']}"
    assert correctness["sent"] == correctness["acked"] == 300 * 3.6, told
    assert (correctness["lost"], correctness["duplicates"], correctness["astray"]) == (0, 0, 0), (
        told
    )
    assert correctness["ledger_delivered"] == correctness["acked"] * 3, told
    assert correctness["ids_compared"] > 0, told
    assert correctness["ids_wrong"] == 0, told
    assert correctness["bad_requests"] == {}, told
    assert 0 < result["ack"][""]["p50"] <= result["ack"][""]["p99"] <= result["ack"][""]["max"]
    assert result["end_to_end"][""]["count"] >= 3 * 300 * 2.5
    assert {"server", "postgres", "generators", "receivers"} == set(result["parts"])
    assert all(part["cpu_seconds"] > 0 for part in result["parts"].values())
    assert result["database"]["fsync"] == "on"
    assert "about " in text.splitlines()[0]
    assert "delivered and recorded" in text
    # The machine may be too busy for the rate; whatever else is wrong with a run fails it.
    assert all("fell behind" in problem for problem in result["problems"]), told
    assert status == (1 if result["problems"] else 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_behind(
    tmp_path: Path, benchmarks: list[Benchmark], number: signal.Signals
) -> None:
    benchmark = Benchmark(tmp_path, "run", "batched", "--seconds=30", "--rate=200")
    benchmarks.append(benchmark)
    wait_for(lambda: "CPU:" in benchmark.text() or benchmark.process.poll() is not None, 100)
    children = benchmark.children()
    assert len(children) > 5, (
        benchmark.text()
    )  # server, guard, Postgres and its own, load, receiver
    benchmark.process.send_signal(number)
    assert benchmark.process.wait(60) == 130
    assert "interrupted" in benchmark.text()
    wait_for(lambda: all(is_gone(child) for child in children), 10)
