"""IngestService: events in, over a stream of frames or in single calls. The rules are in `pipeline.admission`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from typing_extensions import override

from outrider.v1 import ingest_service_pb2, ingest_service_pb2_grpc
from outrider_server.access.policy import out_of_scope
from outrider_server.api import names, publish_stream
from outrider_server.api.errors import ServicerContext
from outrider_server.api.frames import FrameReader, Split, results_of
from outrider_server.api.interceptors import current_caller
from outrider_server.api.peers import Peers
from outrider_server.api.portions import PortionRouter
from outrider_server.api.publish_stream import StreamLimits
from outrider_server.api.tenancy import not_found
from outrider_server.domain.access import Caller
from outrider_server.domain.errors import Aborted, InvalidArgument, Unauthenticated
from outrider_server.pipeline.admission import Admission
from outrider_server.pipeline.homes import Homes
from outrider_server.telemetry.counters import HomesCounters

GO_AWAY_SECONDS_MAX = 1.0


class IngestService(ingest_service_pb2_grpc.IngestServiceServicer):
    """Serves streams and calls; knows the open streams."""

    def __init__(
        self,
        *,
        admission: Admission,
        limits: StreamLimits,
        homes: Homes,
        peers: Peers,
        wrong_home: Callable[[Sequence[str]], None],
        counters: HomesCounters,
        now_us: Callable[[], int],
        seconds: Callable[[], float],
        node: Callable[[], str],
    ) -> None:
        self._admission = admission
        self._limits = limits
        self._homes = homes
        self._peers = peers
        self._wrong_home = wrong_home
        self._counters = counters
        self._now_us = now_us
        self._seconds = seconds
        self._node = node
        self._streams: dict[publish_stream.PublishStream, Caller] = {}
        self._producers: dict[str, publish_stream.PublishStream] = {}

    @property
    def streams(self) -> int:
        """Streams open now."""
        return len(self._streams)

    def reader(self, caller: Caller) -> FrameReader:
        """Reads the frames of a caller."""
        return FrameReader(
            caller, self._admission.directory, self._homes, self._admission.holds, self._now_us
        )

    def _router(self, caller: Caller) -> PortionRouter:
        return PortionRouter(
            caller,
            self._admission,
            self._peers,
            counters=self._counters,
            seconds=self._seconds,
            wrong=self._wrong_home,
        )

    @override
    async def PublishStream(  # type: ignore[override]  # answers are written to the context, beside the reading
        self,
        request_iterator: AsyncIterator[ingest_service_pb2.PublishStreamRequest],
        context: ServicerContext,
    ) -> None:
        caller = current_caller()
        stream = publish_stream.PublishStream(
            context=context,
            admission=self._admission,
            reader=self.reader(caller),
            owner=caller.key_id,
            scope="system" if caller.tenant is None else str(caller.tenant),
            limits=self._limits,
            node=self._node(),
            router=self._router(caller),
            named=self._replace_older,
        )
        self._streams[stream] = caller
        try:
            await stream.run()
        finally:
            del self._streams[stream]
            if self._producers.get(stream.producer) is stream:
                del self._producers[stream.producer]

    @override
    async def Publish(
        self, request: ingest_service_pb2.PublishRequest, context: ServicerContext
    ) -> ingest_service_pb2.PublishResponse:
        caller = current_caller()
        tenant = names.parse_tenant(request.parent, "parent")
        size = request.ByteSize()
        self._check(request, tenant, size)
        async with self._room(caller, size):
            split = await self.reader(caller).read(request.events, tenant, None)
            _require_reach(request.parent, split)
            frame = ingest_service_pb2.Frame(tenant=tenant, events=request.events)
            router = self._router(caller)
            try:
                result = await (await router.submit(None, 0, frame, split, {}))
            finally:
                await router.close()
        return ingest_service_pb2.PublishResponse(results=results_of(result, len(request.events)))

    @asynccontextmanager
    async def _room(self, caller: Caller, size: int) -> AsyncIterator[None]:
        """Room for a call of `size` bytes while the block runs."""
        admission = self._admission
        if size > self._limits.frame_bytes_max:
            await admission.large_room.take(caller.key_id, size)
            release = partial(admission.large_room.give_back, caller.key_id, size)
        else:
            await admission.room.take(size)
            release = partial(admission.room.give_back, size)
        try:
            yield
        finally:
            release()

    def end_streams(
        self, ended: Callable[[Caller], bool], why: Callable[[Caller], Unauthenticated]
    ) -> None:
        """End the streams of callers whose key does not hold any more."""
        for stream, caller in list(self._streams.items()):
            if ended(caller):
                stream.end(why(caller))

    def _replace_older(self, stream: publish_stream.PublishStream) -> None:
        """A producer has one stream: what it left on an older one it sends again on the new."""
        older = self._producers.get(stream.producer)
        self._producers[stream.producer] = stream
        if older is None:
            return
        if older.session < stream.session:
            older.end(Aborted("SESSION_SUPERSEDED", "a later session of this producer took over"))
        else:
            older.end(Aborted("STREAM_REPLACED", "the producer opened another stream"))

    async def go_away(self) -> None:
        """Tell every producer that this node drains. One that does not read holds nobody up."""
        telling = [asyncio.ensure_future(stream.going_away()) for stream in self._streams]
        if telling:
            _, late = await asyncio.wait(telling, timeout=GO_AWAY_SECONDS_MAX)
            for told in late:
                told.cancel()
            await asyncio.gather(*telling, return_exceptions=True)

    def _check(self, request: ingest_service_pb2.PublishRequest, tenant: str, size: int) -> None:
        count = len(request.events)
        if not 1 <= count <= self._limits.frame_events_max:
            raise InvalidArgument(
                "INVALID_ARGUMENT", f"a call carries 1 to {self._limits.frame_events_max} events, not {count}",
                violations=[("events", f"1 to {self._limits.frame_events_max}")],
            )  # fmt: skip
        if count > 1 and size > self._limits.frame_bytes_max:
            raise InvalidArgument(
                "FRAME_TOO_LARGE",
                f"several events have at most {self._limits.frame_bytes_max} bytes in all",
            )
        for index, event in enumerate(request.events):
            if event.tenant not in ("", tenant):
                raise InvalidArgument(
                    "INVALID_ARGUMENT", "every event of a call belongs to the tenant that `parent` names",
                    violations=[(f"events[{index}].tenant", "is not the parent's tenant")],
                )  # fmt: skip


def _require_reach(parent: str, split: Split) -> None:
    """All events of a call are of one tenant: where it is out of reach, or is not, the call itself is wrong."""
    for refusal in split.portion.refusals:
        if refusal.reason == "TENANT_OUT_OF_SCOPE":
            raise out_of_scope()
        if refusal.reason == "UNKNOWN_TENANT":
            raise not_found(parent)
