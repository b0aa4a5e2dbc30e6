"""A whole node in the test's own loop, on a database of the test's own, spoken to over a real channel.

    async with running(database.dsn, tmp_path, lane_deliveries_max=10) as node:
        tenant = await node.tenant("demo")
        endpoint = await tenant.endpoint("hook", url=receiver.url("/hook"))
        await tenant.subscription(endpoint, types=["sales.*"])
        async with node.stream(tenant.publisher) as stream:
            await stream.open("sales-1", 1)
            ack = await stream.publish(1, tenant="demo", events=[event("sales.made")])

Every wait has an end: what does not come within `SECONDS_MAX` fails the test.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import asyncpg
import grpc
from google.protobuf import json_format
from tests.support.api import As, Refusal, taken_apart

from outrider.v1 import (
    api_key_pb2,
    api_key_service_pb2,
    endpoint_service_pb2,
    event_pb2,
    ingest_service_pb2,
    ingest_service_pb2_grpc,
    subscription_service_pb2,
    tenant_service_pb2,
)
from outrider.v1.error_reason_pb2 import ErrorReason
from outrider_server.access.keys import create_admin_key
from outrider_server.app import Node
from outrider_server.pipeline.tenure import Tenure
from outrider_server.settings import Settings
from outrider_server.storage.ledger import Balance, balance

SECONDS_MAX = 10.0
POLL_SECONDS = 0.01
MIB = 1024 * 1024

T = TypeVar("T")


def event(type_: str = "sales.made", data: bytes | str = b'{"total": 1}', **fields: Any) -> Any:
    """An event as a module sends it: bytes, or JSON text where `data` is a string."""
    payload = {"data_json": data} if isinstance(data, str) else {"data": data}
    return event_pb2.Event(type=type_, **payload, **fields)


def reason_of(number: int) -> str:
    """The name of a reason without its prefix."""
    return ErrorReason.Name(number).removeprefix("ERROR_REASON_")


def errors_of(results: Iterable[Any]) -> dict[int, str]:
    """The reasons of the events that were refused, by place."""
    return {r.index: reason_of(r.error.reason) for r in results if r.HasField("error")}


def ids_of(ack: Any, tenants: list[str]) -> list[int | None]:
    """The ids of a frame's events, by the rule of the contract; `tenants` are those of its events. None: refused."""
    told = {result.index: result for result in ack.results}
    following = {
        r.tenant: iter(range(r.first, r.first + r.count * r.step, r.step)) for r in ack.ids
    }
    ids: list[int | None] = []
    for index, tenant in enumerate(tenants):
        if index in told:
            ids.append(told[index].id if told[index].HasField("id") else None)
        else:
            ids.append(next(following[tenant]))
    for tenant, rest in following.items():
        assert not list(rest), f"ids of {tenant} that no event has"
    return ids


async def soon(work: Awaitable[T]) -> T:
    """The result of `work`, which must come in time."""
    async with asyncio.timeout(SECONDS_MAX):
        return await work


async def until(condition: Callable[[], object]) -> None:
    """Until a condition of this process holds, where nothing but looking tells."""
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():
            await asyncio.sleep(POLL_SECONDS)


