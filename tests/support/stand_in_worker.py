"""A process that stands in for a worker: it does what its script says, and speaks with its supervisor as a worker does.

    python -m tests.support.stand_in_worker FOLDER SCRIPT LIFELINE

SCRIPT is a comma-separated list, one step for each start; the last is for all further ones:
    ready        say that it is ready, run until SIGTERM, end with 0
    silent       the same without being ready
    stubborn     ready, and deaf to SIGTERM
    exit:N       end with status N at once
    die          ready, then end by SIGKILL
    refuse:WORDS say why it cannot run, and end with 1
It writes a line for each start, and what came of it, into FOLDER/story; with FOLDER/NAME.sock to be, as OUTRIDER_ADMIN_SOCKET
says, it serves health and metrics there.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from outrider_server.supervisor.lifeline import WorkerEnd


def main() -> int:
    folder, script, descriptor = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3])
    name = os.environ.get("OUTRIDER_NODE_NAME", "worker")
    story = folder / "story"

    def tell(what: str) -> None:
        with story.open("a") as file:
            file.write(f"{name} {os.getpid()} {what}\n")

    before = [line for line in read_story(folder) if line[0] == name and line[2] == "started"]
    tell("started")
    step, _, words = script[min(len(before), len(script) - 1)].partition(":")
    line = WorkerEnd(descriptor)
    match step:
        case "exit":
            return int(words)
        case "refuse":
            line.tell_refused(words)
            return 1
    asyncio.run(run(step, line, tell))
    tell("drained")
    return 0


async def run(step: str, line: WorkerEnd, tell: object) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    deaf = step == "stubborn"
    loop.add_signal_handler(signal.SIGTERM, (lambda: None) if deaf else stop.set)
    line.watch(lambda: loop.call_soon_threadsafe(stop.set), 5.0)
    server = None
    if path := os.environ.get("OUTRIDER_ADMIN_SOCKET"):
        from outrider_server.telemetry.metrics import Metrics
        from outrider_server.web.admin import start_admin_socket

        metrics = Metrics()
        metrics.ingest.events = 5
        ready = step != "silent"
        server = await start_admin_socket(
            Path(path),
            readiness=lambda: (ready, "ready" if ready else "waits"),
            exposition=metrics.exposition,
        )
    if step != "silent":
        line.tell_ready()
    if step == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    await stop.wait()
    if server is not None:
        await server.runner.cleanup()


def read_story(folder: Path) -> list[tuple[str, int, str]]:
    """What stand-ins wrote: (name, process id, what)."""
    story = folder / "story"
    if not story.exists():
        return []
    lines = [line.split() for line in story.read_text().splitlines()]
    return [(name, int(pid), what) for name, pid, what in lines]


if __name__ == "__main__":
    sys.exit(main())
