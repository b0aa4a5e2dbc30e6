"""EventTypeService on a real channel and a real database."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from tests.support.api import Api, As, running
from tests.support.postgres import Database

from outrider.v1 import event_type_service_pb2 as pb
from outrider_server.api.limits import Limits
from outrider_server.storage.configuration import load_tenant


@pytest.fixture
async def acme(api: Api) -> As:
    return await api.tenant("acme")


def create(name: str, **fields: Any) -> pb.CreateEventTypeRequest:
    return pb.CreateEventTypeRequest(parent="tenants/acme", event_type_id=name, event_type=fields)


async def test_created_type_reads_back_and_is_known(api: Api, acme: As) -> None:
    fields = {
        "description": "An order",
        "schema_json": '{"type": "object"}',
        "sample_json": "[1]",
        "owning_module": "sales",
    }
    made = await acme.call("CreateEventType", create("sales_order.created", **fields))
    assert made.name == "tenants/acme/eventTypes/sales_order.created"
    assert made.schema_json == '{"type": "object"}'
    assert await acme.call("GetEventType", pb.GetEventTypeRequest(name=made.name)) == made
    async with api.database.connection() as connection:
        configuration = await load_tenant(connection, api.sealer, api.changed[-1])
    assert configuration is not None
    assert configuration.event_types == {"sales_order.created"}


@pytest.mark.parametrize(
    ("name", "fields", "reason", "field"),
    [
        ("", {}, "INVALID_EVENT_TYPE", "event_type_id"),
        ("Sales", {}, "INVALID_EVENT_TYPE", "event_type_id"),
        ("a.*", {}, "INVALID_EVENT_TYPE", "event_type_id"),
        ("a", {"schema_json": "{"}, "INVALID_ARGUMENT", "event_type.schema_json"),
        ("a", {"schema_json": "[]"}, "INVALID_ARGUMENT", "event_type.schema_json"),
        ("a", {"sample_json": "NaN"}, "INVALID_ARGUMENT", "event_type.sample_json"),
        (
            "a",
            {"sample_json": '"' + "x" * 65535 + '"'},
            "INVALID_ARGUMENT",
            "event_type.sample_json",
        ),
        ("a", {"owning_module": "x" * 129}, "INVALID_ARGUMENT", "event_type.owning_module"),
    ],
)
async def test_wrong_field_is_named_with_its_reason(
    acme: As, name: str, fields: dict[str, Any], reason: str, field: str
) -> None:
    refused = await acme.refused("CreateEventType", create(name, **fields))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (refused.reason, list(refused.violations)) == (reason, [field])


async def test_update_and_delete(api: Api, acme: As) -> None:
    made = await acme.call("CreateEventType", create("a.b", description="old", sample_json="1"))
    updated = await acme.call(
        "UpdateEventType",
        pb.UpdateEventTypeRequest(
            event_type={"name": made.name, "description": "new", "etag": made.etag},
            update_mask=FieldMask(paths=["description"]),
        ),
    )
    assert (updated.description, updated.sample_json) == ("new", "1")
    for method, request in (
        (
            "UpdateEventType",
            pb.UpdateEventTypeRequest(event_type={"name": made.name, "etag": made.etag}),
        ),
        ("DeleteEventType", pb.DeleteEventTypeRequest(name=made.name, etag=made.etag)),
    ):
        assert (await acme.refused(method, request)).reason == "ETAG_MISMATCH"
    wrong = pb.UpdateEventTypeRequest(event_type={"name": made.name, "schema_json": "nope"})
    assert list((await acme.refused("UpdateEventType", wrong)).violations) == [
        "event_type.schema_json"
    ]
    told = len(api.changed)
    _ = await acme.call("DeleteEventType", pb.DeleteEventTypeRequest(name=made.name))
    assert len(api.changed) == told + 1
    missing = await acme.refused("GetEventType", pb.GetEventTypeRequest(name=made.name))
    assert missing.code is grpc.StatusCode.NOT_FOUND
    again = await acme.call("CreateEventType", create("a.b"))
    assert again.etag != made.etag


async def test_large_types_come_in_pages_that_clients_take(acme: As) -> None:
    schema = '{"description": "' + "x" * 250_000 + '"}'
    names = [f"t{index:02}" for index in range(20)]
    for name in names:
        _ = await acme.call("CreateEventType", create(name, schema_json=schema))
    seen: list[str] = []
    token, pages = "", 0
    while True:
        page = await acme.call(
            "ListEventTypes",
            pb.ListEventTypesRequest(parent="tenants/acme", page_size=1000, page_token=token),
        )
        seen += [item.name.rpartition("/")[2] for item in page.event_types]
        pages += 1
        token = page.next_page_token
        if not token:
            break
    assert seen == names
    assert pages == 2


async def test_limit_of_event_types_is_kept(database: Database) -> None:
    async with running(database.dsn, limits=Limits(event_types_max=1)) as api:
        acme = await api.tenant("acme")
        _ = await acme.call("CreateEventType", create("a"))
        assert (await acme.refused("CreateEventType", create("a"))).reason == "LIMIT_REACHED"
