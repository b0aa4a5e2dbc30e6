"""One run from nothing to its result: processes, set-up, load, drain, comparison, and everything ended again.

The order: pin, look at the disk, receivers, server, set-up, generators ready, load (warm-up, then what is measured), wait
until all is delivered and recorded, compare, take down. Every wait has a limit; whatever happens, each process that was
started is ended by its id.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.board import Board, Received, Sent
from benchmarks.children import Child, ChildFailed
from benchmarks.latency import Latencies, Percentiles
from benchmarks.ledger import compare, merge_seen
from benchmarks.manage import set_up, take_down
from benchmarks.report import Correctness, Part, Rates, Result
from benchmarks.scenario import Plan, PlanError, Topology, topology_of
from benchmarks.scrape import ScrapeError, deltas
from benchmarks.server import Ledger, StartedServer, Target, open_ledger
from benchmarks.watch import Busy, Usage, Watch, quarters
from outrider import connect

SETUP_SECONDS = 15.0
"""About what set-up and take-down take: told before, never waited for."""

READY_SECONDS_MAX = 60.0
REPORT_SECONDS_MAX = 120.0
START_DELAY_SECONDS = 0.5
SECRET_BYTES = 32

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What a run does beside its plan."""

    target: Target | None = None
    settings: dict[str, str] = field(default_factory=dict)
    database: str | None = None
    keep: bool = False


@dataclass(slots=True)
class Snapshot:
    """Totals at one moment."""

    at: float
    sent: int
    acked: int
    requests: int
    deliveries: int
    recorded: int | None
    counters: dict[str, float]
    usages: dict[str, Usage]
    busy: Busy


def expected_seconds(plan: Plan) -> float:
    """About how long a run takes."""
    return plan.load_seconds + SETUP_SECONDS


def require_disk(plan: Plan, folder: Path) -> None:
    """Raise where the run could fill the disk."""
    free = shutil.disk_usage(folder).free
    if free < plan.disk_bytes():
        raise PlanError(
            f"the run may write {plan.disk_bytes() / 2**30:.1f} GiB and {folder} has {free / 2**30:.1f} GiB free;"
            " take fewer --seconds, or another TMPDIR"
        )


