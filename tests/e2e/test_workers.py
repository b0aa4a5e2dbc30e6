"""The service of several workers as processes: what dies is started again, what is stopped drains, nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import aiohttp
import pytest
from tests.support.processes import is_gone
from tests.support.service import Service, Template, service, until

pytestmark = [pytest.mark.e2e, pytest.mark.postgres, pytest.mark.timeout(180)]


def started(running: Service) -> dict[str, list[int]]:
    """The process ids of each worker, in the order of its starts."""
    pids: dict[str, list[int]] = {}
    for line in running.lines('"worker.started"'):
        said = json.loads(line)
        pids.setdefault(said["node"], []).append(said["pid"])
    return pids


def ready_workers(running: Service) -> set[str]:
    """The nodes that have begun to serve shards."""
    return {json.loads(line)["node"] for line in running.lines('"tenure.began"')}


async def page(running: Service, path: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession(f"http://{running.admin_address}") as session,
        session.get(path) as response,
    ):
        return response.status, await response.text()


async def all_ready(running: Service) -> None:
    """Until both workers say that they are ready."""
    lines: list[str] = []
    while [line.endswith(" ready") for line in lines] != [True, True]:
        assert running.running, running.tail()
        _, text = await page(running, "/readyz")
        lines = text.splitlines()
        await asyncio.sleep(0.05)


async def up(running: Service) -> dict[str, list[int]]:
    """Start it, and wait until it is ready and both workers answer."""
    running.start()
    await running.ready(60)
    await all_ready(running)
    return started(running)


def everything(running: Service) -> list[int]:
    """Every process of the service, its database's included."""
    workers = [pid for pids in started(running).values() for pid in pids]
    return [running.pid, *workers, *running.process_tree()]


async def all_gone(pids: list[int], seconds: float) -> None:
    await until(lambda: all(is_gone(pid) for pid in pids), seconds, f"the end of all of {pids}")


async def test_a_killed_worker_is_started_again_and_a_stop_drains_all(
    fresh_state: Template,
) -> None:
    with service(fresh_state, workers=2, node_name="host") as running:
        pids = await up(running)
        assert sorted(pids) == ["host.1", "host.2"]
        maps = Path(f"/proc/{running.pid}/maps")
        if maps.exists():
            assert "cygrpc" not in maps.read_text()
            assert "cygrpc" in Path(f"/proc/{pids['host.1'][0]}/maps").read_text()
        victim = min(ready_workers(running))
        os.kill(pids[victim][0], signal.SIGKILL)
        await until(
            lambda: len(started(running)[victim]) == 2, 20, "its restart\n" + running.tail()
        )
        (ended,) = (json.loads(line) for line in running.lines('"worker.ended"'))
        assert (ended["node"], ended["signal"]) == (victim, "SIGKILL")
        await all_ready(running)
        assert (await page(running, "/healthz"))[0] == 200
        _, text = await page(running, "/metrics")
        assert f'outrider_worker_restarts_total{{node="{victim}"}} 1.0' in text
        assert "outrider_workers_expected 2.0" in text

        processes = everything(running)
        assert await running.terminate(60) == 0, running.tail()
        await all_gone(processes, 1)
        ends = [json.loads(line) for line in running.lines('"worker.ended"')][1:]
        assert sorted((end["node"], end.get("status")) for end in ends) == [
            ("host.1", 0),
            ("host.2", 0),
        ]
        assert list((running.state / "run").iterdir()) == []


async def test_a_killed_supervisor_leaves_no_process_and_can_be_started_again(
    fresh_state: Template,
) -> None:
    with service(fresh_state, workers=2) as running:
        await up(running)
        processes = everything(running)
        assert len(processes) > 6
        running.kill()
        await all_gone(processes, 60)
        await up(running)
        assert await running.terminate(60) == 0, running.tail()


async def test_a_second_supervisor_on_a_state_folder_is_refused(fresh_state: Template) -> None:
    with service(fresh_state, workers=2) as running:
        await up(running)
        second = running.run_command(
            "serve", "--listen-address", "127.0.0.1:0", "--admin-address", "127.0.0.1:0"
        )
        assert second.returncode == 1
        (line,) = second.stderr.splitlines()
        assert f"is in use by process {running.pid}" in line
        assert (await page(running, "/healthz"))[0] == 200
        assert await running.terminate(60) == 0, running.tail()


async def test_what_a_person_must_cure_ends_the_service_with_one_sentence(
    fresh_state: Template, tmp_path: Path
) -> None:
    keys = tmp_path / "sealing.keys"
    keys.write_text("kek_x\n")
    keys.chmod(0o644)
    with service(fresh_state, workers=2, sealing_key_file=keys) as running:
        running.start()
        assert await running.ended(60) == 1
        said = running.log.read_text().splitlines()
        assert said[-1] == (
            f"outrider-server: the key file {keys} is open to others: run chmod 600 on it"
        )
        assert sum(line.startswith("outrider-server: ") for line in said) == 1
        assert "Traceback" not in running.log.read_text()
        assert running.postmaster_pid() == 0
        await all_gone([pid for pids in started(running).values() for pid in pids], 1)
