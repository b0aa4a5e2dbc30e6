"""The long form of the crash tests: as many kills as wanted, of the server, the postmaster and single backends.

    python -m tests.e2e.crash_loop --kills 100 --seed 7
    python -m tests.e2e.crash_loop --planted

Everything is chosen by the seed but the machine's own timing. Each round of ten kills is one service with its own data;
at its end the oracle speaks and the books must balance. Ends with status 1 at the first round that is not well, and
says how to repeat it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable

from tests.e2e.scenario import RESUME_SECONDS, Scenario, scenario
from tests.support import planted
from tests.support.ledger import UNRECORDED_SECONDS, Findings
from tests.support.service import Template, template

ROUND_KILLS = 10
RATE = 500.0
KINDS = ("server", "server", "starting", "draining", "postmaster", "backend", "terminate")
"""What is killed: the server (also while it starts or drains), its database, or one connection ended."""


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def strike(running: Scenario, kind: str, dice: random.Random) -> str:
    """One fault at a random moment of the load; returns in words what it was and how long the service was away."""
    await running.under_load(dice.randrange(50, 400))
    # Where in a cycle of commit, delivery and record it falls shall be chance.
    await asyncio.sleep(dice.random() * 0.2)
    began = time.monotonic()
    if kind == "server":
        await running.kill_and_restart()
        return f"server, away {time.monotonic() - began:.1f} s"
    if kind in ("starting", "draining"):
        with running.fault(kind):
            if kind == "starting":
                running.service.kill()
                running.service.start()
            else:
                os.kill(running.service.pid, signal.SIGTERM)
            await asyncio.sleep(dice.random() * (2.0 if kind == "starting" else 0.05))
            running.service.kill()
            running.service.start()
            await running.service.ready(RESUME_SECONDS)
        return f"{kind}, away {time.monotonic() - began:.1f} s"
    tenures = running.tenures()
    backends = await running.service.backends()
    role = dice.choice(sorted(set(backends) - {"api"}))
    with running.fault(kind):
        if kind == "postmaster":
            role = ""
            os.kill(running.service.postmaster_pid(), signal.SIGKILL)
        elif kind == "backend":
            os.kill(backends[role], signal.SIGKILL)
        else:
            connection = await running.service.connect()
            await connection.fetchval("SELECT pg_terminate_backend($1)", backends[role])
            await connection.close()
        await running.comes_back(tenures)
    return f"{kind} {role}".strip() + f", away {time.monotonic() - began:.1f} s"


async def run_round(fresh: Template, kills: int, seed: int) -> Findings:
    """One service, so many kills; raises AssertionError where something is wrong."""
    dice = random.Random(seed)
    async with scenario(fresh, rate=RATE, seed=seed) as running:
        for _ in range(kills):
            _say("    " + await strike(running, dice.choice(KINDS), dice))
        await running.under_load(100)
        return await running.end_well()


async def kill_loop(kills: int, seed: int) -> int:
    """Rounds until so many kills are done."""
    total: Counter[str] = Counter()
    with template() as fresh:
        for number, first in enumerate(range(0, kills, ROUND_KILLS)):
            count = min(ROUND_KILLS, kills - first)
            round_seed = seed + number
            _say(f"round {number + 1}: {count} kills, seed {round_seed}")
            try:
                found = await run_round(fresh, count, round_seed)
            except AssertionError as error:
                _say(str(error))
                _say(f"repeat with --kills {count} --seed {round_seed}")
                return 1
            total.update(
                kills=count,
                acknowledged=found.acknowledged,
                deliveries=found.deliveries,
                lost=len(found.lost),
                duplicates=found.duplicates,
                bound=found.bound,
            )
    _say(", ".join(f"{count} {name}" for name, count in total.items()))
    return 0


# The test of the test

CAUGHT_BY: dict[str, Callable[[Findings], object]] = {
    "ack_before_commit": lambda found: found.lost,
    "checkpoint_past_open": lambda found: found.lost,
    "retries_not_owed": lambda found: found.lost,
    "late_records": lambda found: found.unexcused,
    "frames_stored_again": lambda found: found.doubled,
    "ids_by_attempt": lambda found: found.broken,
}


async def look_for_plant(
    fresh: Template, name: str, seed: int, *, kills: int = 2, rest_seconds: float = RESUME_SECONDS
) -> Findings:
    """Kill a server with a fault planted into it; what does the oracle say?"""
    program = planted.program(name)
    async with scenario(fresh, rate=RATE, seed=seed, program=program) as running:
        for _ in range(kills):
            # Longer than an outcome may be unrecorded, or every duplicate would have its excuse.
            await running.under_load(int(RATE * UNRECORDED_SECONDS * 2))
            await running.kill_and_restart(program)
        await running.under_load(100)
        await running.rest(rest_seconds)
        return running.judge()


async def planted_all(seed: int) -> int:
    missed = []
    with template() as fresh:
        for name in planted.PLANTS:
            found = await look_for_plant(fresh, name, seed)
            caught = bool(CAUGHT_BY[name](found))
            _say(f"{name}: {'caught' if caught else 'MISSED'}: {found}\n    {found.wrong()}")
            if not caught:
                missed.append(name)
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.crash_loop", description=__doc__)
    parser.add_argument(
        "--kills", type=int, default=50, help="how many (default 50, at most 10000)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--planted", action="store_true", help="look for planted faults instead")
    options = parser.parse_args()
    if not 1 <= options.kills <= 10_000:
        parser.error("--kills is 1 to 10000")
    if options.planted:
        return asyncio.run(planted_all(options.seed))
    return asyncio.run(kill_loop(options.kills, options.seed))


if __name__ == "__main__":
    sys.exit(main())
