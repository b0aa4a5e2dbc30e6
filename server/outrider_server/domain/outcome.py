"""Outcomes: what an attempt came to. A failed attempt is a value, not an exception."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Verdict(IntEnum):
    """What an attempt means for the deliveries it carried. Stored as its number."""

    DELIVERED = 1
    RETRY = 2
    DEAD = 3


class AttemptError(IntEnum):
    """Where a failed attempt broke. Stored as its number; `NONE` with a response's own status."""

    NONE = 0
    TIMEOUT = 1
    DNS = 2
    CONNECT = 3
    TLS = 4
    DISCONNECTED = 5
    PROTOCOL = 6
    STATUS = 7
    FORBIDDEN_ADDRESS = 8
    INTERNAL = 9


@dataclass(frozen=True, slots=True)
class Outcome:
    """One HTTP request's end.

    `status` is the response's status, 0 where none came. `duration_ms` counts from the start of the request to the end
    of the response's head and the part of its body that was read. `response` is that part, kept for failures
    (at most 16 KiB). `detail` tells the failure in words.
    """

    verdict: Verdict
    status: int
    error: AttemptError
    duration_ms: float
    detail: str = ""
    response: bytes = b""
