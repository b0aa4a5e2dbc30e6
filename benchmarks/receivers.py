"""A process that receives: a bare HTTP/1.1 server on loopback, one port, a path an endpoint, connections kept open.

It does as little as a receiver can that still checks everything: each signature, each delivery's id, place and first
arrival, and the time since its event was meant to be sent. What the arrivals come to is told at the end.

    python -m benchmarks.receivers SPECIFICATION     (started by `benchmarks.run`; ends when its standard input does)
"""

from __future__ import annotations

import asyncio
import binascii
import gc
import hmac
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import orjson
from typing_extensions import override

from benchmarks.board import Board, Received
from benchmarks.latency import Latencies
from benchmarks.ledger import Arrivals
from benchmarks.loop import run_loop, until_told
from benchmarks.scenario import TIME_BASE, EndpointPlan, Plan, topology_of

HEAD_BYTES_MAX = 16 * 1024
BODY_BYTES_MAX = 32 * 1024 * 1024
TOLERANCE_SECONDS = 300
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
BAD = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"


class Inbox:
    """What all connections of the process share: who expects what, and what has come."""

    def __init__(self, plan: Plan, mark: str, secrets: list[bytes], row: memoryview) -> None:
        topology = topology_of(plan, mark)
        self.arrivals = Arrivals(topology, plan.copies)
        self.end_to_end = [Latencies() for _ in plan.phases()]
        self.large_end_to_end = Latencies()
        self.large = 0
        self.bad: dict[str, int] = {}
        self._single = plan.single
        self._endpoints: dict[bytes, EndpointPlan] = {
            endpoint.path.encode(): endpoint for endpoint in topology.endpoints
        }
        self._keyed = [hmac.new(secret, digestmod="sha256") for secret in secrets]
        self._phases = plan.phases()
        self._row = row
        self.epoch_us = 0
        """The start of the load on this machine's monotonic clock; times in payloads count from it."""

    def request(self, path: bytes, head: Mapping[bytes, bytes], body: bytes) -> bytes:
        """Check and count one request; returns the response."""
        endpoint = self._endpoints.get(path)
        if endpoint is None:
            return self._refuse("path")
        message_id = head.get(b"webhook-id", b"")
        timestamp = head.get(b"webhook-timestamp", b"")
        state = self._keyed[endpoint.index].copy()
        state.update(b"%b.%b." % (message_id, timestamp))
        state.update(body)
        signature = b"v1," + binascii.b2a_base64(state.digest(), newline=False)
        if not hmac.compare_digest(signature, head.get(b"webhook-signature", b"")):
            return self._refuse("signature")
        if not timestamp.isdigit() or abs(int(timestamp) - time.time()) > TOLERANCE_SECONDS:
            return self._refuse("timestamp")
        now_us = time.monotonic_ns() // 1000 - self.epoch_us
        if endpoint.large:
            return self._large(body, now_us)
        try:
            parsed = orjson.loads(body)
            elements = parsed if isinstance(parsed, list) else [parsed]
            first = elements[0]["id"].encode()
            if message_id != first and not (
                message_id.startswith(b"bat_" + first.removeprefix(b"dlv_") + b"_")
                and not self._single
            ):
                return self._refuse("webhook-id")
            times = self.arrivals.take(endpoint.index, elements)
        except (ValueError, LookupError, TypeError, AttributeError):
            return self._refuse("body")
        at = times[0]
        for (_, begin, end), latencies in zip(self._phases, self.end_to_end, strict=True):
            if begin <= at < end:
                latencies.add([now_us - time_us for time_us in times])
        row, arrivals = self._row, self.arrivals
        row[Received.REQUESTS] = arrivals.requests
        row[Received.DELIVERIES] = arrivals.deliveries
        row[Received.DUPLICATES] = arrivals.duplicates
        row[Received.ASTRAY] = arrivals.astray
        return OK

    def _large(self, body: bytes, now_us: int) -> bytes:
        # Signed and long: its head is enough, and parsing all of it would hold up every small one.
        _, found, rest = body[:1_024].partition(b'"data":{"n":')
        time_text = rest.partition(b'"t":')[2].partition(b",")[0]
        if not found or not time_text.isdigit():
            return self._refuse("body")
        self.large_end_to_end.add([now_us - int(time_text) + TIME_BASE])
        self.large += 1
        self._row[Received.LARGE] = self.large
        return OK

    def _refuse(self, why: str) -> bytes:
        self.bad[why] = self.bad.get(why, 0) + 1
        self._row[Received.BAD] = sum(self.bad.values())
        return BAD

    def report(self, seen_files: list[Path]) -> dict[str, Any]:
        """The end's account; the ledgers go into files."""
        arrivals = self.arrivals
        for file, seen in zip(seen_files, arrivals.seen, strict=True):
            file.write_bytes(seen)
        return {
            "requests": arrivals.requests,
            "deliveries": arrivals.deliveries,
            "duplicates": arrivals.duplicates,
            "astray": arrivals.astray,
            "bad": self.bad,
            "large": self.large,
            "event_ids": {str(number): told for number, told in arrivals.event_ids.items()},
            "seen": [str(file) for file in seen_files],
            "end_to_end": [latencies.encode() for latencies in self.end_to_end],
            "large_end_to_end": self.large_end_to_end.encode(),
        }


