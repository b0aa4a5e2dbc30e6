"""Many worlds, one after the other: `python -m tests.simulation --seeds 0-1000`.

--seeds A-B        these seeds (B not included); one number N is 0-N
--stormy           more goes wrong in each, and everything takes longer
--planted          plant each fault in turn, and tell which seeds find it; fails where none does
--trace            one seed, step by step
--note-statements  write down what the statements say that the fake store's twins were written after
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation import statements
from tests.simulation.planted import PLANTS
from tests.simulation.world import Result, run

TRACE_LINES = 80
BROKEN_MAX = 10
"""Broken worlds after which looking for more is over."""


def search(plant: str, seeds: range, *, stormy: bool = True) -> list[int]:
    """The seeds that find a planted fault."""
    found = []
    for seed in seeds:
        with PLANTS[plant]():
            if run(seed, stormy=stormy).violation is not None:
                found.append(seed)
    return found


def report(result: Result, *, lines: int = TRACE_LINES) -> str:
    """A broken world in words, with the way to see it again."""
    again = f"python -m tests.simulation --seeds {result.seed}-{result.seed + 1} --trace"
    return "\n".join(
        (
            f"seed {result.seed}{' (stormy)' if result.stormy else ''}: {result.violation}",
            f"  digest {result.digest:08x}, {result.steps} steps, {result.seconds:.3f} s of its time",
            f"  again: {again}{' --stormy' if result.stormy else ''}",
            *(f"  {line}" for line in result.trace[-lines:]),
        )
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _seeds(text: str) -> range:
    first, _, last = text.rpartition("-")
    return range(int(first or 0), int(last))


def _run_all(seeds: range, *, stormy: bool, trace: bool) -> int:
    broken = steps = worlds = 0
    started = time.monotonic()
    for seed in seeds:
        result = run(seed, stormy=stormy, traced=trace)
        steps += result.steps
        if trace:
            _say("\n".join(result.trace))
        if result.violation is not None:
            broken += 1
            _say(report(result))
        worlds += 1
        if broken == BROKEN_MAX:
            _say("enough")
            break
    seconds = time.monotonic() - started
    _say(
        f"{worlds} worlds, {broken} broken, {steps} steps in {seconds:.1f} s:"
        f" {worlds / seconds * 60:.0f} worlds a minute"
    )
    return 1 if broken else 0


def _search_all(seeds: range, *, stormy: bool) -> int:
    missed = 0
    for plant in PLANTS:
        found = search(plant, seeds, stormy=stormy)
        missed += not found
        _say(f"{plant:28} {len(found):4} of {len(seeds)} seeds: {found[:12]}")
    return 1 if missed else 0


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", type=_seeds, default=range(100))
    parser.add_argument("--stormy", action="store_true")
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--note-statements", action="store_true")
    options = parser.parse_args(arguments)
    if options.note_statements:
        statements.write()
        return 0
    if options.planted:
        return _search_all(options.seeds, stormy=True)
    return _run_all(options.seeds, stormy=options.stormy, trace=options.trace)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
