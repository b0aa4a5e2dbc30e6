"""Faults planted into a server, to see that the crash tests' oracle finds them. Nothing of it is in the server itself.

    python -m tests.support.planted ack_before_commit serve

Each plant changes one function of the process it runs in and then runs the server's own command line.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from outrider_server import __main__ as command_line
from outrider_server.domain.delivery import Cause
from outrider_server.pipeline import deliver, persist, record
from outrider_server.pipeline.persist import Persister
from outrider_server.pipeline.record import Recorder
from outrider_server.policy.checkpoint import Window
from outrider_server.storage import event_log, records

WIDER_SECONDS = 0.05
"""How long a planted gap stays open, so that a kill at any time falls into one."""


def program(name: str) -> list[str]:
    """The command that runs a server with this plant, for `Service.start`."""
    assert name in PLANTS
    return [sys.executable, "-m", "tests.support.planted", name]


def ack_before_commit() -> None:
    """Frames are answered when their events have ids, before anything is durable."""
    assign, commit = Persister._assign, event_log.commit

    def answering(self: Persister, group: list[Any], assigned: list[Any]) -> None:
        assign(self, group, assigned)
        for frame in group:
            persist._answer(frame, frame.result)

    async def late(connection: Any) -> None:
        await asyncio.sleep(WIDER_SECONDS)
        await commit(connection)

    _replace(Persister, "_assign", answering)
    _replace(event_log, "commit", late)


def checkpoint_past_open() -> None:
    """The checkpoint passes every committed event, whether its deliveries have ended or not."""

    def pass_all(self: Window, matched: dict[int, int]) -> bool:
        moved = False
        while self._events and self._events[0].deliveries is not None:
            event = self._events.popleft()
            self.checkpoint = event.sequence
            moved = True
            matched[event.tenant] = matched.get(event.tenant, 0) + len(event.targets)
        return moved

    _replace(Window, "pass_closed", pass_all)


def retries_not_owed() -> None:
    """A failed delivery is settled, but the row that stands for its retry is not written."""
    write = records.write

    async def forgetting(connection: Any, plan: Any, at: Callable[[int], int]) -> None:
        plan.owed_inserts = [row for row in plan.owed_inserts if row.cause is not Cause.RETRY]
        await write(connection, plan, at)

    _replace(records, "write", forgetting)


def late_records() -> None:
    """Outcomes are recorded each three seconds, so a crash repeats far more than the bound."""

    async def run(self: Recorder) -> None:
        while True:
            await asyncio.sleep(3.0)
            await self.record()

    _replace(record.Recorder, "run", run)


def frames_stored_again() -> None:
    """A frame that comes again after a crash is not known again."""
    commit = event_log.commit

    async def late_answer(connection: Any) -> None:
        await commit(connection)
        await asyncio.sleep(WIDER_SECONDS)

    async def none_known(connection: Any, producer: str) -> dict[int, tuple[int, int]]:
        return {}

    async def not_compared(connection: Any, rows: Any) -> None:
        return None

    _replace(event_log, "commit", late_answer)
    _replace(event_log, "read_producer", none_known)
    _replace(event_log, "set_producers", not_compared)


def ids_by_attempt() -> None:
    """The id of a delivery changes from attempt to attempt."""
    message = deliver._message

    def other(endpoint: Any, deliveries: list[Any]) -> tuple[str, bytes]:
        message_id, body = message(endpoint, deliveries)
        if deliveries[0].attempt:
            body = body.replace(b'"id":"dlv_', b'"id":"dlv_1', 1)
        return message_id, body

    _replace(deliver, "_message", other)


PLANTS: dict[str, Callable[[], None]] = {
    plant.__name__: plant
    for plant in (
        ack_before_commit,
        checkpoint_past_open,
        retries_not_owed,
        late_records,
        frames_stored_again,
        ids_by_attempt,
    )
}


def _replace(owner: Any, name: str, by: Any) -> None:
    assert hasattr(owner, name), f"{owner} has no {name} any more: plant it anew"
    setattr(owner, name, by)


def run(name: str, arguments: list[str]) -> int:
    """Plant it, then run the server's command line."""
    PLANTS[name]()
    return command_line.main(arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
