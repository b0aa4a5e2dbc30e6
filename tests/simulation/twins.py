"""The twins: what each statement of the storage room does to the fake store, and the balance.

Arguments are those of the statement's text, in order. Whoever changes a statement changes its twin (see `statements`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
from tests.simulation.store import (
    MISSING,
    NEVER,
    STATEMENTS,
    Fenced,
    Locks,
    NodeRow,
    OwedRow,
    Session,
    ShardRow,
    Store,
    rows_of,
    statement,
)

from outrider_server.storage.event_log import EVENT_COLUMNS


def _write(session: Session, table: str, key: Any, value: Any) -> None:
    assert session.transaction is not None
    session.transaction.writes[table, key] = value


@statement()
def clock(store: Store, session: Session) -> Any:
    return [(store.now_us(),)]


def fence_locks(shards: Sequence[int]) -> Locks:
    """What fence() waits for. A planted bug replaces this."""
    return [(("advisory", shard), False) for shard in sorted(shards)]


def _fences(store: Store, session: Session, shards: list[int], epochs: list[int]) -> Locks:
    return fence_locks(shards)


def _producers(
    store: Store, session: Session, names: list[str], shards: list[int], *_: Any
) -> Locks:
    return [(("producer", name, shard), True) for name, shard in zip(names, shards, strict=True)]


def _rows(kind: str) -> Callable[..., Locks]:
    """The exclusive locks of what the first argument names: one, or a list of them."""

    def locks(store: Store, session: Session, named: Any, *_: Any) -> Locks:
        return [
            ((kind, key), True) for key in (sorted(named) if isinstance(named, list) else [named])
        ]

    return locks


@statement(_fences)
def fence(store: Store, session: Session, shards: list[int], epochs: list[int]) -> Any:
    assert session.transaction is not None
    table = store.tables["shard"]
    for shard, epoch in zip(shards, epochs, strict=True):
        if table[shard].epoch != epoch:
            raise Fenced("another node took a shard over")
    session.transaction.fences.update(zip(shards, epochs, strict=True))
    return []


@statement()
def next_page(store: Store, session: Session) -> Any:
    return []


@statement()
def notify(store: Store, session: Session, channel: str) -> Any:
    assert session.transaction is not None
    session.transaction.channels.add(channel)
    return []


@statement()
def listen(store: Store, session: Session, channel: str) -> Any:
    session.listens.add(channel)
    return []


@statement()
def many(store: Store, session: Session, name: str, arguments: list[tuple[Any, ...]]) -> Any:
    for args in arguments:
        STATEMENTS[name].run(store, session, *args)
    return []


# Copies.


@statement()
def copy(
    store: Store, session: Session, table: str, columns: tuple[str, ...], records: list[Any] | bytes
) -> Any:
    if isinstance(records, bytes):
        records = list(_unpacked(records, columns))
    for record in records:
        _COPIES[table](store, session, dict(zip(columns, record, strict=True)))
    return []


def _copy_event(store: Store, session: Session, row: dict[str, Any]) -> None:
    if row["source"] == "poison":
        raise asyncpg.CharacterNotInRepertoireError("invalid byte sequence")
    key = (row["tenant"], row["sequence"])
    _unique(store, session, "event", key)
    _write(session, "event", key, row)


def _copy_idempotency(store: Store, session: Session, row: dict[str, Any]) -> None:
    _write(session, "idempotency", (row["tenant"], row["key"], row["sequence"]), True)


def _copy_frame(store: Store, session: Session, row: dict[str, Any]) -> None:
    key = (row["producer"], row["session"], row["number"], store.serial())
    _write(session, "producer_frame", key, row["ack"])


def _copy_attempt(store: Store, session: Session, row: dict[str, Any]) -> None:
    _write(session, "attempt", (row["shard"], store.serial()), row)
    if row["verdict"] == 1:
        for pair in zip(row["sequences"], row["subscriptions"], strict=True):
            _write(session, "settled", pair, 1)


def _copy_dead(store: Store, session: Session, row: dict[str, Any]) -> None:
    _write(session, "dead_letter", (row["shard"], store.serial()), row)
    for sequence in row["sequences"]:
        _write(session, "settled", (sequence, row["subscription"]), int(row["verdict"]))


def _copy_owed(store: Store, session: Session, row: dict[str, Any]) -> None:
    key = (row["shard"], row["id"])
    _unique(store, session, "owed", key)
    values = {name: row[name] for name in OwedRow._fields}
    values["sequences"] = tuple(values["sequences"])
    _write(session, "owed", key, OwedRow(**values))


def _copy_ledger(store: Store, session: Session, row: dict[str, Any]) -> None:
    key = (row["shard"], row["record_no"])
    _unique(store, session, "ledger", key)
    _write(session, "ledger", key, row)


_COPIES: dict[str, Callable[[Store, Session, dict[str, Any]], None]] = {
    "event": _copy_event,
    "idempotency": _copy_idempotency,
    "producer_frame": _copy_frame,
    "attempt": _copy_attempt,
    "dead_letter": _copy_dead,
    "owed": _copy_owed,
    "ledger": _copy_ledger,
}


def _unique(store: Store, session: Session, table: str, key: Any) -> None:
    assert session.transaction is not None
    if (
        session.transaction.writes.get((table, key), store.tables[table].get(key, MISSING))
        is not MISSING
    ):
        raise asyncpg.UniqueViolationError(f"{table} {key} exists")


def _unpacked(data: bytes, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The rows of a binary COPY."""
    place = 19
    while True:
        (fields,) = struct.unpack_from("!h", data, place)
        place += 2
        if fields < 0:
            return
        row: list[Any] = []
        for column in columns:
            (length,) = struct.unpack_from("!i", data, place)
            place += 4
            if length < 0:
                row.append(None)
                continue
            row.append(_decoded(column, data[place : place + length]))
            place += length
        yield tuple(row)


