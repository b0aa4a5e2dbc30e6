"""Faults of one host: its workers, their supervisor, its database, its clock, an event that crashes whoever sends it.

Every function makes its own service, is bounded in time, ends what it started, and returns what was seen as figures.
It raises AssertionError, with the end of the logs, where something is not as it must be.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.faults.scene import (
    Scene,
    gone,
    workers_alive,
    workers_scene,
)
from tests.support.ledger import acknowledged, shard_of
from tests.support.service import Template, temporary_folder, until

Figures = dict[str, object]

EVENTS = 25
"""What each producer must get acknowledged between two kills."""

ROUND_KILLS = 25
HOOKS = Path(__file__).parent / "hooks"

STRIKES = ("worker",) * 6 + ("both", "supervisor", "postmaster", "backend")
"""What is killed: mostly a worker; sometimes all, the supervisor, the database, or one connection's process."""


@dataclass(frozen=True)
class Effort:
    """How much to do. `long`: for `make faults`."""

    seed: int = 1
    kills: int = 20
    long: bool = False


# Kills


async def kill_workers(fresh: Template, effort: Effort) -> Figures:
    """kill -9 of workers, the supervisor, the postmaster or a backend, again and again under load."""
    total: Counter[str] = Counter()
    done = 0
    while done < effort.kills:
        count = min(ROUND_KILLS, effort.kills - done)
        dice = random.Random(effort.seed + done)
        async with workers_scene(fresh, seed=effort.seed + done) as made:
            for number in range(count):
                # All kinds in any long run, whatever the dice say of a short one.
                kind = STRIKES[number % len(STRIKES)] if count < 20 else dice.choice(STRIKES)
                await strike(made, kind, dice)
                total[kind] += 1
            await made.under_load(EVENTS)
            found = await made.end_well()
        done += count
        total.update(
            acknowledged=found.acknowledged,
            deliveries=found.deliveries,
            lost=len(found.lost),
            duplicates=found.duplicates,
            bound=found.bound,
        )
    return {"kills": done, **total}


async def strike(made: Scene, kind: str, dice: random.Random) -> None:
    """One kill at a random moment of the load, and the way back to where all shards are held."""
    await made.under_load(dice.randrange(5, 2 * EVENTS))
    # Where in a cycle of commit, delivery and record it falls shall be chance.
    await asyncio.sleep(dice.random() * 0.2)
    running = made.service
    alive = workers_alive(running)
    if kind in ("worker", "both"):
        assert alive, running.tail()
        for node in sorted(alive) if kind == "both" else [dice.choice(sorted(alive))]:
            await made.kill_node(node, alive[node])
        # Now and then the next kill comes while this one is still being mended.
        if dice.random() < 0.7:
            await made.whole()
        return
    if kind == "supervisor":
        with made.fault("kill -9 of the supervisor"):
            running.kill()
            running.start()
            await running.ready(60)
            await gone(list(alive.values()), 30)
            await made.whole()
        return
    with made.fault(f"kill -9 of the {kind}"):
        if kind == "postmaster":
            os.kill(running.postmaster_pid(), signal.SIGKILL)
        else:
            backends = await running.backends()
            os.kill(backends[dice.choice(sorted(set(backends) - {"api"}))], signal.SIGKILL)
        await made.whole()
        await made.under_load(1)


async def takeover_of_a_killed_worker(fresh: Template, effort: Effort) -> Figures:
    """How long a killed worker's shards wait, with leases as they are by default."""
    knobs = {"lease_seconds": 10, "lease_renew_seconds": 3, "lease_margin_seconds": 3}
    held_after, served_after = [], []
    async with workers_scene(fresh, seed=effort.seed, knobs=knobs) as made:
        for number in range(10 if effort.long else 3):
            await made.under_load(EVENTS)
            await made.whole()
            await made.even(120)  # a shard a renewal, if the other took all of them
            alive = workers_alive(made.service)
            node = sorted(alive)[number % 2]
            fault = await made.kill_node(node, alive[node])
            held, served = await served_again(made, fault.began, fault.shards or frozenset(), 30)
            held_after.append(held)
            served_after.append(served)
            assert served < 15, f"{served} s"
        found = await made.end_well()
    return {
        "taken after, s": [round(seconds, 2) for seconds in held_after],
        "delivered again after, s": [round(seconds, 2) for seconds in served_after],
        **made.figures(found),
    }


