"""Bad surroundings, made on purpose: `python -m tests.faults NAME|all --seed S --kills N`.

Each fault is a function of `faults.py` or `hosts_faults.py` that starts a service of its own on temporary folders, puts it
under load, does the harm, and asks the oracle of `tests.support.ledger` and the service's own books what became of it.
RELIABILITY.md tells what each promises and what was seen.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import logging
import signal
import sys
import time

from tests.faults.catalogue import FAULTS
from tests.faults.faults import Effort, Figures
from tests.support.service import ROOT, Template, template

from outrider.errors import OutriderError

REPORTS = ROOT / "build" / "faults"
SHOWN_CHARACTERS_MAX = 3000


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def _bounded(name: str, fresh: Template, effort: Effort) -> Figures:
    fault = FAULTS[name]
    async with asyncio.timeout(fault.seconds_max(effort)):
        return await fault.run(fresh, effort)


async def _run(name: str, fresh: Template, effort: Effort) -> Figures:
    """With a SIGTERM as good as a Ctrl-C: whatever was started is ended."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await _bounded(name, fresh, effort)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults, or all (the default)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--kills", type=int, default=20, help="of each kill loop (default 20, at most 10000)"
    )
    parser.add_argument("--long", action="store_true", help="each fault several times")
    parser.add_argument("--list", action="store_true", help="show what there is")
    options = parser.parse_args()
    if options.list:
        for name, fault in FAULTS.items():
            _say(f"{name:<28} {(inspect.getdoc(fault.run) or '').splitlines()[0]}")
        return 0
    names = options.names or ["all"]
    names = list(FAULTS) if names == ["all"] else names
    if unknown := set(names) - set(FAULTS):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; --list shows what there is")
    if not 1 <= options.kills <= 10_000:
        parser.error("--kills is 1 to 10000")
    REPORTS.mkdir(parents=True, exist_ok=True)
    # Producers tell of every stream that they lose, and here they lose many.
    logging.basicConfig(
        filename=REPORTS / f"producers-{names[0]}.log",
        filemode="w",
        format="%(asctime)s %(message)s",
    )
    effort = Effort(options.seed, options.kills, options.long)
    failed = []
    with template() as fresh:
        for name in names:
            began = time.monotonic()
            try:
                figures = asyncio.run(_run(name, fresh, effort))
            except (AssertionError, TimeoutError, OutriderError) as error:
                failed.append(name)
                said = str(error) or "too slow"
                report = REPORTS / f"{name}-{effort.seed}.log"
                report.write_text(said)
                _say(
                    f"{name}: FAILED after {time.monotonic() - began:.0f} s; all of it in {report}"
                )
                _say(said.partition("\n--- ")[0][:SHOWN_CHARACTERS_MAX])
                _say(f"repeat with: python -m tests.faults {name} --seed {effort.seed}")
            else:
                words = json.dumps(figures, ensure_ascii=False)
                _say(f"{name}: held, {time.monotonic() - began:.0f} s: {words}")
    if failed:
        _say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
