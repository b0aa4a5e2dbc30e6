"""The admin port: metrics for Prometheus, health for whoever supervises the process.

`/healthz` answers as long as the event loop runs, and nothing more: a supervisor that restarts on it must not restart
for a database that is away. `/readyz` says whether this node should be given work, and if not, why not. Nothing here
asks for a key, so nothing here may show a tenant's data.

A node listens on a port, or, as one of several workers, on a Unix socket; their supervisor then has the port, with pages
of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

Exposition = Callable[[str], tuple[bytes, str]]
"""Gives the metrics and their content type, in the form that an Accept header asks for."""

Readiness = Callable[[], tuple[bool, str]]
"""Whether this node can take work, and the reason in words."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

Pages = Mapping[str, Handler]
"""What is served, by path."""

REQUEST_BYTES_MAX = 4 * 1024
KEEPALIVE_SECONDS = 75.0
SHUTDOWN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class AdminServer:
    """A server that is listening. `port` is the one it got, where 0 was asked for; 0 on a Unix socket."""

    host: str
    port: int
    runner: web.AppRunner


async def start_admin(
    host: str, port: int, *, readiness: Readiness, exposition: Exposition | None
) -> AdminServer:
    """Listen; without an `exposition` there is no `/metrics`. Raises OSError where the address cannot be had."""
    return await start_pages(host, port, node_pages(readiness, exposition))


async def start_admin_socket(
    path: Path, *, readiness: Readiness, exposition: Exposition | None
) -> AdminServer:
    """As `start_admin`, on a Unix socket that only this user may use. One that an earlier process left there is replaced."""
    return await start_socket_pages(path, node_pages(readiness, exposition))


async def start_pages(host: str, port: int, pages: Pages) -> AdminServer:
    """Serve `pages`. Raises OSError where the address cannot be had."""
    runner = await _set_up(pages)
    try:
        await web.TCPSite(runner, host, port).start()
    except BaseException:
        await runner.cleanup()
        raise
    return AdminServer(host, runner.addresses[0][1], runner)


async def start_socket_pages(path: Path, pages: Pages) -> AdminServer:
    """Serve `pages` on a Unix socket that only this user may use. Raises OSError where there can be none."""
    runner = await _set_up(pages)
    try:
        await web.UnixSite(runner, path).start()
        path.chmod(0o600)  # noqa: ASYNC240 - one call that does not wait
    except BaseException:
        await runner.cleanup()
        raise
    return AdminServer(str(path), 0, runner)


async def stop_admin(server: AdminServer) -> None:
    """Stop listening and end what is open, within a second."""
    await server.runner.cleanup()


def node_pages(readiness: Readiness, exposition: Exposition | None) -> Pages:
    """The pages of one node."""
    pages: dict[str, Handler] = {"/healthz": _healthz, "/readyz": _readyz(readiness)}
    if exposition is not None:
        pages["/metrics"] = _metrics(exposition)
    return pages


async def _set_up(pages: Pages) -> web.AppRunner:
    application = web.Application(client_max_size=REQUEST_BYTES_MAX)
    for path, handler in pages.items():
        application.router.add_get(path, handler)
    runner = web.AppRunner(
        application,
        access_log=None,
        handle_signals=False,
        keepalive_timeout=KEEPALIVE_SECONDS,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    await runner.setup()
    return runner


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
