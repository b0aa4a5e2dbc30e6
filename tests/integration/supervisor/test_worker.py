"""A worker's place over real processes: started again, given up where nobody but a person can help, left by no process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from tests.support.processes import is_gone
from tests.support.service import until
from tests.support.stand_in_worker import read_story
from tests.support.supervisor import ROOT, RememberedLeases, stand_in

from outrider_server.supervisor.worker import Refusal, Worker, WorkerState


@asynccontextmanager
async def kept(worker: Worker) -> AsyncIterator[asyncio.Task[None]]:
    """The worker at work; stopped at the end."""
    task = asyncio.ensure_future(worker.keep())
    try:
        yield task
    finally:
        worker.stop()
        async with asyncio.timeout(20):
            await asyncio.wait({task})


def ready(worker: Worker) -> bool:
    return worker.state is WorkerState.READY


async def test_a_killed_worker_is_started_again_at_once_and_its_lease_ended(tmp_path: Path) -> None:
    leases = RememberedLeases()
    worker = stand_in(tmp_path, "ready", leases)
    assert worker.state is WorkerState.WAITING
    with capture_logs() as lines:
        async with kept(worker):
            await until(lambda: ready(worker), 20, "ready")
            first = worker.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await until(lambda: ready(worker) and worker.pid != first, 20, "ready again")
            assert leases.expired == ["n.1"]
            assert worker.restarts == 1
    ends = [line for line in lines if line["event"] == "worker.ended"]
    assert [line.get("signal") or line.get("status") for line in ends] == ["SIGKILL", 0]
    assert [line["log_level"] for line in ends] == ["warning", "info"]
    assert [line["node"] for line in lines if line["event"] == "worker.started"] == ["n.1", "n.1"]
    assert [what for _, _, what in read_story(tmp_path)] == ["started", "started", "drained"]
    assert worker.state is WorkerState.ENDED
    assert not worker.unclean


async def test_a_worker_that_crashes_at_each_start_is_started_ever_more_rarely(
    tmp_path: Path,
) -> None:
    loop = asyncio.get_running_loop()
    worker = stand_in(tmp_path, "exit:3,exit:3,exit:3,exit:3,ready", RememberedLeases())
    began = loop.time()
    async with kept(worker):
        await until(lambda: ready(worker), 30, "ready")
        # Nothing before the second start, then 0.1, 0.2 and 0.4 s.
        assert loop.time() - began > 0.7
        assert worker.restarts == 4


async def test_what_never_was_ready_and_says_the_same_three_times_is_given_up(
    tmp_path: Path,
) -> None:
    leases = RememberedLeases()
    worker = stand_in(tmp_path, "refuse:the key file is open to others", leases)
    async with asyncio.timeout(20):
        with pytest.raises(Refusal, match=r"^the key file is open to others$"):
            await worker.keep()
    assert len(read_story(tmp_path)) == 3
    assert leases.expired == []
    assert worker.state is WorkerState.ENDED


async def test_sentences_that_differ_are_tried_further(tmp_path: Path) -> None:
    worker = stand_in(tmp_path, "refuse:a,refuse:a,refuse:b,refuse:a,ready", RememberedLeases())
    async with kept(worker):
        await until(lambda: ready(worker), 30, "ready")
        assert worker.starts == 5


async def test_a_worker_that_once_was_ready_is_never_given_up(tmp_path: Path) -> None:
    worker = stand_in(tmp_path, "die,refuse:a,refuse:a,refuse:a,refuse:a,ready", RememberedLeases())
    async with kept(worker):
        await until(lambda: worker.starts == 6 and ready(worker), 30, "ready again")


async def test_a_program_that_cannot_be_started_is_told_and_given_up(tmp_path: Path) -> None:
    worker = stand_in(tmp_path, "ready", RememberedLeases())
    worker._command = [str(tmp_path / "missing")]
    async with asyncio.timeout(20):
        with pytest.raises(Refusal, match=r"cannot start a worker: .*No such file"):
            await worker.keep()


async def test_a_stop_during_the_back_off_ends_the_wait(tmp_path: Path) -> None:
    worker = stand_in(tmp_path, "exit:3", RememberedLeases())
    async with kept(worker) as task:
        await until(lambda: worker.starts >= 5 and worker.pid is None, 30, "a long wait")
        worker.stop()
        async with asyncio.timeout(5):
            await task
    assert worker.state is WorkerState.ENDED


async def test_a_rolled_worker_drains_and_is_ready_again_in_a_new_process(tmp_path: Path) -> None:
    leases = RememberedLeases()
    worker = stand_in(tmp_path, "ready", leases)
    async with kept(worker):
        await until(lambda: ready(worker), 20, "ready")
        first = worker.pid
        assert await worker.roll(20, 20)
        assert worker.pid not in (None, first)
        assert [what for _, _, what in read_story(tmp_path)] == ["started", "drained", "started"]
        assert leases.expired == []


async def test_a_worker_that_does_not_drain_is_killed_when_it_is_rolled(tmp_path: Path) -> None:
    leases = RememberedLeases()
    worker = stand_in(tmp_path, "stubborn,ready", leases)
    async with kept(worker):
        await until(lambda: ready(worker), 20, "ready")
        assert await worker.roll(0.1, 20)
        assert leases.expired == ["n.1"]


async def test_a_roll_tells_when_the_new_process_does_not_get_ready(tmp_path: Path) -> None:
    worker = stand_in(tmp_path, "ready,silent", RememberedLeases())
    async with kept(worker):
        await until(lambda: ready(worker), 20, "ready")
        assert not await worker.roll(20, 0.2)


async def test_who_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    worker = stand_in(tmp_path, "stubborn", RememberedLeases())
    async with kept(worker) as task:
        await until(lambda: ready(worker), 20, "ready")
        pid = worker.pid
        assert pid is not None
        task.cancel()
        await until(task.done, 10, "the end")
        assert is_gone(pid)


SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from tests.support.supervisor import RememberedLeases, stand_in
asyncio.run(stand_in(Path(sys.argv[1]), "ready", RememberedLeases()).keep())
"""


async def test_workers_of_a_killed_supervisor_drain_and_end(tmp_path: Path) -> None:
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    try:
        await until(lambda: read_story(tmp_path), 20, "a worker")
        ((_, pid, _),) = read_story(tmp_path)
    finally:
        supervisor.kill()
        supervisor.wait(10)
    await until(lambda: is_gone(pid), 10, "the worker's end")
    assert [what for _, _, what in read_story(tmp_path)] == ["started", "drained"]
