"""A database in memory, as the storage functions meet it: named statements, transactions, locks, lost connections.

What it keeps of Postgres:

- Read committed: a statement sees what was committed when it began, and its own transaction's writes. Configuration is
  read in one snapshot (repeatable read).
- Advisory locks, shared and exclusive, and row locks; all held until the transaction ends; who waits waits in line.
- A statement takes time to arrive, to run and to be answered; each of these is drawn. A client sees only its answer.
- A synchronous commit is flushed before it is visible, and cannot be interrupted in between. An asynchronous one is visible
  at once and durable at the next flush: a crash of the database takes back what was not flushed.
- A connection may break at any statement, before or after it ran, so that a commit's outcome is unknown. A backend that is
  terminated ends a little later, and not in the middle of a flush. In a failed transaction COMMIT rolls back.

Statements are known by the names of their files. `statements` holds a fingerprint of the text that each twin here was
written after, and a test tells when one has changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import AsyncIterable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, NamedTuple
from zlib import crc32

import asyncpg
from tests.simulation.loop import LIFE, Life, LifeState, SimulationLoop, Vanished
from typing_extensions import override

from outrider_server.storage.queries import load

START_US = 1_800_000_000_000_000
SHARDS = 4
"""As many as make a world in which shards move between nodes; see `world.determined`."""

NEVER = float("-inf")
MISSING: Any = object()

FENCED_TABLES = frozenset({"event", "owed", "attempt", "dead_letter", "ledger", "idempotency"})
CONFIGURATION = ("tenant", "endpoint", "subscription", "event_type")

Key = tuple[Any, ...]
Locks = Iterable[tuple[Key, bool]]
"""(what, whether exclusively), in the order in which they are waited for."""


class Fenced(asyncpg.PostgresError):
    """What fence() raises."""

    sqlstate = "OR001"


class Row(tuple[Any, ...]):
    """A row by place and by name, as the driver gives it."""

    columns: ClassVar[dict[str, int]]

    @override
    def __getitem__(self, key: Any) -> Any:
        return tuple.__getitem__(self, self.columns[key] if type(key) is str else key)

    def get(self, key: str, default: object = None) -> Any:
        """The value of a column, if there is one."""
        return self[key] if key in self.columns else default


def rows_of(*columns: str) -> type[Row]:
    """A kind of row with these columns."""
    return type("Row", (Row,), {"columns": {name: place for place, name in enumerate(columns)}})


class ShardRow(NamedTuple):
    """A row of `shard`."""

    epoch: int = 0
    node: str | None = None
    checkpoint: int = 0
    record_no: int = 0
    released: bool = True
    crashes: int = 0
    taken_at: float | None = None
    held_back: bool = False


class NodeRow(NamedTuple):
    """A row of `node`. `expires_at` is in seconds of the world's time."""

    boot: str
    address: str
    expires_at: float
    draining: bool = False
    started_at: float = 0.0


class OwedRow(NamedTuple):
    """A row of `owed`, with its key."""

    shard: int
    id: int
    tenant: int
    subscription: int
    first_sequence: int
    sequences: tuple[int, ...]
    attempt: int
    due_us: int
    cause: int


class TenantRow(NamedTuple):
    """A row of `tenant`."""

    id: int
    name: str
    shards: tuple[int, ...]
    config_version: int = 1
    deleted: bool = False
    former_shards: tuple[int, ...] = ()


@dataclass(slots=True)
class Transaction:
    """What a transaction wrote, the fences it holds, and the shards' epochs it raised itself."""

    began: float
    explicit: bool
    writes: dict[tuple[str, Any], Any] = field(default_factory=dict)
    fences: dict[int, int] = field(default_factory=dict)
    exclusive: set[int] = field(default_factory=set)
    savepoints: list[dict[tuple[str, Any], Any]] = field(default_factory=list)
    channels: set[str] = field(default_factory=set)
    snapshot: dict[str, dict[Any, Any]] | None = None
    snapshots: bool = False
    failed: bool = False


@dataclass(slots=True)
class Lock:
    """Who holds a lock, and who waits for it in line."""

    exclusive: Session | None = None
    shared: dict[Session, None] = field(default_factory=dict)
    waiting: deque[tuple[Session, bool, Callable[[], None]]] = field(default_factory=deque)


