"""The direct exchange: the request written and the response read on a connection taken from aiohttp's pool.

Pool, TLS, DNS, egress guard and response parser stay aiohttp's; what is left out is the making of request and response
objects, more than half of an exchange's cost. It leans on three things that aiohttp does not promise
(`connector.connect`, `ResponseHandler.set_response_params` and `.read`), all used in this file alone; aiohttp is pinned to a
minor version, and this form passes the same tests as the plain one.
"""

from __future__ import annotations

import asyncio
import ssl

from aiohttp import ServerDisconnectedError
from aiohttp.client_reqrep import ClientRequest

from outrider_server.transport.attempt import AttemptState, Exchange, read_response
from outrider_server.transport.connector import NO_TIMEOUT, PooledConnector
from outrider_server.transport.target import Target

DIRECT_BODY_BYTES_MAX = 256 * 1024
"""Larger bodies take the plain exchange, which sends them as fast as the receiver reads."""


class DirectExchange:
    """Writes head and body in one piece. `plain` takes the bodies that are too large for that."""

    def __init__(
        self, connector: PooledConnector, ssl_context: ssl.SSLContext | None, plain: Exchange
    ) -> None:
        self._connector = connector
        self._ssl: ssl.SSLContext | bool = ssl_context if ssl_context is not None else True
        self._plain = plain

    async def exchange(
        self, target: Target, headers: tuple[tuple[str, str], ...], body: bytes, state: AttemptState
    ) -> bytes:
        """See `Exchange`."""
        if len(body) > DIRECT_BODY_BYTES_MAX:
            return await self._plain.exchange(target, headers, body, state)
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
        rest = f"{lines}Content-Length: {len(body)}\r\n\r\n".encode("ascii")

        connection = await self._connector.connect(self._dial(target), [], NO_TIMEOUT)
        reusable = False
        try:
            protocol = connection.protocol
            transport = connection.transport
            if protocol is None or transport is None:
                raise ServerDisconnectedError
            protocol.set_response_params(
                skip_payload=target.method == "HEAD", read_until_eof=True, auto_decompress=False
            )
            transport.write(b"".join((target.head, rest, body)))
            message, payload = await protocol.read()
            while 100 <= message.code <= 199 and message.code != 101:
                message, payload = await protocol.read()
            state.status = message.code
            kept, ended = await read_response(payload, message.code)
            reusable = ended
            state.abort_unsent()
            return kept
        finally:
            if reusable:
                connection.release()
            else:
                connection.close()

    def _dial(self, target: Target) -> ClientRequest:
        """What the pool is asked with: only its host, port and TLS are looked at, so one serves all requests."""
        if target.dial is None:
            target.dial = ClientRequest(
                target.method, target.url, loop=asyncio.get_running_loop(), ssl=self._ssl
            )
        return target.dial
