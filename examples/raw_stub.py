"""The ingest stream with generated stubs alone: frames, acknowledgements, credits (the window) and resume.

    python examples/raw_stub.py --target 127.0.0.1:4510 --api-key ... --tenant demo

`outrider.Publisher` does all of this and more; read this to write a client in another language. Half way it breaks its
own stream on purpose and goes on with a new one: what was unanswered is sent again, unchanged and in order, and the
server stores nothing twice. Rule: nothing but the contract in `ingest_service.proto` is relied upon.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import deque
from typing import TYPE_CHECKING

import grpc

from outrider.v1.error_reason_pb2 import ErrorReason
from outrider.v1.event_pb2 import Event
from outrider.v1.ingest_service_pb2 import (
    Frame,
    FrameAck,
    FrameRefused,
    OpenStream,
    PublishStreamRequest,
    PublishStreamResponse,
    Window,
)
from outrider.v1.ingest_service_pb2_grpc import IngestServiceStub

if TYPE_CHECKING:
    from outrider.v1.ingest_service_pb2_grpc import IngestServiceAsyncStub


class Producer:
    """The frames of one session: those not answered yet, in order, and how far the current stream has sent them."""

    def __init__(self, name: str, tenant: str) -> None:
        self.name = name
        self.tenant = tenant
        # Grows from life to life, as the contract asks.
        self.session = time.time_ns() // 1000
        self.unanswered: deque[Frame] = deque()
        self.number = 0
        self.sent = 0
        self.refused = False
        self.resume_after_seconds = 0.0
        self.window = Window()

    def add(self, events: list[Event]) -> None:
        """Number a frame. It keeps this number and these events until it is acknowledged."""
        self.number += 1
        self.unanswered.append(Frame(number=self.number, tenant=self.tenant, events=events))

    def next(self) -> Frame | None:
        """The next frame that the window has room for."""
        if self.refused or self.sent == len(self.unanswered):
            return None
        frame = self.unanswered[self.sent]
        under_way = sum(self.unanswered[i].ByteSize() for i in range(self.sent))
        if self.sent >= self.window.frames:
            return None
        if under_way + frame.ByteSize() > self.window.bytes:
            # A frame larger than the whole window would ask for room by `large_frame` first. These are small.
            return None
        self.sent += 1
        return frame

    def acknowledged(self, ack: FrameAck) -> None:
        """Answers come in the order of the frames, so it is the oldest."""
        frame = self.unanswered.popleft()
        assert frame.number == ack.number, "answers come in order"
        self.sent -= 1
        ranges = ", ".join(f"{r.tenant}: {r.count} ids from {r.first} by {r.step}" for r in ack.ids)
        print(f"  ack {ack.number}{' (was durable before)' if ack.duplicate else ''}: {ranges}")
        for result in ack.results:
            if result.HasField("error"):
                reason = ErrorReason.Name(result.error.reason)
                print(f"    event {result.index} rejected: {reason} {result.error.message}")
            else:
                print(f"    event {result.index} is a duplicate of {result.id}")

    def answered_by_refusal(self, refused: FrameRefused) -> None:
        """The first refusal tells the wait; all behind it are refused, too. Then everything goes again."""
        print(f"  refused {refused.number}: {ErrorReason.Name(refused.reason)}")
        if not self.refused:
            self.refused = True
            self.resume_after_seconds = (
                refused.retry_after.seconds + refused.retry_after.nanos / 1e9
            )
        self.sent -= 1


async def stream(
    stub: IngestServiceAsyncStub,
    metadata: tuple[tuple[str, str], ...],
    producer: Producer,
    cut: int,
) -> bool:
    """One stream. Returns True when every frame is acknowledged, False when it broke or ended before.

    `cut` breaks it on purpose after so many acknowledgements; 0 never does.
    """
    call = stub.PublishStream(metadata=metadata)
    opening = OpenStream(producer=producer.name, session=producer.session)
    await call.write(PublishStreamRequest(open=opening))
    response = await call.read()
    if not isinstance(response, PublishStreamResponse) or not response.HasField("opened"):
        return False
    opened = response.opened
    print(
        f"stream to {opened.node}: window {opened.window.frames} frames, {opened.window.bytes} bytes;"
        f" durable up to frame {opened.last_frame}"
    )
    producer.window.CopyFrom(opened.window)
    producer.sent = 0  # nothing was sent on this stream yet: every unanswered frame goes again
    producer.refused = False
    acks = 0
    draining = False
    while producer.unanswered:
        while not draining and (frame := producer.next()) is not None:
            print(f"  frame {frame.number}: {len(frame.events)} events")
            await call.write(PublishStreamRequest(frame=frame))
        if draining and not producer.sent:
            call.cancel()
            return False
        response = await call.read()
        if not isinstance(response, PublishStreamResponse):
            return False
        match response.WhichOneof("message"):
            case "ack":
                producer.acknowledged(response.ack)
                acks += 1
            case "refused":
                producer.answered_by_refusal(response.refused)
                if not producer.sent:
                    await asyncio.sleep(producer.resume_after_seconds)
                    producer.refused = False
            case "window":
                producer.window.CopyFrom(response.window)
            case "going_away":
                draining = True
            case _:
                pass
        if acks == cut != 0:
            print("breaking the stream on purpose")
            call.cancel()
            return False
    await call.done_writing()
    return True


async def publish(arguments: argparse.Namespace) -> None:
    """Publish the events; a broken stream is followed by another until all are acknowledged."""
    producer = Producer(arguments.producer, arguments.tenant)
    for first in range(0, arguments.events, arguments.frame_events):
        events = [
            Event(
                type="sales_order.created",
                source="examples/raw_stub",
                key=f"sales_orders/{n}",
                data=json.dumps({"order": {"number": n, "total": 100 + n}}).encode(),
            )
            for n in range(first, min(first + arguments.frame_events, arguments.events))
        ]
        producer.add(events)
    frames = producer.number
    cut = frames // 2
    metadata = (("authorization", f"Bearer {arguments.api_key}"),)
    async with grpc.aio.insecure_channel(arguments.target) as channel:
        stub = IngestServiceStub(channel)
        for attempt in range(arguments.attempts):
            try:
                if await stream(stub, metadata, producer, cut):
                    print(f"all {arguments.events} events in {frames} frames are durable")
                    return
            except grpc.aio.AioRpcError as error:
                print(f"stream failed: {error.code().name} {error.details()}")
                if error.code() in (
                    grpc.StatusCode.UNAUTHENTICATED,
                    grpc.StatusCode.PERMISSION_DENIED,
                    grpc.StatusCode.INVALID_ARGUMENT,
                ):
                    break
                await asyncio.sleep(min(5.0, 0.1 * 2**attempt))
            cut = 0
    raise SystemExit(f"{len(producer.unanswered)} frames were not acknowledged")


def main() -> None:
    """Read the arguments and publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", default="127.0.0.1:4510", help="host:port of the server")
    parser.add_argument("--api-key", required=True)
    parser.add_argument("--tenant", default="demo")
    parser.add_argument("--producer", default="raw-stub-example")
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--frame-events", type=int, default=10)
    parser.add_argument("--attempts", type=int, default=8, help="streams to try before giving up")
    asyncio.run(publish(parser.parse_args()))


if __name__ == "__main__":
    main()
