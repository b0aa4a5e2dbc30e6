"""The ways to Postgres: a bounded pool for management and reads, and dedicated connections for the loops that write.

Rule: whoever asks the database through here sees one exception for everything that a retry may cure,
`StorageUnavailable`; an error of the statement itself comes through as it is. Every connection tells who it is in its
application_name, so that a takeover can end exactly the old owner's.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from ssl import SSLError
from typing import TYPE_CHECKING, Any, Self, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

import asyncpg
from typing_extensions import override

from outrider_server.domain.errors import Unavailable

if TYPE_CHECKING:  # generic only in its type information
    from asyncpg.pool import PoolConnectionProxy

    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
    DedicatedConnection: TypeAlias = asyncpg.Connection[asyncpg.Record]
    _Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]
else:
    Connection = DedicatedConnection = _Pool = Any

POOL_CONNECTIONS_MAX = 8
POOL_WAIT_SECONDS_MAX = 5.0
STATEMENT_SECONDS_MAX = 10.0
CONNECT_SECONDS_MAX = 5.0
RETRY_AFTER_SECONDS = 1.0

APPLICATION_NAME_LENGTH_MAX = 63
NODE_NAME_LENGTH_MAX = 40
BOOT_MARK_LENGTH = 8

# The client's own limit lies a little above the server's, so that it is the server that ends a statement where it can:
# then the connection stays usable.
_CLIENT_MARGIN_SECONDS = 2.0

# What Postgres says when it, or the way to it, goes away: 08 connection exception, 57P shutdown, crash, starting up,
# database dropped, idle session ended.
_LOST_STATES = ("08", "57P")
# ... and when it answers but cannot do the work now: 53 out of connections, memory or disk; 57014 statement ended by
# its limit; 55P03 lock wait ended by its limit; 40 serialisation or deadlock; 25006 it has become a read-only standby.
_BUSY_STATES = ("53", "57014", "55P03", "40", "25006")


class StorageUnavailable(Unavailable):
    """The database did not confirm. What was being written may or may not be stored."""

    def __init__(self, message: str = "the database did not confirm in time; try again") -> None:
        super().__init__("STORAGE_UNAVAILABLE", message, retry_after_seconds=RETRY_AFTER_SECONDS)


class CannotConnect(StorageUnavailable):
    """No connection could be made. `place` is where to, without password, and `why` what kept it from there."""

    def __init__(self, place: str, why: str) -> None:
        super().__init__(f"cannot connect to {place}: {why}")
        self.place = place
        self.why = why


def is_connection_lost(error: BaseException) -> bool:
    """Whether `error` means that the connection it came from is of no further use."""
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate or "").startswith(_LOST_STATES)
    if isinstance(error, asyncpg.InternalClientError):
        return True  # the client's own state broke, as it may when a backend ends in the middle of a statement
    if isinstance(error, asyncpg.InterfaceError):
        # The same class also tells of wrong arguments and of misuse, which must not look like an outage.
        return not isinstance(error, ValueError) and (
            "closed" in str(error) or "closing" in str(error)
        )
    # A refused, reset or unresolvable address; a timeout is an OSError, too, but says nothing of the connection.
    return isinstance(error, OSError) and not isinstance(error, TimeoutError)


def is_unavailable(error: BaseException) -> bool:
    """Whether `error` is a passing condition of the database: lost, too slow, out of room or in a deadlock."""
    if isinstance(error, asyncpg.PostgresError):
        return is_connection_lost(error) or str(error.sqlstate or "").startswith(_BUSY_STATES)
    return isinstance(error, TimeoutError) or is_connection_lost(error)


@contextmanager
def translated() -> Iterator[None]:
    """Raise `StorageUnavailable` in place of every passing condition of the database."""
    try:
        yield
    except (
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        OSError,
    ) as error:
        if is_unavailable(error):
            raise StorageUnavailable from error
        raise


def boot_mark(boot: str) -> str:
    """The part of a node's boot id that stands in application names."""
    return boot.replace("-", "")[:BOOT_MARK_LENGTH]


def application_name(node: str, boot: str, role: str) -> str:
    """`outrider/<node>/<boot mark>/<role>`: who a connection belongs to, for a takeover and for people.

    Postgres cuts long names off silently. Only the role, which nothing depends on, may lose its end.
    """
    if len(node) > NODE_NAME_LENGTH_MAX or "/" in node:
        raise ValueError(f"{node!r} is not a node's name")
    return f"outrider/{node}/{boot_mark(boot)}/{role}"[:APPLICATION_NAME_LENGTH_MAX]