def _decoded(column: str, value: bytes) -> Any:
    if column in ("targets", "over_budget"):
        return tuple(struct.unpack_from("!i", value, at)[0] for at in range(24, len(value), 8))
    if column == "data":
        return value
    if column in ("tenant", "sequence", "shard", "time_us", "config_version"):
        return int.from_bytes(value, "big", signed=True)
    return value.decode()


# Ingest.


@statement(_producers)
def set_producers(
    store: Store,
    session: Session,
    names: list[str],
    shards: list[int],
    sessions: list[int],
    frames: list[int],
) -> Any:
    table = store.visible(session, "producer")
    done = []
    for name, shard, number, frame in zip(names, shards, sessions, frames, strict=True):
        held = table.get((name, shard))
        if held is None or held < (number, frame):
            _write(session, "producer", (name, shard), (number, frame))
            done.append((1,))
    return done


_IDEMPOTENT = rows_of("tenant", "key", "sequence")


@statement()
def find_idempotent(
    store: Store, session: Session, tenants: list[int], keys: list[UUID], since: int
) -> Any:
    wanted = set(zip(tenants, keys, strict=True))
    return [
        _IDEMPOTENT(row)
        for row in store.visible(session, "idempotency")
        if row[:2] in wanted and row[2] >= since
    ]


_PRODUCER = rows_of("shard", "session", "last_frame")


@statement()
def read_producer(store: Store, session: Session, producer: str) -> Any:
    return [
        _PRODUCER((shard, *reach))
        for (name, shard), reach in store.visible(session, "producer").items()
        if name == producer
    ]


_FRAME = rows_of("number", "ack")


@statement()
def read_frames(
    store: Store, session: Session, producer: str, number: int, frames: list[int]
) -> Any:
    return [
        _FRAME((key[2], ack))
        for key, ack in store.visible(session, "producer_frame").items()
        if key[:2] == (producer, number) and key[2] in frames
    ]


_FIRST_FRAME = rows_of("number", "at")


@statement()
def first_frame(store: Store, session: Session, producer: str, number: int) -> Any:
    numbers = [
        key[2] for key in store.visible(session, "producer_frame") if key[:2] == (producer, number)
    ]
    # No world lasts as long as answers are kept, so whatever its answer is, it came lately.
    return [_FIRST_FRAME((min(numbers), store.now_us() << 10))] if numbers else []


# Records.


@statement(_rows("shard"))
def advance_shards(
    store: Store,
    session: Session,
    shards: list[int],
    epochs: list[int],
    numbers: list[int],
    checkpoints: list[int],
) -> Any:
    table = store.visible(session, "shard")
    done = []
    for shard, epoch, number, checkpoint in zip(shards, epochs, numbers, checkpoints, strict=True):
        held: ShardRow = table[shard]
        if held.epoch == epoch and held.record_no == number - 1:
            _write(session, "shard", shard, held._replace(record_no=number, checkpoint=checkpoint))
            done.append((1,))
    return done


