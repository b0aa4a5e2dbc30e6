"""Under the floor of free disk publishes are refused, and what was taken is still delivered."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
import structlog
from tests.support.node import event, running, soon, until
from tests.support.postgres import Database
from tests.support.receiver import Behaviour, Receiver

from outrider_server.upkeep import disk


async def test_the_watch_tells_whether_free_disk_is_under_its_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert disk.free_bytes(tmp_path) > 0
    free, told = [10, 9, 11], []
    monkeypatch.setattr(disk, "free_bytes", lambda _: free.pop(0) if free else 100)
    watching = asyncio.ensure_future(disk.watch(tmp_path, 10, 0, told.append))
    await until(lambda: len(told) > 3)
    watching.cancel()
    assert told[:4] == [False, True, False, False]


async def test_a_file_system_that_does_not_answer_changes_nothing_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = [1, OSError(5, "Input/output error"), OSError(5, "Input/output error"), 100]
    told: list[bool] = []

    def look(_: Path) -> int:
        found = looks.pop(0) if looks else 100
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(disk, "free_bytes", look)
    with structlog.testing.capture_logs() as lines:
        watching = asyncio.ensure_future(disk.watch(tmp_path, 10, 0, told.append))
        await until(lambda: len(told) > 1)
        watching.cancel()
    assert told[:2] == [True, False]
    assert [line["event"] for line in lines] == ["disk.unknown", "disk.known_again"]
    assert "Input/output error" in lines[0]["error"]


async def test_publishes_are_refused_while_the_disk_is_full_and_deliveries_go_on(
    database: Database, tmp_path: Path
) -> None:
    async with (
        Receiver() as receiver,
        running(database.dsn, tmp_path, database_folder=tmp_path, free_disk_check_seconds=0.1) as node,
    ):  # fmt: skip
        demo = await node.tenant()
        await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
        hold = asyncio.Event()
        receiver.always("/hook", Behaviour(hold=hold))
        admission = node.node._admission
        with pytest.MonkeyPatch.context() as patch:
            async with demo.stream() as stream:
                await stream.open()
                await stream.publish(1, [event()])
                patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1))
                await until(lambda: admission.disk_full)
                await stream.send(2, [event()])
                response = await stream.answer()
                assert response.refused.retry_after.seconds == 5
                hold.set()
                await soon(receiver.wait_for_deliveries(1))
                await node.balance_when(lambda b: b.delivered == 1)
                patch.undo()
                await until(lambda: not admission.disk_full)
                await stream.publish(2, [event()])
        await soon(receiver.wait_for_deliveries(2))
