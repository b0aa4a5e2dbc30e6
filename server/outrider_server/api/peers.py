"""The other nodes: channels to them, and calls that are sent only once they have proved who they are.

Frames and calls travel as raw bytes; deadlines and cancellation are those of the gRPC call itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from outrider_server.access.nodes import PROOF, NodeAuthenticator
from outrider_server.domain.access import Caller
from outrider_server.domain.errors import Unavailable

CONNECT_SECONDS_MAX = 3.0
PEERS_MAX = 256
MESSAGE_BYTES_MAX = 12 * 1024 * 1024
_DETAILS = "grpc-status-details-bin"

RawCall = Any
"""A grpc.aio.StreamStreamCall over bytes; its stubs know only message types."""


@dataclass
class PeerStatus(Exception):
    """How a call ended at its home: passed on to the caller as it is."""

    code: grpc.StatusCode
    message: str
    details: bytes | None


class Peers:
    """One channel to each node that was ever needed, up to `PEERS_MAX`."""

    def __init__(self, authenticator: NodeAuthenticator) -> None:
        self._authenticator = authenticator
        self._channels: dict[str, grpc.aio.Channel] = {}

    @asynccontextmanager
    async def call(
        self, address: str, method: str, caller: Caller, seconds_max: float | None
    ) -> AsyncIterator[RawCall]:
        """A call on behalf of `caller`, its peer proved; it is cancelled at the end of the block.

        Raises `Unavailable` where the node cannot be reached or is not one of ours.
        """
        metadata, nonce = self._authenticator.ask(address, method, caller)
        call: RawCall = self._channel(address).stream_stream(method)(
            metadata=metadata, timeout=seconds_max
        )
        try:
            try:
                async with asyncio.timeout(CONNECT_SECONDS_MAX):
                    initial = dict(await call.initial_metadata() or ())
            except (grpc.aio.AioRpcError, TimeoutError):
                raise unreachable(address) from None
            if PROOF not in initial:
                # It ended before it began: its status says why.
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await call.read()
                raise unreachable(address)
            if not self._authenticator.is_proof(nonce, str(initial[PROOF])):
                raise unreachable(address)
            yield call
        finally:
            call.cancel()

    async def forward(
        self, address: str, method: str, caller: Caller, request: bytes, seconds_max: float | None
    ) -> bytes:
        """A single call at its home; raises `PeerStatus` as it ended there."""
        async with self.call(address, method, caller, seconds_max) as call:
            try:
                await call.write(request)
                await call.done_writing()
                response = await call.read()
                if response is not grpc.aio.EOF:
                    return bytes(response)
                code, message = await call.code(), await call.details()
                raise PeerStatus(code, message or "", _details(await call.trailing_metadata()))
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                raise await _status(call, error, address) from None

    async def close(self) -> None:
        """Close every channel."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.pop(address, None)
        if channel is None:
            channel = grpc.aio.insecure_channel(
                address,
                options=[
                    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
                    # A node that fell silent is noticed before its lease ends.
                    ("grpc.keepalive_time_ms", 10_000),
                    ("grpc.keepalive_timeout_ms", 3_000),
                    ("grpc.http2.max_pings_without_data", 0),
                    ("grpc.max_reconnect_backoff_ms", 1_000),
                    ("grpc.initial_reconnect_backoff_ms", 100),
                    ("grpc.enable_http_proxy", 0),
                ],
            )
        self._channels[address] = channel
        while len(self._channels) > PEERS_MAX:
            oldest = self._channels.pop(next(iter(self._channels)))
            closing = asyncio.ensure_future(oldest.close())
            closing.add_done_callback(lambda done: done.cancelled() or done.exception())
        return channel


def unreachable(address: str) -> Unavailable:
    """The error where a tenant's home does not answer."""
    return Unavailable(
        "NOT_READY",
        f"the node at {address}, where this belongs, does not answer; retry",
        retry_after_seconds=0.2,
    )


async def _status(call: RawCall, error: Exception, address: str) -> Exception:
    if not isinstance(error, grpc.aio.AioRpcError):
        code = await call.code()
        if code is grpc.StatusCode.OK:
            return unreachable(address)
        return PeerStatus(
            code, await call.details() or "", _details(await call.trailing_metadata())
        )
    details = _details(error.trailing_metadata())
    if error.code() is grpc.StatusCode.UNAVAILABLE and details is None:
        return unreachable(address)
    return PeerStatus(error.code(), error.details() or "", details)


def _details(metadata: Any) -> bytes | None:
    for key, value in metadata or ():
        if key == _DETAILS:
            return bytes(value)
    return None
