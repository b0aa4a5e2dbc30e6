"""The health service: whether the server, and each of its services, can be used now.

Rule: a watcher sees every lasting change, and its stream ends when the server does, so that no watcher holds up a stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from grpc_health.v1 import health_pb2, health_pb2_grpc
from typing_extensions import override

from outrider_server.api.errors import ServicerContext
from outrider_server.domain.errors import NotFound

SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """The health of `services` and, under the empty name, of the whole server. All begin as not serving."""

    def __init__(self, services: Iterable[str]) -> None:
        self._serving = dict.fromkeys(["", *services], False)
        self._closed = False
        # Replaced at every change: whoever waits, waits for the change after the state they have seen.
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool, service: str | None = None) -> None:  # noqa: FBT001
        """Say whether `service` (None: all of them, and the server) can be used. No effect once closed."""
        if self._closed:
            return
        for name in self._serving if service is None else [service]:
            self._serving[name] = serving
        self._announce()

    def close(self) -> None:
        """Nothing serves from now on; watchers are told, and then their streams end."""
        self.set_serving(False)
        self._closed = True
        self._announce()

    @override
    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._serving:
            raise NotFound("RESOURCE_NOT_FOUND", "there is no service of this name here")
        return _Response(status=self._status(request.service))

    @override
    async def List(
        self, request: health_pb2.HealthListRequest, context: ServicerContext
    ) -> health_pb2.HealthListResponse:
        return health_pb2.HealthListResponse(
            statuses={name: _Response(status=self._status(name)) for name in self._serving}
        )

    @override
    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        last = None
        while True:
            changed, closed = self._changed, self._closed
            status = self._status(request.service)
            if status != last:
                last = status
                yield _Response(status=status)
            if closed:
                return
            await changed.wait()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in self._serving:
            return _Response.SERVICE_UNKNOWN
        return _Response.SERVING if self._serving[service] else _Response.NOT_SERVING

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