class RawStream:
    """A publish stream as the generated stub gives it: nothing is counted, kept or sent again."""

    def __init__(self, channel: grpc.aio.Channel, key: str | None) -> None:
        metadata = () if key is None else (("authorization", f"Bearer {key}"),)
        self.call = ingest_service_pb2_grpc.IngestServiceStub(channel).PublishStream(
            metadata=metadata
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.call.cancel()
        with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await self.call.code()

    async def write(self, **message: Any) -> None:
        """Send one message; that the stream ended meanwhile is told by `answer`."""
        with suppress(asyncio.InvalidStateError):
            await soon(self.call.write(ingest_service_pb2.PublishStreamRequest(**message)))

    async def send(self, number: int, events: Iterable[Any] = (), tenant: str = "demo") -> None:
        """Send a frame."""
        await self.write(
            frame=ingest_service_pb2.Frame(number=number, tenant=tenant, events=events)
        )

    async def answer(self) -> Any:
        """The next message of the server, which must come."""
        response = await soon(self.call.read())
        assert response is not grpc.aio.EOF, "the stream ended"
        return response

    async def open(self, producer: str = "sales-1", session: int = 1) -> Any:
        """Open the stream; what the server says to it."""
        await self.write(open=ingest_service_pb2.OpenStream(producer=producer, session=session))
        response = await self.answer()
        assert response.WhichOneof("message") == "opened", response
        return response.opened

    async def ack(self, number: int) -> Any:
        """The next answer, which must be this frame's acknowledgement."""
        response = await self.answer()
        assert response.WhichOneof("message") == "ack", response
        assert response.ack.number == number
        return response.ack

    async def refused(self, number: int) -> str:
        """The next answer, which must refuse this frame: its reason."""
        response = await self.answer()
        assert response.WhichOneof("message") == "refused", response
        assert response.refused.number == number
        return reason_of(response.refused.reason)

    async def publish(self, number: int, events: Iterable[Any], tenant: str = "demo") -> Any:
        """Send a frame and take its acknowledgement."""
        await self.send(number, events, tenant)
        return await self.ack(number)

    async def grant(self, frame_bytes: int) -> None:
        """Ask for room for a large frame and wait for it."""
        await self.write(large_frame=ingest_service_pb2.LargeFrameRequest(frame_bytes=frame_bytes))
        response = await self.answer()
        assert response.WhichOneof("message") == "large_frame", response
        assert response.large_frame.frame_bytes == frame_bytes

    async def error(self) -> Refusal:
        """The error that ends the stream, answers before it passed over."""
        try:
            async with asyncio.timeout(SECONDS_MAX):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
        except grpc.aio.AioRpcError as error:
            return taken_apart(error)
        raise AssertionError("the stream ended without an error")


@dataclass
class TestTenant:
    """A tenant of a running node, with a key for each role."""

    __test__ = False

    node: RunningNode
    name: str
    admin_key: str
    publisher: str

    @property
    def admin(self) -> As:
        """Calls with the integration admin's key."""
        return As(self.node.channel, self.admin_key)

    async def endpoint(self, name: str, url: str, **fields: Any) -> str:
        """Make an endpoint; its resource name. Retries come soon where nothing else is said."""
        fields.setdefault("retry", {"base": "0.01s", "factor": 1, "maximum": "0.05s"})
        request = json_format.ParseDict(
            {
                "parent": f"tenants/{self.name}",
                "endpoint_id": name,
                "endpoint": {"url": url, **fields},
            },
            endpoint_service_pb2.CreateEndpointRequest(),
        )
        return str((await self.admin.call("CreateEndpoint", request)).name)

    async def subscription(
        self, endpoint: str, name: str = "", types: Iterable[str] = ("*",), filter_: str = ""
    ) -> str:
        """Make a subscription; its resource name."""
        request = subscription_service_pb2.CreateSubscriptionRequest(
            parent=f"tenants/{self.name}",
            subscription_id=name,
            subscription={"endpoint": endpoint, "types": types, "filter": filter_},
        )
        return str((await self.admin.call("CreateSubscription", request)).name)

    def stream(self) -> RawStream:
        """A new stream with the publisher's key."""
        return RawStream(self.node.channel, self.publisher)

    async def publish(self, *events: Any) -> list[Any]:
        """Publish in one call; the results."""
        return await self.node.publish(self.publisher, self.name, events)


class RunningNode:
    """A node under test. `node` is the one of the moment: `start` makes another over the same database."""

    def __init__(self, dsn: str, settings: Settings, database_folder: Path | None) -> None:
        self.dsn = dsn
        self.settings = settings
        self.admin_key = ""
        self.node: Node
        self.channel: grpc.aio.Channel
        self._database_folder = database_folder
        self._task: asyncio.Task[None] | None = None

    @property
    def tenure(self) -> Tenure:
        """The tenure of the moment."""
        tenure = self.node._admission.tenure
        assert tenure is not None, "the node holds no shards"
        return tenure

    @property
    def admin(self) -> As:
        """Calls with a system admin's key."""
        return As(self.channel, self.admin_key)

    async def start(self, *, serving: bool = True) -> None:
        """Run a new node until it serves, or until it can be spoken to."""
        self.node = Node(self.settings, self.dsn, database_folder=self._database_folder)
        self._task = asyncio.get_running_loop().create_task(self.node.run())
        if serving:
            await self.serves()
        else:
            task = self._task
            await until(lambda: self.node.port or task.done())
        self.channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{self.node.port}",
            options=[("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)],
        )

    async def serves(self) -> None:
        """Until it holds shards and serves; raises what it ended with before."""
        assert self._task is not None
        ready = asyncio.ensure_future(self.node.ready())
        done, _ = await soon(asyncio.wait((ready, self._task), return_when=asyncio.FIRST_COMPLETED))
        if self._task in done:
            ready.cancel()
            await self._task  # tells why
            raise AssertionError("the node ended before it was ready")

    async def stop(self) -> None:
        """Drain and end; raises what the node ended with."""
        if self._task is None:
            return
        task, self._task = self._task, None
        self.node.stop()
        try:
            await self.channel.close()
        finally:
            await soon(task)

    async def crash(self) -> None:
        """End without any goodbye, as far as that can be within a process: nothing is drained or recorded."""
        assert self._task is not None
        task, self._task = self._task, None
        await self.channel.close()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await soon(task)

    async def ended(self) -> BaseException | None:
        """What the node ends with by itself."""
        assert self._task is not None
        task, self._task = self._task, None
        await soon(asyncio.wait([task]))
        await self.channel.close()
        return task.exception()

    async def restart(self) -> None:
        """Stop, then run a new node."""
        await self.stop()
        await self.start()

    async def next_tenure(self, before: Tenure) -> None:
        """Until another tenure than this serves."""
        await until(lambda: self.node._admission.tenure not in (None, before))

    def stream(self, key: str | None) -> RawStream:
        """A new publish stream with this key."""
        return RawStream(self.channel, key)

    async def publish(self, key: str, tenant: str, events: Iterable[Any]) -> list[Any]:
        """A unary publish; its results."""
        response = await ingest_service_pb2_grpc.IngestServiceStub(self.channel).Publish(
            ingest_service_pb2.PublishRequest(parent=f"tenants/{tenant}", events=events),
            metadata=(("authorization", f"Bearer {key}"),),
            timeout=SECONDS_MAX,
        )
        return list(response.results)

    async def tenant(self, name: str = "demo", **fields: Any) -> TestTenant:
        """Make a tenant with an integration admin's and a publisher's key."""
        await self.admin.call(
            "CreateTenant", tenant_service_pb2.CreateTenantRequest(tenant_id=name, tenant=fields)
        )
        admin = await self.key(name, api_key_pb2.ApiKey.ROLE_INTEGRATION_ADMIN)
        publisher = await self.key(name, api_key_pb2.ApiKey.ROLE_PUBLISHER, "publisher")
        return TestTenant(self, name, admin, publisher)

    async def key(self, tenant: str, role: Any, name: str = "") -> str:
        """Make a key of a tenant; its text."""
        made = await self.admin.call(
            "CreateApiKey",
            api_key_service_pb2.CreateApiKeyRequest(
                parent=f"tenants/{tenant}", api_key_id=name, api_key={"role": role}
            ),
        )
        return str(made.key)

    async def fetch(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        """Ask the database directly."""
        connection = await asyncpg.connect(self.dsn)
        try:
            return await connection.fetch(statement, *arguments)
        finally:
            await connection.close()

    async def stored(self, tenant: str = "demo") -> dict[int, asyncpg.Record]:
        """The events of a tenant in the log, by id."""
        rows = await self.fetch(
            "SELECT event.* FROM event JOIN tenant ON tenant.id = event.tenant"
            " WHERE tenant.name = $1 ORDER BY sequence",
            tenant,
        )
        return {row["sequence"]: row for row in rows}

    async def balances(self) -> dict[str, Balance]:
        """Every tenant's balance, each of which must hold."""
        connection = await asyncpg.connect(self.dsn)
        try:
            rows = await balance(connection)
        finally:
            await connection.close()
        assert [row for row in rows if not row.holds()] == []
        return {row.tenant: row for row in rows}

    async def balance_when(
        self, condition: Callable[[Balance], bool], tenant: str = "demo"
    ) -> Balance:
        """A tenant's balance as soon as a condition of it holds."""
        async with asyncio.timeout(SECONDS_MAX):
            while True:
                found = (await self.balances())[tenant]
                if condition(found):
                    return found
                await asyncio.sleep(POLL_SECONDS)


@asynccontextmanager
async def running(
    dsn: str,
    folder: Path,
    *,
    database_folder: Path | None = None,
    serving: bool = True,
    **knobs: Any,
) -> AsyncIterator[RunningNode]:
    """Run a node over a migrated database; `knobs` are settings by name. `serving`: wait until it serves."""
    settings = Settings(
        **{
            "listen_address": "127.0.0.1:0",
            "admin_address": "127.0.0.1:0",
            "state_folder": folder / "state",
            "node_name": "test",
            "free_disk_bytes_min": 16 * MIB,
            "record_interval_ms": 20,
            "revocation_check_seconds": 0.2,
            "drain_seconds": 2,
            **knobs,
        }
    )
    node = RunningNode(dsn, settings, database_folder)
    connection = await asyncpg.connect(dsn)
    try:
        node.admin_key = await create_admin_key(connection, os.urandom)
    finally:
        await connection.close()
    await node.start(serving=serving)
    try:
        yield node
    finally:
        await node.stop()