async def run(plan: Plan, options: Options, say: Say) -> Result:
    """Do it."""
    cpus = machine.pin(plan.cpus)
    folder = _make_folder()
    try:
        require_disk(plan, folder)
        say(
            f"{plan.scenario}: about {expected_seconds(plan):.0f} s, of which {plan.seconds:g} s are measured"
        )
        return await _Run(plan, options, say, folder, machine.describe(cpus, folder)).run()
    finally:
        if options.keep:
            say(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


class _Run:
    """The state of one run."""

    def __init__(
        self, plan: Plan, options: Options, say: Say, folder: Path, found: machine.Machine
    ) -> None:
        self.plan = plan
        self.options = options
        self.say = say
        self.folder = folder
        self.machine = found
        self.mark = os.urandom(4).hex()
        self.topology: Topology = topology_of(plan, self.mark)
        self.secrets = [os.urandom(SECRET_BYTES) for _ in self.topology.endpoints]
        self.board = Board(folder / "board", create=True)
        self.generating = range(plan.generators)
        self.receiving = range(plan.generators, plan.generators + plan.receivers)
        self.server: StartedServer | None = None
        self.started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self.rss: dict[str, list[tuple[float, int]]] = {}
        self.database: dict[str, str] = {}

    async def run(self) -> Result:
        async with contextlib.AsyncExitStack() as stack:
            receivers = await self._start_receivers(stack)
            ports = [int(await child.line(READY_SECONDS_MAX)) for child in receivers]
            target = await stack.enter_async_context(self._target())
            ledger = await open_ledger(target, self.mark)
            if ledger is not None:
                stack.push_async_callback(ledger.close)
                self.database = await ledger.settings()
            client = await stack.enter_async_context(connect(target.address, target.key))
            began = time.monotonic()
            if self.options.target is not None:
                stack.push_async_callback(take_down, client, self.topology)
            await set_up(client, self.plan, self.topology, ports, self.secrets)
            self.say(
                f"  {len(self.topology.subscriptions):,} subscriptions set up in {time.monotonic() - began:.1f} s"
            )
            generators = await self._start_generators(stack, target)
            for child in generators:
                await child.line(READY_SECONDS_MAX)
            result = await self._measure(target, ledger, generators, receivers)
            if self.server is not None and not result.correctness.drained:
                self.say(
                    f"  not all was delivered; the end of the server's log:{self.server.log()}"
                )
            return result

    @contextlib.asynccontextmanager
    async def _target(self) -> AsyncIterator[Target]:
        if self.options.target is not None:
            yield self.options.target
            return
        server = self.server = StartedServer(
            self.folder, self.options.settings, self.plan.workers, self.options.database
        )
        try:
            yield await server.start()
        finally:
            if not await server.stop():
                self.say(f"  the server did not end in order{server.log()}")

    async def _start_receivers(self, stack: contextlib.AsyncExitStack) -> list[Child]:
        return [
            await self._start(
                stack,
                f"receiver-{process}",
                "benchmarks.receivers",
                {
                    "process": process,
                    "epoch_us": 0,
                    "secrets": [secret.hex() for secret in self.secrets],
                },
            )
            for process in self.receiving
        ]

    async def _start_generators(
        self, stack: contextlib.AsyncExitStack, target: Target
    ) -> list[Child]:
        common = {
            "target": target.address,
            "key": target.key,
            "receivers_first": self.receiving.start,
        }
        children = [
            await self._start(
                stack,
                f"generator-{index}",
                "benchmarks.load",
                common | {"index": index, "process": index, "large": False},
            )
            for index in self.generating
        ]
        if self.plan.large:
            children.append(
                await self._start(
                    stack, "generator-large", "benchmarks.load", common | {"large": True}
                )
            )
        return children

    async def _start(
        self, stack: contextlib.AsyncExitStack, name: str, module: str, more: dict[str, Any]
    ) -> Child:
        specification = self.folder / f"{name}.json"
        specification.touch(0o600)  # it holds a key or secrets
        specification.write_text(
            json.dumps(
                {
                    "plan": self.plan.to_json(),
                    "mark": self.mark,
                    "board": str(self.folder / "board"),
                    "folder": str(self.folder),
                    **more,
                }
            )
        )
        child = await Child.start(
            name, ["-m", module, str(specification)], self.folder, dict(os.environ)
        )
        stack.push_async_callback(child.end, 5.0, None)
        return child

    async def _measure(
        self,
        target: Target,
        ledger: Ledger | None,
        generators: list[Child],
        receivers: list[Child],
    ) -> Result:
        plan = self.plan
        roots = {
            "generators": [child.pid for child in generators],
            "receivers": [child.pid for child in receivers],
        }
        if target.pid is not None:
            roots = {"server": [target.pid], **roots}
        watch = Watch(roots, target.postmaster, self.machine.cpus_used)
        epoch_us = time.monotonic_ns() // 1000 + int(START_DELAY_SECONDS * 1e6)
        for child in receivers:
            child.tell(f"epoch {epoch_us}")
        for child in generators:
            child.tell(f"start {epoch_us}")
        epoch = epoch_us / 1e6
        snapshots: list[Snapshot] = []

        async def observe() -> None:
            await self._progress(watch, epoch, epoch + plan.warmup_seconds)
            snapshots.append(await self._snapshot(target, ledger, watch))
            await self._progress(watch, epoch, epoch + plan.load_seconds)
            snapshots.append(await self._snapshot(target, ledger, watch))

        async with asyncio.TaskGroup() as tasks:
            observing = tasks.create_task(observe())
            sent = [
                await child.report(START_DELAY_SECONDS + plan.load_seconds + REPORT_SECONDS_MAX)
                for child in generators
            ]
            await observing
        large = sent.pop() if plan.large else None
        acked = sum(count for report in sent for count in report["acked"].values())
        drained, drain_seconds = await self._drain(
            ledger, acked * plan.copies, large["acked"] if large else 0
        )
        drained = drained and acked > 0
        for child in receivers:
            child.tell("end")
        got = [await child.report(REPORT_SECONDS_MAX) for child in receivers]
        recorded = await ledger.recorded() if ledger is not None else None
        return self._result(snapshots, sent, large, got, (drained, drain_seconds, recorded), epoch)

    async def _progress(self, watch: Watch, epoch: float, until: float) -> None:
        """A line each second until then; memory is looked at more often in short runs."""
        step = max(0.1, min(1.0, self.plan.seconds / 16))
        before = self._counts()
        before_usage = watch.read()
        next_line = time.monotonic() + 1.0
        while (now := time.monotonic()) < until:
            await asyncio.sleep(min(step, until - now))
            if self.server is not None:
                self.server.require_alive()
            usages = watch.read()
            now = time.monotonic()
            for part, usage in usages.items():
                self.rss.setdefault(part, []).append((now, usage.rss_bytes))
            if now < next_line:
                continue
            seconds = now - next_line + 1.0
            counts = self._counts()
            rates = [(new - old) / seconds for new, old in zip(counts, before, strict=True)]
            busy = "  ".join(
                f"{part} {(usage.cpu_seconds - before_usage[part].cpu_seconds) / seconds:.0%}"
                for part, usage in usages.items()
                if part in before_usage
            )
            server = usages.get("server")
            self.say(
                f"  {max(now - epoch, 0):5.1f} s  sent {rates[0]:>8,.0f}/s  acked {rates[1]:>8,.0f}/s"
                f"  delivered {rates[2] / self.plan.copies:>8,.0f}/s  open {counts[0] - counts[2] // self.plan.copies:>7,}"
                f"  CPU: {busy}" + (f"  {server.rss_bytes / 2**20:.0f} MiB" if server else "")
            )
            before, before_usage, next_line = counts, usages, now + 1.0

    def _counts(self) -> tuple[int, int, int]:
        board = self.board
        return (
            board.total(self.generating, Sent.SENT),
            board.total(self.generating, Sent.ACKED),
            board.total(self.receiving, Received.DELIVERIES),
        )

    async def _snapshot(self, target: Target, ledger: Ledger | None, watch: Watch) -> Snapshot:
        try:
            counters = await target.metrics()
        except ScrapeError:
            counters = {}
        sent, acked, deliveries = self._counts()
        recorded = await ledger.recorded() if ledger is not None else None
        if recorded is None and counters:
            recorded = int(counters.get("outrider_deliver_deliveries_delivered_total", 0))
        return Snapshot(
            time.monotonic(),
            sent,
            acked,
            self.board.total(self.receiving, Received.REQUESTS),
            deliveries,
            recorded,
            counters,
            watch.read(),
            watch.busy(),
        )

    async def _drain(
        self, ledger: Ledger | None, deliveries: int, large: int
    ) -> tuple[bool, float]:
        """Wait until everything acknowledged has arrived and is recorded."""
        began = time.monotonic()
        while True:
            board = self.board
            arrived = board.total(self.receiving, Received.DELIVERIES) >= deliveries
            arrived = arrived and board.total(self.receiving, Received.LARGE) >= large
            took = time.monotonic() - began
            if arrived and (ledger is None or await ledger.recorded() >= deliveries + large):
                return True, took
            if took > self.plan.drain_seconds:
                return False, took
            if self.server is not None:
                self.server.require_alive()
            await asyncio.sleep(0.05)

    def _result(
        self,
        snapshots: list[Snapshot],
        sent: list[dict[str, Any]],
        large: dict[str, Any] | None,
        got: list[dict[str, Any]],
        drained: tuple[bool, float, int | None],
        epoch: float,
    ) -> Result:
        plan = self.plan
        first, last = snapshots
        seconds = last.at - first.at
        deliveries = last.deliveries - first.deliveries
        requests = last.requests - first.requests
        events = deliveries / plan.copies
        recorded = (
            (last.recorded - first.recorded) / plan.copies / seconds
            if last.recorded is not None and first.recorded is not None
            else None
        )
        seen = merge_seen([[Path(file).read_bytes() for file in one["seen"]] for one in got])
        acked = {int(p): count for one in sent for p, count in one["acked"].items()}
        compared = compare(
            seen,
            acked,
            {int(p): count for one in sent for p, count in one["sent"].items()},
            plan.producers,
            {int(n): told for one in sent for n, told in one["event_ids"].items()},
            {int(n): told for one in got for n, told in one["event_ids"].items()},
        )
        bad: dict[str, int] = {}
        for one in got:
            for why, count in one["bad"].items():
                bad[why] = bad.get(why, 0) + count
        frames = sum(one["frames"] for one in sent)
        names = [name for name, _, _ in plan.phases()]
        return Result(
            plan=plan,
            started_at=self.started_at,
            command=" ".join(["python -m benchmarks", *sys.argv[1:]]),
            machine=self.machine,
            server_settings=self.options.settings,
            database=self.database,
            measured_seconds=seconds,
            rates=Rates(
                offered=plan.rate,
                sent=(last.sent - first.sent) / seconds,
                acked=(last.acked - first.acked) / seconds,
                delivered=events / seconds,
                recorded=recorded,
                recorded_from="the database's ledger" if self.database else "the server's counters",
            ),
            ack=_merged(names, [one["acks"] for one in sent]),
            end_to_end=_merged(names, [one["end_to_end"] for one in got]),
            large_ack=_one([large["acks"]]) if large else None,
            large_end_to_end=_one([one["large_end_to_end"] for one in got]) if large else None,
            frame_events_mean=sum(one["frame_events"] for one in sent) / frames if frames else 0.0,
            batch_events_mean=deliveries / requests if requests else 0.0,
            requests_per_second=requests / seconds,
            parts={
                name: self._part(name, first, last, seconds, events, epoch)
                for name in last.usages
                if name in first.usages
            },
            cpu_others=self._others(first, last, seconds),
            cpu_stolen=(last.busy.stolen_seconds - first.busy.stolen_seconds)
            / seconds
            / len(self.machine.cpus_used),
            correctness=Correctness(
                sent=sum(count for one in sent for count in one["sent"].values()),
                acked=sum(acked.values()),
                rejected=sum(one["rejected"] for one in sent) + (large["rejected"] if large else 0),
                lost=compared.lost,
                unacknowledged=compared.unacknowledged
                + (large["sent"] - large["acked"] if large else 0),
                duplicates=sum(one["duplicates"] for one in got),
                astray=sum(one["astray"] for one in got),
                bad_requests=bad,
                ids_compared=compared.ids_compared,
                ids_wrong=compared.ids_wrong,
                ledger_delivered=drained[2],
                ledger_expected=sum(acked.values()) * plan.copies
                + (large["acked"] if large else 0),
                drained=drained[0],
                drain_seconds=drained[1],
                frames_refused=sum(one["frames_refused"] for one in sent),
                frames_resent=sum(one["frames_resent"] for one in sent),
                streams_opened=sum(one["streams_opened"] for one in sent),
                large_sent=large["sent"] if large else 0,
                large_delivered=sum(one["large"] for one in got),
                first_lost=compared.numbers,
            ),
            counters=deltas(first.counters, last.counters),
        )

    def _others(self, first: Snapshot, last: Snapshot, seconds: float) -> float:
        """The share of the run's CPUs that was used by neither its processes nor a host's other guests."""
        ours = sum(
            usage.cpu_seconds - first.usages[name].cpu_seconds
            for name, usage in last.usages.items()
            if name in first.usages
        )
        ours += last.busy.own_seconds - first.busy.own_seconds
        ours += last.busy.stolen_seconds - first.busy.stolen_seconds
        others = last.busy.all_seconds - first.busy.all_seconds - ours
        return max(0.0, others / seconds / len(self.machine.cpus_used))

    def _part(
        self,
        name: str,
        first: Snapshot,
        last: Snapshot,
        seconds: float,
        events: float,
        epoch: float,
    ) -> Part:
        cpu = last.usages[name].cpu_seconds - first.usages[name].cpu_seconds
        samples = self.rss.get(name, [])
        begin = epoch + self.plan.warmup_seconds
        found = quarters(samples, begin, begin + self.plan.seconds)
        return Part(
            cpu_seconds=cpu,
            cpu_share=cpu / seconds,
            cpu_us_per_event=cpu / events * 1e6 if events else 0.0,
            rss_bytes=last.usages[name].rss_bytes,
            rss_bytes_max=max([value for _, value in samples] + [last.usages[name].rss_bytes]),
            rss_quarters=found.means,
            rss_drift=found.drift,
        )


def _make_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="outrider-bench-"))
    # The embedded database runs as an unprivileged account where we are root, and must get through.
    folder.chmod(0o755)
    return folder


def _merged(names: list[str], parts: list[list[str]]) -> dict[str, Percentiles]:
    return {name: _one([part[index] for part in parts]) for index, name in enumerate(names)}


def _one(encoded: list[str]) -> Percentiles:
    latencies = Latencies()
    for text in encoded:
        latencies.merge(text)
    return latencies.percentiles()


__all__ = ["ChildFailed", "Options", "expected_seconds", "run"]
