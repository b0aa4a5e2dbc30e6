"""What one signed request costs in the sender's process: the plain exchange, the direct one, and their ratio.

    python -m benchmarks.micro_send [--requests 20000] [--concurrency 16] [--rounds 3]

The receiver is a bare asyncio protocol in a child process, so the sender's own CPU time is what is compared; both forms
alternate in one run, so what disturbs the machine disturbs both.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from typing import cast

import uvloop
from typing_extensions import override

from outrider_server.domain.endpoint import Endpoint
from outrider_server.domain.outcome import Verdict
from outrider_server.policy.envelope import CONTENT_TYPE
from outrider_server.transport.webhook import Form, WebhookSender

BODY = b'{"id":"dlv_1_1","type":"sales_order.created","data":{"note":"' + b"x" * 300 + b'"}}'


class _Answering(asyncio.Protocol):
    """Answers each request of known size with an empty 200."""

    def __init__(self) -> None:
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    @override
    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            total = end + 4 + len(BODY)
            if len(self._buffer) < total:
                return
            self._buffer = self._buffer[total:]
            assert self._transport is not None
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


async def _receive() -> None:
    server = await asyncio.get_running_loop().create_server(_Answering, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    # The parent closes our standard input when it is done, or dies.
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


async def _round(form: Form, port: int, requests: int, concurrency: int) -> tuple[float, float]:
    """CPU microseconds in this process and elapsed microseconds, a request."""
    sender = WebhookSender(monotonic=time.monotonic, form=form)
    endpoint = Endpoint(1, 1, "bench", f"http://127.0.0.1:{port}/hook", (bytes(32),))

    async def lane(count: int) -> None:
        for number in range(count):
            outcome = await sender.send(endpoint, f"dlv_{number}_1", BODY, CONTENT_TYPE, 1764000000)
            if outcome.verdict is not Verdict.DELIVERED:
                raise RuntimeError(f"not delivered: {outcome}")

    await lane(200)
    cpu, wall = time.process_time(), time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(lane(requests // concurrency))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    await sender.close()
    return cpu / requests * 1e6, wall / requests * 1e6


async def _measure(port: int, requests: int, concurrency: int, rounds: int) -> None:
    figures: dict[Form, list[tuple[float, float]]] = {Form.SESSION: [], Form.DIRECT: []}
    for _ in range(rounds):
        for form, rows in figures.items():
            rows.append(await _round(form, port, requests, concurrency))
    medians = {}
    for form, rows in figures.items():
        cpu = statistics.median(row[0] for row in rows)
        wall = statistics.median(row[1] for row in rows)
        medians[form] = cpu
        print(f"{form.value:8} {cpu:6.1f} us CPU, {wall:6.1f} us elapsed a request")
    print(f"direct / session: {medians[Form.DIRECT] / medians[Form.SESSION]:.2f} of the CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive:
        uvloop.run(_receive())
        return
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.micro_send", "--receive"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        uvloop.run(_measure(port, arguments.requests, arguments.concurrency, arguments.rounds))
    finally:
        child.communicate()


if __name__ == "__main__":
    main()
