"""What it costs to pass a frame on to the node where its tenant lives.

Two node processes with a real grpc.aio server each (uvloop, the server's own stack) and this process as the producer, which
keeps a window of 64 frames of 100 events in flight. Ways:

    local      the entry parses the frame and serves it itself
    forward    the entry parses, looks each event's tenant up, serialises the frame again and passes it as raw bytes on a
               stream to the home, which parses, serves and answers; the entry parses the answer and passes it on
    bundle N   as `forward`, but up to N frames that wait travel in one gRPC message, and so do answers
    split      as `forward`, but every other event lives at the entry: it serves those, passes a frame of the others on, and
               joins the answers
    relay      the entry passes the bytes it received (a frame that lives whole in one place), without serialising again
    socket     as `forward`, but on a plain TCP connection with lengths in front, without gRPC between the nodes

"Serving" is parsing the protobuf and making the domain's events of it, no more: what matching and the commit cost is the
same everywhere and not part of the question. CPU is that of the whole process, its gRPC threads included.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc

from benchmarks.children import Child
from benchmarks.loop import run_loop, until_told
from benchmarks.spikes.common import head, median, payload, table
from outrider.v1 import ingest_service_pb2
from outrider.v1.event_pb2 import Event as EventMessage
from outrider_server.domain.event import Event

EVENTS = 100
TENANTS = 10
WINDOW = 64
WAITING_MAX = 256
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
START_SECONDS_MAX = 30.0
SERVER_US_PER_FRAME = 1960.0
"""CPU of the whole path for 100 events, one process, `batched` of benchmarks/README.md: 19.6 us an event."""

PUBLISH = "/outrider.spike.Node/Publish"
FORWARD = "/outrider.spike.Node/Forward"
CPU = "/outrider.spike.Node/Cpu"
WAYS = ("local", "forward", "bundle 4", "bundle 16", "split", "relay", "socket")
OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
]

_LENGTH = struct.Struct("!I")

Request = ingest_service_pb2.PublishStreamRequest
Response = ingest_service_pb2.PublishStreamResponse


def serve(number: int, messages: Iterable[EventMessage]) -> bytes:
    """Make the domain's events of a frame's, as the ingest stream does; returns the serialised answer."""
    events = [
        Event(
            1,
            message.type,
            message.data or message.data_json.encode(),
            message.time.seconds * 1_000_000 + message.time.nanos // 1000
            if message.HasField("time")
            else 0,
            message.source,
            message.subject,
            message.key,
            message.organization,
            message.actor,
            message.idempotency_key,
        )
        for message in messages
    ]
    ack = ingest_service_pb2.FrameAck(number=number)
    ack.ids.add(tenant="tenant-1", first=number << 20, count=len(events), step=1024)
    return Response(ack=ack).SerializeToString()


def serve_bytes(data: bytes) -> bytes:
    """Parse a request and serve its frame."""
    frame = Request.FromString(data).frame
    return serve(frame.number, frame.events)


def pack(parts: Iterable[bytes]) -> bytes:
    """Several messages as one, each behind its length."""
    return b"".join(piece for part in parts for piece in (_LENGTH.pack(len(part)), part))


def unpack(data: bytes) -> list[bytes]:
    """The messages that `pack` joined."""
    parts, at = [], 0
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        parts.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return parts


class Link:
    """The entry's way to a home: `send` a frame's bytes, and its answer comes to the future, in order."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue(WAITING_MAX)
        self._open: deque[asyncio.Future[bytes]] = deque()

    async def send(self, frame: bytes) -> asyncio.Future[bytes]:
        """Queue a frame; waits while too many are queued."""
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        await self._waiting.put(frame)
        self._open.append(answer)
        return answer

    async def run_grpc(self, home: str, bundle: int) -> None:
        """Carry frames over one stream-stream call, up to `bundle` a message."""
        async with grpc.aio.insecure_channel(home, options=OPTIONS) as channel:
            call: Any = channel.stream_stream(FORWARD)(metadata=(("bundle", str(bundle)),))

            async def write() -> None:
                while True:
                    if bundle == 1:
                        await call.write(await self._waiting.get())
                    else:
                        await call.write(pack(await _take(self._waiting, bundle)))

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(write())
                while (message := await call.read()) is not grpc.aio.EOF:
                    for answer in [message] if bundle == 1 else unpack(message):
                        self._open.popleft().set_result(answer)

    async def run_socket(self, port: int) -> None:
        """Carry frames over a TCP connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def write() -> None:
            while True:
                writer.write(pack(await _take(self._waiting, 16)))
                await writer.drain()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(write())
            try:
                while True:
                    answer = await _read_part(reader)
                    self._open.popleft().set_result(answer)
            except asyncio.IncompleteReadError:
                writer.close()


class Node:
    """One process: entry and home at once. `home` is told by the producer in the call's metadata."""

    def __init__(self) -> None:
        self.homes = {f"tenant-{number}": number for number in range(TENANTS)}

    async def stream(self, _: Any, context: Any) -> None:
        """Publish: read frames, answer in order."""
        asked = dict(context.invocation_metadata())
        way = asked["way"]
        if way == "local":
            while (data := await context.read()) is not grpc.aio.EOF:
                await context.write(serve_bytes(data))
            return
        link = Link()
        answers: asyncio.Queue[tuple[bytes, asyncio.Future[bytes]] | None] = asyncio.Queue()

        async def answer() -> None:
            while (waiting := await answers.get()) is not None:
                own, passed_on = waiting
                response = Response.FromString(await passed_on)
                if own:
                    response.ack.ids.extend(Response.FromString(own).ack.ids)
                await context.write(response.SerializeToString())

        async with asyncio.TaskGroup() as tasks:
            if way == "socket":
                carrying = tasks.create_task(link.run_socket(int(asked["port"])))
            else:
                bundle = int(way.partition(" ")[2] or 1)
                carrying = tasks.create_task(link.run_grpc(asked["home"], bundle))
            writer = tasks.create_task(answer())
            homes = self.homes
            while (data := await context.read()) is not grpc.aio.EOF:
                request = Request.FromString(data)
                frame = request.frame
                tenant = frame.tenant
                for event in frame.events:
                    _ = homes[event.tenant or tenant]
                if way == "split":
                    away = ingest_service_pb2.Frame(number=frame.number, tenant=tenant)
                    away.events.extend(e for e in frame.events if homes[e.tenant or tenant] % 2)
                    here = [e for e in frame.events if not homes[e.tenant or tenant] % 2]
                    passed_on = await link.send(Request(frame=away).SerializeToString())
                    answers.put_nowait((serve(frame.number, here), passed_on))
                    continue
                raw = data if way == "relay" else request.SerializeToString()
                answers.put_nowait((b"", await link.send(raw)))
            answers.put_nowait(None)
            await writer
            carrying.cancel()

    async def forwarded(self, _: Any, context: Any) -> None:
        """Forward: frames of another node."""
        bundle = int(dict(context.invocation_metadata())["bundle"])
        while (data := await context.read()) is not grpc.aio.EOF:
            if bundle == 1:
                await context.write(serve_bytes(data))
            else:
                await context.write(pack(serve_bytes(part) for part in unpack(data)))

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Frames of another node over TCP."""
        try:
            while True:
                data = await _read_part(reader)
                writer.write(pack([serve_bytes(data)]))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def cpu(self, _: bytes, __: Any) -> bytes:
        """CPU time of this process so far."""
        return repr(time.process_time()).encode()


async def _take(queue: asyncio.Queue[bytes], count: int) -> list[bytes]:
    taken = [await queue.get()]
    while len(taken) < count and not queue.empty():
        taken.append(queue.get_nowait())
    return taken


async def _read_part(reader: asyncio.StreamReader) -> bytes:
    (length,) = _LENGTH.unpack(await reader.readexactly(4))
    return await reader.readexactly(length)


async def node_process() -> None:
    """Serve until standard input ends; says its ports first."""
    node = Node()
    server = grpc.aio.server(options=OPTIONS)
    handlers: dict[str, Any] = {
        "Publish": grpc.stream_stream_rpc_method_handler(node.stream),
        "Forward": grpc.stream_stream_rpc_method_handler(node.forwarded),
        "Cpu": grpc.unary_unary_rpc_method_handler(node.cpu),
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("outrider.spike.Node", handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    plain = await asyncio.start_server(node.connected, "127.0.0.1", 0, limit=1 << 20)
    print(f"{port} {plain.sockets[0].getsockname()[1]}", flush=True)
    async for _ in until_told():
        pass
    plain.close()
    await server.stop(0)


def frames() -> list[bytes]:
    """Serialised requests; numbers do not matter here."""
    made = []
    for number in range(1, WINDOW + 1):
        frame = ingest_service_pb2.Frame(number=number)
        for index in range(EVENTS):
            event = EventMessage(
                tenant=f"tenant-{index % TENANTS}",
                type="sales_order.created",
                source="spike",
                key=f"order-{index}",
                data=payload(number * EVENTS + index),
            )
            event.time.FromNanoseconds(1_795_000_000_000_000_000)
            frame.events.append(event)
        made.append(Request(frame=frame).SerializeToString())
    return made


async def one_turn(
    channel: Any, way: str, home: str, port: int, seconds: float
) -> tuple[int, float]:
    """Publish with a full window for `seconds`; (frames answered, seconds it took)."""
    requests = frames()
    call = channel.stream_stream(PUBLISH)(
        metadata=(("way", way), ("home", home), ("port", str(port)))
    )
    room = asyncio.Semaphore(WINDOW)
    answered = 0
    begin = time.perf_counter()

    async def read() -> None:
        nonlocal answered
        while await call.read() is not grpc.aio.EOF:
            answered += 1
            room.release()

    reading = asyncio.get_running_loop().create_task(read())
    sent = 0
    while time.perf_counter() - begin < seconds:
        await room.acquire()
        await call.write(requests[sent % WINDOW])
        sent += 1
    await call.done_writing()
    await reading
    if answered != sent:
        raise RuntimeError(f"{way}: {sent} frames sent, {answered} answered")
    return answered, time.perf_counter() - begin


async def run(quick: bool) -> None:  # noqa: FBT001 - the one option of every spike
    """Take turns and print the table."""
    turns, seconds = (1, 1.0) if quick else (7, 3.0)
    head("forwarder", f"passing on frames of {EVENTS} events of {len(payload(1))} bytes")
    children: list[Child] = []
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    try:
        addresses = []
        for name in ("entry", "home"):
            child = await Child.start(
                f"outrider-spike-{os.getpid()}-{name}",
                ["-m", "benchmarks.spikes.forwarder"],
                folder,
                dict(os.environ),
            )
            children.append(child)
            addresses.append([int(p) for p in (await child.line(START_SECONDS_MAX)).split()])
        await _measure(addresses, turns, seconds)
    finally:
        for child in children:
            await child.end(10.0)
            child.log.unlink(missing_ok=True)


async def _measure(addresses: list[list[int]], turns: int, seconds: float) -> None:
    (entry, _), (home, home_plain) = addresses
    targets = [f"127.0.0.1:{port}" for port in (entry, home)]
    channels: list[Any] = [grpc.aio.insecure_channel(target, options=OPTIONS) for target in targets]
    rows: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}

    async def cpu() -> list[float]:
        return [float(await channel.unary_unary(CPU)(b"")) for channel in channels]

    for way in WAYS:
        await one_turn(channels[0], way, targets[1], home_plain, 0.3)
    for turn in range(turns):
        for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
            before = await cpu()
            count, took = await one_turn(channels[0], way, targets[1], home_plain, seconds)
            after = await cpu()
            used = [(b - a) / count * 1e6 for a, b in zip(before, after, strict=True)]
            rows[way].append((used[0], used[1], count / took))
    for channel in channels:
        await channel.close()
    medians = {way: [median(c) for c in zip(*r, strict=True)] for way, r in rows.items()}
    local = medians["local"]
    made = frames()[0]
    print(
        f"frame of {len(made):,} bytes; {turns} turns of {seconds:g} s; parse {_cost(lambda: Request.FromString(made)):.0f} us, "
        f"serialise {_cost(Request.FromString(made).SerializeToString):.0f} us, "
        f"parse and make events {_cost(lambda: serve_bytes(made)):.0f} us\n"
    )
    table(
        [
            "way", "entry CPU us/frame", "home CPU us/frame", "both", "more than local",
            f"share of a whole path of {SERVER_US_PER_FRAME:,.0f} us", "frames/s (three processes on two cores)",
            "ratio to local",
        ],
        [
            (
                way, m[0], m[1], m[0] + m[1], m[0] + m[1] - local[0] - local[1],
                f"{(m[0] + m[1] - local[0] - local[1]) / SERVER_US_PER_FRAME:.1%}", m[2], m[2] / local[2],
            )
            for way, m in medians.items()
        ],
    )  # fmt: skip


def _cost(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(5):
        begin = time.thread_time()
        for _ in range(200):
            call()
        best = min(best, (time.thread_time() - begin) / 200 * 1e6)
    return best


if __name__ == "__main__":
    run_loop(node_process())
