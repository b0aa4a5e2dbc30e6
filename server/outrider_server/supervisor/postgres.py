"""The embedded Postgres under a service: started first, started again when it dies, stopped last."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import structlog

from outrider_server.embedded.errors import StateFolderInUse
from outrider_server.embedded.launcher import EmbeddedPostgres
from outrider_server.embedded.running import find_running
from outrider_server.settings import Settings

RESTART_SECONDS = 0.2


@contextlib.asynccontextmanager
async def embedded_postgres_for_command(settings: Settings) -> AsyncIterator[str]:
    """The DSN of the Postgres in the state folder: of the one that a server runs there, else of one run for the block."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            dsn, _ = await stack.enter_async_context(embedded_postgres(settings))
        except StateFolderInUse:
            dsn = (await asyncio.to_thread(find_running, settings.state_folder)).dsn
        yield dsn


@contextlib.asynccontextmanager
async def embedded_postgres(
    settings: Settings, postgres_settings: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[str, Path]]:
    """Run Postgres in the state folder for the length of the block; gives its DSN and the folder of its files.

    `postgres_settings` go over the defaults of `embedded.defaults`.
    """
    postgres = EmbeddedPostgres(
        settings.state_folder,
        bin_folder=settings.postgres_bin_folder,
        port=settings.postgres_port or None,
        settings=postgres_settings,
        user=settings.postgres_user_id,
    )
    address = await asyncio.to_thread(postgres.start)
    async with asyncio.TaskGroup() as tasks:
        keeper = tasks.create_task(_keep(postgres))
        try:
            yield address.dsn, settings.state_folder
        finally:
            keeper.cancel()
            await asyncio.to_thread(postgres.stop)


async def _keep(postgres: EmbeddedPostgres) -> None:
    """Start Postgres again whenever it ends by itself. It recovers from its own log."""
    log = structlog.get_logger()
    while True:
        if await asyncio.to_thread(postgres.wait, RESTART_SECONDS) is None:
            continue
        log.warning("postgres.ended", status=postgres.returncode)
        try:
            await asyncio.to_thread(postgres.start)
        except Exception as error:  # noqa: BLE001 - a full disk may have room again; the node says what is wrong
            log.error("postgres.not_started", error=str(error))  # noqa: TRY400
            await asyncio.sleep(1.0)
