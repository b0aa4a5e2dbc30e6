"""The other nodes: channels to them, and calls that are sent only once they have proved who they are.

Frames and calls travel as raw bytes; deadlines and cancellation are those of the gRPC call itself. A connection carries
only so many calls at a time, and links stay open for as long as their streams, so a node has several channels to each peer,
each with a connection of its own; single calls have one that no link is on, so that they never wait for a stream to end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from outrider_server.access.nodes import PROOF, NodeAuthenticator
from outrider_server.domain.access import Caller
from outrider_server.domain.errors import Unavailable

CONNECT_SECONDS_MAX = 3.0
PEERS_MAX = 256
CHANNEL_CALLS_MAX = 400
"""Open calls at which another channel is opened: well below what a node lets a connection carry (see `api.server`)."""

CHANNELS_MAX = 16
"""Channels to one peer for calls that stay open; beyond them the least used one takes more."""

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


@dataclass(slots=True, eq=False)
class _Channel:
    """A channel with a connection of its own, and how many calls are open on it."""

    channel: grpc.aio.Channel
    calls: int = 0


class _Peer:
    """The channels to one node. One that was put out is closed as soon as no call is open on it."""

    def __init__(self, address: str, calls_max: int, channels_max: int) -> None:
        self._address = address
        self._calls_max = calls_max
        self._channels_max = channels_max
        self._lasting: list[_Channel] = []
        self._single: _Channel | None = None

    @property
    def channels(self) -> list[_Channel]:
        """All that are open."""
        return self._lasting if self._single is None else [*self._lasting, self._single]

    @property
    def idle(self) -> bool:
        """Whether no call is open."""
        return not any(each.calls for each in self.channels)

    def lasting(self) -> _Channel:
        """The channel for a call that may stay open: the least used one, or a new one where that has enough."""
        least = min(self._lasting, key=lambda each: each.calls, default=None)
        if least is None or (
            least.calls >= self._calls_max and len(self._lasting) < self._channels_max
        ):
            least = _Channel(_opened(self._address))
            self._lasting.append(least)
        return least

    def single(self) -> _Channel:
        """The channel for calls that end by themselves."""
        if self._single is None:
            self._single = _Channel(_opened(self._address))
        return self._single

    async def close(self) -> None:
        """Close every channel; calls on them are cancelled."""
        for each in self.channels:
            await each.channel.close()


class Peers:
    """The channels to each node that was ever needed: of the `peers_max` last used, and of others while a call is open.

    `calls_max`, `channels_max`: see `CHANNEL_CALLS_MAX` and `CHANNELS_MAX`. `connect_seconds`: how long a peer may take to
    prove itself.
    """

    def __init__(
        self,
        authenticator: NodeAuthenticator,
        *,
        peers_max: int = PEERS_MAX,
        calls_max: int = CHANNEL_CALLS_MAX,
        channels_max: int = CHANNELS_MAX,
        connect_seconds: float = CONNECT_SECONDS_MAX,
    ) -> None:
        self._authenticator = authenticator
        self._peers_max = peers_max
        self._calls_max = calls_max
        self._channels_max = channels_max
        self._connect_seconds = connect_seconds
        self._peers: dict[str, _Peer] = {}
        self._put_out: set[_Peer] = set()
        self._closing: set[asyncio.Future[None]] = set()

    @asynccontextmanager
    async def call(
        self, address: str, method: str, caller: Caller, seconds_max: float | None
    ) -> AsyncIterator[RawCall]:
        """A call on behalf of `caller`, its peer proved; it is cancelled at the end of the block.

        Raises `Unavailable` where the node cannot be reached or is not one of ours.
        """
        peer = self._peer(address)
        with self._on(peer, peer.lasting()) as channel:
            async with self._proved(channel, address, method, caller, seconds_max) as call:
                yield call

    @asynccontextmanager
    async def _proved(
        self,
        channel: grpc.aio.Channel,
        address: str,
        method: str,
        caller: Caller,
        seconds_max: float | None,
    ) -> AsyncIterator[RawCall]:
        metadata, nonce = self._authenticator.ask(address, method, caller)
        call: RawCall = channel.stream_stream(method)(metadata=metadata, timeout=seconds_max)
        try:
            try:
                async with asyncio.timeout(self._connect_seconds):
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
        peer = self._peer(address)
        with self._on(peer, peer.single()) as channel:
            return await self._forward(channel, address, method, caller, request, seconds_max)

    async def _forward(
        self,
        channel: grpc.aio.Channel,
        address: str,
        method: str,
        caller: Caller,
        request: bytes,
        seconds_max: float | None,
    ) -> bytes:
        async with self._proved(channel, address, method, caller, seconds_max) as call:
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
        peers = [*self._peers.values(), *self._put_out]
        self._peers.clear()
        self._put_out.clear()
        for peer in peers:
            await peer.close()
        await asyncio.gather(*self._closing, return_exceptions=True)

    @contextlib.contextmanager
    def _on(self, peer: _Peer, channel: _Channel) -> Iterator[grpc.aio.Channel]:
        channel.calls += 1
        try:
            yield channel.channel
        finally:
            channel.calls -= 1
            if peer in self._put_out and peer.idle:
                self._put_out.discard(peer)
                self._close(peer)

    def _peer(self, address: str) -> _Peer:
        peer = self._peers.pop(address, None)
        if peer is None:
            peer = _Peer(address, self._calls_max, self._channels_max)
        self._peers[address] = peer
        while len(self._peers) > self._peers_max:
            oldest = self._peers.pop(next(iter(self._peers)))
            if oldest.idle:
                self._close(oldest)
            else:
                self._put_out.add(oldest)
        return peer

    def _close(self, peer: _Peer) -> None:
        closing = asyncio.ensure_future(peer.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        closing.add_done_callback(lambda done: done.cancelled() or done.exception())


def _opened(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        address,
        options=[
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            # Channels of one process to one address would share a connection.
            ("grpc.use_local_subchannel_pool", 1),
            # A node that fell silent is noticed before its lease ends.
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 3_000),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.enable_http_proxy", 0),
        ],
    )


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