async def served_again(
    made: Scene, since: float, shards: frozenset[int], seconds: float
) -> tuple[float, float]:
    """After how many seconds all of these shards had a new live owner, and all their tenants got new events delivered."""
    before = {shard: h.epoch for shard, h in (await made.holdings()).items()}
    wall = time.time()
    since_us = int((wall - (time.monotonic() - since)) * 1e6)
    deadline = since + seconds
    # Who took a shard before this look has a new epoch already, so the first look may only be too strict.
    while True:
        held = await made.holdings()
        if all(
            held[s].live and (held[s].epoch > before[s] or _is_new(made, s, since_us))
            for s in shards
        ):
            break
        assert time.monotonic() < deadline, f"not taken\n{await made.state()}"
        await asyncio.sleep(0.03)
    taken = time.monotonic() - since
    tenants = {
        tenant: shard for tenant, homes in made.homes.items() for shard in homes if shard in shards
    }
    assert tenants, f"no tenant lives in {sorted(shards)}"
    while not all(_is_new(made, shard, since_us) for shard in tenants.values()):
        assert time.monotonic() < deadline, (
            f"not served: {[t for t, s in tenants.items() if not _is_new(made, s, since_us)]} of {tenants}\n{await made.state()}"
        )
        await asyncio.sleep(0.03)
    return taken, time.monotonic() - since


def _is_new(made: Scene, shard: int, since_us: int) -> bool:
    """Whether an event that entered this shard's log since then was delivered."""
    for request in reversed(made.receiver.requests):
        if request.status == 200 and any(
            shard_of(name) == shard and int(name.split("_")[1]) >> 10 > since_us
            for name in request.ids
        ):
            return True
        if time.time() - since_us / 1e6 > 0 and request.arrived < time.monotonic() - 60:
            break
    return False


async def zombie_worker(fresh: Template, effort: Effort) -> Figures:
    """A worker is stopped beyond its lease, and goes on under load when others have its shards."""
    taken = []
    async with workers_scene(fresh, seed=effort.seed) as made:
        for number in range(3 if effort.long else 1):
            await made.under_load(EVENTS)
            await made.whole()
            await made.even()
            alive = workers_alive(made.service)
            node = sorted(alive)[number % 2]
            shards = await made.held_by(node)
            with made.fault(f"SIGSTOP of {node}", shards) as fault:
                os.kill(alive[node], signal.SIGSTOP)
                try:
                    fault.shards = shards = shards | await made.held_by(node)
                    deadline = time.monotonic() + 20
                    while await made.held_by(node):
                        assert time.monotonic() < deadline, f"nobody took over\n{made.tail()}"
                        await asyncio.sleep(0.05)
                    taken.append(round(time.monotonic() - fault.began, 1))
                    await asyncio.sleep(
                        1.0
                    )  # the new owner sends, the old one's answers wait in its sockets
                finally:
                    os.kill(alive[node], signal.SIGCONT)
            await made.under_load(EVENTS)
            await made.whole()
        found = await made.end_well()
    return {"taken after, s": taken, **made.figures(found)}


# The database


async def database_restart(fresh: Template, effort: Effort) -> Figures:
    """The database ends, in order and by kill -9, and comes back: everybody keeps what it had."""
    moved = 0
    away = []
    async with workers_scene(fresh, seed=effort.seed) as made:
        for kind in (signal.SIGINT, signal.SIGKILL) * (5 if effort.long else 1):
            await made.under_load(EVENTS)
            await made.whole()
            await made.even()
            await _at_rest(made)
            before = {shard: h.node for shard, h in (await made.holdings()).items()}
            alive = workers_alive(made.service)
            with made.fault(f"{kind.name} of the postmaster") as fault:
                os.kill(made.service.postmaster_pid(), kind)
                await asyncio.sleep(0.2)
                await made.whole()
                await made.under_load(1)
            away.append(round(fault.ended - fault.began, 2))
            after = {shard: h.node for shard, h in (await made.holdings()).items()}
            moved += sum(before[shard] != node for shard, node in after.items())
            assert alive == workers_alive(made.service), "the workers live on"
        assert moved == 0, f"{moved} shards changed hands\n{made.tail()}"
        found = await made.end_well()
    return {
        "restarts": len(away),
        "away, s": away,
        "shards taken by others": moved,
        **made.figures(found),
    }


async def _at_rest(made: Scene) -> None:
    """Until nobody hands shards off any more."""
    seen = {shard: h.node for shard, h in (await made.holdings()).items()}
    quiet = time.monotonic()
    while time.monotonic() - quiet < 1.5:
        await asyncio.sleep(0.1)
        now = {shard: h.node for shard, h in (await made.holdings()).items()}
        if now != seen:
            seen, quiet = now, time.monotonic()


