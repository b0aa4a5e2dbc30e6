"""What the unary Publish promises: to stubs, and to whoever types a line of grpcurl."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.api import Refusal, refusal
from tests.support.node import RunningNode, errors_of, event, running, soon, until
from tests.support.postgres import Database
from tests.support.receiver import Receiver

from outrider.v1 import ingest_service_pb2, ingest_service_pb2_grpc

GRPCURL = Path(sys.executable).parent / "grpcurl"


@pytest.fixture
async def node(database: Database, tmp_path: Path) -> AsyncIterator[RunningNode]:
    async with running(database.dsn, tmp_path) as node:
        yield node


async def refused(node: RunningNode, key: str | None, tenant: str, *events: Any) -> Refusal:
    metadata = () if key is None else (("authorization", f"Bearer {key}"),)
    return await refusal(
        ingest_service_pb2_grpc.IngestServiceStub(node.channel).Publish(
            ingest_service_pb2.PublishRequest(parent=tenant, events=events),
            metadata=metadata,
            timeout=10,
        )
    )


async def test_each_event_gets_its_result_in_order(node: RunningNode) -> None:
    demo = await node.tenant()
    first = await demo.publish(event(idempotency_key="k", data=b"0"))
    results = await demo.publish(
        event(data=b"1"),
        event(data=b"{"),
        event(data="2"),
        event(idempotency_key="k", data=b"3"),
        event(idempotency_key="k2", data=b"4", tenant="demo"),
        event(idempotency_key="k2", data=b"5"),
        event(data=b""),
    )
    assert [r.index for r in results] == list(range(7))
    assert errors_of(results) == {1: "PAYLOAD_NOT_JSON", 6: "EMPTY_PAYLOAD"}
    assert results[3].id == first[0].id
    assert results[5].id == results[4].id
    assert [r.duplicate for r in results] == [False, False, False, True, False, True, False]
    stored = await node.stored()
    assert {id_: row["data"] for id_, row in stored.items()} == {
        first[0].id: b"0",
        results[0].id: b"1",
        results[2].id: b"2",
        results[4].id: b"4",
    }
    assert errors_of(await demo.publish(event(data=b"{"))) == {0: "PAYLOAD_NOT_JSON"}


async def test_a_call_that_is_wrong_itself_stores_nothing(node: RunningNode) -> None:
    demo, _ = await node.tenant("demo"), await node.tenant("other")
    half = event(data=b'"%b"' % (b"x" * 600_000))
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for events, code, reason in (
        ((), invalid, "INVALID_ARGUMENT"),
        ([event()] * 501, invalid, "INVALID_ARGUMENT"),
        ((half, half), invalid, "FRAME_TOO_LARGE"),
        ((event(), event(tenant="other")), invalid, "INVALID_ARGUMENT"),
    ):
        error = await refused(node, demo.publisher, "tenants/demo", *events)
        assert (error.code, error.reason) == (code, reason)
    for key, tenant, code, reason in (
        (demo.publisher, "demo", invalid, "INVALID_ARGUMENT"),
        (demo.publisher, "tenants/other", grpc.StatusCode.PERMISSION_DENIED, "TENANT_OUT_OF_SCOPE"),
        (demo.publisher, "tenants/nobody", grpc.StatusCode.PERMISSION_DENIED, "TENANT_OUT_OF_SCOPE"),
        (node.admin_key, "tenants/nobody", grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND"),
        (None, "tenants/demo", grpc.StatusCode.UNAUTHENTICATED, "MISSING_API_KEY"),
        ("ork_x", "tenants/demo", grpc.StatusCode.UNAUTHENTICATED, "INVALID_API_KEY"),
    ):  # fmt: skip
        error = await refused(node, key, tenant, event())
        assert (error.code, error.reason) == (code, reason)
    assert await node.stored() == {}
    assert node.node._admission.room.taken == 0


async def test_one_event_of_ten_mebibytes_is_taken(node: RunningNode) -> None:
    demo = await node.tenant()
    most = 10 * 1024 * 1024
    (result,) = await demo.publish(event(data=b'"%b"' % (b"x" * (most - 2))))
    assert len((await node.stored())[result.id]["data"]) == most


async def test_a_passing_reason_tells_when_to_come_again(node: RunningNode) -> None:
    demo = await node.tenant()
    admission = node.node._admission
    admission.disk_full = True
    error = await refused(node, demo.publisher, "tenants/demo", event())
    assert (error.code, error.reason, error.retry_seconds) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "DISK_FULL",
        5.0,
    )
    admission.disk_full = False
    tenure, admission.tenure = admission.tenure, None
    error = await refused(node, demo.publisher, "tenants/demo", event())
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
    assert error.retry_seconds
    admission.tenure = tenure
    assert len(await demo.publish(event())) == 1


async def test_calls_wait_for_room_and_a_cancelled_one_gives_its_place_up(
    node: RunningNode,
) -> None:
    demo = await node.tenant()
    room = node.node._admission.room
    everything = 10**12
    await room.take(everything)
    calls = [asyncio.ensure_future(demo.publish(event(data=b"%d" % n))) for n in range(3)]
    await until(lambda: len(room._waiting) == 3)
    calls[0].cancel()
    await until(lambda: len(room._waiting) == 2)
    assert await node.stored() == {}
    room.give_back(everything)
    await soon(asyncio.gather(*calls[1:]))
    assert len(await node.stored()) == 2
    assert room.taken == 0


async def grpcurl(node: RunningNode, *arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        GRPCURL,
        "-plaintext",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await soon(process.communicate())
    assert process.returncode is not None
    return process.returncode, output.decode()


@pytest.mark.skipif(not GRPCURL.exists(), reason="no grpcurl in this environment")
async def test_a_typed_line_publishes_json_text_and_it_arrives(node: RunningNode) -> None:
    async with Receiver() as receiver:
        demo = await node.tenant()
        await demo.subscription(
            await demo.endpoint("hook", receiver.url("/hook")), filter_="order.total > 100"
        )
        address = f"127.0.0.1:{node.node.port}"
        method = "outrider.v1.IngestService/Publish"
        data = '{"order":{"total":  100.5, "id": 12345678901234567890}}'
        events = [
            {"type": "sales.made", "data_json": data},
            {"type": "sales.made", "data_json": '{"order": {"total": 1}}'},
            {"type": "sales.made", "data_json": "{"},
        ]
        request = json.dumps({"parent": "tenants/demo", "events": events})
        key = ("-H", f"authorization: Bearer {demo.publisher}")
        code, output = await grpcurl(node, *key, "-d", request, address, method)
        assert code == 0, output
        results = json.loads(output)["results"]
        assert int(results[0]["id"]) in await node.stored()
        assert results[2]["error"]["reason"] == "ERROR_REASON_PAYLOAD_NOT_JSON"
        await soon(receiver.wait_for_deliveries(1))
        assert receiver.requests[0].body.endswith(b'"data":' + data.encode() + b"}")
        assert receiver.requests[0].deliveries[0]["event_id"] == results[0]["id"]
        code, output = await grpcurl(node, "-d", request, address, method)
        assert code != 0
        assert "MISSING_API_KEY" in output
