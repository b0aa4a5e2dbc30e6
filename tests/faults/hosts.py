"""Several hosts on one database, under load: each a `serve` with its own addresses and state folder, sharing sealing keys."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.database import Database, database
from tests.faults.network import Network, Place, network
from tests.faults.scene import KNOBS, RATE, START_SECONDS, Scene, scene
from tests.support.processes import is_gone
from tests.support.service import Service, Template, temporary_folder


def descendants(pid: int) -> list[int]:
    """A process and everything it started, as far as its parents still live."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(") ")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children[int(fields[1])].append(int(status.parent.name))
    found = [pid]
    for each in found:
        found += children[each]
    return found


@dataclass
class Host:
    """A machine that runs the service, as far as one process can tell."""

    place: Place
    service: Service
    nodes: list[str]

    @property
    def address(self) -> str:
        return self.service.listen_address

    def send(self, number: int) -> list[int]:
        """Send a signal to all of its processes."""
        pids = descendants(self.service.pid)
        for pid in pids:
            if not is_gone(pid):
                os.kill(pid, number)
        return pids

    def kill(self) -> None:
        """As a power cut: all of it at once."""
        if self.service.running:
            self.send(signal.SIGSTOP)  # so that nobody starts another meanwhile
            self.send(signal.SIGKILL)
            self.service.kill()

    async def start(self) -> None:
        self.service.start()
        await self.service.ready(START_SECONDS)


@dataclass
class Hosts:
    """The hosts of a scene, what is between them, and their database."""

    network: Network
    database: Database
    hosts: list[Host]
    scene: Scene

    async def held_by(self, host: Host) -> frozenset[int]:
        """The shards of all of its nodes."""
        holdings = await self.scene.holdings()
        return frozenset(shard for shard, h in holdings.items() if h.node in host.nodes)

    async def taken_from(self, host: Host, seconds: float = 60.0) -> None:
        """Wait until others hold everything that this host held."""
        deadline = time.monotonic() + seconds
        while any(
            h.node in host.nodes or not h.live for h in (await self.scene.holdings()).values()
        ):
            assert time.monotonic() < deadline, f"nobody took over\n{self.scene.tail()}"
            await asyncio.sleep(0.05)


async def _deal(postgres: Database, nodes: Sequence[str]) -> None:
    """Say that each node holds its share already, as after a time of running: one shard a renewal would take minutes."""
    connection = await postgres.connect()
    try:
        for node in nodes:
            await connection.execute(
                "INSERT INTO node (name, boot, address, expires_at)"
                " VALUES ($1, gen_random_uuid(), '', now() + interval '1 minute')",
                node,
            )
        await connection.execute(
            "UPDATE shard SET node = ($1::text[])[shard % $2 + 1]", list(nodes), len(nodes)
        )
    finally:
        await connection.close()


@asynccontextmanager
async def hosts_scene(
    fresh: Template,
    *,
    seed: int,
    hosts: int = 3,
    workers: int = 1,
    rate: float = RATE,
    knobs: Mapping[str, object] | None = None,
    variables: Mapping[int, Mapping[str, str]] | None = None,
) -> AsyncIterator[Hosts]:
    """So many hosts with so many workers each, under load. `variables`: the environment of a host, by its index."""
    with ExitStack() as stack:
        net = stack.enter_context(network(hosts))
        postgres = stack.enter_context(database(fresh, net.database))
        await postgres.start()
        shared = stack.enter_context(temporary_folder())
        made = []
        for index, place in enumerate(net.hosts):
            given = {
                **KNOBS,
                "node_name": place.name,
                "workers": workers,
                "database_url": postgres.dsn,
                "own_address": f"{place.address}:0",
                "sealing_key_file": shared / "sealing.keys",
                **(knobs or {}),
            }
            running = Service(
                stack.enter_context(temporary_folder()),
                given,
                host=place.address,
                prefix=place.prefix,
                variables=(variables or {}).get(index),
            )
            nodes = (
                [f"{place.name}.{n}" for n in range(1, workers + 1)]
                if workers > 1
                else [place.name]
            )
            host = Host(place, running, nodes)
            stack.callback(host.kill)
            made.append(host)
        await _deal(postgres, [node for host in made for node in host.nodes])
        await asyncio.gather(*(host.start() for host in made))
        async with scene(
            fresh,
            [host.service for host in made],
            [node for host in made for node in host.nodes],
            postgres.connect,
            # The first address that answers, in this order.
            target="ipv4:" + ",".join(host.address for host in made),
            manage=made[0].address,
            here=net.here,
            seed=seed,
            rate=rate,
        ) as under_load:
            yield Hosts(net, postgres, made, under_load)
