"""The command line of the server: `outrider-server COMMAND`. Every wrong input is answered in one sentence."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from outrider_server import __version__
from outrider_server.embedded.errors import EmbeddedPostgresError
from outrider_server.settings import Settings, SettingsError, render

EXIT_USAGE = 2
ORPHAN_MARGIN_SECONDS = 10.0
"""What a worker may take for its end beside its drain once its supervisor is gone."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    # Our children are started by exec: gRPC need not prepare for a fork, which it may find itself unable to.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    options = _parser().parse_args(arguments)
    try:
        settings = Settings.load(_overrides(options), options.config)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    if options.command == "config":
        print(render(settings))
        return 0
    if options.command == "node":
        return _node(options, settings)
    try:
        _run(_command(options, settings))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (problems := _settings_error(error)) is not None:
            print(problems, file=sys.stderr)
            return EXIT_USAGE
        sentence = _sentence(error, settings)
        if sentence is None:
            raise
        print(f"outrider-server: {sentence}", file=sys.stderr)
        return 1
    return 0


def _node(options: argparse.Namespace, settings: Settings) -> int:
    """One worker. Its supervisor, not the terminal, is told why it cannot run."""
    from outrider_server.supervisor.lifeline import WorkerEnd

    line = WorkerEnd(options.lifeline)
    try:
        _run(_run_node(settings, line, options.database_folder))
    except Exception as error:
        # The address of an embedded database is no setting that somebody could correct.
        embedded = options.database_folder is not None
        sentence = _sentence(error, settings.replaced(database_url=None) if embedded else settings)
        if sentence is None:
            raise
        line.tell_refused(sentence)
        return 1
    return 0


def _command(options: argparse.Namespace, settings: Settings) -> Coroutine[Any, Any, None]:
    match options.command:
        case "serve" if settings.workers_expected > 1:
            from outrider_server.supervisor.service import supervise

            return supervise(settings)
        case "serve":
            return _serve(settings.replaced(workers=1))
        case "migrate":
            return _migrate(settings)
        case "create-admin-key":
            return _create_admin_key(settings, options.name)
        case "balance":
            return _balance(settings)
        case "nodes":
            return _nodes(settings, shards=options.shards)
        case "let-go":
            return _let_go(settings, options.shard)
        case _:
            from outrider_server.demo import run_demo

            return run_demo(settings, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="outrider-server", description="Webhook and event delivery."
    )
    parser.add_argument("--version", action="version", version=f"outrider-server {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config",
        help="TOML file of settings; each may also be OUTRIDER_<NAME> in the environment",
    )
    common.add_argument("--state-folder", help="where the embedded database, keys and logs live")
    common.add_argument(
        "--database-url", help="use this Postgres (15 or newer) instead of the embedded one"
    )
    common.add_argument("--listen-address", help="host:port of the gRPC API")
    common.add_argument("--admin-address", help="host:port of metrics and health")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    serve = command("serve", "Run the server: as many nodes as workers are asked for.")
    serve.add_argument(
        "--workers", type=int, help="nodes to run (default 0: one for each processor core)"
    )
    # One worker, for the supervisor only: it has no line in the help.
    node = commands.add_parser("node", parents=[common])
    node.add_argument("--lifeline", type=int, required=True)
    node.add_argument("--database-folder", type=Path)
    command("migrate", "Bring the database's schema up to date.")
    command("config", "Print the effective configuration, secrets redacted.")
    command("balance", "Print per tenant what matched and what became of it.")
    nodes = command(
        "nodes", "Print the nodes and what they hold: shards, windows, deliveries owed, lag."
    )
    nodes.add_argument("--shards", action="store_true", help="a line for each of the 64 shards")
    let_go = command(
        "let-go",
        "Send what a shard held back after its owners had crashed over it again and again.",
    )
    let_go.add_argument(
        "--shard", type=int, choices=range(64), metavar="0..63", help="only this one (default: all)"
    )
    create = command("create-admin-key", "Make a system admin's API key and print it once.")
    create.add_argument("--name", default="", help="the key's id; chosen if not given")
    demo = command(
        "demo",
        "Run a node with sample data, a sample receiver and sample traffic. Its data is in ./run, or where"
        " --state-folder says.",
    )
    demo.add_argument(
        "--rate", type=float, default=200.0, help="events a second to publish (default 200)"
    )
    demo.add_argument(
        "--seconds", type=float, default=0.0, help="stop after so many seconds (default: never)"
    )
    demo.add_argument(
        "--disk-mib",
        type=int,
        default=4096,
        help="publish nothing while the state folder holds more MiB than this (default 4096)",
    )
    return parser


def _overrides(options: argparse.Namespace) -> dict[str, object]:
    names = ("state_folder", "database_url", "listen_address", "admin_address", "workers")
    given = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop
    except ImportError:  # where it has no wheel
        asyncio.run(work)
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work)


@contextlib.asynccontextmanager
async def _database_to_serve(settings: Settings) -> AsyncIterator[tuple[str, Path | None]]:
    """The database to use: (DSN, folder of its files if they are here). An embedded one runs inside the block."""
    if settings.database_url is not None:
        yield settings.database_url.get_secret_value(), None
        return
    from outrider_server.supervisor import embedded_postgres

    async with embedded_postgres(settings) as (dsn, folder):
        yield dsn, folder


@contextlib.asynccontextmanager
async def _database_for_command(settings: Settings) -> AsyncIterator[Any]:
    """A connection for one command, also beside a running server. An embedded database that nobody runs is run for it."""
    async with contextlib.AsyncExitStack() as stack:
        if settings.database_url is not None:
            dsn = settings.database_url.get_secret_value()
        else:
            from outrider_server.supervisor import embedded_postgres_for_command

            dsn = await stack.enter_async_context(embedded_postgres_for_command(settings))
        yield await stack.enter_async_context(_connected(dsn, settings))


