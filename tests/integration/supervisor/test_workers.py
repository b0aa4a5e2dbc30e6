"""Several workers together: drained in order, hurried, restarted one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.support.processes import is_gone
from tests.support.service import until
from tests.support.stand_in_worker import read_story
from tests.support.supervisor import RememberedLeases, stand_in

from outrider_server.supervisor.worker import Refusal, WorkerState
from outrider_server.supervisor.workers import DrainIncomplete, Workers


def made(
    folder: Path, scripts: Sequence[str], leases: RememberedLeases, drain_seconds: float = 20
) -> Workers:
    return Workers(
        [
            stand_in(folder, script, leases, name=f"n.{number}")
            for number, script in enumerate(scripts, start=1)
        ],
        leases=leases,
        drain_seconds=drain_seconds,
    )


@asynccontextmanager
async def running(workers: Workers) -> AsyncIterator[asyncio.Task[None]]:
    """The workers at work; whatever the test left of them is killed."""
    task = asyncio.ensure_future(workers.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


def ready_count(workers: Workers) -> int:
    return sum(worker.state is WorkerState.READY for worker in workers.each)


def all_ready(workers: Workers) -> bool:
    return ready_count(workers) == len(workers.each)


async def test_a_stop_says_that_all_drain_then_tells_them_and_waits(tmp_path: Path) -> None:
    leases = RememberedLeases()
    workers = made(tmp_path, ["ready", "ready", "silent"], leases)
    async with running(workers) as task:
        await until(lambda: len(read_story(tmp_path)) == 3, 20, "three starts")
        await until(lambda: ready_count(workers) == 2, 20, "two are ready")
        assert workers.alive == 3
        workers.stop()
        async with asyncio.timeout(20):
            await task
    assert leases.told == [("n.1", "n.2", "n.3")]
    assert leases.expired == []
    assert sorted(what for _, _, what in read_story(tmp_path)) == ["drained"] * 3 + ["started"] * 3
    assert workers.alive == 0


async def test_who_does_not_drain_in_time_is_killed_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outrider_server.supervisor.workers.MARGIN_SECONDS", 0.1)
    leases = RememberedLeases()
    workers = made(tmp_path, ["ready", "stubborn"], leases, drain_seconds=3)
    async with running(workers) as task:
        await until(lambda: all_ready(workers), 20, "ready")
        workers.stop()
        with pytest.raises(DrainIncomplete, match=r"^n\.2 did not drain in order"):
            async with asyncio.timeout(20):
                await task
    assert leases.expired == ["n.2"]
    assert all(is_gone(pid) for _, pid, _ in read_story(tmp_path))


async def test_a_second_stop_does_not_wait_for_the_drain(tmp_path: Path) -> None:
    workers = made(tmp_path, ["stubborn", "stubborn"], RememberedLeases(), drain_seconds=3_600)
    async with running(workers) as task:
        await until(lambda: all_ready(workers), 20, "ready")
        workers.stop()
        await asyncio.sleep(0)
        workers.stop()
        with pytest.raises(DrainIncomplete, match=r"n\.1, n\.2 did not"):
            async with asyncio.timeout(20):
                await task


async def test_a_worker_that_nobody_but_a_person_can_help_ends_all_in_order(tmp_path: Path) -> None:
    workers = made(tmp_path, ["ready", "refuse:cannot listen here"], RememberedLeases())
    async with running(workers) as task:
        with pytest.raises(Refusal, match=r"^cannot listen here$"):
            async with asyncio.timeout(30):
                await task
    story = read_story(tmp_path)
    assert sum(name == "n.2" for name, _, _ in story) == 3
    assert all(is_gone(pid) for _, pid, _ in story)


async def test_workers_are_restarted_one_after_the_other(tmp_path: Path) -> None:
    leases = RememberedLeases()
    workers = made(tmp_path, ["ready", "ready"], leases)
    async with running(workers) as task:
        await until(lambda: all_ready(workers), 20, "ready")
        before = [worker.pid for worker in workers.each]
        workers.roll()
        await until(
            lambda: (
                all_ready(workers)
                and all(w.pid != pid for w, pid in zip(workers.each, before, strict=True))
            ),
            30,
            "both anew",
        )
        story = [(name, what) for name, _, what in read_story(tmp_path)][2:]
        assert story == [
            ("n.1", "drained"),
            ("n.1", "started"),
            ("n.2", "drained"),
            ("n.2", "started"),
        ]
        assert leases.told == []
        workers.stop()
        async with asyncio.timeout(20):
            await task


async def test_a_restart_that_fails_leaves_the_next_worker_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outrider_server.supervisor.workers.READY_SECONDS_MAX", 0.5)
    workers = made(tmp_path, ["ready,silent", "ready"], RememberedLeases())
    async with running(workers) as task:
        await until(lambda: all_ready(workers), 20, "ready")
        other = workers.each[1].pid
        workers.roll()
        await until(lambda: workers.each[0].starts == 2, 20, "the first anew")
        workers.stop()
        async with asyncio.timeout(20):
            await task
    assert [
        pid for name, pid, what in read_story(tmp_path) if name == "n.2" and what == "started"
    ] == [other]
