"""Every fault by its name, with the time it may take."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.faults import faults, hosts_faults
from tests.faults.faults import Effort, Figures
from tests.support.service import Template


@dataclass(frozen=True)
class Entry:
    """A fault. `seconds`: what its short form may take; a kill loop is given so much for each 20 kills.

    `long_only`: `make test` leaves it to `make faults`: another fault is much the same.
    """

    run: Callable[[Template, Effort], Awaitable[Figures]]
    seconds: float = 120.0
    by_kills: bool = False
    long_only: bool = False

    def seconds_max(self, effort: Effort) -> float:
        if self.by_kills:
            return self.seconds * (1 + effort.kills / 20)
        return self.seconds * (4 if effort.long else 1)


FAULTS: dict[str, Entry] = {
    "kill-workers": Entry(faults.kill_workers, by_kills=True),
    "killed-worker-takeover": Entry(faults.takeover_of_a_killed_worker, seconds=300.0),
    "zombie-worker": Entry(faults.zombie_worker),
    "database-restart": Entry(faults.database_restart),
    "lease-table-slow": Entry(faults.lease_table_slow),
    "clock-steps": Entry(faults.clock_steps),
    "poison-event": Entry(faults.poison_event, seconds=180.0),
    "second-supervisor": Entry(faults.second_supervisor),
    "rolling-restart": Entry(faults.rolling_restart),
    "kill-hosts": Entry(hosts_faults.kill_hosts, seconds=180.0, by_kills=True),
    "silent-host": Entry(hosts_faults.silent_host, seconds=180.0),
    "paused-host": Entry(hosts_faults.paused_host),
    "host-without-database": Entry(hosts_faults.host_without_database),
    "host-without-another": Entry(hosts_faults.host_without_another),
    "lossy-wires": Entry(hosts_faults.lossy_wires),
    "clock-step-of-a-host": Entry(hosts_faults.clock_step_of_a_host),
}