async def connect(
    dsn: str,
    role: str,
    *,
    node: str,
    boot: str,
    statement_seconds_max: float = STATEMENT_SECONDS_MAX,
) -> DedicatedConnection:
    """Open a connection of its own for the loop `role` of a node; `boot` names this life of the node.

    The caller owns it, closes it, and must take any lost connection (`is_connection_lost`) for a lost transaction.
    Raises CannotConnect, whatever the reason: what is wrong today may have been put right at the next try.
    """
    name = application_name(node, boot, role)
    try:
        return await asyncpg.connect(
            dsn,
            timeout=CONNECT_SECONDS_MAX,
            command_timeout=statement_seconds_max + _CLIENT_MARGIN_SECONDS,
            server_settings=_server_settings(name, statement_seconds_max),
        )
    except (
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        OSError,
        ValueError,  # a port or a host name that is none
    ) as error:
        raise CannotConnect(_place(dsn), _why(error)) from error


async def until_lost(connections: Iterable[DedicatedConnection]) -> None:
    """Wait until one of the connections ends, then raise: an idle one that the server ended tells nobody until it is used."""
    ended = asyncio.Event()

    def tell(_: object) -> None:
        ended.set()

    watched = list(connections)
    for connection in watched:
        connection.add_termination_listener(tell)
    try:
        if not any(connection.is_closed() for connection in watched):
            await ended.wait()
        raise StorageUnavailable("a connection to the database ended")
    finally:
        for connection in watched:
            connection.remove_termination_listener(tell)


class Database:
    """The pool that management calls and reads share. `async with` opens and closes it.

    At most `connections_max` statements run at once; a caller waits `POOL_WAIT_SECONDS_MAX` for its turn.
    """

    def __init__(
        self,
        dsn: str,
        *,
        node: str,
        boot: str,
        connections_max: int = POOL_CONNECTIONS_MAX,
        statement_seconds_max: float = STATEMENT_SECONDS_MAX,
        wait_seconds_max: float = POOL_WAIT_SECONDS_MAX,
    ) -> None:
        # No connection is made ahead, so a node starts, and says what is wrong, while its database is away.
        self._pool: _Pool = asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=connections_max,
            timeout=CONNECT_SECONDS_MAX,
            command_timeout=statement_seconds_max + _CLIENT_MARGIN_SECONDS,
            server_settings=_server_settings(
                application_name(node, boot, "api"), statement_seconds_max
            ),
        )
        self._wait_seconds_max = wait_seconds_max

    async def open(self) -> None:
        """Make the pool ready. It connects when it is first asked."""
        _ = await self._pool

    async def close(self) -> None:
        """Close every connection; statements under way end first, for a while."""
        try:
            await self._pool.close()
        finally:
            self._pool.terminate()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """One connection, outside a transaction."""
        with translated():
            async with self._pool.acquire(timeout=self._wait_seconds_max) as connection:
                yield connection

    @asynccontextmanager
    async def transaction(self, *, dry_run: bool = False) -> AsyncIterator[Connection]:
        """One connection in a transaction, committed at the end; a `dry_run` is always taken back."""
        try:
            async with self.connection() as connection, connection.transaction():
                yield connection
                if dry_run:
                    raise _TakeBack
        except _TakeBack:
            pass

    @override
    def __repr__(self) -> str:
        return "Database()"  # a pool's own repr may show its address


class _TakeBack(Exception):
    """Ends a dry run's transaction without committing it."""


def _place(dsn: str) -> str:
    """`host:port/database` of a DSN; nothing else of it, and nothing at all where a password may have slipped in."""
    unknown = "the database"
    try:
        parts = urlsplit(dsn)
        if "@" in parts.path + parts.query + parts.fragment:
            return unknown
        query = dict(parse_qsl(parts.query))
        name = unquote(parts.path.removeprefix("/")) or query.get("dbname", query.get("database"))
        host = unquote(parts.netloc.rpartition("@")[2])
        if not host:
            host = query.get("host", "")
            port = query.get("port", "")
            host += f":{port}" if port and host else ""
    except ValueError:
        return unknown
    return f"{host or 'the default host'}/{name}" if name else host or unknown


def _why(error: Exception) -> str:
    """What kept a connection from being made, in a few words of one line."""
    said = str(error)
    if isinstance(error, OSError) and not isinstance(error, SSLError):
        number = error.errno or 0
        if number > 0:  # look-ups of names have numbers of their own, below zero
            said = os.strerror(number)
        elif error.strerror:
            said = error.strerror
        elif isinstance(error, TimeoutError):
            said = f"no answer within {CONNECT_SECONDS_MAX:g} s"
    return " ".join(said.split()) or type(error).__name__


def _server_settings(name: str, statement_seconds_max: float) -> dict[str, str]:
    return {
        "application_name": name,
        "statement_timeout": str(int(statement_seconds_max * 1000)),
        # A transaction that its owner forgot must not hold back vacuum, nor a takeover.
        "idle_in_transaction_session_timeout": "60s",
        "timezone": "UTC",
        # Generated plans of these short statements never pay for their compilation.
        "jit": "off",
    }
