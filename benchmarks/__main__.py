"""The benchmarks' command line: `python -m benchmarks run SCENARIO` and `python -m benchmarks suite`.

Ends with 0 when everything asked for was reached, 1 when something is wrong with a run, 2 for a wrong command, 130 when
interrupted. Whatever it ends with, nothing it started is left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.children import ChildFailed
from benchmarks.report import Floors, Result, problems, table
from benchmarks.run import Options, expected_seconds, run
from benchmarks.scenario import SCENARIOS, Plan, PlanError, plan_of
from benchmarks.scrape import ScrapeError
from benchmarks.server import Target, TargetError, find_processes, require_loopback

RESULTS = Path(__file__).resolve().parent / "results"
SUITE = ("batched", "single", "latency")
RECORDED_FLOOR = 10_000.0
ACK_P99_MS_MAX = 50.0
MARGIN_SECONDS = 400.0
"""Beyond what a run is expected to take it is ended: every single wait in it has a shorter limit."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "suite":
            return _loop(_suite(options))
        plan = _plan(options.scenario, options)
        return _loop(_one(plan, options))
    except (PlanError, TargetError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except (ChildFailed, ScrapeError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("benchmarks: interrupted", file=sys.stderr)
        return 130


def floors_of(scenario: str, plan: Plan) -> Floors:
    """What the suite asks of a run."""
    if scenario == "batched":
        return Floors(recorded_per_second=RECORDED_FLOOR)
    if scenario == "latency" and plan.rate <= RECORDED_FLOOR:
        return Floors(ack_p99_ms=ACK_P99_MS_MAX)
    return Floors()


def _loop(work: Coroutine[Any, Any, int]) -> int:
    """Run `work`; a signal to end cancels it, so that it ends what it started."""

    async def guarded() -> int:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            return await work
        except BaseExceptionGroup as group:
            raise _leaf(group) from group

    return asyncio.run(guarded())


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _one(plan: Plan, options: argparse.Namespace) -> int:
    result = await _bounded(plan, options)
    floors = Floors(
        recorded_per_second=options.floor,
        ack_p99_ms=options.ack_p99_ms,
    )
    return 1 if _tell(result, floors, options) else 0


async def _suite(options: argparse.Namespace) -> int:
    plans = [_plan(name, options) for name in SUITE]
    _say(f"suite: about {sum(map(expected_seconds, plans)):.0f} s")
    wrong: list[str] = []
    for name, plan in zip(SUITE, plans, strict=True):
        result = await _bounded(plan, options)
        wrong += [f"{name}: {problem}" for problem in _tell(result, floors_of(name, plan), options)]
        print(flush=True)
    for problem in wrong:
        _say(problem)
    _say("suite: " + ("FAILED" if wrong else "passed"))
    return 1 if wrong else 0


async def _bounded(plan: Plan, options: argparse.Namespace) -> Result:
    limit = asyncio.timeout(expected_seconds(plan) + MARGIN_SECONDS)
    try:
        async with limit:
            return await run(plan, _options(options), _say)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise ChildFailed("the run took far longer than it should have") from error


def _tell(result: Result, floors: Floors, options: argparse.Namespace) -> list[str]:
    wrong = problems(result, floors)
    print(f"\n{table(result, wrong)}", flush=True)
    folder: Path = options.results
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    path = folder / f"{stamp}-{result.plan.scenario}.json"
    path.write_text(json.dumps(result.to_json() | {"problems": wrong}, indent=1) + "\n")
    print(f"written to {path}", flush=True)
    return wrong


def _say(text: str) -> None:
    print(text, flush=True)


def _plan(scenario: str, options: argparse.Namespace) -> Plan:
    given = {
        name: getattr(options, name, None)
        for name in Plan.__dataclass_fields__
        if name not in {"scenario", "copies", "single", "large"}
    }
    return plan_of(scenario, given)


def _options(options: argparse.Namespace) -> Options:
    settings: dict[str, str] = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise PlanError(f"--set takes NAME=VALUE, not {text}")
        settings[name] = value
    if options.target is None:
        return Options(None, settings, options.database_url, options.keep)
    host, port = require_loopback(options.target)
    key = options.key or os.environ.get("OUTRIDER_API_KEY", "")
    if not key:
        raise TargetError("--target needs a system admin's key: --key, or OUTRIDER_API_KEY")
    admin = require_loopback(options.admin or f"{host}:{port + 1}")
    target = Target(f"{host}:{port}", key, admin, options.database_url, *find_processes(port))
    return Options(target, settings, None, options.keep)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure the service from outside."
    )
    common = argparse.ArgumentParser(add_help=False)

    def number(flag: str, kind: Callable[[str], float], text: str, name: str | None = None) -> None:
        common.add_argument(flag, type=kind, default=None, help=text, dest=name)

    number("--seconds", float, "measured time (default 20)")
    number("--size", int, "payload bytes of an event (default 400)")
    number("--subscriptions", int, "subscriptions (default 1,000; fanout 999)")
    number("--workers", int, "nodes that the server runs (default 1)")
    number("--cpus", int, "CPUs that everything shares (default 2)")
    number("--warmup", float, "time before it (default 2, less in short runs)", "warmup_seconds")
    number("--drain", float, "how long to wait for what is open (default 30)", "drain_seconds")
    number("--generators", int, "publishing processes (default 1)")
    number("--receivers", int, "receiving processes (default 1)")
    number("--producers", int, "publish streams in all (default 4)")
    number("--publisher-linger-ms", float, "how long an event waits for its frame")
    number("--endpoint-linger-ms", float, "how long an event waits for its batch")
    number("--batch", int, "events of a request at most (default 100)", "batch_events")
    number("--outstanding", int, "closed loop: events published and not yet delivered")
    common.add_argument(
        "--ignore-homes",
        dest="follow_homes",
        action="store_const",
        const=False,
        help="with several workers: publishers stay where they are, and frames are passed on",
    )
    common.add_argument("--target", help="host:port of a server on this machine that runs already")
    common.add_argument("--key", help="its system admin's key (or OUTRIDER_API_KEY)")
    common.add_argument("--admin", help="its admin port, host:port (default: target's port + 1)")
    common.add_argument(
        "--database-url",
        help="the server's Postgres; without --target: use it, not the embedded one",
    )
    common.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting for the server that is started, for example record_interval_ms=50",
    )
    common.add_argument("--keep", action="store_true", help="keep the run's folder with its logs")
    common.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON results")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("run", help="run one scenario", parents=[common])
    one.add_argument("scenario", choices=tuple(SCENARIOS))
    one.add_argument(
        "--rate",
        type=float,
        help="events a second, open loop; 0: closed loop at the limit (default 0; latency 10,000, large 2,000)",
    )
    one.add_argument("--floor", type=float, help="fail below so many events/s recorded")
    one.add_argument("--ack-p99-ms", type=float, help="fail above this ack p99")
    commands.add_parser(
        "suite",
        help=f"run {', '.join(SUITE)} and fail on loss, duplicates, under {RECORDED_FLOOR:,.0f} events/s, or an ack"
        f" p99 over {ACK_P99_MS_MAX:.0f} ms",
        parents=[common],
    )
    return parser


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
