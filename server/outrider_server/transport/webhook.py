"""The sender: one signed request to one endpoint, and what came of it.

Rule: whatever the other side does, `send` returns an Outcome within the endpoint's timeout; only cancellation leaves it
otherwise. Nothing is followed, inflated, remembered or read without a bound.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum

from aiohttp.abc import AbstractResolver

from outrider_server.domain.endpoint import Endpoint
from outrider_server.domain.outcome import AttemptError, Outcome, Verdict
from outrider_server.policy.verdict import verdict_of
from outrider_server.transport.attempt import AttemptState, Exchange, current_attempt
from outrider_server.transport.connector import SocketFactory, make_connector
from outrider_server.transport.direct import DirectExchange
from outrider_server.transport.failures import classify, is_stale, timed_out
from outrider_server.transport.session import SessionExchange
from outrider_server.transport.target import Target, TargetCache

SIGNED_ON_LOOP_BYTES_MAX = 256 * 1024
"""Larger bodies are signed in a thread: at 2 microseconds a KiB they would hold up everyone else's requests."""

_SIGNING_THREADS = 2


class Form(Enum):
    """How a request is exchanged; see `transport.session` and `transport.direct`."""

    SESSION = "session"
    DIRECT = "direct"


class WebhookSender:
    """Sends requests over one pool of connections, which it owns. Make it in a running loop and close it.

    `monotonic` measures attempts, in seconds. `socket_factory` decides which addresses may be dialled. `targets_max` bounds
    the endpoints that are held ready.
    """

    def __init__(
        self,
        *,
        monotonic: Callable[[], float],
        form: Form = Form.SESSION,
        user_agent: str = "Outrider",
        ssl_context: ssl.SSLContext | None = None,
        socket_factory: SocketFactory | None = None,
        resolver: AbstractResolver | None = None,
        targets_max: int = 20_000,
    ) -> None:
        self._monotonic = monotonic
        self._connector = make_connector(
            ssl_context=ssl_context, socket_factory=socket_factory, resolver=resolver
        )
        self._session = SessionExchange(self._connector)
        self._exchange: Exchange = (
            DirectExchange(self._connector, ssl_context, self._session)
            if form is Form.DIRECT
            else self._session
        )
        self._targets = TargetCache(user_agent, targets_max)
        self._signing = ThreadPoolExecutor(_SIGNING_THREADS, thread_name_prefix="signing")

    async def send(
        self, endpoint: Endpoint, message_id: str, body: bytes, content_type: str, timestamp: int
    ) -> Outcome:
        """Send one request and wait for its end. `timestamp` is now, in seconds since 1970 UTC."""
        started = self._monotonic()
        state = AttemptState()
        current_attempt.set(state)
        deadline = asyncio.timeout(endpoint.attempt_timeout_seconds)
        try:
            async with deadline:
                target = self._targets.of(endpoint)
                signature = await self._sign(target, message_id, timestamp, body)
                headers = _headers(target, message_id, timestamp, signature, content_type)
                kept = await self._exchanged(target, headers, body, state)
        except asyncio.CancelledError:
            state.abort()
            raise
        except Exception as error:  # noqa: BLE001 - any failure of an attempt is its outcome
            if deadline.expired() and isinstance(error, TimeoutError):
                kind = AttemptError.TIMEOUT
                detail = timed_out(state, endpoint.attempt_timeout_seconds)
            else:
                kind, detail = classify(error)
            state.abort()
            return Outcome(Verdict.RETRY, state.status, kind, self._since(started), detail)
        state.abort_unsent()
        verdict = verdict_of(state.status)
        if verdict is Verdict.DELIVERED:
            return Outcome(verdict, state.status, AttemptError.NONE, self._since(started))
        detail = f"answered with status {state.status}"
        return Outcome(
            verdict, state.status, AttemptError.STATUS, self._since(started), detail, kept
        )

    def forget(self, endpoint_id: int) -> None:
        """Drop what is held of an endpoint that is deleted or whose secrets changed."""
        self._targets.forget(endpoint_id)

    async def close(self) -> None:
        """Close every connection. Requests in flight end as disconnected."""
        await self._session.close()
        await self._connector.close()
        self._signing.shutdown(wait=False, cancel_futures=True)

    async def _exchanged(
        self,
        target: Target,
        headers: tuple[tuple[str, str], ...],
        body: bytes,
        state: AttemptState,
    ) -> bytes:
        try:
            return await self._exchange.exchange(target, headers, body, state)
        except Exception as error:
            if self._connector.closed or not is_stale(error, state):
                raise
        # Outside the handler, so that a second failure does not carry the first as its context.
        state.again_on_fresh_connection()
        return await self._exchange.exchange(target, headers, body, state)

    async def _sign(self, target: Target, message_id: str, timestamp: int, body: bytes) -> str:
        if len(body) <= SIGNED_ON_LOOP_BYTES_MAX:
            return target.signer.sign(message_id, timestamp, body)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._signing, target.signer.sign, message_id, timestamp, body
        )

    def _since(self, started: float) -> float:
        return (self._monotonic() - started) * 1000.0


def _headers(
    target: Target, message_id: str, timestamp: int, signature: str, content_type: str
) -> tuple[tuple[str, str], ...]:
    """The headers of one request. Ids and types are ours; a control character in one would be a bug that forges lines."""
    if not (message_id.isprintable() and content_type.isprintable()):
        raise ValueError("a message id or content type holds a control character")
    headers = [("webhook-id", message_id), ("webhook-timestamp", str(timestamp))]
    if signature:
        headers.append(("webhook-signature", signature))
    if not target.own_content_type:
        headers.append(("Content-Type", content_type))
    return tuple(headers)
