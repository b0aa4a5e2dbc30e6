"""From domain errors to statuses."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2

from outrider.v1 import error_reason_pb2
from outrider_server.api.errors import (
    CODES,
    STATUS_BYTES_MAX,
    code_of,
    internal_status,
    status_of,
)
from outrider_server.domain import errors
from outrider_server.domain.errors import Exhausted, InvalidArgument, NotFound, OutriderError
from outrider_server.matching.filter import FilterError
from outrider_server.storage.database import StorageUnavailable


def test_every_class_of_error_has_its_code() -> None:
    classes = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, OutriderError)
    } - {OutriderError}
    assert classes == CODES.keys()
    assert len(set(CODES.values())) == len(CODES)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StorageUnavailable(), grpc.StatusCode.UNAVAILABLE),
        (FilterError("m", 2, 3), grpc.StatusCode.INVALID_ARGUMENT),
        (OutriderError("INTERNAL", "m"), grpc.StatusCode.INTERNAL),
    ],
)
def test_class_of_an_error_decides_its_code(error: OutriderError, code: grpc.StatusCode) -> None:
    assert code_of(error) is code
    assert error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{error.reason}") > 0


def test_details_are_there_where_they_help() -> None:
    status = status_of(
        InvalidArgument("INVALID_HEADER", "m", metadata={"a": "b"}, violations=[("f", "d")])
    )
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad)
    assert (info.reason, info.domain, dict(info.metadata)) == (
        "INVALID_HEADER",
        "outrider",
        {"a": "b"},
    )
    assert [(v.field, v.description) for v in bad.field_violations] == [("f", "d")]
    assert len(status.details) == 2


@pytest.mark.parametrize(("given", "seconds"), [(None, 1.0), (0.25, 0.25), (0.0, 0.0)])
def test_passing_errors_say_when_to_try_again(given: float | None, seconds: float) -> None:
    status = status_of(Exhausted("OVERLOADED", "m", retry_after_seconds=given))
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToNanoseconds() == seconds * 1e9


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tenants/a", "outrider/Tenant"),
        ("tenants/a/endpoints/b", "outrider/Endpoint"),
        ("apiKeys/b", "outrider/ApiKey"),
        ("?", "outrider/Resource"),
    ],
)
def test_named_resource_is_told_with_its_type(name: str, kind: str) -> None:
    status = status_of(NotFound("RESOURCE_NOT_FOUND", "m", metadata={"resource": name}))
    resource = error_details_pb2.ResourceInfo()
    assert status.details[1].Unpack(resource)
    assert (resource.resource_name, resource.resource_type) == (name, kind)


def test_status_fits_into_a_header_whatever_the_error_holds() -> None:
    status = status_of(
        InvalidArgument(
            "INVALID_ARGUMENT",
            "é" * 10_000,
            metadata={f"k{index}": "v" * 1000 for index in range(3)},
            violations=[("f" * 1000, "d" * 1000)] * 100,
        )
    )
    assert status.ByteSize() <= STATUS_BYTES_MAX
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert len(status.details) == 2


def test_internal_error_tells_a_reference_and_nothing_else() -> None:
    status = internal_status("abc")
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert "abc" in status.message
