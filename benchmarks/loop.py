"""What the processes of a run share: their loop, and orders on standard input, whose end is the end of whoever gave them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Coroutine
from typing import Any

LINE_BYTES_MAX = 64 * 1024


def run_loop(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` on uvloop where there is one."""
    try:
        import uvloop  # noqa: PLC0415 - it has no wheel everywhere
    except ImportError:
        asyncio.run(work)
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work)


async def until_told() -> AsyncIterator[str]:
    """The lines of standard input as they come."""
    reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        yield line.decode().strip()
