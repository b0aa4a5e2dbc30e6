"""The admin port over several workers: as one, and each alone; who does not answer is shown and left out."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.service import until
from tests.support.supervisor import RememberedLeases, stand_in

from outrider_server.supervisor.admin import Overview, WorkerPages
from outrider_server.supervisor.worker import Worker, WorkerState
from outrider_server.web.admin import start_pages, stop_admin


@dataclass
class Shown:
    """Two workers behind an admin port; the second is never ready."""

    browser: aiohttp.ClientSession
    workers: list[Worker]

    async def get(self, path: str) -> tuple[int, str]:
        async with self.browser.get(path) as response:
            return response.status, await response.text()

    async def metrics(self) -> dict[tuple[str, str], float]:
        """Samples by name and node."""
        status, text = await self.get("/metrics")
        assert status == 200
        return {
            (sample.name, sample.labels.get("node", "")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@pytest.fixture
async def shown(tmp_path: Path) -> AsyncIterator[Shown]:
    async with AsyncExitStack() as stack:
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outrider-")))
        leases = RememberedLeases()
        workers = [
            stand_in(tmp_path, script, leases, name=name, socket=sockets / f"{name}.sock")
            for name, script in (("n.1", "ready,exit:3"), ("n.2", "silent"))
        ]
        pages = [WorkerPages(worker, sockets / f"{worker.name}.sock") for worker in workers]
        for page in pages:
            stack.push_async_callback(page.close)
        overview = Overview(metrics_enabled=True)
        server = await start_pages("127.0.0.1", 0, overview.pages())
        stack.push_async_callback(stop_admin, server)
        browser = await stack.enter_async_context(
            aiohttp.ClientSession(f"http://127.0.0.1:{server.port}")
        )
        shown = Shown(browser, workers)
        assert await shown.get("/readyz") == (503, "starting the database\n")
        assert await shown.get("/healthz") == (200, "ok\n")
        overview.show(pages)
        keepers = [asyncio.ensure_future(worker.keep()) for worker in workers]
        try:
            await until(lambda: workers[0].state is WorkerState.READY, 20, "ready")
            await until((sockets / "n.2.sock").exists, 20, "the second's socket")
            yield shown
        finally:
            for worker in workers:
                worker.stop()
            await asyncio.wait(keepers)


async def test_the_service_is_ready_when_one_worker_is_and_each_is_listed(shown: Shown) -> None:
    assert await shown.get("/readyz") == (200, "n.1: ready\nn.2: waits\n")
    assert await shown.get("/healthz") == (200, "ok\n")


async def test_each_workers_pages_can_be_had_alone(shown: Shown) -> None:
    assert await shown.get("/nodes/n.1/readyz") == (200, "ready\n")
    assert await shown.get("/nodes/n.2/readyz") == (503, "waits\n")
    assert await shown.get("/nodes/n.2/healthz") == (200, "ok\n")
    status, text = await shown.get("/nodes/n.2/metrics")
    assert status == 200
    assert "outrider_ingest_events_total 5.0" in text
    for path in ("/nodes/n.3/readyz", "/nodes/n.1/other", "/nodes/n.1", "/nodes/"):
        assert (await shown.get(path))[0] == 404


async def test_metrics_are_added_up_and_the_supervisors_own_stand_beside_them(shown: Shown) -> None:
    metrics = await shown.metrics()
    assert metrics["outrider_ingest_events_total", ""] == 10
    assert metrics["outrider_workers_expected", ""] == 2
    assert metrics["outrider_workers_alive", ""] == 2
    assert metrics["outrider_worker_up", "n.1"] == metrics["outrider_worker_up", "n.2"] == 1
    assert metrics["outrider_worker_restarts_total", "n.1"] == 0
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    async with shown.browser.get("/metrics", headers=accept) as response:
        assert response.content_type == "application/openmetrics-text"
        assert (await response.text()).endswith("# EOF\n")


async def test_a_dead_worker_is_left_out_of_the_sums_and_does_not_make_the_service_ill(
    shown: Shown,
) -> None:
    dead = shown.workers[0]
    assert dead.pid is not None
    os.kill(dead.pid, signal.SIGKILL)
    await until(lambda: dead.starts > 4 and dead.state is WorkerState.WAITING, 30, "its back-off")
    assert await shown.get("/healthz") == (200, "ok\n")
    assert await shown.get("/readyz") == (503, "n.1: ended, to be started again\nn.2: waits\n")
    status, said = await shown.get("/nodes/n.1/metrics")
    assert (status, said) == (503, "ended, to be started again\n")
    metrics = await shown.metrics()
    assert metrics["outrider_ingest_events_total", ""] == 5
    assert metrics["outrider_worker_up", "n.1"] == 0
    assert metrics["outrider_workers_alive", ""] == 1
    assert metrics["outrider_worker_restarts_total", "n.1"] == dead.restarts > 3


async def test_a_worker_whose_loop_hangs_makes_the_service_ill(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = shown.workers[0].pid
    assert hanging is not None
    os.kill(hanging, signal.SIGSTOP)
    try:
        assert await shown.get("/healthz") == (503, "no answer from n.1\n")
        status, said = await shown.get("/readyz")
        assert status == 503
        assert said.startswith("n.1: does not answer (")
    finally:
        os.kill(hanging, signal.SIGCONT)
    assert await shown.get("/healthz") == (200, "ok\n")
