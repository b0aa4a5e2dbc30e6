"""The server runs in a process of its own: gRPC's asyncio serves one loop a process well."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from outrider import errors
from outrider.threads import ThreadHandle, ThreadPublisher
from outrider.v1.event_pb2 import Event

_ROOT = Path(__file__).parents[3]
_SERVER = """
import asyncio, sys
from tests.support.scripted_ingest import Drop, Log, ScriptedIngest, Take

async def main():
    dropped = set()

    def script(frame):
        if frame.number % 5 == 0 and frame.number not in dropped:
            dropped.add(frame.number)
            return Drop(stored=frame.number % 2 == 0)
        bad = tuple((i, "PAYLOAD_NOT_JSON", "") for i, e in enumerate(frame.events) if e.data == b"bad")
        return Take(rejected=bad)

    log = Log()
    async with (
        ScriptedIngest(script, api_key="k", log=log) as server,
        ScriptedIngest(script, api_key="k", log=log) as other,
    ):
        log.homes["elsewhere"] = (other.target,)
        print(server.target, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        print(server.violations, flush=True)
        print(b" ".join(server.payloads()).decode(), flush=True)

asyncio.run(main())
"""


class Server:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.target = self.line()

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def stored(self) -> list[str]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        assert self.line() == "[]"
        return self.line().split()


@pytest.fixture
def server() -> Iterator[Server]:
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
    ) as process:
        yield Server(process)


def publisher(server: Server, key: str = "k") -> ThreadPublisher:
    return ThreadPublisher(server.target, key, "threads-1", tenant="demo", backoff_ms=1)


def event(data: str) -> Event:
    return Event(type="a.b", data=data.encode())


def test_many_threads_publish_in_their_own_order_without_loss(server: Server) -> None:
    def work(name: int) -> list[ThreadHandle]:
        return [p.send(event(f"{name}-{i}")) for i in range(3000)]

    with publisher(server) as p:
        with ThreadPoolExecutor(4) as pool:
            handles = [handle for each in pool.map(work, range(4)) for handle in each]
        p.flush(20)
        assert all(handle.done() for handle in handles)
        ids = [handle.result().event_id for handle in handles]
    assert len(set(ids)) == 12_000
    stored = server.stored()
    for name in range(4):
        mine = [data for data in stored if data.startswith(f"{name}-")]
        assert mine == [f"{name}-{i}" for i in range(3000)]


def test_a_tenant_that_lives_on_another_node_keeps_the_order_of_each_thread(
    server: Server,
) -> None:
    def work(name: int) -> list[ThreadHandle]:
        tenant = "elsewhere" if name % 2 else "demo"
        return [
            p.send(Event(tenant=tenant, type="a.b", data=b"%d-%d" % (name, i))) for i in range(3000)
        ]

    with publisher(server) as p:
        with ThreadPoolExecutor(4) as pool:
            handles = [handle for each in pool.map(work, range(4)) for handle in each]
        p.flush(20)
        assert all(handle.done() for handle in handles)
        assert p.stats.streams_opened >= 2
    stored = server.stored()
    for name in range(4):
        mine = [data for data in stored if data.startswith(f"{name}-")]
        assert mine == [f"{name}-{i}" for i in range(3000)]


def test_outcomes_reach_the_thread_that_asks(server: Server) -> None:
    with publisher(server) as p:
        assert p.publish(event("1"), 20).event_id
        with pytest.raises(errors.EventRejected) as caught:
            p.publish(event("bad"), 20)
        assert caught.value.reason == "PAYLOAD_NOT_JSON"
        with pytest.raises(errors.EventRejected):
            p.publish(Event(type="a.b", data=b"x" * (10 * 1024 * 1024 + 1)), 20)
        good, bad = p.publish_many([event("2"), event("bad")])
        assert not isinstance(good, errors.OutriderError)
        assert isinstance(bad, errors.EventRejected)
    assert server.stored() == ["1", "2"]


def test_a_callback_runs_for_each_handle_before_and_after_it_is_done(server: Server) -> None:
    called = threading.Semaphore(0)
    with publisher(server) as p:
        handle = p.send(event("1"))
        handle.add_done_callback(lambda done: called.release() if done is handle else None)
        assert called.acquire(timeout=20)
        handle.add_done_callback(lambda _: called.release())
        assert called.acquire(timeout=20)


def test_a_failure_reaches_every_thread(server: Server) -> None:
    p = publisher(server, key="wrong")
    with pytest.raises(errors.Unauthenticated):
        p.publish(event("1"), 20)
    with pytest.raises(errors.Unauthenticated):
        p.flush(20)
    with pytest.raises(errors.Unauthenticated):
        p.close()


def test_nothing_is_taken_after_close_and_what_was_taken_is_stored(server: Server) -> None:
    p = publisher(server)
    handles = [p.send(event(str(i))) for i in range(2000)]
    p.close()
    assert all(handle.done() for handle in handles)
    assert handles[-1].result().event_id
    with pytest.raises(errors.PublisherClosed):
        p.send(event("late"))
    with pytest.raises(errors.PublisherClosed):
        p.flush()
    p.close()
    assert server.stored() == [str(i) for i in range(2000)]


def test_a_wait_ends_after_its_time(server: Server) -> None:
    p = ThreadPublisher("127.0.0.1:1", "k", "threads-1")
    handle = p.send(event("1"))
    with pytest.raises(TimeoutError):
        handle.result(0.01)
    with pytest.raises(TimeoutError):
        p.flush(0.01)
    with pytest.raises(errors.PublisherClosed):
        p.close(0.01)
    assert isinstance(handle.exception(), errors.PublisherClosed)