@statement()
def shrink_owed(
    store: Store, session: Session, shard: int, row_id: int, rest: tuple[int, ...], first: int
) -> Any:
    held = store.visible(session, "owed").get((shard, row_id))
    if held is not None:
        _write(
            session,
            "owed",
            (shard, row_id),
            held._replace(sequences=tuple(rest), first_sequence=first),
        )
    return []


@statement()
def delete_owed(store: Store, session: Session, shards: list[int], ids: list[int]) -> Any:
    table = store.visible(session, "owed")
    for key in zip(shards, ids, strict=True):
        if key in table:
            _write(session, "owed", key, MISSING)
    return []


# Owed rows and events, read.

_OWED = rows_of(
    "shard", "id", "tenant", "subscription", "first_sequence", "sequences", "attempt", "due_us"
)


def _owed_rows(rows: Iterable[OwedRow], limit: int) -> list[Any]:
    return [
        _OWED((*row[:5], list(row.sequences), row.attempt, row.due_us))
        for row in list(rows)[:limit]
    ]


@statement()
def find_backlog(
    store: Store,
    session: Session,
    subscriptions: list[int],
    held: list[int],
    limit: int,
    shard: int,
) -> Any:
    found = [
        row
        for row in store.visible(session, "owed").values()
        if row.subscription in subscriptions
        and not row.due_us
        and row.id not in held
        and row.shard == shard
    ]
    return _owed_rows(sorted(found, key=lambda row: row.first_sequence), limit)


@statement()
def find_retries(
    store: Store,
    session: Session,
    subscriptions: list[int],
    held: list[int],
    limit: int,
    now_us: int,
    shard: int,
) -> Any:
    found = [
        row
        for row in store.visible(session, "owed").values()
        if row.subscription in subscriptions
        and 0 < row.due_us <= now_us
        and row.id not in held
        and row.shard == shard
    ]
    return _owed_rows(sorted(found, key=lambda row: row.due_us), limit)


@statement()
def next_retry(
    store: Store,
    session: Session,
    subscriptions: list[int],
    held: list[int],
    shard: int,
) -> Any:
    due = [
        row.due_us
        for row in store.visible(session, "owed").values()
        if row.subscription in subscriptions
        and row.due_us
        and row.id not in held
        and row.shard == shard
    ]
    return [(min(due, default=None),)]


@statement()
def find_owed_of(store: Store, session: Session, subscription: int, limit: int, shard: int) -> Any:
    return _owed_rows(
        (
            row
            for row in store.visible(session, "owed").values()
            if row.subscription == subscription and row.shard == shard
        ),
        limit,
    )


_COUNT = rows_of("shard", "subscription", "tenant", "backlog", "retry_us")


@statement()
def count_owed(store: Store, session: Session, shards: list[int]) -> Any:
    counted: dict[tuple[int, int], list[OwedRow]] = {}
    for row in store.visible(session, "owed").values():
        if row.shard in shards:
            counted.setdefault((row.shard, row.subscription), []).append(row)
    return [
        _COUNT(
            (
                *key,
                rows[0].tenant,
                sum(not row.due_us for row in rows),
                min((row.due_us for row in rows if row.due_us), default=None),
            )
        )
        for key, rows in counted.items()
    ]


_EVENT = rows_of(*EVENT_COLUMNS)


@statement()
def load_events(
    store: Store, session: Session, tenant: int, sequences: list[int], bytes_max: int
) -> Any:
    table = store.visible(session, "event")
    rows = []
    before = 0
    for sequence in sorted(sequences):
        row = table.get((tenant, sequence))
        if row is not None and before < bytes_max:
            rows.append(_EVENT([row[column] for column in EVENT_COLUMNS]))
            before += len(row["data"])
    return rows


# Takeover.


@statement()
def read_tenants(store: Store, session: Session, shards: list[int]) -> Any:
    return [
        (row.id, shard)
        for row in store.visible(session, "tenant").values()
        for shard in (*row.shards, *row.former_shards)
        if shard in shards
    ]


_WINDOW = rows_of("sequence", "tenant", "targets")


@statement()
def read_window(
    store: Store,
    session: Session,
    tenants: list[int],
    checkpoint: int,
    shard: int,
) -> Any:
    found = sorted(
        (row["sequence"], row["tenant"], list(row["targets"]))
        for (tenant, sequence), row in store.visible(session, "event").items()
        if tenant in tenants and sequence > checkpoint and sequence & 1023 == shard
    )
    return [_WINDOW(row) for row in found]