async def _serve(settings: Settings) -> None:
    from outrider_server.app import Node
    from outrider_server.supervisor import require_free
    from outrider_server.telemetry.logs import configure
    from outrider_server.telemetry.metrics import otlp_exporter_module

    configure(settings.log_level, settings.log_format, sys.stderr)
    # What would fail after the database was started and migrated is refused before.
    require_free(settings.listen_address, "listen_address")
    require_free(settings.admin_address, "admin_address")
    if settings.otlp_endpoint is not None:
        otlp_exporter_module()
    async with _database_to_serve(settings) as (dsn, folder):
        node = Node(settings, dsn, database_folder=folder)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, node.stop)
        await node.run()


async def _run_node(settings: Settings, line: Any, database_folder: Path | None) -> None:
    import structlog

    from outrider_server.app import Node
    from outrider_server.telemetry.logs import configure

    configure(settings.log_level, settings.log_format, sys.stderr)
    structlog.contextvars.bind_contextvars(node=settings.node_name)
    assert settings.database_url is not None
    node = Node(settings, settings.database_url.get_secret_value(), database_folder=database_folder)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, node.stop)

    def drain() -> None:
        structlog.get_logger().warning("supervisor.gone")
        node.stop()

    def orphaned() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            loop.call_soon_threadsafe(drain)

    line.watch(orphaned, settings.drain_seconds + ORPHAN_MARGIN_SECONDS)

    async def tell_ready() -> None:
        await node.ready()
        line.tell_ready()

    async with asyncio.TaskGroup() as tasks:
        telling = tasks.create_task(tell_ready())
        await node.run()
        telling.cancel()


async def _migrate(settings: Settings) -> None:
    from outrider_server.storage.migrate import migrate

    async with _database_for_command(settings) as connection:
        applied = await migrate(connection)
        print("\n".join(f"applied {name}" for name in applied) or "up to date")


async def _create_admin_key(settings: Settings, name: str) -> None:
    from outrider_server.access.keys import create_admin_key, require_key_id
    from outrider_server.storage.migrate import migrate

    if name:
        require_key_id(name)
    async with _database_for_command(settings) as connection:
        await migrate(connection)
        print(await create_admin_key(connection, os.urandom, name=name))


async def _balance(settings: Settings) -> None:
    from outrider_server.storage.ledger import balance

    async with _database_for_command(settings) as connection:
        rows = await balance(connection)
    print(
        f"{'tenant':<24}{'matched':>12}{'delivered':>12}{'dead':>10}{'cancelled':>11}{'owed':>10}{'window':>10}"
    )
    for row in rows:
        mark = "" if row.holds() else f"  off by {row.difference()}"
        print(
            f"{row.tenant:<24}{row.matched:>12}{row.delivered:>12}{row.dead:>10}{row.cancelled:>11}"
            f"{row.owed:>10}{row.window:>10}{mark}"
        )
    if not all(row.holds() for row in rows):
        raise SystemExit(1)


async def _nodes(settings: Settings, *, shards: bool) -> None:
    from outrider_server.storage import holdings
    from outrider_server.upkeep import holdings_table

    async with _database_for_command(settings) as connection:
        nodes, held = await holdings.read(connection)
    lines = holdings_table.by_shard(held) if shards else holdings_table.by_node(nodes, held)
    print("\n".join(lines))


async def _let_go(settings: Settings, shard: int | None) -> None:
    from outrider_server.storage.shards import let_go

    async with _database_for_command(settings) as connection:
        found = await let_go(connection, shard)
    if not found:
        print("nothing is held back" if shard is None else f"shard {shard} holds nothing back")
        raise SystemExit(1)
    print("\n".join(f"shard {each} is sent again" for each in found))


@contextlib.asynccontextmanager
async def _connected(dsn: str, settings: Settings) -> AsyncIterator[Any]:
    import uuid

    from outrider_server.storage.database import connect

    connection = await connect(
        dsn, "command", node=settings.node_name, boot=str(uuid.uuid4()), statement_seconds_max=600
    )
    try:
        yield connection
    finally:
        await connection.close()


def _settings_error(error: BaseException) -> SettingsError | None:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, SettingsError) else None


def _sentence(error: BaseException, settings: Settings) -> str | None:
    """What a person can do something about, in one sentence; None for what nobody foresaw."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    from outrider_server.supervisor.worker import Refusal
    from outrider_server.supervisor.workers import DrainIncomplete

    if isinstance(error, Refusal | DrainIncomplete):
        return str(error)
    from outrider_server.api.server import ListenError
    from outrider_server.demo.errors import DemoError
    from outrider_server.domain.errors import OutriderError
    from outrider_server.secrets.errors import SecretsError
    from outrider_server.storage.database import CannotConnect
    from outrider_server.storage.migrate import MigrationError
    from outrider_server.storage.shards import LeaseLost
    from outrider_server.supervisor import AddressUnusable
    from outrider_server.telemetry.metrics import ExporterMissingError

    if isinstance(error, CannotConnect) and settings.database_url is not None:
        return f"{error}; check database_url"
    known = (
        AddressUnusable,
        EmbeddedPostgresError,
        ExporterMissingError,
        DemoError,
        ListenError,
        MigrationError,
        SecretsError,
        LeaseLost,
        OutriderError,
        OSError,
    )
    return str(error) if isinstance(error, known) else None


if __name__ == "__main__":
    sys.exit(main())
