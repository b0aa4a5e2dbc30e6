"""An ingest server that keeps the contract in memory, fails on demand, and watches that its client keeps it, too.

A real gRPC server over a log in memory. A `script` decides what becomes of each frame that arrives in sequence; the
default stores and acknowledges it. What a client does against `ingest_service.proto` is collected in `violations`:
numbers with gaps, a frame sent again with other bytes, more under way than the window, a large frame without a grant.
Frames are kept as the bytes that came, so "unchanged" means byte for byte.

Several servers may share one log, as nodes do: what one stored, the others know. `homes` tells where tenants live; a
server that stores events of a tenant that lives elsewhere names its homes in the acknowledgement.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from outrider.v1.event_pb2 import Event
from outrider.v1.ingest_service_pb2 import (
    EventError,
    EventResult,
    Frame,
    FrameAck,
    FrameRefused,
    GoingAway,
    IdRange,
    LargeFrameGrant,
    PublishStreamRequest,
    PublishStreamResponse,
    StreamOpened,
    TenantHome,
    Window,
)

STEP = 1024
FRAME_EVENTS_MAX = 500
FRAME_BYTES_MAX = 1024 * 1024
LARGE_BYTES_MAX = 11 * 1024 * 1024


@dataclass(frozen=True)
class Take:
    """Store the frame and acknowledge it; `rejected` are (index, reason, message) of events with errors."""

    rejected: tuple[tuple[int, str, str], ...] = ()


@dataclass(frozen=True)
class Refuse:
    """Store nothing of it and say so."""

    reason: str = "OVERLOADED"
    retry_after_seconds: float = 0.0


@dataclass(frozen=True)
class Drop:
    """Break the stream: `stored` tells whether the frame became durable before."""

    stored: bool


@dataclass(frozen=True)
class End:
    """End the stream with a status."""

    code: grpc.StatusCode
    reason: str = ""
    stored: bool = False


@dataclass(frozen=True)
class SayGoingAway:
    """Take the frame, and announce the end of the stream before the answer."""


@dataclass(frozen=True)
class Resize:
    """Take the frame, and change the window before the answer."""

    frames: int
    bytes: int


Action = Take | Refuse | Drop | End | SayGoingAway | Resize
Script = Callable[[Frame], Action]


@dataclass
class _Producer:
    session: int = 0
    last_frame: int = 0
    acks: dict[int, FrameAck] = field(default_factory=dict)
    seen: dict[tuple[int, int], bytes] = field(default_factory=dict)


@dataclass
class Log:
    """What is stored: shared by all servers of a cluster."""

    events: list[tuple[str, int, Event]] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    """By which server each event came, its target."""
    producers: dict[str, _Producer] = field(default_factory=dict)
    homes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Addresses by tenant; several where it is split."""
    violations: list[str] = field(default_factory=list)
    next_id: int = 1_000_000


