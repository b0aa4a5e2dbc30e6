"""The sample receiver: a real HTTP server on loopback that takes webhooks as somebody's system would.

It verifies every request with `outrider.webhooks` before it counts it, knows copies by their id, and one of its paths
answers some requests with 503. Rule: it holds a bounded number of ids, and answers 2xx only for what it counted.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from aiohttp import web

from outrider.webhooks import Webhook, WebhookError
from outrider_server.demo.errors import DemoError

HOST = "127.0.0.1"
REQUEST_BYTES_MAX = 12 * 1024 * 1024
IDS_REMEMBERED_MAX = 100_000


@dataclass(slots=True)
class Received:
    """Counts of one path. `deliveries` are those answered with 200, copies not counted."""

    requests: int = 0
    deliveries: int = 0
    copies: int = 0
    failed_on_purpose: int = 0
    not_genuine: int = 0


@dataclass(slots=True)
class _Path:
    webhook: Webhook
    share_failed: float
    received: Received


class SampleReceiver:
    """The receiver's paths, one an endpoint. `random` gives numbers in [0, 1)."""

    def __init__(self, random: Callable[[], float], *, ids_max: int = IDS_REMEMBERED_MAX) -> None:
        self._random = random
        self._ids_max = ids_max
        self._ids: OrderedDict[str, None] = OrderedDict()
        self._paths: dict[str, _Path] = {}
        self.port = 0

    def expect(self, name: str, secret: str, share_failed: float = 0.0) -> None:
        """Serve `/<name>`, whose requests are signed with `secret`; fail about that share of them."""
        self._paths[name] = _Path(Webhook(secret), share_failed, Received())

    def url(self, name: str) -> str:
        """Where an endpoint of this name sends its requests."""
        return f"http://{HOST}:{self.port}/{name}"

    @property
    def received(self) -> dict[str, Received]:
        """The counts by path."""
        return {name: path.received for name, path in self._paths.items()}

    @property
    def deliveries(self) -> int:
        """Deliveries that arrived and were genuine, copies not counted."""
        return sum(path.received.deliveries for path in self._paths.values())

    @contextlib.asynccontextmanager
    async def listening(self, port: int) -> AsyncIterator[None]:
        """Listen for the length of the block: on `port`, where what is owed looks for it; else on any that is free."""
        application = web.Application(client_max_size=REQUEST_BYTES_MAX)
        application.router.add_post("/{name}", self._answer)
        runner = web.AppRunner(
            application, access_log=None, handle_signals=False, shutdown_timeout=1.0
        )
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, HOST, port).start()
            except OSError:
                try:
                    await web.TCPSite(runner, HOST, 0).start()
                except OSError as error:
                    raise DemoError(
                        f"The sample receiver cannot listen on {HOST} ({error.strerror or error}):"
                        " see to it that this host has a loopback address and free ports."
                    ) from error
            self.port = runner.addresses[0][1]
            yield
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = self._paths.get(request.match_info["name"])
        if path is None:
            return web.Response(status=404)
        received = path.received
        received.requests += 1
        body = await request.read()
        try:
            deliveries = path.webhook.verify(request.headers, body)
        except WebhookError as error:
            received.not_genuine += 1
            return web.Response(status=401, text=f"{error}\n")
        if path.share_failed and self._random() < path.share_failed:
            received.failed_on_purpose += 1
            return web.Response(status=503, text="too busy, come again\n")
        for delivery in deliveries:
            if delivery.id in self._ids:
                received.copies += 1
            else:
                received.deliveries += 1
                self._remember(delivery.id)
        return web.Response(status=200)

    def _remember(self, delivery_id: str) -> None:
        self._ids[delivery_id] = None
        if len(self._ids) > self._ids_max:
            self._ids.popitem(last=False)