class Session:
    """A backend, and the client's end of its connection as far as the backend knows."""

    def __init__(self, store: Store, name: str, life: Life | None, number: int) -> None:
        self.store = store
        self.name = name
        self.life = life
        self.number = number
        self.durable = True
        self.transaction: Transaction | None = None
        self.ended = False
        self.flushing = False
        self.ending = False
        self.locks: dict[Key, None] = {}
        self.listens: set[str] = set()
        self.connection: FakeConnection | None = None

    @override
    def __hash__(self) -> int:
        return self.number

    @override
    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def node(self) -> str:
        """Whose it is, by its application name."""
        return self.name.split("/")[1] if "/" in self.name else ""

    @property
    def role(self) -> str:
        """What it does, by its application name."""
        return self.name.split("/")[-1]

    @property
    def mark(self) -> str:
        """Which boot's it is."""
        return self.name.split("/")[2] if "/" in self.name else ""


class Latency:
    """How long things take, drawn. Many short times are equal, so that many things happen at once."""

    _STEPS = (0.0, 0.0005, 0.0005, 0.0005, 0.001, 0.001, 0.002, 0.002, 0.005, 0.02)

    def __init__(self, random: Random, slow: float) -> None:
        self._random = random
        self._slow = slow

    def calm(self) -> None:
        """Nothing takes long any more."""
        self._slow = 0.0

    def statement(self) -> float:
        """One way, or the work of one statement."""
        if self._random.random() < self._slow:
            return self._random.uniform(0.02, 0.4)
        return self._STEPS[int(self._random.random() * 10)]

    def flush(self) -> float:
        """The disk, and the standby servers that have to confirm."""
        draw = self._random.random()
        if draw < self._slow:
            return self._random.uniform(1.0, 4.0)
        if draw < self._slow * 4:
            return self._random.uniform(0.05, 1.0)
        return 0.001 + self._STEPS[int(self._random.random() * 10)]


