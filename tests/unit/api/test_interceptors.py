"""What every kind of call goes through, on a channel of its own with plain handlers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

import grpc
import pytest
from tests.support.api import refusal

from outrider_server.access.keys import KeyRing
from outrider_server.api.interceptors import CallInterceptor, current_caller
from outrider_server.domain.access import Caller, Role
from outrider_server.domain.errors import NotFound, Unauthenticated

METADATA = (("authorization", "Bearer good"),)


class ScriptedKeys:
    """Knows one key, and counts who is held."""

    def __init__(self) -> None:
        self.held = 0
        self.caller = Caller("/k", Role.SYSTEM_ADMIN, None)

    async def authenticate(self, text: str) -> Caller:
        if text != "good":
            raise Unauthenticated("INVALID_API_KEY", "no")
        return self.caller

    @contextmanager
    def hold(self, caller: Caller) -> Any:
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1


async def generator(request: Any, context: Any) -> AsyncIterator[bytes]:
    """Answers with whose call it is, then fails as it is told."""
    yield current_caller().key_id.encode()
    if request == b"fail":
        raise NotFound("RESOURCE_NOT_FOUND", "gone")


async def writer(requests: Any, context: Any) -> None:
    await context.write(current_caller().key_id.encode())
    async for request in requests:
        if request == b"bug":
            raise ZeroDivisionError
        if request == b"abort":
            await context.abort(grpc.StatusCode.DATA_LOSS, "by hand")
        if request == b"wait":
            await asyncio.Event().wait()


@asynccontextmanager
async def served(
    keys: ScriptedKeys, observed: list[tuple[str, str, float]]
) -> AsyncIterator[grpc.aio.Channel]:
    ticks = itertools.count()
    interceptor = CallInterceptor(
        cast(KeyRing, keys),
        observe=lambda *ended: observed.append(ended),
        clock=lambda: float(next(ticks)),
        random=lambda count: b"\1" * count,
    )
    server = grpc.aio.server(interceptors=[interceptor])
    handlers = {
        "Generator": grpc.unary_stream_rpc_method_handler(generator),
        "Writer": grpc.stream_stream_rpc_method_handler(writer),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


async def test_streams_know_their_caller_who_is_held_as_long() -> None:
    keys, observed = ScriptedKeys(), list[tuple[str, str, float]]()
    async with served(keys, observed) as channel:
        answers = channel.unary_stream("/test.Test/Generator")(b"", metadata=METADATA)
        assert [answer async for answer in answers] == [b"/k"]
        call = channel.stream_stream("/test.Test/Writer")(metadata=METADATA)
        assert await call.read() == b"/k"
        assert keys.held == 1
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
    assert keys.held == 0
    assert observed == [("/test.Test/Generator", "OK", 1.0), ("/test.Test/Writer", "OK", 1.0)]


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [(b"bug", grpc.StatusCode.INTERNAL), (b"abort", grpc.StatusCode.DATA_LOSS)],
)
async def test_errors_of_streams_become_statuses(
    request_bytes: bytes, code: grpc.StatusCode
) -> None:
    keys, observed = ScriptedKeys(), list[tuple[str, str, float]]()
    async with served(keys, observed) as channel:
        call = channel.stream_stream("/test.Test/Writer")(metadata=METADATA)
        _ = await call.read()
        await call.write(request_bytes)
        assert (await refusal(call.read())).code is code
    assert (keys.held, observed[0][1]) == (0, code.name)


async def test_error_after_the_first_answer_becomes_a_status() -> None:
    keys, observed = ScriptedKeys(), list[tuple[str, str, float]]()
    async with served(keys, observed) as channel:
        call = channel.unary_stream("/test.Test/Generator")(b"fail", metadata=METADATA)

        async def read_all() -> list[bytes]:
            return [answer async for answer in call]

        refused = await refusal(read_all())
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")
    assert observed[0][1] == "NOT_FOUND"


async def test_stream_without_a_key_is_refused_before_it_begins() -> None:
    keys, observed = ScriptedKeys(), list[tuple[str, str, float]]()
    async with served(keys, observed) as channel:
        call = channel.stream_stream("/test.Test/Writer")()
        assert (await refusal(call.read())).reason == "MISSING_API_KEY"
    assert (keys.held, observed[0][1]) == (0, "UNAUTHENTICATED")


async def test_call_that_its_caller_gives_up_is_counted_as_cancelled() -> None:
    keys, observed = ScriptedKeys(), list[tuple[str, str, float]]()
    async with served(keys, observed) as channel:
        call = channel.stream_stream("/test.Test/Writer")(metadata=METADATA)
        assert await call.read() == b"/k"
        await call.write(b"wait")
        _ = call.cancel()
        async with asyncio.timeout(10):
            while not observed:
                await asyncio.sleep(0.01)
    assert (keys.held, observed[0][1]) == (0, "CANCELLED")
