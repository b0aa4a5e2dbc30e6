"""What the server tells on its admin port: Prometheus text, read and taken apart."""

from __future__ import annotations

import asyncio
import re

TEXT_BYTES_MAX = 4 * 1024 * 1024
_LINE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)(?: \d+)?$")


class ScrapeError(Exception):
    """The admin port did not answer as it should."""


def parse(text: str) -> dict[str, float]:
    """Samples by name, summed over labels; buckets of histograms are left out."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is None or found[1].endswith(("_bucket", "_created")):
            continue
        values[found[1]] = values.get(found[1], 0.0) + float(found[3])
    return values


def deltas(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """How much each counter grew; those that did not are left out."""
    return {
        name: value - before.get(name, 0.0)
        for name, value in after.items()
        if name.endswith(("_total", "_count", "_sum")) and value != before.get(name, 0.0)
    }


async def get(host: str, port: int, path: str, seconds: float = 5.0) -> tuple[int, str]:
    """Status and text of a page."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(host, port, limit=TEXT_BYTES_MAX)
            try:
                writer.write(
                    f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
                )
                answer = await reader.read(TEXT_BYTES_MAX)
                while more := await reader.read(TEXT_BYTES_MAX):
                    answer += more
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise ScrapeError(f"no answer from http://{host}:{port}{path}: {error!r}") from error
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        return int(head.split(b" ", 2)[1]), body.decode()
    except (IndexError, ValueError) as error:
        raise ScrapeError(f"http://{host}:{port}{path} does not speak HTTP") from error


async def scrape(host: str, port: int) -> dict[str, float]:
    """The server's counters and levels now."""
    status, text = await get(host, port, "/metrics")
    if status != 200:
        raise ScrapeError(f"http://{host}:{port}/metrics answers {status}")
    return parse(text)