class Connection(asyncio.Protocol):
    """Reads requests one after another and answers each. Reads only what the server under test sends, strictly."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._held = bytearray()
        self._wanted = 0
        self._transport: asyncio.Transport | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    @override
    def data_received(self, data: bytes) -> None:
        if self._held:
            self._held += data
            if len(self._held) < self._wanted:
                return
            data = bytes(self._held)
            self._held.clear()
        while data:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > HEAD_BYTES_MAX:
                    self._break()
                    return
                self._hold(data, 0)
                return
            try:
                path, head = _head(data[:end])
                length = int(head[b"content-length"])
            except (ValueError, LookupError):
                self._break()
                return
            total = end + 4 + length
            if not 0 <= length <= BODY_BYTES_MAX:
                self._break()
                return
            if len(data) < total:
                self._hold(data, total)
                return
            assert self._transport is not None
            self._transport.write(self._inbox.request(path, head, data[end + 4 : total]))
            data = data[total:]

    def _hold(self, data: bytes, wanted: int) -> None:
        self._held += data
        self._wanted = wanted

    def _break(self) -> None:
        self._inbox.request(b"", {}, b"")
        assert self._transport is not None
        self._transport.close()


def _head(data: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """The path and the headers, names in lower case."""
    request, *lines = data.split(b"\r\n")
    _, path, _ = request.split(b" ")
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip()
    return path, headers


async def _serve(specification: Mapping[str, Any]) -> None:
    plan = Plan.from_json(specification["plan"])
    board = Board(Path(specification["board"]))
    inbox = Inbox(
        plan,
        specification["mark"],
        [bytes.fromhex(secret) for secret in specification["secrets"]],
        board.row(specification["process"]),
    )
    inbox.epoch_us = specification["epoch_us"]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(inbox), "127.0.0.1", 0, backlog=1_024)
    gc.collect()
    gc.freeze()
    print(server.sockets[0].getsockname()[1], flush=True)
    async for order in until_told():
        if order.startswith("epoch "):
            inbox.epoch_us = int(order.split()[1])
        elif order == "end":
            break
    else:
        return  # whoever started this is gone: nobody reads a report
    server.close()
    folder = Path(specification["folder"])
    process = specification["process"]
    files = [folder / f"seen-{process}-{copy}" for copy in range(plan.copies)]
    print(json.dumps(inbox.report(files)), flush=True)


if __name__ == "__main__":
    run_loop(_serve(json.loads(Path(sys.argv[1]).read_text())))
