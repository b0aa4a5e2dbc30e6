"""Connections: aiohttp's pool, TLS and DNS, set up the way deliveries need them.

Rule: no limit of the pool's own (lanes bound what is in flight), names resolved by c-ares rather than in threads, and
every connection tells its attempt whether it is new. A connection on which an answer came that nobody asked for is
closed, or that answer would be taken for the next request's.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.client_reqrep import ClientRequest, ConnectionKey
from aiohttp.connector import AddrInfoType, Connection
from aiohttp.tracing import Trace
from typing_extensions import override

from outrider_server.transport.attempt import current_attempt

KEEPALIVE_SECONDS = 15.0
"""How long an idle connection is kept: below what common servers keep theirs, so they seldom close first."""

DNS_CACHE_SECONDS = 10
DNS_CACHE_HOSTS_MAX = 10_000

SocketFactory = Callable[[AddrInfoType], Any]
"""Makes the socket of a connection from its final address, or raises PermissionError: where egress policy is enforced."""

NO_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)
"""The sender has one timeout over everything; aiohttp's own would only race with it."""


class PooledConnector(aiohttp.TCPConnector):
    """aiohttp's pool, telling the attempt in `current_attempt` what it was given."""

    @override
    async def connect(
        self, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> Connection:
        connection = await super().connect(req, traces, timeout)
        current_attempt.get().transport = connection.transport
        return connection

    @override
    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        state = current_attempt.get()
        if state.fresh_only:
            return None
        while (connection := await super()._get(key, traces)) is not None:
            protocol = connection.protocol
            if protocol is not None and not protocol.should_close:
                state.reused = True
                return connection
            connection.close()
        return None


def make_connector(
    *,
    ssl_context: ssl.SSLContext | None = None,
    socket_factory: SocketFactory | None = None,
    resolver: AbstractResolver | None = None,
) -> PooledConnector:
    """The connector of a sender; needs a running loop."""
    return PooledConnector(
        limit=0,
        keepalive_timeout=KEEPALIVE_SECONDS,
        ssl=ssl_context if ssl_context is not None else True,
        resolver=resolver if resolver is not None else aiohttp.AsyncResolver(),
        ttl_dns_cache=DNS_CACHE_SECONDS,
        dns_cache_max_size=DNS_CACHE_HOSTS_MAX,
        socket_factory=socket_factory,
    )
