"""Faults planted into the code under simulation, to see that the oracle finds them. Nothing of it is in the server.

Each plant replaces a function or two of the server (or, where the rule lives in SQL, of the fake store) while its block runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from tests.simulation import node as simulated
from tests.simulation import twins
from tests.simulation.replacing import replaced

from outrider_server.domain.frame import FrameResult
from outrider_server.pipeline import persist, tenure
from outrider_server.pipeline.persist import Persister
from outrider_server.pipeline.record import Recorder
from outrider_server.policy.checkpoint import Window
from outrider_server.storage import configuration, owed, records, shards
from outrider_server.storage.database import is_unavailable
from outrider_server.storage.queries import load


@contextmanager
def ack_before_commit() -> Iterator[None]:
    """Frames are answered when their events have ids, before anything is durable."""
    assign = Persister._assign

    def answering(self: Persister, group: list[Any], assigned: list[Any]) -> None:
        assign(self, group, assigned)
        for frame in group:
            persist._answer(frame, frame.result)

    with replaced(Persister, "_assign", answering):
        yield


@contextmanager
def checkpoint_past_open() -> Iterator[None]:
    """The checkpoint passes every committed event, whether its deliveries have ended or not."""

    def pass_all(self: Window, matched: dict[int, int]) -> bool:
        moved = False
        while self._events and self._events[0].deliveries is not None:
            event = self._events.popleft()
            self.checkpoint = event.sequence
            moved = True
            if event.targets:
                matched[event.tenant] = matched.get(event.tenant, 0) + len(event.targets)
        return moved

    with replaced(Window, "pass_closed", pass_all):
        yield


@contextmanager
def plain_read_fence() -> Iterator[None]:
    """The fence reads the epoch and holds no lock: a takeover does not wait for who has read it."""
    with replaced(twins, "fence_locks", lambda *_: []):
        yield


@contextmanager
def memory_after_lost_record() -> Iterator[None]:
    """A record whose connection broke is taken for written: the number is read again, and memory goes on."""
    write, write_record = records.write, Recorder.record
    connects: dict[int, Any] = {}
    make = tenure.open_tenure

    def opening(parts: Any, *args: Any, **kwargs: Any) -> Any:
        connects[0] = parts.connect
        return make(parts, *args, **kwargs)

    async def recording(self: Recorder) -> bool:
        connects[1] = self
        return await write_record(self)

    async def keeping(connection: Any, plan: Any, at: Callable[[int], int]) -> None:
        try:
            await write(connection, plan, at)
        except Exception as error:
            if not is_unavailable(error):
                raise
            recorder = connects[1]
            recorder._connection = await connects[0]("record", durable=False)
            for each in plan.shards:
                held = connection._store.tables["shard"][each.shard]
                recorder._obligations.windows[each.shard].record_no = held.record_no

    async def never(connections: Iterable[Any]) -> None:
        await asyncio.Event().wait()

    with ExitStack() as stack:
        stack.enter_context(replaced(records, "write", keeping))
        stack.enter_context(replaced(Recorder, "record", recording))
        stack.enter_context(replaced(simulated, "open_tenure", opening))
        stack.enter_context(replaced(tenure, "until_lost", never))
        yield


@contextmanager
def owed_apart_from_checkpoint() -> Iterator[None]:
    """The checkpoint moves in one transaction, the owed rows it relies on are written in the next."""
    write = records.write

    async def parted(connection: Any, plan: Any, at: Callable[[int], int]) -> None:
        inserts, plan.owed_inserts = plan.owed_inserts, []
        updates, plan.owed_updates = plan.owed_updates, []
        deletes, plan.owed_deletes = plan.owed_deletes, []
        later = {(o.shard, o.id) for o in inserts}
        await write(connection, plan, at)
        plan.owed_inserts = inserts
        plan.owed_updates = [u for u in updates if u[:2] not in later]
        plan.owed_deletes = deletes
        if not (inserts or updates or deletes):
            return
        await connection.execute(shards.fence_statement((s.shard, s.epoch) for s in plan.shards))
        rows = [
            (o.shard, o.id, o.tenant, o.subscription, o.sequences[0], o.sequences, o.attempt, o.due_us, o.cause)
            for o in inserts
        ]  # fmt: skip
        await connection.copy_records_to_table("owed", records=rows, columns=records._OWED_COLUMNS)
        for shard, row_id, rest in updates:
            await connection.execute(load("shrink_owed"), shard, row_id, rest, rest[0])
        await connection.execute(
            load("delete_owed"), [s for s, _ in deletes], [number for _, number in deletes]
        )
        await connection.execute("COMMIT")

    with replaced(records, "write", parted):
        yield


@contextmanager
def claim_deletes() -> Iterator[None]:
    """Rows are deleted when they are claimed, not when their deliveries have ended."""
    backlog, retries = owed.find_backlog, owed.find_retries

    async def delete(connection: Any, rows: list[Any]) -> None:
        if rows:
            held = connection._store.tables["shard"]
            pairs = sorted({(row.shard, held[row.shard].epoch) for row in rows})
            await connection.execute(shards.fence_statement(pairs))
            await connection.execute(
                load("delete_owed"), [row.shard for row in rows], [row.id for row in rows]
            )
            await connection.execute("COMMIT")

    async def find_backlog(connection: Any, *args: Any) -> Any:
        found = await backlog(connection, *args)
        await delete(connection, found[0])
        return found

    async def find_retries(connection: Any, *args: Any) -> Any:
        found = await retries(connection, *args)
        await delete(connection, found[0])
        return found

    with ExitStack() as stack:
        stack.enter_context(replaced(owed, "find_backlog", find_backlog))
        stack.enter_context(replaced(owed, "find_retries", find_retries))
        yield


@contextmanager
def older_configuration() -> Iterator[None]:
    """A takeover uses the configuration that was read at the first start."""
    load = configuration.load_shards
    first: dict[int, Any] = {}

    async def stale(*args: Any) -> Any:
        return [first.setdefault(each.tenant.id, each) for each in await load(*args)]

    with replaced(configuration, "load_shards", stale):
        yield


@contextmanager
def swallowed_cancellation() -> Iterator[None]:
    """A transaction of the persister that is cancelled goes on as if it had only failed."""
    write = Persister._write

    async def swallowing(self: Persister, *args: Any, **kwargs: Any) -> None:
        with suppress(asyncio.CancelledError):
            await write(self, *args, **kwargs)

    with replaced(Persister, "_write", swallowing):
        yield


@contextmanager
def duplicate_before_commit() -> Iterator[None]:
    """The second copy of a frame in one group is answered at once, before its first copy is durable."""
    without = Persister._without_duplicates

    async def hasty(self: Persister, *args: Any) -> Any:
        fresh, again = await without(self, *args)
        for frame, _ in again:
            persist._answer(frame, FrameResult(duplicate=True))
        return fresh, []

    with replaced(Persister, "_without_duplicates", hasty):
        yield


PLANTS: dict[str, Callable[[], Any]] = {
    plant.__name__: plant
    for plant in (
        ack_before_commit,
        checkpoint_past_open,
        plain_read_fence,
        memory_after_lost_record,
        owed_apart_from_checkpoint,
        claim_deletes,
        older_configuration,
        swallowed_cancellation,
        duplicate_before_commit,
    )
}
