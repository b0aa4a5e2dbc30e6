"""Errors a caller can cause, each with a stable reason. `api.errors` maps them to statuses, in one table.

OutriderError
|-- InvalidArgument      the call itself is wrong; sending it again cannot help
|-- NotFound             a named resource does not exist (or not for this caller)
|-- AlreadyExists        the name is taken
|-- FailedPrecondition   right call, wrong state
|-- Aborted              somebody else changed it first (etag)
|-- Unauthenticated      no key, or one that does not hold
|-- PermissionDenied     the key does not reach this
|-- Exhausted            a bound is reached; try again later
`-- Unavailable          this node cannot do it now; try again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class OutriderError(Exception):
    """Base of every error that is told to a caller.

    `reason` is a name of the published enum `outrider.v1.ErrorReason`, without its prefix. `metadata` goes into the
    ErrorInfo; `violations` are (field path, description) pairs; `retry_after_seconds` tells when a retry may help.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[tuple[str, str]] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds


class InvalidArgument(OutriderError):
    """The call itself is wrong."""


class NotFound(OutriderError):
    """The named resource does not exist for this caller."""


class AlreadyExists(OutriderError):
    """The name is taken."""


class FailedPrecondition(OutriderError):
    """The resource is in a state that does not allow this."""


class Aborted(OutriderError):
    """The resource changed since the caller read it."""


class Unauthenticated(OutriderError):
    """No valid credentials."""


class PermissionDenied(OutriderError):
    """Valid credentials that do not reach this."""


class Exhausted(OutriderError):
    """A bound is reached; a retry later may succeed."""


class Unavailable(OutriderError):
    """This node cannot do it now; a retry may succeed."""