class ScriptedIngest:
    """The server. `async with ScriptedIngest() as server:` listens at `server.target`.

    `node` is the address that it gives for its own; by default that at which it listens.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        window_frames: int = 64,
        window_bytes: int = 8 * 1024 * 1024,
        api_key: str | None = None,
        keep_events: bool = True,
        node: str = "",
        log: Log | None = None,
    ) -> None:
        self.script: Script = script or (lambda _: Take())
        self.window_frames = window_frames
        self.window_bytes = window_bytes
        self.api_key = api_key
        self.keep_events = keep_events
        self.node = node
        self.shared = log or Log()
        self.log = self.shared.events
        self.violations = self.shared.violations
        self.producers = self.shared.producers
        self.homes = self.shared.homes
        self.events_stored = 0
        self.streams = 0
        self.sessions: list[int] = []
        self.frames_received = 0
        self.unanswered_frames_max = 0
        self.unanswered_bytes_max = 0
        self.answering = asyncio.Event()
        """Cleared, frames are received but not answered."""
        self.answering.set()
        self.received = asyncio.Condition()
        """Notified on each frame that arrives."""
        self.opened_by: list[str] = []
        """The producer of each stream, in order of their opening."""
        self.peers: set[str] = set()
        """The connections that streams came on."""
        self.target = ""
        self.port = 0
        self._streams: set[_Stream] = set()
        self._server: Any = None

    async def start(self, port: int = 0) -> None:
        # Ours pings every half minute; gRPC's default would take that for an attack.
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", 12 * 1024 * 1024),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ]
        )
        handler: Any = grpc.stream_stream_rpc_method_handler(
            self._publish_stream,
            request_deserializer=None,
            response_serializer=PublishStreamResponse.SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    "outrider.v1.IngestService", {"PublishStream": handler}
                )
            ]
        )
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.target = f"127.0.0.1:{self.port}"
        await self._server.start()

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(0)

    async def restart(self) -> None:
        """Come back on the same port with the same log."""
        await self.start(self.port)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.answering.set()
        await self.stop()

    def revoke(self) -> None:
        """Take the key back: streams end with UNAUTHENTICATED, new ones find it invalid."""
        self.api_key = "another"
        for stream in list(self._streams):
            stream.end(End(grpc.StatusCode.UNAUTHENTICATED, "REVOKED_API_KEY"))

    def break_streams(self) -> None:
        for stream in list(self._streams):
            stream.end(End(grpc.StatusCode.UNAVAILABLE))

    def go_away(self) -> None:
        """Tell every stream that this node drains."""
        for stream in list(self._streams):
            stream.announce()

    @property
    def listening(self) -> bool:
        return self._server is not None

    @property
    def streams_open(self) -> int:
        return len(self._streams)

    def payloads(self, tenant: str | None = None) -> list[bytes]:
        return [event.data for name, _, event in self.log if tenant in (None, name)]

    def violation(self, text: str) -> None:
        self.violations.append(text)

    async def _publish_stream(
        self, requests: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[PublishStreamResponse]:
        self.streams += 1
        self.peers.add(context.peer())
        if self.api_key is not None:
            given = dict(context.invocation_metadata()).get("authorization")
            if given != f"Bearer {self.api_key}":
                await _abort(context, End(grpc.StatusCode.UNAUTHENTICATED, "INVALID_API_KEY"))
        stream = _Stream(self)
        self._streams.add(stream)
        reader = asyncio.get_running_loop().create_task(stream.read(requests))
        try:
            async for response in stream.answers():
                yield response
        finally:
            self._streams.discard(stream)
            reader.cancel()
            await asyncio.wait([reader])
        if stream.ended is not None:
            await _abort(context, stream.ended)

    def store(self, producer: _Producer, frame: Frame, rejected: Iterable[Any] = ()) -> FrameAck:
        ack = FrameAck(number=frame.number)
        errors = {index: (reason, message) for index, reason, message in rejected}
        counts: dict[str, int] = {}
        for index, event in enumerate(frame.events):
            if index not in errors:
                tenant = event.tenant or frame.tenant
                counts[tenant] = counts.get(tenant, 0) + 1
        following: dict[str, int] = {}
        for tenant, count in counts.items():
            ack.ids.append(
                IdRange(tenant=tenant, first=self.shared.next_id, count=count, step=STEP)
            )
            following[tenant] = self.shared.next_id
            self.shared.next_id += count * STEP
            for address in self.homes.get(tenant, ()):
                if address != (self.node or self.target):
                    ack.homes.append(TenantHome(tenant=tenant, address=address))
        for index, event in enumerate(frame.events):
            if index in errors:
                reason, message = errors[index]
                error = EventError(reason=f"ERROR_REASON_{reason}", message=message)
                ack.results.append(EventResult(index=index, error=error))
                continue
            tenant = event.tenant or frame.tenant
            self.events_stored += 1
            if self.keep_events:
                self.log.append((tenant, following[tenant], event))
                self.shared.nodes.append(self.target)
            following[tenant] += STEP
        producer.last_frame = frame.number
        producer.acks[frame.number] = ack
        return ack


class _Stream:
    """One stream: a reader that takes what comes at once and counts it, answers in order behind it."""

    def __init__(self, server: ScriptedIngest) -> None:
        self.server = server
        self.ended: End | None = None
        self.producer = _Producer()
        self._session = 0
        self._inbox: deque[tuple[Frame, int] | int | None] = deque()
        self._arrived = asyncio.Event()
        self._frames = 0
        self._bytes = 0
        self._window = (server.window_frames, server.window_bytes)
        self._allowed = self._window
        # A client that has not read a smaller window yet has sent at most as many frames as were answered before it,
        # and one old window more. Up to that frame the old window counts.
        self._allowed_until = 0
        self._received = 0
        self._answered = 0
        self._grant = 0
        self._grant_asked = False
        self._refused: int | None = None
        self._announced = False

    def end(self, end: End) -> None:
        self.ended = self.ended or end
        self._arrived.set()

    def announce(self) -> None:
        self._announced = True
        self._arrived.set()

    async def read(self, requests: AsyncIterator[bytes]) -> None:
        first = True
        async for message in requests:
            request = PublishStreamRequest.FromString(message)
            kind = request.WhichOneof("message")
            if first != (kind == "open"):
                self.server.violation(f"{kind} where first is {first}")
                self.end(End(grpc.StatusCode.FAILED_PRECONDITION, "STREAM_NOT_OPEN"))
                return
            if kind == "open":
                first = False
                self._opened(request)
            elif kind == "large_frame":
                if self._grant_asked or self._grant:
                    self.server.violation(
                        "room asked for while another large frame has or awaits it"
                    )
                self._grant_asked = True
                self._inbox.append(request.large_frame.frame_bytes)
            else:
                self._receive(request.frame, message)
            self._arrived.set()
            async with self.server.received:
                self.server.received.notify_all()
        self._inbox.append(None)
        self._arrived.set()

    def _opened(self, request: PublishStreamRequest) -> None:
        server, opening = self.server, request.open
        self._session = opening.session
        server.sessions.append(opening.session)
        server.opened_by.append(opening.producer)
        producer = server.producers.setdefault(opening.producer, _Producer(opening.session))
        if opening.session < producer.session:
            self.end(End(grpc.StatusCode.ABORTED, "SESSION_SUPERSEDED"))
            return
        if opening.session > producer.session:
            producer.session, producer.last_frame = opening.session, 0
            producer.acks.clear()
        for other in list(server._streams):
            if other is not self and other.producer is producer:
                other.end(End(grpc.StatusCode.ABORTED))
        self.producer = producer

    def _receive(self, frame: Frame, message: bytes) -> None:
        server = self.server
        server.frames_received += 1
        size = frame.ByteSize()
        self._check_unchanged(frame, message)
        if len(frame.events) > FRAME_EVENTS_MAX or not frame.events:
            server.violation(f"frame {frame.number} has {len(frame.events)} events")
        # A grant is used by the frame that it was asked for, known by its size: whether another one is large depends on
        # which window its sender knew.
        if size == self._grant:
            if size > FRAME_BYTES_MAX and len(frame.events) != 1:
                server.violation(f"a large frame of {len(frame.events)} events")
            self._grant = 0
            counted = 0
        else:
            if size > FRAME_BYTES_MAX:
                server.violation(f"frame {frame.number} of {size} bytes without a grant")
            counted = size
        self._received += 1
        if self._received > self._allowed_until:
            self._allowed = self._window
        self._frames += 1
        self._bytes += counted
        server.unanswered_frames_max = max(server.unanswered_frames_max, self._frames)
        server.unanswered_bytes_max = max(server.unanswered_bytes_max, self._bytes)
        if self._frames > self._allowed[0] or self._bytes > self._allowed[1]:
            server.violation(f"{self._frames} frames, {self._bytes} bytes beyond {self._allowed}")
            self.end(End(grpc.StatusCode.FAILED_PRECONDITION, "CREDIT_EXCEEDED"))
        self._inbox.append((frame, counted))

    def _check_unchanged(self, frame: Frame, message: bytes) -> None:
        digest = hashlib.blake2b(message, digest_size=16).digest()
        known = self.producer.seen.setdefault((self._session, frame.number), digest)
        if known != digest:
            self.server.violation(f"frame {frame.number} came again with other bytes")

    async def answers(self) -> AsyncIterator[PublishStreamResponse]:
        while not self._session and self.ended is None:
            await self._more()
        if self.ended is not None:
            return
        yield PublishStreamResponse(
            opened=StreamOpened(
                last_frame=self.producer.last_frame,
                window=Window(frames=self._window[0], bytes=self._window[1]),
                frame_events_max=FRAME_EVENTS_MAX,
                frame_bytes_max=FRAME_BYTES_MAX,
                node=self.server.node or self.server.target,
            )
        )
        while self.ended is None:
            if self._announced:
                self._announced = False
                yield PublishStreamResponse(going_away=GoingAway())
                continue
            if not self._inbox or not self.server.answering.is_set():
                await self._more()
                continue
            item = self._inbox.popleft()
            if item is None:
                return
            if isinstance(item, int):
                self._grant_asked = False
                self._grant = item
                yield PublishStreamResponse(large_frame=LargeFrameGrant(frame_bytes=item))
                continue
            frame, counted = item
            for response in self._answer(frame):
                # Counted off before it leaves: a client may use the room as soon as it reads the answer.
                if response.HasField("ack") or response.HasField("refused"):
                    self._frames -= 1
                    self._bytes -= counted
                    self._answered += 1
                yield response

    async def _more(self) -> None:
        self._arrived.clear()
        if not self.server.answering.is_set():
            waits = [
                asyncio.ensure_future(self.server.answering.wait()),
                asyncio.ensure_future(self._arrived.wait()),
            ]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        else:
            await self._arrived.wait()

    def _answer(self, frame: Frame) -> list[PublishStreamResponse]:
        producer, server = self.producer, self.server
        if self._refused is not None:
            if frame.number != self._refused:
                return [_refusal(frame.number, Refuse("FRAME_OUT_OF_SEQUENCE"))]
            self._refused = None
        if frame.number <= producer.last_frame:
            again = FrameAck()
            again.CopyFrom(producer.acks[frame.number])
            again.duplicate = True
            return [PublishStreamResponse(ack=again)]
        if frame.number != producer.last_frame + 1:
            server.violation(f"frame {frame.number} after {producer.last_frame}")
            self.end(End(grpc.StatusCode.FAILED_PRECONDITION, "FRAME_OUT_OF_SEQUENCE"))
            return []
        return self._act(frame, server.script(frame))

    def _act(self, frame: Frame, action: Action) -> list[PublishStreamResponse]:
        match action:
            case Take():
                return [
                    PublishStreamResponse(
                        ack=self.server.store(self.producer, frame, action.rejected)
                    )
                ]
            case Refuse():
                self._refused = frame.number
                return [_refusal(frame.number, action)]
            case Drop():
                if action.stored:
                    self.server.store(self.producer, frame)
                self.end(End(grpc.StatusCode.UNAVAILABLE))
                return []
            case End():
                if action.stored:
                    self.server.store(self.producer, frame)
                self.end(action)
                return []
            case SayGoingAway():
                ack = self.server.store(self.producer, frame)
                return [
                    PublishStreamResponse(going_away=GoingAway()),
                    PublishStreamResponse(ack=ack),
                ]
            case Resize():
                new = (action.frames, action.bytes)
                self._allowed_until = self._answered + self._allowed[0]
                self._allowed = (max(new[0], self._allowed[0]), max(new[1], self._allowed[1]))
                self._window = new
                ack = self.server.store(self.producer, frame)
                return [
                    PublishStreamResponse(window=Window(frames=new[0], bytes=new[1])),
                    PublishStreamResponse(ack=ack),
                ]


def _refusal(number: int, refuse: Refuse) -> PublishStreamResponse:
    refused = FrameRefused(
        number=number, reason=f"ERROR_REASON_{refuse.reason}", message="scripted"
    )
    if refuse.retry_after_seconds:
        nanos = int(refuse.retry_after_seconds * 1e9)
        refused.retry_after.CopyFrom(
            duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)
        )
    return PublishStreamResponse(refused=refused)


async def _abort(context: Any, end: End) -> None:
    details = any_pb2.Any()
    details.Pack(error_details_pb2.ErrorInfo(reason=end.reason, domain="outrider"))
    status = status_pb2.Status(code=end.code.value[0], message="scripted", details=[details])
    trailing = (("grpc-status-details-bin", status.SerializeToString()),) if end.reason else ()
    await context.abort(end.code, "scripted", trailing_metadata=trailing)
