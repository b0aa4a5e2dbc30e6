from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import grpc
from tests.support.scripted_ingest import (
    Action,
    Drop,
    Refuse,
    SayGoingAway,
    ScriptedIngest,
    Take,
)

from outrider.v1.ingest_service_pb2 import Frame

EXAMPLE = Path(__file__).parents[3] / "examples" / "raw_stub.py"


async def run_example(server: ScriptedIngest, *arguments: str, key: str = "k") -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLE),
        *("--target", server.target, "--api-key", key, "--tenant", "demo", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


def orders(server: ScriptedIngest) -> list[int]:
    return [json.loads(data)["order"]["number"] for data in server.payloads()]


async def test_the_example_breaks_its_stream_and_still_stores_every_event_once() -> None:
    async with ScriptedIngest(api_key="k", window_frames=4) as server:
        code, output = await run_example(server)
        assert code == 0, output
        assert "breaking the stream on purpose" in output
        assert "all 100 events in 10 frames are durable" in output
        assert orders(server) == list(range(100))
        assert server.streams == 2
        assert server.unanswered_frames_max <= 4
        assert server.violations == []


async def test_the_example_follows_refusals_drops_and_draining() -> None:
    left: dict[int, list[Action]] = {
        2: [Refuse("OVERLOADED", 0.01), Refuse()],
        4: [Drop(stored=True)],
        6: [Drop(stored=False)],
        8: [SayGoingAway()],
    }

    def script(frame: Frame) -> Action:
        actions = left.get(frame.number)
        return actions.pop(0) if actions else Take()

    async with ScriptedIngest(script, api_key="k") as server:
        code, output = await run_example(server)
        assert code == 0, output
        assert orders(server) == list(range(100))
        assert server.violations == []


async def test_the_example_gives_up_on_a_wrong_key() -> None:
    async with ScriptedIngest(api_key="k") as server:
        code, output = await run_example(server, key="wrong")
        assert code == 1
        assert grpc.StatusCode.UNAUTHENTICATED.name in output
        assert server.streams == 1
