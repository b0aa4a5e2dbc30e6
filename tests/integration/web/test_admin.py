"""The admin port over a real socket: health, readiness, metrics, and nothing else."""

from __future__ import annotations

import asyncio
import socket
import stat
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from outrider_server.telemetry.metrics import Metrics
from outrider_server.web.admin import AdminServer, start_admin, start_admin_socket, stop_admin


class Node:
    """What the admin port asks about."""

    def __init__(self) -> None:
        self.metrics = Metrics(node="a")
        self.state: tuple[bool, str] | Exception = (True, "ready")

    def readiness(self) -> tuple[bool, str]:
        if isinstance(self.state, Exception):
            raise self.state
        return self.state


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
async def server(node: Node) -> AsyncIterator[AdminServer]:
    server = await start_admin(
        "127.0.0.1", 0, readiness=node.readiness, exposition=node.metrics.exposition
    )
    yield server
    await stop_admin(server)


@pytest.fixture
async def browser(server: AdminServer) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
        yield session


async def get(browser: aiohttp.ClientSession, path: str) -> tuple[int, str]:
    async with browser.get(path) as response:
        return response.status, await response.text()


async def test_process_is_alive_whatever_its_readiness(
    browser: aiohttp.ClientSession, node: Node
) -> None:
    node.state = (False, "the database does not answer")
    assert await get(browser, "/healthz") == (200, "ok\n")


async def test_readiness_follows_the_node_and_gives_its_reason(
    browser: aiohttp.ClientSession, node: Node
) -> None:
    assert await get(browser, "/readyz") == (200, "ready\n")
    node.state = (False, "draining")
    assert await get(browser, "/readyz") == (503, "draining\n")
    node.state = (True, "ready")
    assert await get(browser, "/readyz") == (200, "ready\n")


async def test_readiness_that_cannot_be_told_is_not_ready_and_tells_no_details(
    browser: aiohttp.ClientSession, node: Node
) -> None:
    node.state = RuntimeError("postgres://u:hunter2@h")
    assert await get(browser, "/readyz") == (503, "readiness cannot be told: RuntimeError\n")


async def test_metrics_are_those_of_now(browser: aiohttp.ClientSession, node: Node) -> None:
    for events in (3, 4):
        node.metrics.ingest.events += events
        async with browser.get("/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=")
            text = await response.text()
        samples = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}
        assert samples["outrider_ingest_events_total"] == node.metrics.ingest.events


async def test_scraper_may_ask_for_openmetrics(browser: aiohttp.ClientSession) -> None:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    async with browser.get("/metrics", headers=accept) as response:
        assert response.content_type == "application/openmetrics-text"
        assert (await response.text()).endswith("# EOF\n")


async def test_nothing_else_is_served(browser: aiohttp.ClientSession) -> None:
    assert (await get(browser, "/"))[0] == 404
    assert (await get(browser, "/metrics/../readyz/x"))[0] == 404
    async with browser.post("/healthz") as response:
        assert response.status == 405


async def test_metrics_can_be_switched_off(node: Node) -> None:
    server = await start_admin("127.0.0.1", 0, readiness=node.readiness, exposition=None)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
        assert (await get(session, "/metrics"))[0] == 404
        assert (await get(session, "/healthz"))[0] == 200
    await stop_admin(server)


async def test_taken_port_is_an_error_at_start(server: AdminServer, node: Node) -> None:
    with pytest.raises(OSError, match="address already in use"):
        await start_admin("127.0.0.1", server.port, readiness=node.readiness, exposition=None)


async def test_stop_frees_the_port_though_a_connection_is_open(node: Node) -> None:
    server = await start_admin("127.0.0.1", 0, readiness=node.readiness, exposition=None)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    async with asyncio.timeout(5):
        await stop_admin(server)
    again = await start_admin("127.0.0.1", server.port, readiness=node.readiness, exposition=None)
    assert again.port == server.port
    await stop_admin(again)
    writer.close()
    await writer.wait_closed()


async def test_a_worker_serves_the_same_on_a_socket_that_only_its_user_may_use(node: Node) -> None:
    with tempfile.TemporaryDirectory(prefix="outrider-") as folder:
        path = Path(folder) / "1.sock"
        with socket.socket(socket.AF_UNIX) as left:  # by a process that was killed
            left.bind(str(path))
        server = await start_admin_socket(
            path, readiness=node.readiness, exposition=node.metrics.exposition
        )
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        connector = aiohttp.UnixConnector(path=str(path))
        async with aiohttp.ClientSession("http://worker", connector=connector) as session:
            assert await get(session, "/healthz") == (200, "ok\n")
            assert await get(session, "/readyz") == (200, "ready\n")
            assert (await get(session, "/metrics"))[0] == 200
        await stop_admin(server)


async def test_a_socket_that_cannot_be_is_an_error_at_start(node: Node, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        await start_admin_socket(
            tmp_path / "missing" / "1.sock", readiness=node.readiness, exposition=None
        )
