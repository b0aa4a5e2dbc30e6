"""One endpoint's trouble is its own: what goes to the others arrives while it lasts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.support.node import event, running, soon, until
from tests.support.postgres import Database
from tests.support.receiver import Behaviour, Receiver

REQUESTS_MAX = 20
EVENTS = 200


@pytest.mark.parametrize("hanging", [1, 2])
async def test_endpoints_that_never_answer_do_not_delay_one_that_does(
    database: Database, tmp_path: Path, receiver: Receiver, hanging: int
) -> None:
    """They may have more requests under way than the node starts in all, and wait with thousands before it comes."""
    never = asyncio.Event()
    async with running(
        database.dsn, tmp_path, requests_in_flight_max=REQUESTS_MAX, lane_deliveries_max=100
    ) as node:
        demo = await node.tenant()
        for number in range(hanging):
            path = f"/hangs{number}"
            receiver.always(path, Behaviour(hold=never))
            hangs = await demo.endpoint(f"hangs{number}", receiver.url(path), concurrency=1000)
            await demo.subscription(hangs)
        fast = await demo.endpoint("fast", receiver.url("/fast"), concurrency=1000)
        await demo.subscription(fast, types=["sales.fast"])
        await demo.publish(*[event() for _ in range(EVENTS)])
        # Those that hang are there first, and all lanes of an event are woken in one go.
        deliverer = node.tenure.deliverer
        await until(lambda: deliverer.in_flight >= REQUESTS_MAX // 2)
        for part in range(4):
            await demo.publish(*[event("sales.fast") for _ in range(EVENTS)])
            await soon(receiver.wait_for_deliveries((part + 1) * EVENTS, "/fast"))
            assert deliverer.in_flight <= REQUESTS_MAX
        taken = [len(receiver.on(f"/hangs{number}")) for number in range(hanging)]
        assert sum(taken) < REQUESTS_MAX
        assert not any(r.answered for r in receiver.requests if r.path != "/fast")
        # They were not put off for good either.
        never.set()
        for number in range(hanging):
            await soon(receiver.wait_for_deliveries(5 * EVENTS, f"/hangs{number}"))
        await node.balance_when(lambda b: b.delivered == (5 * hanging + 4) * EVENTS == b.matched)
