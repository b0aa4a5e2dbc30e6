"""Faults of several hosts on one database: one is killed, paused, silent, cut off from another or from the database.

In network namespaces where they can be made, else on loopback addresses; there no wire can be cut, so a silent host is a
paused one, and the faults that need a wire are left out.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter

from tests.faults.faults import (
    EVENTS,
    Effort,
    Figures,
    _check_increasing,
    _write,
    hook_variables,
    served_again,
)
from tests.faults.hosts import Host, Hosts, hosts_scene
from tests.support.service import Template, temporary_folder

TAKEOVER_SECONDS_MAX = 17.0
"""A lease of 10 s, the looks that see it expired for a whole renewal, and the shards' windows."""

DEFAULT_LEASE = {"lease_seconds": 10, "lease_renew_seconds": 3, "lease_margin_seconds": 3}
ROUND_KILLS = 25
NO_WIRES: Figures = {"left out": "no network namespaces here"}


async def kill_hosts(fresh: Template, effort: Effort) -> Figures:
    """A whole host is killed, and comes back at once or after others took its shards over; again and again."""
    total: Counter[str] = Counter()
    done = 0
    # A host takes twice the time of a worker to come back.
    kills = effort.kills if effort.long else -(-effort.kills // 2)
    while done < kills:
        count = min(ROUND_KILLS, kills - done)
        dice = random.Random(effort.seed + done)
        async with hosts_scene(fresh, seed=effort.seed + done) as made:
            scene = made.scene
            for _ in range(count):
                await scene.under_load(dice.randrange(5, 2 * EVENTS))
                await asyncio.sleep(dice.random() * 0.2)
                host = dice.choice(made.hosts)
                shards = await made.held_by(host)
                with scene.fault(f"kill -9 of {host.place.name}", shards) as fault:
                    host.kill()
                    fault.ended = time.monotonic() + 0.5
                    fault.shards = shards | await made.held_by(host)
                    if dice.random() < 0.25:
                        await made.taken_from(host)
                        total["taken over"] += 1
                await host.start()
                await scene.whole()
            await scene.under_load(EVENTS)
            found = await scene.end_well()
        done += count
        total.update(
            acknowledged=found.acknowledged,
            deliveries=found.deliveries,
            lost=len(found.lost),
            duplicates=found.duplicates,
            bound=found.bound,
        )
    return {"kills": done, **total}


async def silent_host(fresh: Template, effort: Effort) -> Figures:
    """A host's wire is cut: others serve its shards in time, and when it comes back it does no harm."""
    taken, served = [], []
    async with hosts_scene(fresh, seed=effort.seed, knobs=DEFAULT_LEASE) as made:
        scene = made.scene
        for number in range(4 if effort.long else 1):
            await scene.under_load(EVENTS)
            await scene.whole()
            await scene.even(60)
            # Not the one that producers came in by: theirs is the way round.
            host = made.hosts[1 + number % 2]
            shards = await made.held_by(host)
            with scene.fault(f"silence of {host.place.name}", shards) as fault:
                _silence(made, host)
                try:
                    fault.shards = shards = shards | await made.held_by(host)
                    held_after, served_after = await served_again(
                        made.scene, fault.began, shards, 60
                    )
                finally:
                    _end_silence(made, host)
                await scene.whole(60)
            taken.append(round(held_after, 1))
            served.append(round(served_after, 1))
            await scene.under_load(EVENTS, 60)
        assert max(served) <= TAKEOVER_SECONDS_MAX, f"{served} s\n{scene.tail()}"
        found = await scene.end_well()
    return {"taken after, s": taken, "delivered again after, s": served, **scene.figures(found)}


def _silence(made: Hosts, host: Host) -> None:
    if made.network.has_wires:
        host.place.unplug()
    else:
        host.send(signal.SIGSTOP)


def _end_silence(made: Hosts, host: Host) -> None:
    if made.network.has_wires:
        host.place.plug_in()
    else:
        host.send(signal.SIGCONT)


async def paused_host(fresh: Template, effort: Effort) -> Figures:
    """All processes of a host stand still past its lease and go on: an owner that does not know that it is none."""
    taken = []
    async with hosts_scene(fresh, seed=effort.seed) as made:
        scene = made.scene
        for number in range(4 if effort.long else 1):
            await scene.under_load(EVENTS)
            await scene.whole()
            await scene.even()
            host = made.hosts[number % 3]
            shards = await made.held_by(host)
            with scene.fault(f"a pause of {host.place.name}", shards) as fault:
                host.send(signal.SIGSTOP)
                try:
                    fault.shards = shards | await made.held_by(host)
                    await made.taken_from(host)
                    taken.append(round(time.monotonic() - fault.began, 1))
                    await asyncio.sleep(1.0)  # the new owners send
                finally:
                    host.send(signal.SIGCONT)
                await scene.whole()
            await scene.under_load(EVENTS, 60)
        found = await scene.end_well()
    return {"taken after, s": taken, **scene.figures(found)}


async def host_without_database(fresh: Template, effort: Effort) -> Figures:
    """A host reaches all others but the database: it stops sending, others take over, it joins again."""
    taken = []
    async with hosts_scene(fresh, seed=effort.seed) as made:
        if not made.network.has_wires:
            return NO_WIRES
        scene = made.scene
        for number in range(4 if effort.long else 1):
            await scene.under_load(EVENTS)
            await scene.whole()
            await scene.even()
            host = made.hosts[(1 + number) % 3]
            shards = await made.held_by(host)
            with scene.fault(f"{host.place.name} without database", shards) as fault:
                host.place.lose_way_to(made.network.database)
                try:
                    fault.shards = shards | await made.held_by(host)
                    await made.taken_from(host)
                    taken.append(round(time.monotonic() - fault.began, 1))
                    await asyncio.sleep(2.0)
                finally:
                    host.place.find_way_to(made.network.database)
                await scene.whole(60)
            await scene.under_load(EVENTS, 60)
        found = await scene.end_well()
    return {"taken after, s": taken, **scene.figures(found)}


async def host_without_another(fresh: Template, effort: Effort) -> Figures:
    """A host reaches the database but not one other host: nobody's shards move, and all goes on afterwards."""
    async with hosts_scene(fresh, seed=effort.seed) as made:
        if not made.network.has_wires:
            return NO_WIRES
        scene = made.scene
        moved, during = 0, []
        for number in range(4 if effort.long else 1):
            await scene.under_load(EVENTS)
            await scene.whole()
            await scene.even()
            # Producers come in by the first host, which must forward to the other.
            one, other = (made.hosts[0], made.hosts[1 + number % 2])
            before = {shard: h.node for shard, h in (await scene.holdings()).items()}
            with scene.fault(f"{one.place.name} without {other.place.name}"):
                one.place.lose_way_to(other.place)
                try:
                    acked = scene.acked
                    await asyncio.sleep(8.0)
                    during.append(scene.acked - acked)
                finally:
                    one.place.find_way_to(other.place)
                after = {shard: h.node for shard, h in (await scene.holdings()).items()}
                moved += sum(before[shard] != node for shard, node in after.items())
                await scene.under_load(EVENTS, 60)
        found = await scene.end_well()
    return {"acknowledged meanwhile": during, "shards moved": moved, **scene.figures(found)}


async def lossy_wires(fresh: Template, effort: Effort) -> Figures:
    """Every host's wire fails for moments, again and again, as a network that loses much."""
    dice = random.Random(effort.seed)
    cuts = 0
    async with hosts_scene(fresh, seed=effort.seed) as made:
        if not made.network.has_wires:
            return NO_WIRES
        scene = made.scene
        await scene.under_load(EVENTS)
        with scene.fault("lossy wires"):
            until = time.monotonic() + (60 if effort.long else 12)
            while time.monotonic() < until:
                host = dice.choice(made.hosts)
                host.place.unplug()
                try:
                    await asyncio.sleep(dice.uniform(0.02, 0.4))
                finally:
                    host.place.plug_in()
                cuts += 1
                await asyncio.sleep(dice.uniform(0.05, 0.4))
            await scene.whole(60)
            await scene.under_load(EVENTS, 60)
        found = await scene.end_well()
    return {"cuts": cuts, **scene.figures(found)}


async def clock_step_of_a_host(fresh: Template, effort: Effort) -> Figures:
    """One host's clock jumps an hour, and back; the others' and the database's stand right."""
    with temporary_folder() as folder:
        offset = folder / "offset"
        offset.write_text("0")
        hooks = {1: hook_variables(FAULTS_CLOCK_FILE=str(offset))}
        async with hosts_scene(fresh, seed=effort.seed, hosts=2, variables=hooks) as made:
            scene = made.scene
            await scene.under_load(EVENTS)
            steps = (3600, 0, -3600, 0) * (3 if effort.long else 1)
            for seconds in steps:
                _write(offset, str(seconds))
                await asyncio.sleep(1.5)  # two renewals
                await scene.under_load(2 * EVENTS)
            _check_increasing(scene)
            refused = sum(p.stats.frames_refused for p in scene.publishers)
            found = await scene.end_well()
    return {"steps": len(steps), "frames refused": refused, **scene.figures(found)}
