"""The gRPC server: one port, our services, reflection and health, and a limit on everything a peer can send.

Rule: it serves when it is told to (`health.set_serving`) and, when stopped, first says that it does not serve any more,
then lets calls under way end.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from outrider_server.api.health import SERVICE_NAME as HEALTH_SERVICE_NAME
from outrider_server.api.health import Health
from outrider_server.api.reflection import add_reflection

MESSAGE_BYTES_MAX = 11 * 1024 * 1024 + 64 * 1024
"""Largest message taken: an event of 10 MiB and what is around it, also what a node that passes it on adds."""

METADATA_BYTES_MAX = 16 * 1024
CALLS_MAX = 10_000
STREAMS_PER_CONNECTION_MAX = 1_000


class ListenError(Exception):
    """The server cannot listen where it was told to; the message says why, in one sentence."""


@dataclass(frozen=True, slots=True)
class Service:
    """One service: its full name, its servicer, and the generated function that adds it to a server."""

    name: str
    servicer: Any
    add: Callable[[Any, Any], None]


class ApiServer:
    """The gRPC server of one node. `start`, then `stop`; `ports` are those it really listens on."""

    def __init__(self, server: grpc.aio.Server, ports: Sequence[int], health: Health) -> None:
        self._server = server
        self.ports = ports
        self.health = health

    async def start(self) -> None:
        """Take calls. Health says not serving until it is told otherwise."""
        await self._server.start()

    async def stop(self, grace_seconds: float) -> None:
        """Take no further calls; those under way may end within `grace_seconds`, then they are cancelled."""
        self.health.close()
        await self._server.stop(grace_seconds)


def build_server(
    services: Sequence[Service],
    addresses: Sequence[str],
    *,
    interceptor: grpc.aio.ServerInterceptor,
    credentials: grpc.ServerCredentials | None = None,
    handlers: Sequence[grpc.GenericRpcHandler] = (),
    reuse_port: bool = False,
    calls_max: int = CALLS_MAX,
) -> ApiServer:
    """Make the server and bind `addresses` (host:port; port 0 takes a free one). ListenError where that cannot be.

    `credentials` None serves without TLS. With `reuse_port` other processes may bind the same ones.
    """
    server = grpc.aio.server(
        interceptors=[interceptor],
        options=_options(reuse_port=reuse_port),
        maximum_concurrent_rpcs=calls_max,
    )
    names = [service.name for service in services]
    for service in services:
        service.add(service.servicer, server)
    server.add_generic_rpc_handlers(tuple(handlers))
    health = Health(names)
    add_health: Callable[[Any, Any], None] = health_pb2_grpc.add_HealthServicer_to_server
    add_health(health, server)
    add_reflection(server, [*names, HEALTH_SERVICE_NAME])
    ports = [_bind(server, address, credentials) for address in addresses]
    return ApiServer(server, ports, health)


def _options(*, reuse_port: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_metadata_size", METADATA_BYTES_MAX),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION_MAX),
        # A dead peer is noticed within 40 s; peers may ask as often as every 10 s.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        port = (
            server.add_insecure_port(address)
            if credentials is None
            else server.add_secure_port(address, credentials)
        )
    except RuntimeError:
        port = 0
    if not port:
        raise ListenError(f"cannot listen on {address}: {_why_not(address)}")
    return int(port)


def _why_not(address: str) -> str:
    """Why an address cannot be bound. gRPC tells only that it cannot, so try again with a plain socket."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(where)
            probe.listen(1)
    except socket.gaierror:
        return "there is no such host"
    except (ValueError, OverflowError):
        return "it is not host:port"
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "another process uses that port; stop it or choose another address"
        return os.strerror(error.errno or 0).lower()
    return "it could not be bound, though it is free now; try again"
