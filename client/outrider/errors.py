"""What can go wrong, as exceptions that say whose turn it is.

OutriderError
|-- CallFailed               the server answered a call or a stream with a status
|   |-- InvalidArgument      the call itself is wrong
|   |-- NotFound             a named resource does not exist for this key
|   |-- AlreadyExists        the name is taken
|   |-- FailedPrecondition   right call, wrong state
|   |-- Aborted              somebody else changed it first
|   |   `-- SessionSuperseded  another process publishes under this producer's name
|   |-- Unauthenticated      no key, or one that does not hold
|   |-- PermissionDenied     the key does not reach this
|   |-- Exhausted            a bound is reached; later may help
|   `-- Unavailable          the server cannot do it now; again may help
|-- EventRejected            one event breaks a rule; sending it again unchanged cannot help
|-- PublisherClosed          the publisher was closed before this was acknowledged
|-- PublisherFailed          a fault of the publisher itself
|-- ProtocolBroken           the server broke the contract of the stream
`-- SpoolError               the spool cannot be used (SpoolLocked: another process has it)

Rule: callers branch on the class or on `reason` (names of `outrider.v1.ErrorReason` without the prefix), never on texts.
This file loads no grpc: receivers of webhooks import it, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import grpc


class OutriderError(Exception):
    """Base of every error of this package.

    `permanent` tells that the same thing done again, unchanged, fails again.
    """

    permanent = True

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason

    def again(self) -> Self:
        """A copy to raise: one cause fails many handles, and a raised exception collects its traceback."""
        copy = type(self).__new__(type(self), *self.args)
        copy.__dict__.update(self.__dict__)
        copy.__cause__ = self.__cause__
        return copy


class CallFailed(OutriderError):
    """The server answered with a status that has no class of its own, or with one of those below."""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: str = "UNKNOWN",
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[tuple[str, str]] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message, reason=reason)
        self.code = code
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds
        self.permanent = _is_permanent(code, reason)


class InvalidArgument(CallFailed):
    """The call itself is wrong; `violations` are (field, description)."""


class NotFound(CallFailed):
    """The named resource does not exist for this key."""


class AlreadyExists(CallFailed):
    """The name is taken."""


class FailedPrecondition(CallFailed):
    """The resource's state does not allow this."""


class Aborted(CallFailed):
    """The resource changed since it was read."""


class SessionSuperseded(Aborted):
    """A later session of the same producer took over: two processes use one producer name."""


class Unauthenticated(CallFailed):
    """The key is missing, unknown, expired or revoked."""


class PermissionDenied(CallFailed):
    """The key does not reach this."""


class Exhausted(CallFailed):
    """A bound of the server is reached."""


class Unavailable(CallFailed):
    """The server cannot do it now."""


class EventRejected(OutriderError):
    """The permanent error of one event; the others of its frame are not concerned."""


class PublisherClosed(OutriderError):
    """The publisher was closed. What a spool holds is sent by the next publisher on it."""


class PublisherFailed(OutriderError):
    """The publisher stopped by a fault of its own; the cause is attached."""


class ProtocolBroken(OutriderError):
    """The server answered against the contract of the stream; the publisher opens another."""

    permanent = False


class SpoolError(OutriderError):
    """The spool cannot be read or written."""


class SpoolLocked(SpoolError):
    """Another process holds the spool."""


_CLASSES: dict[str, type[CallFailed]] = {
    "INVALID_ARGUMENT": InvalidArgument,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": AlreadyExists,
    "FAILED_PRECONDITION": FailedPrecondition,
    "ABORTED": Aborted,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "RESOURCE_EXHAUSTED": Exhausted,
    "UNAVAILABLE": Unavailable,
}

_PERMANENT_CODES = frozenset(
    {
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "FAILED_PRECONDITION",
        "OUT_OF_RANGE",
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
        "UNIMPLEMENTED",
    }
)

# A reason decides before the code: what the reason's contract calls passing is passing under any status.
_PASSING_REASONS = frozenset(
    {
        "NOT_READY",
        "STORAGE_UNAVAILABLE",
        "DISK_FULL",
        "OVERLOADED",
        "SHUTTING_DOWN",
        "CREDIT_EXCEEDED",
        "FRAME_OUT_OF_SEQUENCE",
    }
)


def _is_permanent(code: str, reason: str) -> bool:
    if reason in _PASSING_REASONS:
        return False
    return reason == "SESSION_SUPERSEDED" or code in _PERMANENT_CODES


def call_failed(
    code: str,
    message: str,
    *,
    reason: str = "",
    metadata: Mapping[str, str] | None = None,
    violations: Sequence[tuple[str, str]] = (),
    retry_after_seconds: float | None = None,
) -> CallFailed:
    """The exception of a status: by its reason where one has a class, else by its code."""
    chosen = SessionSuperseded if reason == "SESSION_SUPERSEDED" else _CLASSES.get(code, CallFailed)
    return chosen(
        message,
        reason=reason,
        code=code,
        metadata=metadata,
        violations=violations,
        retry_after_seconds=retry_after_seconds,
    )


def from_rpc(error: grpc.aio.AioRpcError) -> CallFailed:
    """The exception of a failed call, with what `google.rpc.Status` in its trailing metadata tells."""
    code = error.code().name
    message = error.details() or code
    packed: Any = None
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            packed = value
    if not isinstance(packed, bytes):
        return call_failed(code, message)
    return _with_details(code, message, packed)


def _with_details(code: str, message: str, packed: bytes) -> CallFailed:
    # Here and not above: these load protobuf, which a receiver of webhooks does without.
    from google.protobuf.message import DecodeError  # noqa: PLC0415
    from google.rpc import (  # type: ignore[import-untyped]  # noqa: PLC0415
        error_details_pb2,
        status_pb2,
    )

    reason = ""
    metadata: dict[str, str] = {}
    violations: list[tuple[str, str]] = []
    retry_after_seconds: float | None = None
    try:
        for detail in status_pb2.Status.FromString(packed).details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo.FromString(detail.value)
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                request = error_details_pb2.BadRequest.FromString(detail.value)
                violations += [(each.field, each.description) for each in request.field_violations]
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
                retry_after_seconds = retry.seconds + retry.nanos / 1e9
    except DecodeError:
        # A proxy may have cut or rewritten the details; the status itself still tells what happened.
        return call_failed(code, message)
    return call_failed(
        code,
        message,
        reason=reason,
        metadata=metadata,
        violations=violations,
        retry_after_seconds=retry_after_seconds,
    )
