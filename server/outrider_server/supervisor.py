"""The supervisor of the embedded Postgres: starts it, starts it again when it dies, stops it last. Imports no gRPC.

Before that it looks whether what comes after could start at all, and beside a server it only finds the one that runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import structlog

from outrider_server.embedded.errors import StateFolderInUse
from outrider_server.embedded.launcher import EmbeddedPostgres
from outrider_server.embedded.running import find_running
from outrider_server.settings import Settings, split_address

RESTART_SECONDS = 0.2


class AddressUnusable(Exception):
    """Nothing can listen on a configured address; the message says what to do."""


def require_free(address: str, knob: str) -> None:
    """AddressUnusable where somebody listens on `address` already, or this host does not have it.

    Another may still take it before the server does; it is asked to save the start of a database in the usual case.
    """
    host, port = split_address(address)
    if port == 0:
        return
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: connections of an earlier run that linger do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen(1)
    except OSError as error:
        # Name look-ups have numbers of their own, below zero.
        number = error.errno or 0
        why = os.strerror(number).lower() if number > 0 else error.strerror or str(error)
        raise AddressUnusable(
            f"Cannot listen on {address} ({why}): stop what uses that port, or choose another address with {knob}."
        ) from None


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
