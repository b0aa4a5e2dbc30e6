from __future__ import annotations

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from outrider import errors


def failed(code: grpc.StatusCode, *details: Message) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata()
    if details:
        packed = []
        for detail in details:
            wrapped = any_pb2.Any()
            wrapped.Pack(detail)
            packed.append(wrapped)
        status = status_pb2.Status(code=code.value[0], message="m", details=packed)
        trailing.add("grpc-status-details-bin", status.SerializeToString())
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details="told")


def test_a_status_becomes_its_class_with_everything_the_details_tell() -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="url", description="not http")
    error = errors.from_rpc(
        failed(
            grpc.StatusCode.INVALID_ARGUMENT,
            error_details_pb2.ErrorInfo(reason="INVALID_ENDPOINT_URL", metadata={"line": "1"}),
            error_details_pb2.BadRequest(field_violations=[violation]),
            error_details_pb2.RetryInfo(
                retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000)
            ),
        )
    )
    assert type(error) is errors.InvalidArgument
    assert (error.reason, error.message, error.code) == (
        "INVALID_ENDPOINT_URL",
        "told",
        "INVALID_ARGUMENT",
    )
    assert error.metadata == {"line": "1"}
    assert error.violations == (("url", "not http"),)
    assert error.retry_after_seconds == 1.5
    assert error.permanent


@pytest.mark.parametrize(
    ("code", "reason", "class_", "permanent"),
    [
        ("UNAUTHENTICATED", "REVOKED_API_KEY", errors.Unauthenticated, True),
        ("PERMISSION_DENIED", "ROLE_TOO_LOW", errors.PermissionDenied, True),
        ("ABORTED", "SESSION_SUPERSEDED", errors.SessionSuperseded, True),
        ("FAILED_PRECONDITION", "SESSION_SUPERSEDED", errors.SessionSuperseded, True),
        ("ABORTED", "", errors.Aborted, False),
        ("UNAVAILABLE", "", errors.Unavailable, False),
        ("FAILED_PRECONDITION", "NOT_READY", errors.FailedPrecondition, False),
        ("FAILED_PRECONDITION", "CREDIT_EXCEEDED", errors.FailedPrecondition, False),
        ("RESOURCE_EXHAUSTED", "DISK_FULL", errors.Exhausted, False),
        ("INTERNAL", "INTERNAL", errors.CallFailed, False),
        ("UNIMPLEMENTED", "", errors.CallFailed, True),
    ],
)
def test_what_can_pass_is_told_from_what_cannot(
    code: str, reason: str, class_: type[errors.CallFailed], permanent: bool
) -> None:
    error = errors.call_failed(code, "m", reason=reason)
    assert type(error) is class_
    assert error.permanent is permanent


def test_details_that_cannot_be_read_leave_the_status() -> None:
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff"))
    error = errors.from_rpc(
        grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), trailing)
    )
    assert type(error) is errors.NotFound
    assert error.reason == ""


def test_a_copy_to_raise_equals_its_original_and_shares_no_traceback() -> None:
    original = errors.call_failed("NOT_FOUND", "gone", reason="R", metadata={"a": "b"})
    original.__cause__ = ValueError("why")
    copy = original.again()
    assert copy is not original
    assert (type(copy), str(copy), copy.metadata) == (errors.NotFound, "gone", {"a": "b"})
    assert copy.__cause__ is original.__cause__
    with pytest.raises(errors.NotFound):
        raise copy
    assert original.__traceback__ is None