_NAMED = rows_of("sequences", "subscriptions", "subscription")


@statement()
def read_settled(store: Store, session: Session, shard: int, first: int) -> Any:
    rows = [
        _NAMED((list(row["sequences"]), list(row["subscriptions"]), None))
        for row in store.visible(session, "attempt").values()
        if row["shard"] == shard and row["verdict"] == 1 and row["at"] >= first
    ]
    rows += [
        _NAMED((list(row["sequences"]), None, row["subscription"]))
        for row in store.visible(session, "dead_letter").values()
        if row["shard"] == shard and row["at"] >= first
    ]
    rows += [
        _NAMED((list(owed.sequences), None, owed.subscription))
        for owed in store.visible(session, "owed").values()
        if owed.shard == shard and owed.sequences[-1] >= first
    ]
    return rows


@statement()
def has_incumbent(store: Store, session: Session, node: str, boot: str, length: int) -> Any:
    held: NodeRow | None = store.tables["node"].get(node)
    found = (
        held is not None
        and held.boot != boot
        and held.expires_at > store.now()
        and any(
            s.node == node and s.mark == held.boot.replace("-", "")[:length] for s in store.sessions
        )
    )
    return [(found,)]


_NODE = rows_of("name", "address", "draining", "live", "started_at", "seconds")


@statement()
def read_nodes(store: Store, session: Session) -> Any:
    now = store.now()
    return [
        _NODE((name, row.address, row.draining, row.expires_at >= now, None, row.expires_at - now))
        for name, row in sorted(store.tables["node"].items())
    ]


_SHARD = rows_of(
    "shard",
    "epoch",
    "node",
    "released",
    "crashes",
    "held_back",
    "boot",
    "live",
    "dead",
    "expires_at",
)


@statement()
def read_shards(store: Store, session: Session) -> Any:
    found = []
    for number, row in sorted(store.tables["shard"].items()):
        holder: NodeRow | None = store.tables["node"].get(row.node)
        ends = None if holder is None else holder.expires_at
        found.append(
            _SHARD(
                (
                    number, row.epoch, row.node, row.released, row.crashes, row.held_back,
                    None if holder is None else holder.boot, ends is not None and ends >= store.now(), ends == NEVER,
                    None if ends is None else str(ends),
                )
            )
        )  # fmt: skip
    return found


@statement(_rows("node"))
def take_node(
    store: Store, session: Session, node: str, boot: str, seconds: float, address: str, again: bool
) -> Any:
    held = store.visible(session, "node").get(node)
    if held is not None and held.boot != boot and again:
        return []
    _write(session, "node", node, NodeRow(boot, address, store.now() + seconds))
    return [(node,)]


@statement(_rows("node"))
def renew_lease(
    store: Store,
    session: Session,
    node: str,
    boot: str,
    seconds: float,
    address: str,
    draining: bool,
) -> Any:
    held = store.visible(session, "node").get(node)
    if held is None or held.boot != boot:
        return []
    ends = store.now() + seconds
    _write(
        session, "node", node, held._replace(expires_at=ends, address=address, draining=draining)
    )
    return [(ends,)]


_HELD = rows_of("shard", "epoch")


@statement()
def held_shards(store: Store, session: Session, node: str) -> Any:
    return [
        _HELD((number, row.epoch))
        for number, row in store.tables["shard"].items()
        if row.node == node and not row.released
    ]


@statement(_rows("node"))
def release_node(store: Store, session: Session, node: str, boot: str) -> Any:
    held = store.visible(session, "node").get(node)
    if held is not None and held.boot == boot:
        _write(session, "node", node, held._replace(expires_at=NEVER, draining=True))
    return []


@statement(_rows("node"))
def lock_nodes(store: Store, session: Session, names: list[str]) -> Any:
    return []


@statement()
def terminate_backends(
    store: Store, session: Session, names: list[str], own: str, mark: str
) -> Any:
    nodes = store.tables["node"]
    for each in list(store.sessions):
        over = (
            each.node in names and each.node in nodes and nodes[each.node].expires_at < store.now()
        )
        if each is not session and (each.mark != mark if each.node == own else over):
            store.terminate(each)
    return []


