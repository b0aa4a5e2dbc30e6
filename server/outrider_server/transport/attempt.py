"""What is known of one attempt while it runs, and the shape of an exchange: how its bytes go out and come back.

Rule: an exchange tells how far it came by writing it here, so that a failure can be named and a stale connection be
told from a fresh one, whichever exchange it was and wherever it broke.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Protocol

from aiohttp import StreamReader

from outrider_server.domain.outcome import Verdict
from outrider_server.policy.verdict import verdict_of
from outrider_server.transport.target import Target

RESPONSE_KEPT_BYTES = 16 * 1024
"""How much of a failed response's body is read and kept; the connection of a longer one is closed."""

RESPONSE_DRAINED_BYTES = 64 * 1024
"""How much of a successful response's body is read away to keep the connection; that of a longer one is closed."""


class AttemptState:
    """How far an attempt has come.

    `fresh_only` asks for a new connection; `reused` tells that the pool gave one that had served before; `transport` is
    the connection's, once there is one; `status` is 0 until a response's head arrived.
    """

    __slots__ = ("fresh_only", "reused", "status", "transport")

    def __init__(self) -> None:
        self.fresh_only = False
        self.reused = False
        self.transport: asyncio.Transport | None = None
        self.status = 0

    def again_on_fresh_connection(self) -> None:
        """Start over after a reused connection turned out to be closed."""
        self.abort()
        self.fresh_only = True
        self.reused = False

    def abort(self) -> None:
        """End the connection now.

        Closing alone would first wait until everything is written, which a receiver that does not read can put off
        for ever.
        """
        if self.transport is not None:
            self.transport.abort()
            self.transport = None

    def abort_unsent(self) -> None:
        """End the connection if the receiver answered without taking the whole request."""
        if self.transport is not None and self.transport.get_write_buffer_size() > 0:
            self.abort()


current_attempt: ContextVar[AttemptState] = ContextVar("current_attempt")
"""The attempt that this task is making. A context variable, since aiohttp passes nothing of ours to its connector."""


class Exchange(Protocol):
    """One request and its response on a pooled connection: two forms, one suite of tests."""

    async def exchange(
        self, target: Target, headers: tuple[tuple[str, str], ...], body: bytes, state: AttemptState
    ) -> bytes:
        """Send and read; sets `state`. Returns what is kept of the response's body. Raises what aiohttp raises.

        `headers` are those of this request, beside the target's.
        """
        ...


async def read_response(content: StreamReader, status: int) -> tuple[bytes, bool]:
    """What is kept of a response's body, and whether it ended within its bound (else the connection is no use)."""
    delivered = verdict_of(status) is Verdict.DELIVERED
    limit = RESPONSE_DRAINED_BYTES if delivered else RESPONSE_KEPT_BYTES
    chunks: list[bytes] = []
    size = 0
    while not content.at_eof():
        chunk = await content.readany()
        size += len(chunk)
        if not delivered:
            chunks.append(chunk)
        if size > limit:
            return b"".join(chunks)[:RESPONSE_KEPT_BYTES], False
    return b"".join(chunks), True