async def lease_table_slow(fresh: Template, effort: Effort) -> Figures:
    """Somebody locks the rows of the leases for longer than a lease: nobody may send meanwhile."""
    stopped, locked = [], []
    async with workers_scene(fresh, seed=effort.seed) as made:
        for _ in range(3 if effort.long else 1):
            await made.under_load(EVENTS)
            with made.fault("the leases are locked"):
                connection = await made.connect()
                try:
                    async with connection.transaction():
                        await connection.fetch("SELECT name FROM node FOR UPDATE")
                        began = time.monotonic()
                        # Lease 4 s, margin 1 s: from 3 s after its last renewal on nobody sends.
                        await asyncio.sleep(3.6)
                        late = len(made.receiver.requests)
                        await asyncio.sleep(2.4)
                        sent = len(made.receiver.requests) - late
                        stopped.append(sent)
                        locked.append(round(time.monotonic() - began, 1))
                finally:
                    await connection.close()
                assert sent == 0, f"{sent} requests without a lease\n{made.tail()}"
                await made.whole()
                await made.under_load(EVENTS)
        found = await made.end_well()
    return {
        "locked, s": locked,
        "requests without a lease": sum(stopped),
        **made.figures(found),
    }


# The clock


async def clock_steps(fresh: Template, effort: Effort) -> Figures:
    """The clock of the host's processes jumps an hour ahead, and back, and another hour back, under load."""
    with temporary_folder() as folder:
        offset = folder / "offset"
        offset.write_text("0")
        variables = hook_variables(FAULTS_CLOCK_FILE=str(offset))
        async with workers_scene(fresh, seed=effort.seed, variables=variables) as made:
            await made.under_load(EVENTS)
            for seconds in (3600, 0, -3600, 0) * (3 if effort.long else 1):
                before = max(_ids(made))
                _write(offset, str(seconds))
                # Two renewals later the node has measured its clock anew.
                await asyncio.sleep(1.5)
                await made.under_load(2 * EVENTS)
                last = max(_ids(made))
                # The log's time is the database's, whose clock nobody touched.
                assert last > before
                drift = abs((last >> 10) / 1e6 - time.time())
                assert drift < 30, f"ids are {drift:.0f} s off\n{made.tail()}"
            _check_increasing(made)
            found = await made.end_well()
    return {"steps": 4 * (3 if effort.long else 1), **made.figures(found)}


def _write(path: Path, text: str) -> None:
    """Whole or not at all: others read it at any time."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def _ids(made: Scene) -> list[int]:
    return [
        event_id
        for sent in made.sent.values()
        if (event_id := acknowledged(sent.handle)) is not None
    ]


def _check_increasing(made: Scene) -> None:
    """Of each producer and shard, ids are in the order in which the events were sent."""
    for load in made.loads:
        last: dict[int, int] = {}
        for number in sorted(load.sent):
            event_id = acknowledged(load.sent[number].handle)
            if event_id is None:
                continue
            shard = event_id & 1023
            assert event_id > last.get(shard, 0), f"event {number} of {load.producer} in {shard}"
            last[shard] = event_id


def hook_variables(**values: str) -> Mapping[str, str]:
    """The environment under which every Python of the service runs the hooks of `hooks/sitecustomize.py`."""
    path = os.pathsep.join(filter(None, (str(HOOKS), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, **values}


# An event that crashes whoever sends it


async def poison_event(fresh: Template, effort: Effort) -> Figures:
    """Whoever sends this event dies: after three owners its shard is held back, and the others' tenants go on."""
    with temporary_folder() as folder:
        armed = folder / "armed"
        armed.touch()
        variables = hook_variables(FAULTS_POISON_FILE=str(armed))
        knobs = {"crash_seconds": 30}
        async with workers_scene(fresh, seed=effort.seed, variables=variables, knobs=knobs) as made:
            await made.under_load(EVENTS)
            await _at_rest(made)
            shard = made.homes["t1"][0]
            owner = (await made.holdings())[shard].node
            others = {t for t, homes in made.homes.items() if t != "t1"}
            began = time.monotonic()
            with made.fault("a poison event") as fault:
                made.loads[0].marker["t1"] = "poison"
                await _until_held_back(made, shard, 90)
                held_after = time.monotonic() - began
                await made.whole()
                # Everybody else is served while that shard's deliveries wait.
                await made.under_load(EVENTS, 60)
                crashes = len(made.service.lines('"SIGKILL"')) + sum(
                    json.loads(line).get("status") == 9
                    for line in made.service.lines('"worker.ended"')
                )
            assert made.service.lines("shard.held_back"), made.tail()
            held_back = sorted(s for s, h in (await made.holdings()).items() if h.held_back)
            assert shard in held_back
            await asyncio.sleep(1.0)
            waiting = sorted(t for t in others if any(s in held_back for s in made.homes[t]))
            served = [
                t for t in others if t not in waiting and _delivered_since(made, t, fault.ended)
            ]
            armed.unlink()
            # What these shards' node has in flight is sent again: it takes them anew.
            with made.fault("let go"):
                for each in held_back:
                    ran = await asyncio.to_thread(
                        made.service.run_command, "let-go", "--shard", str(each)
                    )
                    assert ran.returncode == 0, ran.stdout + ran.stderr
                await made.whole()
                await made.under_load(EVENTS)
            left = sorted(s for s, h in (await made.holdings()).items() if h.held_back)
            assert not left, (
                f"{left} are held back although nothing crashes any more\n{made.tail()}"
            )
            # What was set aside comes after what did not wait for it.
            made.unordered = {t for t, homes in made.homes.items() if set(homes) & set(held_back)}
            found = await made.end_well()
    return {
        "worker": owner,
        "crashes": crashes,
        "held back after, s": round(held_after, 1),
        "shards held back": len(held_back),
        "tenants that waited with it": waiting,
        "tenants served meanwhile": sorted(served),
        **made.figures(found),
    }


