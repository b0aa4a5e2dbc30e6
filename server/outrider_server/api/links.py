"""Links: frames on their way to the node where their tenants live, and their answers back.

One link is one stream of one producer to one node. A message is a header (its length, then JSON) and the frame's bytes:

    -> {"producer", "session"}                    first
    -> {"number", "previous", "places"} + Frame   `previous`: (shard, number) pairs; `places`: indexes in the whole frame
    <- {"number", "result"} or {"number", "error"}  in order

Whether a portion is taken is decided at the home, by the numbers: a link that breaks leaves its frames refused for a
passing reason, and they come again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import grpc
import orjson

from outrider.v1 import ingest_service_pb2
from outrider_server.api.errors import ServicerContext
from outrider_server.api.frames import FrameReader
from outrider_server.api.interceptors import current_caller
from outrider_server.api.peers import Peers, RawCall, unreachable
from outrider_server.domain.access import Caller
from outrider_server.domain.errors import (
    Aborted,
    Exhausted,
    InvalidArgument,
    OutriderError,
    Unavailable,
)
from outrider_server.domain.frame import EventRefusal, FrameResult
from outrider_server.pipeline.admission import Admission
from outrider_server.telemetry.counters import HomesCounters

METHOD = "/outrider.node.v1.NodeService/Portions"
ANSWER_SECONDS_MAX = 10.0
"""A home that does not answer for so long is given up; the frames come again."""

_HEADER_LENGTH_BYTES = 4
_ERRORS: dict[str, type[OutriderError]] = {
    cls.__name__: cls for cls in (Aborted, Exhausted, InvalidArgument, Unavailable)
}


class Link:
    """The sending side. `seconds` gives monotonic seconds."""

    def __init__(
        self,
        peers: Peers,
        address: str,
        caller: Caller,
        producer: str | None,
        session: int,
        *,
        seconds: Callable[[], float],
    ) -> None:
        self.address = address
        self._peers = peers
        self._caller = caller
        self._hello = {"producer": producer, "session": session}
        self._seconds = seconds
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._waiting: deque[tuple[int, float, asyncio.Future[FrameResult]]] = deque()
        self._closed = False
        self._running = asyncio.ensure_future(self._run())

    @property
    def closed(self) -> bool:
        """Whether it takes no more frames."""
        return self._closed

    def submit(
        self,
        number: int,
        previous: Mapping[int, int],
        places: Sequence[int],
        frame: ingest_service_pb2.Frame,
    ) -> asyncio.Future[FrameResult]:
        """Send a portion behind the others; its answer, or an `OutriderError`. The caller bounds what is unanswered."""
        answer: asyncio.Future[FrameResult] = asyncio.get_running_loop().create_future()
        header = {"number": number, "previous": list(previous.items()), "places": list(places)}
        self._waiting.append((number, self._seconds(), answer))
        self._outgoing.put_nowait(_message(header, frame.SerializeToString()))
        return answer

    async def close(self) -> None:
        """End the link; what is unanswered is refused."""
        self._running.cancel()
        await asyncio.wait([self._running])

    async def _run(self) -> None:
        error: OutriderError = unreachable(self.address)
        try:
            async with self._peers.call(self.address, METHOD, self._caller, None) as call:
                await call.write(_message(self._hello))
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._write(call))
                    tasks.create_task(self._watch(call))
                    await self._read(call)
                    raise _Over
        except* OutriderError as group:
            error = _first(group)
        except* (grpc.aio.AioRpcError, asyncio.InvalidStateError, _Over):
            pass
        finally:
            self._closed = True
            while self._waiting:
                _, _, answer = self._waiting.popleft()
                if not answer.done():
                    answer.set_exception(error)

    async def _write(self, call: RawCall) -> None:
        while True:
            await call.write(await self._outgoing.get())

    async def _read(self, call: RawCall) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            told = orjson.loads(message)
            number, _, answer = self._waiting.popleft()
            if told["number"] != number:
                return
            if answer.done():
                continue
            if "error" in told:
                answer.set_exception(_decoded_error(told["error"]))
            else:
                answer.set_result(_decoded(told["result"]))

    async def _watch(self, call: RawCall) -> None:
        while True:
            await asyncio.sleep(ANSWER_SECONDS_MAX / 4)
            if self._waiting and self._seconds() - self._waiting[0][1] > ANSWER_SECONDS_MAX:
                call.cancel()
                raise unreachable(self.address)


class Portions:
    """The receiving side: the handler of `METHOD`."""

    def __init__(
        self,
        admission: Admission,
        reader: Callable[[Caller], FrameReader],
        counters: HomesCounters,
    ) -> None:
        self._admission = admission
        self._counters = counters
        self._reader = reader

    def handler(self) -> grpc.GenericRpcHandler:
        """To be added to a server; bytes in, bytes out."""
        service, _, method = METHOD.removeprefix("/").partition("/")
        return grpc.method_handlers_generic_handler(
            service, {method: grpc.stream_stream_rpc_method_handler(self.serve)}
        )

    async def serve(self, _: Any, context: ServicerContext) -> None:
        """Take portions in and answer them in order."""
        hello = await context.read()
        if hello is grpc.aio.EOF:
            return
        header, _ = _parts(hello)
        answers: asyncio.Queue[tuple[int, Callable[[], None], asyncio.Future[FrameResult]] | None]
        answers = asyncio.Queue()
        reader = self._reader(current_caller())
        try:
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(_write_answers(context, answers))
                while (message := await context.read()) is not grpc.aio.EOF:
                    answers.put_nowait(
                        await self._take(reader, header["producer"], header["session"], message)
                    )
                    del message
                answers.put_nowait(None)
                await writer
        finally:
            while not answers.empty():
                item = answers.get_nowait()
                if item is not None:
                    item[1]()
                    item[2].add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _take(
        self, reader: FrameReader, producer: str | None, session: int, message: bytes
    ) -> tuple[int, Callable[[], None], asyncio.Future[FrameResult]]:
        header, body = _parts(message)
        number = header["number"]
        self._counters.portions_taken += 1
        size = len(message)
        await self._admission.forwarded_room.take(size)
        release = partial(self._admission.forwarded_room.give_back, size)
        try:
            frame = ingest_service_pb2.Frame.FromString(body)
            portion = reader.read_here(frame.events, frame.tenant, header["places"])
            portion.previous = dict(header["previous"])
            # A frame without a sound event names its shard here only.
            portion.shards |= portion.previous.keys()
            return number, release, await self._admission.submit(producer, session, number, portion)
        except OutriderError as error:
            failed: asyncio.Future[FrameResult] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            return number, release, failed
        except BaseException:
            release()
            raise


async def _write_answers(
    context: ServicerContext,
    answers: asyncio.Queue[tuple[int, Callable[[], None], asyncio.Future[FrameResult]] | None],
) -> None:
    while (item := await answers.get()) is not None:
        number, release, answer = item
        told: dict[str, object] = {"number": number}
        try:
            told["result"] = _encoded(await answer)
        except OutriderError as error:
            told["error"] = [
                next(
                    (name for name, cls in _ERRORS.items() if isinstance(error, cls)), "Unavailable"
                ),
                error.reason,
                error.message,
                error.retry_after_seconds,
            ]
        finally:
            release()
        await context.write(orjson.dumps(told))


class _Over(Exception):
    """The other side ended the link."""


def _message(header: Mapping[str, object], body: bytes = b"") -> bytes:
    text = orjson.dumps(header)
    return len(text).to_bytes(_HEADER_LENGTH_BYTES, "big") + text + body


def _parts(message: bytes) -> tuple[dict[str, Any], bytes]:
    start = _HEADER_LENGTH_BYTES + int.from_bytes(message[:_HEADER_LENGTH_BYTES], "big")
    return orjson.loads(message[_HEADER_LENGTH_BYTES:start]), message[start:]


def _encoded(result: FrameResult) -> list[object]:
    refusals = [(r.index, r.reason, r.message) for r in result.refusals]
    return [result.ranges, refusals, result.duplicates, result.singles, result.duplicate]


def _decoded(told: list[Any]) -> FrameResult:
    ranges, refusals, duplicates, singles, duplicate = told
    return FrameResult(
        [(name, first, count) for name, first, count in ranges],
        [EventRefusal(*refusal) for refusal in refusals],
        [(index, sequence) for index, sequence in duplicates],
        [(index, sequence) for index, sequence in singles],
        duplicate,
    )


def _decoded_error(told: list[Any]) -> OutriderError:
    name, reason, message, retry_after_seconds = told
    return _ERRORS[name](reason, message, retry_after_seconds=retry_after_seconds)


def _first(group: BaseExceptionGroup[OutriderError]) -> OutriderError:
    found: list[BaseException] = [group]
    while isinstance(found[0], BaseExceptionGroup):
        found = list(found[0].exceptions)
    error = found[0]
    assert isinstance(error, OutriderError)
    with contextlib.suppress(AttributeError):
        error.__traceback__ = None
    return error
