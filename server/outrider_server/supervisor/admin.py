"""The admin port of a service of several workers: their health, readiness and metrics as one, and each worker's alone.

    /healthz                            this loop runs, and so does that of every worker that was ready
    /readyz                             some worker takes work; a line for each
    /metrics                            the workers' added up, and this process's own
    /nodes/NAME/healthz|readyz|metrics  what one worker says

Workers are asked over their Unix sockets, at once and each for a bounded time; one that does not answer is left out of
the sums and shown as `outrider_worker_up 0`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from outrider_server.supervisor.worker import Worker, WorkerState
from outrider_server.telemetry import sums
from outrider_server.web.admin import Pages

ANSWER_SECONDS_MAX = 2.0
ANSWER_BYTES_MAX = 4 * 1024 * 1024
PLACES = frozenset({"healthz", "readyz", "metrics"})


class Unreachable(Exception):
    """A worker does not answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker answered."""

    status: int
    content_type: str
    body: bytes


class WorkerPages:
    """The pages of one worker, asked for over its socket. Close it."""

    def __init__(self, worker: Worker, socket: Path) -> None:
        self.worker = worker
        self._session = aiohttp.ClientSession(
            # A connection each time: one that is kept would belong to a process that may be dead.
            connector=aiohttp.UnixConnector(path=str(socket), limit=4, force_close=True),
            timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS_MAX),
        )

    async def get(self, place: str, accept: str = "") -> Answer:
        """Raises Unreachable."""
        if self.worker.pid is None:
            raise Unreachable(self.worker.state.value)
        headers = {"Accept": accept} if accept else {}
        try:
            async with self._session.get(f"http://worker/{place}", headers=headers) as response:
                body = await response.content.read(ANSWER_BYTES_MAX)
                while not response.content.at_eof() and len(body) < ANSWER_BYTES_MAX:
                    body += await response.content.read(ANSWER_BYTES_MAX - len(body))
                return Answer(response.status, response.headers.get("Content-Type", ""), body)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(f"does not answer ({type(error).__name__})") from None

    async def close(self) -> None:
        await self._session.close()


class Overview:
    """What the supervisor's admin port shows. Empty until `show` tells it of workers."""

    def __init__(self, *, metrics_enabled: bool) -> None:
        self._metrics_enabled = metrics_enabled
        self._each: tuple[WorkerPages, ...] = ()

    def show(self, each: Sequence[WorkerPages]) -> None:
        self._each = tuple(each)

    def pages(self) -> Pages:
        """For `web.admin`."""
        pages = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/nodes/{node}/{place}": self._node,
        }
        return {**pages, "/metrics": self._metrics} if self._metrics_enabled else pages

    async def _ask_all(self, place: str) -> list[tuple[Worker, Answer | Unreachable]]:
        async def ask(pages: WorkerPages) -> tuple[Worker, Answer | Unreachable]:
            try:
                return pages.worker, await pages.get(place)
            except Unreachable as error:
                return pages.worker, error

        return list(await asyncio.gather(*(ask(pages) for pages in self._each)))

    async def _healthz(self, _request: web.Request) -> web.StreamResponse:
        # One that is not ready yet may be at work on the schema; one that ended is about to be started again.
        stuck = [
            worker.name
            for worker, answer in await self._ask_all("healthz")
            if worker.state is WorkerState.READY
            and (isinstance(answer, Unreachable) or answer.status != 200)
        ]
        if stuck:
            return web.Response(status=503, text=f"no answer from {', '.join(stuck)}\n")
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.StreamResponse:
        ready = False
        lines = []
        for worker, answer in await self._ask_all("readyz"):
            if isinstance(answer, Answer):
                ready = ready or answer.status == 200
                said = answer.body.decode(errors="replace").strip()
            else:
                said = str(answer)
            lines.append(f"{worker.name}: {said}")
        text = "\n".join(lines or ["starting the database"])
        return web.Response(status=200 if ready else 503, text=f"{text}\n")

    async def _node(self, request: web.Request) -> web.StreamResponse:
        node, place = request.match_info["node"], request.match_info["place"]
        found = [pages for pages in self._each if pages.worker.name == node]
        if not found or place not in PLACES:
            raise web.HTTPNotFound
        try:
            answer = await found[0].get(place, request.headers.get("Accept", ""))
        except Unreachable as error:
            return web.Response(status=503, text=f"{error}\n")
        return web.Response(
            status=answer.status, body=answer.body, headers={"Content-Type": answer.content_type}
        )

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        expositions: list[list[Metric]] = []
        up: dict[str, bool] = {}
        for worker, answer in await self._ask_all("metrics"):
            up[worker.name] = False
            if isinstance(answer, Answer) and answer.status == 200:
                try:
                    expositions.append(sums.read(answer.body.decode(errors="replace")))
                except ValueError:
                    continue
                up[worker.name] = True
        families = [*sums.add_up(expositions), *self._own(up)]
        body, content_type = sums.write(families, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    def _own(self, up: dict[str, bool]) -> list[Metric]:
        workers = [pages.worker for pages in self._each]
        ups = GaugeMetricFamily(
            "outrider_worker_up", "Whether a worker's metrics are in the sums.", labels=["node"]
        )
        restarts = CounterMetricFamily(
            "outrider_worker_restarts", "Times that a worker was started again.", labels=["node"]
        )
        for worker in workers:
            ups.add_metric([worker.name], float(up.get(worker.name, False)))
            restarts.add_metric([worker.name], worker.restarts)
        return [
            GaugeMetricFamily(
                "outrider_workers_expected", "Workers that should run.", value=len(workers)
            ),
            GaugeMetricFamily(
                "outrider_workers_alive",
                "Workers that have a process.",
                value=sum(worker.pid is not None for worker in workers),
            ),
            ups,
            restarts,
        ]