class Store:
    """The tables as committed, the sessions, and the switches that break things."""

    def __init__(
        self,
        loop: SimulationLoop,
        random: Random,
        latency: Latency,
        violate: Callable[[str], None],
    ) -> None:
        self.loop = loop
        self.random = random
        self.latency = latency
        self.violate = violate
        self.down = False
        self.held_back = False
        """Whether anything was ever set aside for a person."""
        self.statements = 0
        self.breaks: dict[int, bool] = {}
        """Statement number -> whether it runs before its connection breaks."""
        self.commit_breaks: dict[str, bool] = {}
        """Likewise for the next commit of a connection of this role."""
        self.tables: dict[str, dict[Any, Any]] = {
            name: {}
            for name in (
                "node", "shard", "tenant", "endpoint", "subscription", "event_type", "event", "owed", "attempt",
                "dead_letter", "ledger", "producer", "producer_frame", "idempotency", "settled",
            )
        }  # fmt: skip
        self.tables["shard"].update({number: ShardRow() for number in range(SHARDS)})
        self.sessions: list[Session] = []
        self.locks: dict[Key, Lock] = {}
        self._numbers = 0
        self._serial = 0
        # Commits since the last flush, in the order of the write-ahead log: (what undoes it, None for one in its flush).
        self._unflushed: list[tuple[Transaction, list[tuple[str, Any, Any]] | None]] = []
        self._flush_planned = False

    # Time and looks, for the world.

    def now(self) -> float:
        """Seconds of the world's time."""
        return self.loop.time()

    def now_us(self) -> int:
        """Microseconds since 1970 by the database's clock."""
        return START_US + round(self.loop.time() * 1e6)

    def is_durable(self, table: str, key: Any) -> bool:
        """Whether a row would still be there after a crash of the database."""
        return key in self.tables[table] and not any(
            (table, key) in transaction.writes for transaction, _ in self._unflushed
        )

    def serial(self) -> int:
        """A number for a row that has no key."""
        self._serial += 1
        return self._serial

    # Connections.

    async def connect(self, name: str, life: Life | None) -> FakeConnection:
        """Open a connection; raises OSError while the database is away."""
        if self.loop.is_closed():
            raise Vanished
        await asyncio.sleep(self.latency.statement())
        if self.down:
            raise ConnectionRefusedError(111, "the database is away")
        self._numbers += 1
        session = Session(self, name, life, self._numbers)
        session.connection = FakeConnection(self, session)
        self.sessions.append(session)
        return session.connection

    def disconnect(self, life: Life) -> None:
        """A process is gone: its backends notice, sooner or later; what was sent before may still run."""
        for session in list(self.sessions):
            if session.life is life and not session.ending:
                late = 5.0 if self.random.random() < 0.1 else 0.05
                self.loop.call_later(
                    self.random.uniform(0.0, late), self.end, session, context=self.loop.outside
                )

    def terminate(self, session: Session) -> None:
        """As pg_terminate_backend: the backend ends soon, though not in the middle of a flush."""
        if not session.ended and not session.ending:
            session.ending = True
            self.loop.call_later(
                self.latency.statement(), self.end, session, context=self.loop.outside
            )

    def end(self, session: Session) -> None:
        """A backend ends: its transaction is rolled back, its client told."""
        if session.ended:
            return
        if session.flushing:
            session.ending = True
            return
        session.ended = True
        self.sessions.remove(session)
        self.release(session)
        if session.connection is not None:
            session.connection.backend_ended()

    def crash(self, seconds: float) -> None:
        """The database restarts: connections end, commits that were not flushed are taken back; some had reached the disk."""
        survivors = self.random.randint(0, len(self._unflushed))
        lost = self._unflushed[survivors:]
        flushed = [t for t, undo in self._unflushed[:survivors] if undo is None]
        self._unflushed.clear()
        for _, undo in reversed(lost):
            if undo is not None:
                for table, key, before in reversed(undo):
                    self._set(table, key, before)
        for transaction in flushed:
            self._apply(transaction)
        self.loop.note("database crash", (len(lost), len(flushed)))
        self.down = True
        for session in list(self.sessions):
            session.flushing = False
            self.end(session)
        self.locks.clear()
        self.loop.call_later(seconds, self._up, context=self.loop.outside)

    def _up(self) -> None:
        self.down = False
        self.loop.note("database up")

    # Locks.

    def acquire(
        self, session: Session, keys: Iterable[tuple[Key, bool]], then: Callable[[], None]
    ) -> None:
        """Take locks one after the other, (key, exclusive), then go on."""
        rest = iter(keys)

        def step() -> None:
            if session.ended:
                return
            for key, exclusive in rest:
                lock = self.locks.get(key)
                if lock is None:
                    lock = self.locks[key] = Lock()
                if not self._grant(lock, session, exclusive):
                    lock.waiting.append((session, exclusive, step_after(key, exclusive)))
                    return
                session.locks[key] = None
            then()

        def step_after(key: Key, exclusive: bool) -> Callable[[], None]:
            def granted() -> None:
                session.locks[key] = None
                step()

            return granted

        step()

    @staticmethod
    def _grant(lock: Lock, session: Session, exclusive: bool, *, queued: bool = False) -> bool:
        if lock.exclusive is session:
            return True
        if exclusive:
            if lock.exclusive is None and not (lock.shared.keys() - {session}):
                lock.exclusive = session
                return True
            return False
        if session in lock.shared:
            return True
        if lock.exclusive is None and (queued or not lock.waiting):
            lock.shared[session] = None
            return True
        return False

    def release(self, session: Session) -> None:
        """End a session's transaction as far as others see it: its locks go."""
        session.transaction = None
        held = list(session.locks)
        session.locks.clear()
        woken: list[Callable[[], None]] = []
        for key in held:
            lock = self.locks.get(key)
            if lock is None:
                continue
            if lock.exclusive is session:
                lock.exclusive = None
            lock.shared.pop(session, None)
            while lock.waiting:
                waiter, exclusive, go_on = lock.waiting[0]
                if waiter.ended:
                    lock.waiting.popleft()
                elif self._grant(lock, waiter, exclusive, queued=True):
                    lock.waiting.popleft()
                    woken.append(go_on)
                else:
                    break
            if lock.exclusive is None and not lock.shared and not lock.waiting:
                del self.locks[key]
        for go_on in woken:
            go_on()

    # Transactions.

    def begin(self, session: Session, *, explicit: bool) -> Transaction:
        """The session's transaction; a new one where there is none."""
        if session.transaction is None:
            session.transaction = Transaction(self.now(), explicit)
        return session.transaction

    def commit(self, session: Session, then: Callable[[], None]) -> None:
        """Commit, then go on."""
        transaction = session.transaction
        if transaction is None or not transaction.writes:
            self.release(session)
            self._notify(transaction)
            then()
            return
        if not session.durable:
            undo = self._apply(transaction)
            self._unflushed.append((transaction, undo))
            if not self._flush_planned:
                self._flush_planned = True
                self.loop.call_later(
                    self.random.uniform(0.1, 0.6), self._flush, context=self.loop.outside
                )
            self.release(session)
            self._notify(transaction)
            then()
            return
        session.flushing = True
        self._unflushed.append((transaction, None))
        self.loop.call_later(
            self.latency.flush(),
            self._flushed,
            session,
            transaction,
            then,
            context=self.loop.outside,
        )

    def _flushed(
        self, session: Session, transaction: Transaction, then: Callable[[], None]
    ) -> None:
        place = next(
            (i for i, (each, _) in enumerate(self._unflushed) if each is transaction), None
        )
        if place is None:
            return  # the database crashed in between
        # One flush makes durable whatever stands before it in the log. Others that wait for theirs go on waiting.
        self._unflushed = [
            entry
            for i, entry in enumerate(self._unflushed)
            if i > place or (i < place and entry[1] is None)
        ]
        self._apply(transaction)
        session.flushing = False
        self.release(session)
        self._notify(transaction)
        then()
        if session.ending:
            self.end(session)

    def _notify(self, transaction: Transaction | None) -> None:
        """Tell those who listen, once it is committed."""
        if transaction is None or not transaction.channels:
            return
        for session in self.sessions:
            if session.connection is not None:
                for channel in sorted(transaction.channels & session.listens):
                    session.connection.notified(channel)

    def _flush(self) -> None:
        self._flush_planned = False
        self._unflushed = [entry for entry in self._unflushed if entry[1] is None]

    def _apply(self, transaction: Transaction) -> list[tuple[str, Any, Any]]:
        """Make a transaction's writes visible; returns what undoes them."""
        undo = []
        shards = self.tables["shard"]
        for (table, key), value in transaction.writes.items():
            if table in FENCED_TABLES:
                shard = _shard_of(table, key)
                epoch = transaction.fences.get(shard)
                if shard in transaction.exclusive:
                    pass  # nobody else can be in the middle of anything
                elif epoch is None:
                    self.violate(f"a write to {table} without the fence of shard {shard}")
                elif shards[shard].epoch != epoch:
                    self.violate(
                        f"a write to {table} under epoch {epoch} of shard {shard}, whose epoch is"
                        f" {shards[shard].epoch}"
                    )
            undo.append((table, key, self.tables[table].get(key, MISSING)))
            self._set(table, key, value)
        return undo

    def _set(self, table: str, key: Any, value: Any) -> None:
        if value is MISSING:
            self.tables[table].pop(key, None)
        else:
            self.tables[table][key] = value

    def visible(self, session: Session, table: str) -> dict[Any, Any]:
        """A table as a statement of this session sees it."""
        committed = self.tables[table]
        transaction = session.transaction
        if transaction is None:
            return committed
        if transaction.snapshot is not None and table in transaction.snapshot:
            return transaction.snapshot[table]
        mine = {key: value for (name, key), value in transaction.writes.items() if name == table}
        if not mine:
            return committed
        merged = {**committed, **mine}
        return {key: value for key, value in merged.items() if value is not MISSING}

    # Statements.

    def receive(self, session: Session, ask: Ask) -> None:
        """A statement was sent."""
        self.loop.call_later(
            self.latency.statement(), self._arrived, session, ask, context=self.loop.outside
        )

    def _arrived(self, session: Session, ask: Ask) -> None:
        if session.ended or ask.cancelled:
            if not session.ended:
                self._answer(ask, error=asyncpg.QueryCanceledError("cancelled by its client"))
            return
        self.statements += 1
        breaking = self.breaks.pop(self.statements, None)
        if breaking is None and self.commit_breaks and ask.name == "commit":
            breaking = self.commit_breaks.pop(session.role, None)
        self.loop.note("ask", (session.name, ask.name))
        if breaking is not None:
            self.loop.note("break", (session.name, ask.name, breaking))
            if not breaking:
                self.end(session)
                return
            # It runs, and nobody hears of it.
            ask.lost = True
        try:
            self._perform(session, ask)
        except asyncpg.PostgresError as error:
            self._failed(session, ask, error)

    def _perform(self, session: Session, ask: Ask) -> None:
        name = ask.name
        if name == "begin" and session.transaction is not None:
            session.transaction.savepoints.append(dict(session.transaction.writes))
            self._answer(ask, "SAVEPOINT")
        elif (
            name in ("commit", "rollback")
            and session.transaction
            and session.transaction.savepoints
        ):
            before = session.transaction.savepoints.pop()
            if name == "rollback":
                session.transaction.writes = before
                session.transaction.failed = False
            self._answer(ask, "RELEASE")
        elif name == "begin":
            transaction = self.begin(session, explicit=True)
            transaction.snapshots = bool(ask.args and ask.args[0])
            self._answer(ask, "BEGIN")
        elif name == "rollback":
            self.release(session)
            self._answer(ask, "ROLLBACK")
        elif name == "commit":
            if session.transaction is not None and session.transaction.failed:
                self.release(session)
                self._answer(ask, "ROLLBACK")
            else:
                self.loop.note("commit", session.name)
                self.commit(session, lambda: self._committed(session, ask, "COMMIT"))
        elif name == "asynchronous":
            session.durable = False
            self._answer(ask, "SET")
        else:
            if session.transaction is not None and session.transaction.failed:
                raise asyncpg.InFailedSQLTransactionError("the transaction is aborted")
            statement = STATEMENTS[name]
            if name == "fence":  # also where it comes with its BEGIN
                self.begin(session, explicit=True)
            keys = statement.locks(self, session, *ask.args) if statement.locks else ()
            self.acquire(session, keys, lambda: self._run(session, ask, statement))

    def _run(self, session: Session, ask: Ask, statement: Statement) -> None:
        try:
            implicit = session.transaction is None
            transaction = self.begin(session, explicit=not implicit)
            if transaction.snapshots and transaction.snapshot is None:
                transaction.snapshot = {name: dict(self.tables[name]) for name in CONFIGURATION}
            result = statement.run(self, session, *ask.args)
        except asyncpg.PostgresError as error:
            self._failed(session, ask, error)
            return
        if transaction.explicit:
            self._answer(ask, result)
        else:
            self.commit(session, lambda: self._committed(session, ask, result))

    def _committed(self, session: Session, ask: Ask, result: Any) -> None:
        self._answer(ask, result)

    def _failed(self, session: Session, ask: Ask, error: asyncpg.PostgresError) -> None:
        transaction = session.transaction
        if transaction is not None and transaction.explicit:
            transaction.failed = True
        else:
            self.release(session)
        self.loop.note("error", (session.name, ask.name, type(error).__name__))
        self._answer(ask, error=error)

    def _answer(self, ask: Ask, result: Any = None, error: Exception | None = None) -> None:
        if ask.lost:
            assert ask.session is not None
            self.end(ask.session)
            return
        self.loop.call_later(
            self.latency.statement(), ask.settle, result, error, context=self.loop.outside
        )