@statement(_rows("advisory"))
def lock_shards(store: Store, session: Session, shards: list[int]) -> Any:
    assert session.transaction is not None
    session.transaction.exclusive.update(shards)
    return []


_TAKEN = rows_of("shard", "epoch", "checkpoint", "record_no", "crashes")


@statement(_rows("shard"))
def take_shards(
    store: Store,
    session: Session,
    shards: list[int],
    node: str,
    orderly: bool,
    crash_seconds: float,
) -> Any:
    taken = []
    table, nodes = store.visible(session, "shard"), store.tables["node"]
    now = store.now()
    for shard in shards:
        row: ShardRow = table[shard]
        holder: NodeRow | None = nodes.get(row.node)
        if not (row.node in (None, node) or holder is None or holder.expires_at < now):
            continue
        if row.released or (orderly and row.node == node):
            crashes = 0
        elif row.taken_at is not None and row.taken_at > now - crash_seconds:
            crashes = row.crashes + 1
        else:
            crashes = 1
        row = row._replace(
            epoch=row.epoch + 1, node=node, released=False, taken_at=now, crashes=crashes
        )
        _write(session, "shard", shard, row)
        taken.append(_TAKEN((shard, row.epoch, row.checkpoint, row.record_no, crashes)))
    store.loop.note("take", (node, [row[0] for row in taken]))
    return taken


def _due_at(store: Store, session: Session, shard: int, before_us: int | None, due_us: int) -> None:
    for key, row in store.visible(session, "owed").items():
        if row.shard == shard and before_us in (None, row.due_us):
            _write(session, "owed", key, row._replace(due_us=due_us))


@statement(_rows("shard"))
def hold_back(store: Store, session: Session, shards: list[int], due_us: int) -> Any:
    for shard in shards:
        row = store.visible(session, "shard")[shard]
        _write(session, "shard", shard, row._replace(crashes=0))
        soon = store.now_us() + 60_000_000
        for key, owing in store.visible(session, "owed").items():
            if owing.shard == shard and owing.due_us <= soon:
                _write(session, "owed", key, owing._replace(due_us=due_us))
    store.held_back = True
    store.loop.note("hold back", shards)
    return []


@statement(_rows("shard"))
def mark_held_back(store: Store, session: Session, shards: list[int]) -> Any:
    for shard in shards:
        row = store.visible(session, "shard")[shard]
        _write(session, "shard", shard, row._replace(held_back=True))
    return []


@statement()
def find_held_back(store: Store, session: Session, shard: int | None, due_us: int) -> Any:
    held = {row.shard for row in store.visible(session, "owed").values() if row.due_us == due_us}
    return [
        _NUMBER((number,))
        for number, row in sorted(store.visible(session, "shard").items())
        if shard in (None, number) and (row.held_back or number in held)
    ]


@statement(_rows("shard"))
def let_go(store: Store, session: Session, shards: list[int], due_us: int) -> Any:
    for shard in shards:
        row = store.visible(session, "shard")[shard]
        _write(session, "shard", shard, row._replace(held_back=False, crashes=0))
        _due_at(store, session, shard, due_us, 0)
    return []


@statement(_rows("shard"))
def raise_epochs(store: Store, session: Session, shards: list[int]) -> Any:
    for shard in shards:
        row = store.visible(session, "shard")[shard]
        _write(session, "shard", shard, row._replace(epoch=row.epoch + 1, released=True))
    return []


@statement()
def find_split_tenants(store: Store, session: Session, shards: list[int]) -> Any:
    return [
        _SPLIT((row.id, row.config_version))
        for row in store.visible(session, "tenant").values()
        if not row.deleted
        and len(row.shards + row.former_shards) > 1
        and not set(shards).isdisjoint(row.shards + row.former_shards)
    ]


_SPLIT = rows_of("id", "config_version")


_NUMBER = rows_of("shard")


@statement(_rows("shard"))
def release_shards(
    store: Store,
    session: Session,
    shards: list[int],
    epochs: list[int],
    targets: list[str | None],
    node: str,
) -> Any:
    given = []
    table = store.visible(session, "shard")
    for shard, epoch, target in zip(shards, epochs, targets, strict=True):
        row: ShardRow = table[shard]
        if row.epoch == epoch and row.node == node:
            _write(session, "shard", shard, row._replace(node=target, released=True))
            given.append(_NUMBER((shard,)))
            store.loop.note("give", (node, shard, target))
    return given


