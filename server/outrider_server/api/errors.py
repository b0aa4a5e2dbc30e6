"""One table: domain error -> gRPC status, with details that programs can read.

Every error carries an ErrorInfo with its stable reason. What nobody foresaw becomes INTERNAL: the trace goes to the
log, the caller learns a reference to it and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import (  # type: ignore[import-untyped]
    BadRequest,
    ErrorInfo,
    ResourceInfo,
    RetryInfo,
)
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

from outrider_server.domain.errors import (
    Aborted,
    AlreadyExists,
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutriderError,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)

if TYPE_CHECKING:  # generic only in its type information
    ServicerContext: TypeAlias = grpc.aio.ServicerContext[Any, Any]
else:
    ServicerContext = grpc.aio.ServicerContext

DOMAIN = "outrider"
"""The domain of every ErrorInfo: whose reasons these are."""

STATUS_BYTES_MAX = 4 * 1024
"""Most bytes of a status with its details. They travel as a header, and peers refuse more than 8 KiB of headers."""

TEXT_LENGTH_MAX = 500
RETRY_AFTER_SECONDS = 1.0

CODES: dict[type[OutriderError], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    Aborted: grpc.StatusCode.ABORTED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}

_RETRIED = frozenset({grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE})
_PACKING_BYTES = 64  # the name of a detail's type, and lengths
_DETAILS_KEY = "grpc-status-details-bin"

_log = logging.getLogger(__name__)


def code_of(error: OutriderError) -> grpc.StatusCode:
    """The status code of a domain error: that of the nearest class in the table."""
    for cls in type(error).__mro__:
        if cls in CODES:
            return CODES[cls]
    return grpc.StatusCode.INTERNAL


def status_of(error: OutriderError) -> Status:
    """The full status of a domain error, small enough to travel."""
    code = code_of(error)
    status = Status(code=code.value[0], message=_clipped(error.message))
    for detail in _details(error, code):
        _add(status, detail)
    if error.violations:
        _add(status, _violations(error, STATUS_BYTES_MAX - status.ByteSize()))
    return status


def internal_status(reference: str) -> Status:
    """What a caller learns of an error that nobody foresaw."""
    return status_of(
        OutriderError(
            "INTERNAL",
            "something went wrong inside the server; its log tells more under this reference: "
            + reference,
            metadata={"reference": reference},
        )
    )


async def abort(context: ServicerContext, status: Status) -> NoReturn:
    """End the call with this status and its details."""
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    await context.abort(
        code, status.message, trailing_metadata=((_DETAILS_KEY, status.SerializeToString()),)
    )


def log_unexpected(error: BaseException, method: str, reference: str) -> None:
    """Write the trace of an error that nobody foresaw."""
    _log.error(
        "unexpected error in %s, reference %s",
        method,
        reference,
        exc_info=(type(error), error, error.__traceback__),
    )


def _details(error: OutriderError, code: grpc.StatusCode) -> Iterator[Message]:
    yield ErrorInfo(
        reason=error.reason,
        domain=DOMAIN,
        metadata={key: _clipped(value) for key, value in error.metadata.items()},
    )
    if code in _RETRIED:
        seconds = error.retry_after_seconds
        delay = Duration()
        delay.FromNanoseconds(
            int((RETRY_AFTER_SECONDS if seconds is None else seconds) * 1_000_000_000)
        )
        yield RetryInfo(retry_delay=delay)
    if "resource" in error.metadata:
        name = error.metadata["resource"]
        yield ResourceInfo(resource_type=_type_of(name), resource_name=_clipped(name))


def _add(status: Status, detail: Message) -> None:
    status.details.add().Pack(detail)
    if status.ByteSize() > STATUS_BYTES_MAX:
        del status.details[-1]


def _violations(error: OutriderError, room: int) -> BadRequest:
    """As many of the violations as there is room for; the first ones are the ones to begin with anyway."""
    request = BadRequest()
    for field, description in error.violations:
        request.field_violations.add(field=_clipped(field), description=_clipped(description))
        if request.ByteSize() > room - _PACKING_BYTES:
            del request.field_violations[-1]
            break
    return request


_TYPES = {
    "tenants": "Tenant",
    "endpoints": "Endpoint",
    "subscriptions": "Subscription",
    "eventTypes": "EventType",
    "apiKeys": "ApiKey",
}


def _type_of(name: str) -> str:
    collection = name.split("/")[-2:][0]
    return f"{DOMAIN}/{_TYPES.get(collection, 'Resource')}"


def _clipped(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH_MAX else text[: TEXT_LENGTH_MAX - 3] + "..."