class Ask:
    """One statement on its way, and the client that waits for it."""

    __slots__ = ("args", "cancelled", "done", "lost", "name", "reply", "session")

    def __init__(
        self, session: Session, name: str, args: tuple[Any, ...], reply: asyncio.Future[Any]
    ) -> None:
        self.session: Session | None = session
        self.name = name
        self.args = args
        self.reply = reply
        self.cancelled = False
        self.lost = False
        self.done = False

    def settle(self, result: Any, error: Exception | None) -> None:
        """The answer has come."""
        self.done = True
        if self.reply.done():
            return
        if error is not None:
            self.reply.set_exception(error)
        else:
            self.reply.set_result(result)


class FakeConnection:
    """What the server's code holds: the methods of the driver's connection that storage and the stages call."""

    def __init__(self, store: Store, session: Session) -> None:
        self._store = store
        self._session = session
        self._closed = False
        self._asking: Ask | None = None
        self._listeners: list[Callable[[Any], None]] = []
        self._told = False
        self._heard: dict[str, Callable[..., None]] = {}

    async def execute(self, text: str, *args: Any) -> str:
        """Run a statement; its status."""
        result = await self._ask(*_named(text, args))
        return result if isinstance(result, str) else "OK"

    async def executemany(self, text: str, args: Iterable[Sequence[Any]]) -> None:
        """Run a statement for each of these arguments: all of them in one transaction, or none."""
        await self._ask("many", (_named(text, ())[0], [tuple(each) for each in args]))

    async def fetch(self, text: str, *args: Any) -> list[Any]:
        """All rows."""
        rows: list[Any] = await self._ask(*_named(text, args))
        return rows

    async def fetchrow(self, text: str, *args: Any) -> Any:
        """The first row, None for none."""
        rows = await self._ask(*_named(text, args))
        return rows[0] if rows else None

    async def fetchval(self, text: str, *args: Any) -> Any:
        """The first column of the first row, None for none."""
        rows = await self._ask(*_named(text, args))
        return rows[0][0] if rows else None

    async def cursor(self, text: str, *args: Any) -> FakeCursor:
        """Declare a cursor; the transaction it lives in sees what it saw then."""
        return FakeCursor(self, await self.fetch(text, *args))

    async def copy_records_to_table(
        self, table: str, *, records: Iterable[Sequence[Any]], columns: Sequence[str]
    ) -> str:
        """COPY of rows."""
        await self._ask("copy", (table, tuple(columns), [tuple(record) for record in records]))
        return "COPY"

    async def copy_to_table(
        self,
        table: str,
        *,
        source: AsyncIterable[bytes],
        columns: Sequence[str],
        format: str,  # noqa: A002
    ) -> str:
        """COPY of the binary form, as pieces of it come."""
        assert format == "binary"
        data = b"".join([piece async for piece in source])
        await self._ask("copy", (table, tuple(columns), data))
        return "COPY"

    def transaction(self, *, isolation: str = "", readonly: bool = False) -> FakeTransaction:
        """A block of statements that are committed together."""
        return FakeTransaction(self, snapshots=isolation == "repeatable_read")

    def is_closed(self) -> bool:
        """Whether it can be used no more."""
        return self._closed

    def terminate(self) -> None:
        """Cut the connection, waiting for nobody."""
        life = self._session.life
        if (
            self._closed
            or (life is not None and life.state is LifeState.DEAD)
            or self._store.loop.is_closed()
        ):
            return
        store = self._store
        store.loop.call_later(
            store.latency.statement(), store.end, self._session, context=store.loop.outside
        )
        self._lost()

    async def close(self) -> None:
        """End it in order."""
        self.terminate()

    async def settled(self) -> None:
        """Wait until a statement that was cancelled has come to its end, as a pool does before it takes one back."""
        asking = self._asking
        if asking is not None and asking.cancelled and not asking.done and not self._closed:
            asking.reply = self._store.loop.create_future()
            with contextlib.suppress(asyncpg.PostgresError):
                await asking.reply

    def add_termination_listener(self, listener: Callable[[Any], None]) -> None:
        """Have a function called when the connection ends."""
        self._listeners.append(listener)

    def remove_termination_listener(self, listener: Callable[[Any], None]) -> None:
        """Have it called no more."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    async def add_listener(self, channel: str, listener: Callable[..., None]) -> None:
        """Have a function called at each notification."""
        self._heard[channel] = listener
        await self._ask("listen", (channel,))

    def notified(self, channel: str) -> None:
        """The backend was notified; word of it travels."""
        self._later(self._hear, channel)

    def backend_ended(self) -> None:
        """The backend is gone; word of it travels."""
        self._later(self._lost)

    def _later(self, callback: Callable[..., None], *args: Any) -> None:
        loop = self._store.loop
        context = loop.outside.copy()
        context.run(LIFE.set, self._session.life)
        loop.call_later(self._store.latency.statement(), callback, *args, context=context)

    def _hear(self, channel: str) -> None:
        if not self._closed:
            self._heard[channel](self, 0, channel, "")

    async def ask(self, name: str, *args: Any) -> Any:
        """One of the statements that only the world sends."""
        return await self._ask(name, args)

    def _lost(self) -> None:
        self._closed = True
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.settle(
                None,
                asyncpg.ConnectionDoesNotExistError(
                    "connection was closed in the middle of operation"
                ),
            )
        self._tell()

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            for listener in list(self._listeners):
                self._store.loop.call_soon(listener, self)

    async def _ask(self, name: str, args: tuple[Any, ...]) -> Any:
        if self._store.loop.is_closed():
            raise Vanished  # somebody's `finally`, at the end of the world
        earlier = self._asking
        if earlier is not None:
            if not earlier.cancelled:
                raise asyncpg.InterfaceError(
                    "cannot perform operation: another operation is in progress"
                )
            # The driver waits until a cancelled statement has come to its end.
            if not earlier.done:
                reply = earlier.reply = self._store.loop.create_future()
                with contextlib.suppress(asyncpg.PostgresError):
                    await reply
            if self._asking is earlier:
                self._asking = None
        if self._closed:
            raise asyncpg.InterfaceError("connection is closed")
        ask = self._asking = Ask(self._session, name, args, self._store.loop.create_future())
        self._store.receive(self._session, ask)
        try:
            result = await ask.reply
        except asyncio.CancelledError:
            ask.cancelled = True
            raise
        except BaseException:
            self._asking = None
            raise
        self._asking = None
        return result


class FakeCursor:
    """The rows of a statement, page by page."""

    def __init__(self, connection: FakeConnection, rows: list[Any]) -> None:
        self._connection = connection
        self._rows = rows

    async def fetch(self, count: int) -> list[Any]:
        """The next rows."""
        await self._connection.ask("next_page")
        page, self._rows = self._rows[:count], self._rows[count:]
        return page


class FakeTransaction:
    """`async with connection.transaction()`."""

    def __init__(self, connection: FakeConnection, *, snapshots: bool) -> None:
        self._connection = connection
        self._snapshots = snapshots

    async def __aenter__(self) -> None:
        await self._connection.ask("begin", self._snapshots)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self._connection.ask("commit" if kind is None else "rollback")


@dataclass(frozen=True, slots=True)
class Statement:
    """The twin of a statement. `locks` gives what it waits for before it looks, in order: (key, exclusive)."""

    run: Callable[..., Any]
    locks: Callable[..., Locks] | None = None


STATEMENTS: dict[str, Statement] = {}

Run = Callable[..., Any]


def statement(
    locks: Callable[..., Locks] | None = None,
) -> Callable[[Run], Run]:
    """Register a function as the twin of the statement of its name."""

    def register(run: Run) -> Run:
        STATEMENTS[run.__name__.rstrip("_")] = Statement(run, locks)
        return run

    return register


_FENCE = re.compile(
    r"BEGIN; SELECT fence\('\{([\d,]*)\}'::smallint\[\], '\{([\d,]*)\}'::bigint\[\]\)"
)
_PLAIN = {
    "BEGIN": "begin",
    "COMMIT": "commit",
    "ROLLBACK": "rollback",
    "SET synchronous_commit = off": "asynchronous",
    "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint": "clock",
    "SELECT fence($1::smallint[], $2::bigint[])": "fence",
    "SELECT pg_notify($1, '')": "notify",
}
_names: dict[str, str] = {}


def _named(text: str, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """The name of a statement, by its text."""
    name = _names.get(text)
    if name is not None:
        return name, args
    if text in _PLAIN:
        return _PLAIN[text], args
    fence_call = _FENCE.fullmatch(text)
    if fence_call:
        shards, epochs = (
            [int(each) for each in group.split(",") if each] for group in fence_call.groups()
        )
        return "fence", (shards, epochs)
    for known in STATEMENTS:
        with contextlib.suppress(FileNotFoundError):  # one of the world's own
            _names[load(known)] = known
    name = _names.get(text)
    if name is None:
        raise NotImplementedError(f"the fake store has no twin of this statement:\n{text}")
    return name, args


def _shard_of(table: str, key: Any) -> int:
    """The shard of a row, by its key."""
    if table == "event":
        return int(key[1]) & 1023
    if table == "idempotency":
        return int(key[2]) & 1023
    return int(key[0])


def fingerprint(name: str) -> int:
    """A number that changes with a statement's text."""
    return crc32(" ".join(load(name).split()).encode())
