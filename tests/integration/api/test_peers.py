"""Calls to other nodes: only to proved ones, over as many connections as they need, and single ones wait for no link."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest

from outrider_server.access.nodes import PROOF, NodeAuthenticator
from outrider_server.api.peers import Peers, PeerStatus, RawCall
from outrider_server.domain.access import Caller, Role
from outrider_server.domain.errors import Unavailable

METHOD = "/test.Node/Echo"
STREAMS_MAX = 4
CALLER = Caller("key-1", Role.PUBLISHER, 7)
KEY = b"k" * 32


def authenticator(key: bytes = KEY) -> NodeAuthenticator:
    return NodeAuthenticator([key], now_us=lambda: time.time_ns() // 1000, random=os.urandom)


class Home:
    """A node that answers each message of a call with itself; it knows which connection each open call is on."""

    def __init__(self, key: bytes = KEY) -> None:
        self.address = ""
        self.key = key
        self.callers: list[Caller] = []
        self.open: Counter[str] = Counter()
        self._authenticator = authenticator(key)

    @property
    def calls(self) -> list[int]:
        """Open calls by connection, the fullest first."""
        return sorted((count for count in self.open.values() if count), reverse=True)

    @property
    def connections(self) -> int:
        """All that there were."""
        return len(self.open)

    async def has(self, *calls: int) -> None:
        """Wait until it has so many open calls by connection."""
        async with asyncio.timeout(10):
            while self.calls != list(calls):
                await asyncio.sleep(0.005)

    async def serve(self, _: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        caller, proof = self._authenticator.answer(metadata, self.address, METHOD)
        self.callers.append(caller)
        self.open[context.peer()] += 1
        try:
            await context.send_initial_metadata(((PROOF, proof),))
            while (message := await context.read()) is not grpc.aio.EOF:
                if message == b"fail":
                    await context.abort(
                        grpc.StatusCode.NOT_FOUND,
                        "no such thing",
                        (("grpc-status-details-bin", b"why"),),
                    )
                await context.write(message)
        finally:
            self.open[context.peer()] -= 1


@asynccontextmanager
async def homes(count: int, key: bytes = KEY) -> AsyncIterator[list[Home]]:
    """Nodes that let a connection carry `STREAMS_MAX` calls at a time."""
    found = []
    async with AsyncExitStack() as stack:
        for _ in range(count):
            home = Home(key)
            server = grpc.aio.server(options=[("grpc.max_concurrent_streams", STREAMS_MAX)])
            handlers: dict[str, Any] = {"Echo": grpc.stream_stream_rpc_method_handler(home.serve)}
            server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler("test.Node", handlers),)
            )
            home.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            stack.push_async_callback(server.stop, None)
            found.append(home)
        yield found


@asynccontextmanager
async def wire(home: Home) -> AsyncIterator[set[asyncio.Task[None]]]:
    """Every connection to a home passes here; those that are open."""
    host, _, port = home.address.rpartition(":")
    found: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        found.add(task)
        home_reader, home_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, home_writer), copy(home_reader, writer))
        found.discard(task)

    async with await asyncio.start_server(pass_on, host, 0) as server:
        home.address = f"{host}:{server.sockets[0].getsockname()[1]}"
        yield found
        if found:
            _, left = await asyncio.wait(found, timeout=5)
            assert not left, "connections outlive the peers"


@pytest.fixture
async def home() -> AsyncIterator[Home]:
    async with homes(1) as (home,):
        yield home


@asynccontextmanager
async def peers(**bounds: Any) -> AsyncIterator[Peers]:
    found = Peers(authenticator(), **bounds)
    try:
        yield found
    finally:
        await found.close()


async def open_call(stack: AsyncExitStack, found: Peers, home: Home) -> RawCall:
    return await stack.enter_async_context(found.call(home.address, METHOD, CALLER, None))


async def echoes(call: RawCall, text: bytes = b"x") -> None:
    await call.write(text)
    assert await call.read() == text


async def test_more_calls_stay_open_than_a_connection_carries(home: Home) -> None:
    async with peers(calls_max=2) as found, AsyncExitStack() as stack:
        calls = [await open_call(stack, found, home) for _ in range(3 * STREAMS_MAX)]
        for number, call in enumerate(calls):
            await echoes(call, b"%d" % number)
        assert home.calls == [2] * 6
        assert home.callers == [CALLER] * 12


async def test_calls_share_a_connection_until_it_has_enough(home: Home) -> None:
    async with peers(calls_max=3) as found, AsyncExitStack() as stack:
        for _ in range(3):
            await open_call(stack, found, home)
        assert home.calls == [3]
        await open_call(stack, found, home)
        assert home.calls == [3, 1]
        # Further ones go where there is most room, and none is opened before all have enough.
        await open_call(stack, found, home)
        await open_call(stack, found, home)
        assert home.calls == [3, 3]
        await open_call(stack, found, home)
        assert home.calls == [3, 3, 1]


async def test_connections_to_a_peer_have_a_bound(home: Home) -> None:
    async with (
        peers(calls_max=1, channels_max=2, connect_seconds=0.3) as found,
        AsyncExitStack() as stack,
    ):
        calls = [await open_call(stack, found, home) for _ in range(2 * STREAMS_MAX)]
        assert home.calls == [STREAMS_MAX] * 2
        with pytest.raises(Unavailable):
            await open_call(stack, found, home)
        for call in calls:
            await echoes(call)
        assert home.connections == 2


async def test_the_place_of_a_call_that_ended_is_used_again(home: Home) -> None:
    async with peers(calls_max=2) as found:
        for _ in range(5):
            async with AsyncExitStack() as stack:
                for _ in range(4):
                    await echoes(await open_call(stack, found, home))
            await home.has()
        with pytest.raises(RuntimeError):
            async with found.call(home.address, METHOD, CALLER, None):
                raise RuntimeError
        await home.has()
        assert home.connections == 2


async def test_single_calls_do_not_wait_for_calls_that_stay_open(home: Home) -> None:
    async with peers(channels_max=1, connect_seconds=0.3) as found, AsyncExitStack() as stack:
        for _ in range(STREAMS_MAX):
            await open_call(stack, found, home)
        with pytest.raises(Unavailable):  # the connection of such calls is full
            await open_call(stack, found, home)
        for number in range(2 * STREAMS_MAX):
            text = b"%d" % number
            assert await found.forward(home.address, METHOD, CALLER, text, 10.0) == text
        assert home.connections == 2


async def test_a_single_call_ends_as_it_ended_at_its_home(home: Home) -> None:
    async with peers() as found:
        with pytest.raises(PeerStatus) as caught:
            await found.forward(home.address, METHOD, CALLER, b"fail", 10.0)
        assert (caught.value.code, caught.value.message, caught.value.details) == (
            grpc.StatusCode.NOT_FOUND,
            "no such thing",
            b"why",
        )
        assert await found.forward(home.address, METHOD, CALLER, b"well", None) == b"well"


async def test_nothing_is_sent_to_a_peer_that_proves_nothing() -> None:
    async with homes(1, key=b"f" * 32) as (foreign,), peers(connect_seconds=5.0) as found:
        with pytest.raises(Unavailable):
            await found.forward(foreign.address, METHOD, CALLER, b"secret", 10.0)
        assert foreign.callers == []
    async with peers(connect_seconds=0.3) as found:
        with pytest.raises(Unavailable):  # nobody listens any more
            await found.forward(foreign.address, METHOD, CALLER, b"secret", 10.0)


async def test_a_peer_that_is_put_out_keeps_its_open_calls_and_is_closed_after_them() -> None:
    async with (
        homes(3) as (one, two, three),
        wire(one) as wire_one,
        wire(two) as wire_two,
        peers(peers_max=2, calls_max=1) as found,
    ):

        async def connections(ones: int, twos: int) -> None:
            async with asyncio.timeout(10):
                while (len(wire_one), len(wire_two)) != (ones, twos):
                    await asyncio.sleep(0.005)

        async with AsyncExitStack() as first:
            calls = [await open_call(first, found, one) for _ in range(2)]
            await found.forward(two.address, METHOD, CALLER, b"x", 10.0)
            # The third takes the place of the first, which was used least lately.
            await found.forward(three.address, METHOD, CALLER, b"x", 10.0)
            for call in calls:
                await echoes(call)
            assert one.calls == [1, 1]
            # Asked for again, it is a peer anew, and puts out the second: nothing is open there.
            async with found.call(one.address, METHOD, CALLER, None) as again:
                await echoes(again)
                await connections(3, 0)
                await found.forward(two.address, METHOD, CALLER, b"x", 10.0)
                await connections(3, 1)
            for call in calls:
                await echoes(call)
        del (
            call,
            calls,
            again,
        )  # gRPC keeps a connection for as long as something names a call of it
        # Of the first only the later channel is left, as the peer that it is.
        await connections(1, 1)
        await found.forward(one.address, METHOD, CALLER, b"x", 10.0)


async def test_closing_ends_the_calls_of_all_peers_also_of_those_put_out() -> None:
    async with homes(2) as (one, two), AsyncExitStack() as stack:
        async with peers(peers_max=1) as found:
            calls = [await open_call(stack, found, home) for home in (one, two)]
            for call in calls:
                await echoes(call)
        await one.has()
        await two.has()
        for call in calls:
            assert await call.code() is grpc.StatusCode.CANCELLED
