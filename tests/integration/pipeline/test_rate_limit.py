"""A rate limit holds from end to end: over time, over a restart, and for its own endpoint alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from tests.support.node import event, running, soon, until
from tests.support.postgres import Database
from tests.support.receiver import Receiver

from outrider.v1 import endpoint_service_pb2

PER_SECOND = 10


class Paced:
    """Watches a path that is called at most `PER_SECOND` times a second, and never in advance."""

    def __init__(self, receiver: Receiver, path: str) -> None:
        self._receiver = receiver
        self._path = path
        self._began = time.monotonic()

    def seen(self) -> int:
        """How many have come, which must be no more than the time since the beginning allows."""
        came = len(self._receiver.on(self._path))
        # What is looked at later than it came can only seem slower.
        assert came <= (time.monotonic() - self._began) * PER_SECOND
        return came

    async def wait_for(self, count: int) -> None:
        await soon(self._receiver.wait_until(lambda: self.seen() >= count))


@pytest.mark.parametrize("mode", ["MODE_SINGLE", "MODE_BATCH"])
async def test_requests_arrive_no_faster_than_the_limit_says(
    database: Database, tmp_path: Path, receiver: Receiver, mode: str
) -> None:
    """Also with a lane that overflows; a batch is one request."""
    fields = {"mode": mode, "rate_limit": {"requests": PER_SECOND, "period": "1s"}}
    if mode == "MODE_BATCH":
        fields["batch"] = {"events_max": 2}
    async with running(database.dsn, tmp_path, lane_deliveries_max=10) as node:
        demo = await node.tenant()
        paced = await demo.endpoint("paced", receiver.url("/paced"), **fields)
        await demo.subscription(paced)
        watch = Paced(receiver, "/paced")
        await demo.publish(*[event() for _ in range(20)])
        await watch.wait_for(10 if mode == "MODE_BATCH" else 20)
        await node.balance_when(lambda b: b.delivered == 20 == b.matched)


async def test_a_restart_lets_no_more_through(
    database: Database, tmp_path: Path, receiver: Receiver
) -> None:
    """What a burst would allow after a pause is not allowed to each start anew."""
    async with running(database.dsn, tmp_path) as node:
        demo = await node.tenant()
        limit = {"requests": PER_SECOND, "period": "1s", "burst": PER_SECOND}
        paced = await demo.endpoint("paced", receiver.url("/paced"), rate_limit=limit)
        await demo.subscription(paced)
        watch = Paced(receiver, "/paced")
        await demo.publish(*[event() for _ in range(12)])
        await watch.wait_for(3)
        await node.restart()
        await watch.wait_for(6)
        await node.crash()
        await node.start()
        await watch.wait_for(12)


async def test_others_are_not_held_up_and_a_raised_limit_holds_at_once(
    database: Database, tmp_path: Path, receiver: Receiver
) -> None:
    async with running(
        database.dsn, tmp_path, requests_in_flight_max=4, lane_deliveries_max=10
    ) as node:
        demo = await node.tenant()
        slow = await demo.endpoint("slow", receiver.url("/slow"), rate_limit={"requests": 1})
        await demo.subscription(slow)
        fast = await demo.endpoint("fast", receiver.url("/fast"))
        await demo.subscription(fast, types=["sales.fast"])
        await demo.publish(*[event() for _ in range(20)])
        await demo.publish(*[event("sales.fast") for _ in range(500)])
        await soon(receiver.wait_for_deliveries(500, "/fast"))
        assert receiver.on("/slow") == []
        await until(lambda: node.tenure.deliverer.in_flight == 0)
        await demo.admin.call(
            "UpdateEndpoint",
            endpoint_service_pb2.UpdateEndpointRequest(
                endpoint={"name": slow, "rate_limit": {"requests": 60_000, "burst": 100}},
                update_mask=FieldMask(paths=["rate_limit"]),
            ),
        )
        await soon(receiver.wait_for_deliveries(520, "/slow"))
        await node.balance_when(lambda b: b.delivered == 1020 == b.matched)
