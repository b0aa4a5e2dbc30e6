"""The ledger's reader: what the database says, asked in measure, over a connection that may be lost."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import asyncpg
import pytest

from outrider_server.demo.ledger import LedgerReader, Standing, standing_of
from outrider_server.storage.database import DedicatedConnection
from outrider_server.storage.ledger import Balance

ROW = {
    "tenant": "demo",
    "matched": 10,
    "delivered": 5,
    "dead": 1,
    "cancelled": 1,
    "owed": 2,
    "window": 1,
}


class Database:
    """Answers each reading with the next of `answers`, which may be an error; a reading takes `seconds`."""

    def __init__(self, *answers: dict[str, Any] | Exception, seconds: float = 0.0) -> None:
        self.answers = list(answers)
        self.seconds = seconds
        self.now = 0.0
        self.connections = 0
        self.slept: list[float] = []

    async def connect(self) -> DedicatedConnection:
        self.connections += 1
        return cast(DedicatedConnection, self)

    def is_closed(self) -> bool:
        return False

    def terminate(self) -> None:
        pass

    async def fetch(self, _query: str) -> list[tuple[Any, ...]]:
        self.now += self.seconds
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [tuple(answer.values())]

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if not self.answers:
            raise asyncio.CancelledError

    def reader(self) -> LedgerReader:
        return LedgerReader(self.connect, "demo", lambda: self.now, self.sleep)


def test_recorded_is_all_that_ended_and_owed_all_that_did_not() -> None:
    other = Balance("other", 1, 1, 0, 0, 0, 0)
    assert standing_of([other, Balance(**ROW)], "demo") == Standing(recorded=7, owed=3, holds=True)
    assert standing_of([other], "demo") == Standing()
    assert not standing_of([Balance(**{**ROW, "matched": 11})], "demo").holds


async def test_what_was_recorded_before_the_start_does_not_count() -> None:
    reader = Database(ROW, {**ROW, "matched": 14, "delivered": 9}).reader()
    await reader.begin()
    assert reader.recorded == 0
    await reader.read()
    assert reader.recorded == 4


async def test_a_database_without_tables_yet_stands_at_zero() -> None:
    reader = Database(asyncpg.UndefinedTableError("ledger")).reader()
    await reader.begin()
    assert reader.at_start == Standing()


async def test_a_lost_connection_leaves_the_last_figures_and_is_made_again() -> None:
    database = Database(ROW, ConnectionResetError(), {**ROW, "matched": 11, "delivered": 6})
    reader = database.reader()
    with pytest.raises(asyncio.CancelledError):
        await reader.run()
    assert reader.now.recorded == 8
    assert database.connections == 2


async def test_slow_readings_are_made_less_often() -> None:
    database = Database(ROW, seconds=2.0)
    with pytest.raises(asyncio.CancelledError):
        await database.reader().run()
    assert database.slept == [20.0]
