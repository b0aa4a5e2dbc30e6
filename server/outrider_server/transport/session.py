"""The plain exchange: aiohttp's own `session.request`."""

from __future__ import annotations

import io

import aiohttp

from outrider_server.transport.attempt import AttemptState, read_response
from outrider_server.transport.connector import NO_TIMEOUT, PooledConnector
from outrider_server.transport.target import Target

_STREAMED_BODY_BYTES = 256 * 1024


class SessionExchange:
    """Sends through one ClientSession: no redirects, no cookies, no inflating, nothing from the environment.

    The connector is the caller's and outlives the session.
    """

    def __init__(self, connector: PooledConnector) -> None:
        self._session = aiohttp.ClientSession(
            connector=connector,
            connector_owner=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=NO_TIMEOUT,
        )

    async def exchange(
        self, target: Target, headers: tuple[tuple[str, str], ...], body: bytes, state: AttemptState
    ) -> bytes:
        """See `Exchange`."""
        response = await self._session.request(
            target.method,
            target.url,
            # Large bodies go out piece by piece as the receiver takes them, not into one buffer at once.
            data=body if len(body) <= _STREAMED_BODY_BYTES else io.BytesIO(body),
            headers=target.headers + headers,
            allow_redirects=False,
        )
        ended = False
        try:
            state.status = response.status
            kept, ended = await read_response(response.content, response.status)
            return kept
        finally:
            if ended:
                response.release()
            else:
                response.close()

    async def close(self) -> None:
        """Close the session, not the connector."""
        await self._session.close()