_HOME = rows_of("id", "name", "shards")


@statement()
def find_homes(store: Store, session: Session, names: list[str], ids: list[int]) -> Any:
    return [
        _HOME((row.id, row.name, list(row.shards)))
        for row in store.visible(session, "tenant").values()
        if not row.deleted and (row.name in names or row.id in ids)
    ]


# Configuration.

_TENANT = rows_of(
    "id", "name", "shard", "shards", "former_shards", "frozen_until", "spread_at", "display_name", "strict_types", "config_version", "now",
)  # fmt: skip


@statement()
def load_tenants(store: Store, session: Session, tenant: int | None, shards: list[int]) -> Any:
    now = datetime.fromtimestamp(store.now_us() / 1e6, UTC)
    return [
        _TENANT(
            (
                row.id,
                row.name,
                row.shards[0],
                list(row.shards),
                list(row.former_shards),
                None,
                None,
                "",
                False,
                row.config_version,
                now,
            )
        )
        for row in store.visible(session, "tenant").values()
        if not row.deleted
        and (
            row.id == tenant
            if tenant is not None
            else not set(shards).isdisjoint((*row.shards, *row.former_shards))
        )
    ]


_ENDPOINT = rows_of("id", "tenant", "name", "version", "state", "settings", "sealed")
_SUBSCRIPTION = rows_of(
    "id", "tenant", "name", "endpoint", "version", "state", "types", "filter", "filter_ast"
)


@statement()
def load_endpoints(store: Store, session: Session, tenants: list[int]) -> Any:
    rows = sorted(
        store.visible(session, "endpoint").values(), key=lambda row: (row["tenant"], row["id"])
    )
    return [
        _ENDPOINT([row[name] for name in _ENDPOINT.columns])
        for row in rows
        if not row["deleted"] and row["tenant"] in tenants
    ]


@statement()
def load_subscriptions(store: Store, session: Session, tenants: list[int]) -> Any:
    rows = sorted(
        store.visible(session, "subscription").values(), key=lambda row: (row["tenant"], row["id"])
    )
    return [
        _SUBSCRIPTION([row[name] for name in _SUBSCRIPTION.columns])
        for row in rows
        if not row["deleted"] and row["tenant"] in tenants
    ]


@statement()
def load_event_types(store: Store, session: Session, tenants: list[int]) -> Any:
    return []


@statement(_rows("tenant"))
def simulated_change(
    store: Store, session: Session, tenant: int, table: str, key: int, changes: dict[str, Any]
) -> Any:
    """A change of a tenant's configuration, under its lock, with its version raised: what management calls do."""
    row = store.visible(session, "tenant")[tenant]
    _write(session, "tenant", tenant, row._replace(config_version=row.config_version + 1))
    held = store.visible(session, table).get(key, {})
    _write(session, table, key, {**held, **changes, "version": held.get("version", 0) + 1})
    return []


# The balance.


@dataclass(slots=True)
class BalanceOf:
    """A tenant's deliveries, by what became of them."""

    matched: int = 0
    delivered: int = 0
    dead: int = 0
    cancelled: int = 0
    owed: int = 0
    window: int = 0

    def difference(self) -> int:
        """What matched and is nowhere."""
        return self.matched - self.delivered - self.dead - self.cancelled - self.owed - self.window


def balance(store: Store) -> dict[int, BalanceOf]:
    """Every tenant's balance, as balance.sql sums it up."""
    sums = {tenant: BalanceOf() for tenant in store.tables["tenant"]}
    for row in store.tables["ledger"].values():
        for place, tenant in enumerate(row["tenants"]):
            of = sums[tenant]
            of.matched += row["matched"][place]
            of.delivered += row["delivered"][place]
            of.dead += row["dead"][place]
            of.cancelled += row["cancelled"][place]
    owed: dict[tuple[int, int], None] = {}
    for row in store.tables["owed"].values():
        sums[row.tenant].owed += len(row.sequences)
        owed.update(dict.fromkeys((sequence, row.subscription) for sequence in row.sequences))
    shards, settled = store.tables["shard"], store.tables["settled"]
    for (tenant, sequence), row in store.tables["event"].items():
        if sequence > shards[sequence & 1023].checkpoint:
            for subscription in row["targets"]:
                sums[tenant].matched += 1
                pair = (sequence, subscription)
                if pair not in settled and pair not in owed:
                    sums[tenant].window += 1
    return sums
