"""A real HTTP receiver whose behaviour a test scripts, path by path; runs in the test's own loop, on loopback.

Everything that arrives is written to `requests` *before* anything is answered, so the ledger holds also what the sender
never learned of. Waiting is for a count (`wait_for`), never for time.

    async with Receiver() as receiver:
        receiver.secrets("/hook", secret)
        receiver.script("/hook", Behaviour(status=500), times=2)     # the first two, then 200
        ...
        await receiver.wait_for(3)
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import random
import socket
import ssl
import struct
from base64 import b64encode
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Self

HEAD_BYTES_MAX = 64 * 1024
BODY_BYTES_MAX = 64 * 1024 * 1024


class Cut(Enum):
    """When the receiver breaks the connection."""

    NEVER = auto()
    BEFORE_BODY = auto()  # after the request's head, its body unread
    BEFORE_RESPONSE = auto()  # the request read, nothing answered
    MID_HEAD = auto()  # half of the response's head sent
    MID_BODY = auto()  # the head and half of the response's body sent
    AFTER_RESPONSE = auto()  # all sent, though the head promised keep-alive


@dataclass(frozen=True)
class Behaviour:
    """What the receiver does with one request.

    `hold` is waited for before the answer. `reset` makes a cut a TCP reset instead of a close. `raw` is sent in place of
    the whole response; `takeover` writes what it likes and keeps the connection until it returns.
    """

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    hold: asyncio.Event | None = None
    cut: Cut = Cut.NEVER
    reset: bool = False
    raw: bytes | None = None
    takeover: Callable[[asyncio.StreamWriter], Awaitable[None]] | None = None


@dataclass
class Received:
    """One request as it arrived. `answered` is the status sent back, 0 while (or where) none was."""

    path: str
    method: str
    headers: dict[str, str]
    body: bytes
    connection: int
    signed: bool | None
    deliveries: list[dict[str, Any]] = field(default_factory=list)
    answered: int = 0

    @property
    def message_id(self) -> str:
        return self.headers.get("webhook-id", "")

    @property
    def delivery_ids(self) -> list[str]:
        return [delivery["id"] for delivery in self.deliveries]


@dataclass
class _Path:
    """The script of one path."""

    default: Behaviour = field(default_factory=Behaviour)
    queue: list[Behaviour] = field(default_factory=list)
    fraction: float = 0.0
    failing: Behaviour = field(default_factory=lambda: Behaviour(status=503))
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    secrets: tuple[bytes, ...] = ()

    def next(self) -> Behaviour:
        if self.queue:
            return self.queue.pop(0)
        if self.fraction and self.dice.random() < self.fraction:
            return self.failing
        return self.default


class Receiver:
    """The receiver. Use it as an asynchronous context manager."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self.requests: list[Received] = []
        self.connections = 0
        self.connections_open = 0
        self.bytes_written = 0
        self._broken: list[Exception] = []
        self._tls = tls
        self._host = host
        self._paths: dict[str, _Path] = {}
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._accept, self._host, 0, ssl=self._tls, limit=HEAD_BYTES_MAX
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop listening and break every connection. Raises what went wrong in serving, if anything did."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        if self._broken:
            raise ExceptionGroup("the receiver failed", self._broken)

    def url(self, path: str = "/", host: str | None = None) -> str:
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{host or self._host}:{self.port}{path}"

    # Scripting

    def secrets(self, path: str, *secrets: bytes) -> None:
        """Check signatures on `path` with these keys: `Received.signed` tells whether any one of them fits."""
        self._path(path).secrets = secrets

    def script(self, path: str, *behaviours: Behaviour, times: int = 1) -> None:
        """Do these, each `times` times, with the next requests of `path`; after them its usual behaviour."""
        for behaviour in behaviours:
            self._path(path).queue.extend([behaviour] * times)

    def always(self, path: str, behaviour: Behaviour) -> None:
        """The usual behaviour of `path`."""
        self._path(path).default = behaviour

    def fail_fraction(
        self, path: str, fraction: float, seed: int, behaviour: Behaviour | None = None
    ) -> None:
        """Fail that part of the requests of `path`, chosen by `seed`."""
        script = self._path(path)
        script.fraction = fraction
        script.dice = random.Random(seed)
        script.failing = behaviour or Behaviour(status=503)

    # Looking

    def on(self, path: str) -> list[Received]:
        return [request for request in self.requests if request.path == path]

    def delivered(self, path: str | None = None) -> Counter[str]:
        """How often each delivery arrived in a request that was answered with 2xx."""
        return Counter(
            delivery_id
            for request in self.requests
            if (path is None or request.path == path) and 200 <= request.answered <= 299
            for delivery_id in request.delivery_ids
        )

    async def wait_for(self, count: int, path: str | None = None) -> None:
        """Until `count` requests arrived in all (on `path`)."""
        await self.wait_until(
            lambda: len(self.requests if path is None else self.on(path)) >= count
        )

    async def wait_for_deliveries(self, count: int, path: str | None = None) -> None:
        """Until `count` different deliveries were answered with 2xx."""
        await self.wait_until(lambda: len(self.delivered(path)) >= count)

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Until `holds()` is true; it is asked after each change of the ledger or of the connections."""
        async with self._changed:
            await self._changed.wait_for(holds)

    # Serving

    def _path(self, path: str) -> _Path:
        return self._paths.setdefault(path, _Path())

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.connections_open += 1
        number = self.connections
        try:
            while await self._serve(reader, writer, number):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the other side went away, or the test ended
        except Exception as error:  # noqa: BLE001 - raised by stop()
            self._broken.append(error)
        finally:
            self._tasks.discard(task)
            self.connections_open -= 1
            writer.transport.abort()
            with contextlib.suppress(asyncio.CancelledError):
                await self._notify()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> bool:
        """Serve one request; whether the connection goes on."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {}
        for line in head[1:-2]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        path = target.partition("?")[0]
        script = self._path(path)
        behaviour = script.next()
        if behaviour.cut is Cut.BEFORE_BODY:
            await self._end(writer, behaviour)
            return False
        body = await _read_body(reader, headers)
        received = Received(
            path, method, headers, body, number, _signed(script.secrets, headers, body)
        )
        received.headers[":target"] = target
        received.deliveries = _deliveries(body)
        self.requests.append(received)
        await self._notify()
        if behaviour.hold is not None:
            await _set_or_closed(behaviour.hold, reader)
        return await self._answer(writer, behaviour, received)

    async def _answer(
        self, writer: asyncio.StreamWriter, behaviour: Behaviour, received: Received
    ) -> bool:
        if behaviour.cut is Cut.BEFORE_RESPONSE:
            await self._end(writer, behaviour)
            return False
        if behaviour.takeover is not None:
            await behaviour.takeover(writer)
            return False
        if behaviour.raw is not None:
            await self._write(writer, behaviour.raw)
            return True
        head = _response_head(behaviour)
        if behaviour.cut is Cut.MID_HEAD:
            await self._write(writer, head[: len(head) // 2])
            await self._end(writer, behaviour)
            return False
        if behaviour.cut is Cut.MID_BODY:
            await self._write(writer, head + behaviour.body[: len(behaviour.body) // 2])
            await self._end(writer, behaviour)
            return False
        received.answered = behaviour.status
        # The ledger first: when the sender knows, a test that asks must know too.
        await self._notify()
        await self._write(writer, head + behaviour.body)
        if behaviour.cut is Cut.AFTER_RESPONSE:
            await self._end(writer, behaviour)
            return False
        return True

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        await writer.drain()
        self.bytes_written += len(data)

    async def _end(self, writer: asyncio.StreamWriter, behaviour: Behaviour) -> None:
        if behaviour.reset:
            # Linger for zero seconds: closing sends a reset and drops what is unsent.
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


async def _set_or_closed(event: asyncio.Event, reader: asyncio.StreamReader) -> None:
    """Wait for the event; IncompleteReadError if the sender goes away first."""
    opened = asyncio.ensure_future(event.wait())
    closed = asyncio.ensure_future(reader.readexactly(1))
    try:
        await asyncio.wait((opened, closed), return_when=asyncio.FIRST_COMPLETED)
        if closed.done() and not opened.done():
            closed.result()
            raise AssertionError("the sender went on before its request was answered")
    finally:
        opened.cancel()
        closed.cancel()
        await asyncio.gather(opened, closed, return_exceptions=True)


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        chunks = []
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            chunks.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readexactly(2)
        return b"".join(chunks)
    length = int(headers.get("content-length", "0"))
    assert length <= BODY_BYTES_MAX
    return await reader.readexactly(length)


def _response_head(behaviour: Behaviour) -> bytes:
    names = {name.lower() for name, _ in behaviour.headers}
    lines = [f"HTTP/1.1 {behaviour.status} Scripted"]
    lines += [f"{name}: {value}" for name, value in behaviour.headers]
    if not names & {"content-length", "transfer-encoding"} and behaviour.status not in (204, 304):
        lines.append(f"Content-Length: {len(behaviour.body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _signed(secrets: tuple[bytes, ...], headers: dict[str, str], body: bytes) -> bool | None:
    """Whether any key of the path fits any signature of the request; None where the path has no key."""
    if not secrets:
        return None
    text = f"{headers.get('webhook-id')}.{headers.get('webhook-timestamp')}.".encode() + body
    expected = {
        "v1," + b64encode(hmac.new(secret, text, "sha256").digest()).decode() for secret in secrets
    }
    return not expected.isdisjoint(headers.get("webhook-signature", "").split(" "))


def _deliveries(body: bytes) -> list[dict[str, Any]]:
    """The deliveries of a request in Outrider's envelope, one or many; none of any other body."""
    try:
        parsed = json.loads(body)
    except ValueError:
        return []
    elements = parsed if isinstance(parsed, list) else [parsed]
    return [element for element in elements if isinstance(element, dict) and "id" in element]