async def _until_held_back(made: Scene, shard: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not (await made.holdings())[shard].held_back:
        assert time.monotonic() < deadline, f"shard {shard} is not held back\n{made.tail()}"
        await asyncio.sleep(0.1)


def _delivered_since(made: Scene, tenant: str, since: float) -> bool:
    return any(
        request.arrived > since and request.status == 200 and request.path.startswith(f"/{tenant}/")
        for request in made.receiver.requests
    )


# Supervisors


async def second_supervisor(fresh: Template, effort: Effort) -> Figures:
    """A second supervisor on the same data folder is refused, and the first does not feel it."""
    said = ""
    async with workers_scene(fresh, seed=effort.seed) as made:
        await made.under_load(EVENTS)
        alive = workers_alive(made.service)
        for _ in range(10 if effort.long else 2):
            ran = await asyncio.to_thread(
                made.service.run_command,
                "serve",
                "--listen-address",
                "127.0.0.1:0",
                "--admin-address",
                "127.0.0.1:0",
            )
            assert ran.returncode == 1, ran.stderr
            assert f"is in use by process {made.service.pid}" in ran.stderr
            said = ran.stderr.strip().splitlines()[-1]
        await made.under_load(EVENTS)
        assert alive == workers_alive(made.service)
        assert len(made.service.lines('"tenure.ended"')) == 0
        found = await made.end_well()
        assert found.duplicates == 0
    return {"refused with": said[-60:], **made.figures(found)}


async def rolling_restart(fresh: Template, effort: Effort) -> Figures:
    """SIGHUP: the workers are restarted one after the other; no publish fails and nothing comes twice."""
    seconds = []
    async with workers_scene(fresh, seed=effort.seed) as made:
        refused = 0
        for number in range(5 if effort.long else 1):
            await made.under_load(EVENTS)
            await made.whole()
            alive = workers_alive(made.service)
            began = time.monotonic()
            os.kill(made.service.pid, signal.SIGHUP)
            await until(
                lambda n=number: len(made.service.lines('"workers.rolled"')) > n,  # type: ignore[misc]
                90,
                f"the restart of all\n{made.tail()}",
            )
            seconds.append(round(time.monotonic() - began, 1))
            assert not set(alive.values()) & set(workers_alive(made.service).values())
            await made.whole()
            await made.under_load(EVENTS)
        refused = sum(publisher.stats.frames_refused for publisher in made.publishers)
        resent = sum(publisher.stats.frames_resent for publisher in made.publishers)
        # Handles that failed would have failed the end.
        found = await made.end_well()
        ends = [json.loads(line) for line in made.service.lines('"worker.ended"')]
        assert all(end.get("status") == 0 for end in ends), ends
        assert found.duplicates == 0, f"{found.duplicates} duplicates\n{made.tail()}"
    return {
        "restarts": len(seconds),
        "each, s": seconds,
        "frames refused and sent again": refused,
        "frames resent": resent,
        **made.figures(found),
    }
