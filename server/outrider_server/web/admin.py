"""The admin port: metrics for Prometheus, health for whoever supervises the process.

`/healthz` answers as long as the event loop runs, and nothing more: a supervisor that restarts on it must not restart
for a database that is away. `/readyz` says whether this node should be given work, and if not, why not. Nothing here
asks for a key, so nothing here may show a tenant's data.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

Exposition = Callable[[str], tuple[bytes, str]]
"""Gives the metrics and their content type, in the form that an Accept header asks for."""

Readiness = Callable[[], tuple[bool, str]]
"""Whether this node can take work, and the reason in words."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_BYTES_MAX = 4 * 1024
KEEPALIVE_SECONDS = 75.0
SHUTDOWN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class AdminServer:
    """A server that is listening. `port` is the one it got, where 0 was asked for."""

    host: str
    port: int
    runner: web.AppRunner


async def start_admin(
    host: str, port: int, *, readiness: Readiness, exposition: Exposition | None
) -> AdminServer:
    """Listen; without an `exposition` there is no `/metrics`. Raises OSError where the address cannot be had."""
    application = web.Application(client_max_size=REQUEST_BYTES_MAX)
    application.router.add_get("/healthz", _healthz)
    application.router.add_get("/readyz", _readyz(readiness))
    if exposition is not None:
        application.router.add_get("/metrics", _metrics(exposition))
    runner = web.AppRunner(
        application,
        access_log=None,
        handle_signals=False,
        keepalive_timeout=KEEPALIVE_SECONDS,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except BaseException:
        await runner.cleanup()
        raise
    return AdminServer(host, runner.addresses[0][1], runner)


async def stop_admin(server: AdminServer) -> None:
    """Stop listening and end what is open, within a second."""
    await server.runner.cleanup()


async def _healthz(_request: web.Request) -> web.StreamResponse:
    return web.Response(text="ok\n")


def _readyz(readiness: Readiness) -> Handler:
    async def readyz(_request: web.Request) -> web.StreamResponse:
        try:
            ready, reason = readiness()
        except Exception as error:  # noqa: BLE001  # not knowing whether it is ready is not being ready
            ready, reason = False, f"readiness cannot be told: {type(error).__name__}"
        return web.Response(status=200 if ready else 503, text=f"{reason}\n")

    return readyz


def _metrics(exposition: Exposition) -> Handler:
    async def metrics(request: web.Request) -> web.StreamResponse:
        body, content_type = exposition(request.headers.get("Accept", ""))
        # By header, for the content type carries parameters that `content_type=` refuses.
        return web.Response(body=body, headers={"Content-Type": content_type})

    return metrics
