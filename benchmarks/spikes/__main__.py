"""The spikes' command line: `python -m benchmarks.spikes NAME`, with `--quick` for a short look that gives no figures to keep."""

from __future__ import annotations

import argparse
import asyncio
from importlib import import_module

from benchmarks.loop import run_loop

SPIKES = ("forwarder", "fence", "window", "brin", "many")
SECONDS_MAX = 900.0


def main() -> None:
    """Run one spike, bounded in time. Only that one's module is loaded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spikes", description=__doc__)
    parser.add_argument("name", choices=SPIKES)
    parser.add_argument("--quick", action="store_true", help="shorter turns and fewer of them")
    options = parser.parse_args()
    spike = import_module(f"benchmarks.spikes.{options.name}")

    async def bounded() -> None:
        async with asyncio.timeout(SECONDS_MAX):
            await spike.run(options.quick)

    run_loop(bounded())


if __name__ == "__main__":
    main()
