"""Records: the one transaction that settles outcomes. All of a `RecordPlan`, or nothing of it."""

from __future__ import annotations

from collections.abc import Callable

from outrider_server.domain.outcome import Verdict
from outrider_server.policy.plans import RecordPlan, ShardRecord
from outrider_server.storage.database import Connection
from outrider_server.storage.queries import load
from outrider_server.storage.shards import fence_statement

VERDICT_CANCELLED = 4
"""Stored in dead_letter.verdict beside `Verdict.DEAD`."""

_ATTEMPT_COLUMNS = (
    "at", "shard", "tenant", "endpoint", "endpoint_version", "sequences", "subscriptions", "number", "verdict",
    "status", "error", "duration_ms", "detail", "response",
)  # fmt: skip
_DEAD_COLUMNS = (
    "at", "shard", "tenant", "endpoint", "subscription", "sequences", "attempts", "verdict", "reason", "status", "detail",
)  # fmt: skip
_OWED_COLUMNS = (
    "shard", "id", "tenant", "subscription", "first_sequence", "sequences", "attempt", "due_us", "cause",
)  # fmt: skip
_LEDGER_COLUMNS = (
    "at",
    "shard",
    "record_no",
    "tenants",
    "matched",
    "delivered",
    "dead",
    "cancelled",
)


class RecordConflict(Exception):
    """A shard's record number is not the one that this node's memory continues."""


async def write(connection: Connection, plan: RecordPlan, at: Callable[[int], int]) -> None:
    """Write a plan in one transaction.

    `at` gives a shard's record time as a sequence, at or above every sequence given out so far. The order of locks:
    fences, shard rows, owed rows. Raises `RecordConflict`; on any error the caller must forget its lanes.
    """
    shards = plan.shards
    await connection.execute(fence_statement((s.shard, s.epoch) for s in shards))
    advanced = await connection.fetch(
        load("advance_shards"),
        [s.shard for s in shards],
        [s.epoch for s in shards],
        [s.record_no for s in shards],
        [s.checkpoint for s in shards],
    )
    if len(advanced) != len(shards):
        await connection.execute("ROLLBACK")
        raise RecordConflict
    times = {s.shard: at(s.shard) for s in shards}
    if plan.attempts:
        rows = [
            (
                times[a.shard], a.shard, a.tenant, a.endpoint, a.endpoint_version, a.sequences, a.subscriptions,
                a.number, a.verdict, a.status, a.error, a.duration_ms, a.detail or None, a.response or None,
            )
            for a in plan.attempts
        ]  # fmt: skip
        await connection.copy_records_to_table("attempt", records=rows, columns=_ATTEMPT_COLUMNS)
    if plan.dead_letters:
        dead = [
            (
                times[d.shard], d.shard, d.tenant, d.endpoint, d.subscription, d.sequences, d.attempts,
                VERDICT_CANCELLED if d.cancelled else Verdict.DEAD, d.reason, d.status, d.detail or None,
            )
            for d in plan.dead_letters
        ]  # fmt: skip
        await connection.copy_records_to_table("dead_letter", records=dead, columns=_DEAD_COLUMNS)
    if plan.owed_inserts:
        owed = [
            (
                o.shard,
                o.id,
                o.tenant,
                o.subscription,
                o.sequences[0],
                o.sequences,
                o.attempt,
                o.due_us,
                o.cause,
            )
            for o in plan.owed_inserts
        ]
        await connection.copy_records_to_table("owed", records=owed, columns=_OWED_COLUMNS)
    if plan.owed_updates:
        updates = sorted(
            (shard, row_id, rest, rest[0]) for shard, row_id, rest in plan.owed_updates
        )
        await connection.executemany(load("shrink_owed"), updates)
    if plan.owed_deletes:
        deletes = sorted(plan.owed_deletes)
        await connection.execute(
            load("delete_owed"),
            [shard for shard, _ in deletes],
            [row_id for _, row_id in deletes],
        )
    ledger = [
        _ledger_row(times[s.shard], s)
        for s in shards
        if s.matched or s.delivered or s.dead or s.cancelled
    ]
    if ledger:
        await connection.copy_records_to_table("ledger", records=ledger, columns=_LEDGER_COLUMNS)
    await connection.execute("COMMIT")


def _ledger_row(at: int, record: ShardRecord) -> tuple[object, ...]:
    counts = (record.matched, record.delivered, record.dead, record.cancelled)
    tenants = sorted(set().union(*counts))
    return (
        at,
        record.shard,
        record.record_no,
        tenants,
        *([c.get(t, 0) for t in tenants] for c in counts),
    )
