"""A service of several workers, composed: addresses, database, workers, admin port; taken down in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

from outrider_server.embedded.state import SOCKET_PATH_BYTES_MAX
from outrider_server.settings import (
    CONFIG_VARIABLE,
    PREFIX,
    Settings,
    join_address,
    split_address,
)
from outrider_server.supervisor.address import require_free, reserved, unusable
from outrider_server.supervisor.admin import Overview, WorkerPages
from outrider_server.supervisor.leases import DatabaseLeases
from outrider_server.supervisor.postgres import embedded_postgres
from outrider_server.supervisor.worker import Worker
from outrider_server.supervisor.workers import Workers
from outrider_server.telemetry.logs import configure
from outrider_server.telemetry.metrics import otlp_exporter_module
from outrider_server.web.admin import start_pages, start_socket_pages, stop_admin

CONNECTIONS_OF_A_NODE = 20
CONNECTIONS_OF_OTHERS = 40

READ_ALREADY = (
    CONFIG_VARIABLE,
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
)
"""Variables whose values stand in the settings by now, and must not come over them again in a worker."""


async def supervise(settings: Settings) -> None:
    """Run the service until it is told to stop by SIGTERM or SIGINT; SIGHUP restarts its workers one after the other.

    Raises what a person can put right, SettingsError among it; `DrainIncomplete` when it had to kill.
    """
    configure(settings.log_level, settings.log_format, sys.stderr)
    async with contextlib.AsyncExitStack() as stack:
        if settings.admin_socket is None:
            require_free(settings.admin_address, "admin_address")
        if settings.otlp_endpoint is not None:
            otlp_exporter_module()
        address = stack.enter_context(reserved(settings.listen_address, "listen_address"))
        each = worker_settings(settings.replaced(listen_address=address))
        overview = Overview(metrics_enabled=settings.metrics_enabled)
        await stack.enter_async_context(_admin(settings, overview))
        dsn, folder = await stack.enter_async_context(_database(settings, len(each)))
        sockets = stack.enter_context(socket_folder(folder))
        leases = DatabaseLeases(dsn, name=settings.node_name, boot=str(uuid.uuid4()))
        stack.push_async_callback(leases.close)
        command = [sys.executable, "-P", "-m", "outrider_server", "node"]
        if folder is not None:
            command.append(f"--database-folder={folder}")
        workers = []
        for number, mine in enumerate(each, start=1):
            socket = sockets / f"{number}.sock"
            given = mine.replaced(database_url=dsn, admin_socket=socket)
            worker = Worker(
                mine.node_name,
                [*command, "--lifeline"],
                worker_environment(given, os.environ),
                leases=leases,
                monotonic=time.monotonic,
            )
            workers.append((worker, socket))
        pages = [WorkerPages(worker, socket) for worker, socket in workers]
        for page in pages:
            stack.push_async_callback(page.close)
        overview.show(pages)
        group = Workers(
            [worker for worker, _ in workers],
            leases=leases,
            drain_seconds=settings.drain_seconds,
        )
        with told_by_signals(group):
            await group.run()


def worker_settings(settings: Settings) -> list[Settings]:
    """The settings of each worker. Raises SettingsError where they cannot all be had from these."""
    count = settings.workers_expected
    host, port = split_address(settings.own_address)
    return [
        settings.replaced(
            node_name=f"{settings.node_name}.{number}",
            workers=count,
            own_address=join_address(host, port + number - 1 if port else 0),
        )
        for number in range(1, count + 1)
    ]


def worker_environment(settings: Settings, ours: Mapping[str, str]) -> dict[str, str]:
    """`ours` with `settings` as its only settings. Secrets stand here: a command line could be read by every user."""
    kept = {
        name: value
        for name, value in ours.items()
        if not name.upper().startswith(PREFIX) and name not in READ_ALREADY
    }
    return kept | settings.as_environment()


@contextlib.contextmanager
def socket_folder(state: Path | None) -> Iterator[Path]:
    """A folder for the workers' sockets that only this user may enter: in the state folder if its name is short enough.

    `state` is a folder that is ours alone as long as we run; None where there is none.
    """
    if state is None or len(os.fsencode(state / "run" / "00.sock")) > SOCKET_PATH_BYTES_MAX:
        with tempfile.TemporaryDirectory(prefix="outrider-") as made:
            yield Path(made)
        return
    folder = state / "run"
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    try:
        yield folder
    finally:
        for left in folder.glob("*.sock"):
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def told_by_signals(workers: Workers) -> Iterator[None]:
    """SIGTERM and SIGINT stop, a second one in a hurry; SIGHUP restarts one after the other."""
    loop = asyncio.get_running_loop()
    had_terminal = _has_terminal()

    def hung_up() -> None:
        # The same signal tells that the terminal was closed; then nobody asked for a restart.
        if had_terminal and not _has_terminal():
            workers.stop()
        else:
            workers.roll()

    handlers = {
        signal.SIGTERM: workers.stop,
        signal.SIGINT: workers.stop,
        signal.SIGHUP: hung_up,
    }
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


@contextlib.asynccontextmanager
async def _database(settings: Settings, workers: int) -> AsyncIterator[tuple[str, Path | None]]:
    """The DSN of the database, and the folder of its files if it is the embedded one."""
    if settings.database_url is not None:
        yield settings.database_url.get_secret_value(), None
        return
    needed = CONNECTIONS_OF_OTHERS + CONNECTIONS_OF_A_NODE * workers
    async with embedded_postgres(settings, {"max_connections": str(max(100, needed))}) as (dsn, at):
        yield dsn, at


@contextlib.asynccontextmanager
async def _admin(settings: Settings, overview: Overview) -> AsyncIterator[None]:
    if settings.admin_socket is not None:
        server = await start_socket_pages(settings.admin_socket, overview.pages())
    else:
        host, port = split_address(settings.admin_address)
        try:
            server = await start_pages(host, port, overview.pages())
        except OSError as error:
            raise unusable(settings.admin_address, "admin_address", error) from None
    try:
        yield
    finally:
        await stop_admin(server)
