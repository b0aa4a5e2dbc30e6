"""CPU and memory of the processes of a run, by the part they play.

Postgres' processes share their buffers, and the resident size of each holds them: they are summed without what is shared,
plus the largest shared part once. CPU of helpers that ended meanwhile is in their parent's figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

RSS_DRIFT_MAX = 0.05


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds since the process began, and resident bytes now."""

    cpu_seconds: float
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class Quarters:
    """Mean resident bytes in each quarter of a run."""

    means: tuple[float, ...]

    @property
    def drift(self) -> float:
        """How far the last quarter is above the second, as a share of it."""
        return self.means[3] / self.means[1] - 1 if len(self.means) == 4 else 0.0


def quarters(samples: Sequence[tuple[float, int]], begin: float, end: float) -> Quarters:
    """Means by quarter of (time, bytes) samples; fewer than four where a quarter has none."""
    length = (end - begin) / 4
    groups: list[list[int]] = [[], [], [], []]
    for at, value in samples:
        if begin <= at < end:
            groups[min(int((at - begin) / length), 3)].append(value)
    return Quarters(tuple(statistics.fmean(group) for group in groups if group))


@dataclass(frozen=True, slots=True)
class Busy:
    """CPU seconds since the machine started: all work on the run's CPUs, what a host took from them, this process."""

    all_seconds: float
    stolen_seconds: float
    own_seconds: float


class Watch:
    """Reads the parts of a run. `roots` are process ids by part; `postgres` is the postmaster's, below the server's."""

    def __init__(
        self, roots: dict[str, list[int]], postgres: int | None, cpus: Sequence[int]
    ) -> None:
        self._roots = roots
        self._postgres = postgres
        self._cpus = cpus

    def busy(self) -> Busy:
        """How busy the run's CPUs are, with whatever."""
        times = psutil.cpu_times(percpu=True)
        taken = [times[cpu] for cpu in self._cpus if cpu < len(times)]
        stolen = sum(getattr(one, "steal", 0.0) for one in taken)
        idle = sum(one.idle + getattr(one, "iowait", 0.0) for one in taken)
        # A guest's time is in the user's already.
        guests = sum(getattr(one, "guest", 0.0) + getattr(one, "guest_nice", 0.0) for one in taken)
        own = psutil.Process().cpu_times()
        return Busy(sum(sum(one) for one in taken) - idle - guests, stolen, own.user + own.system)

    def read(self) -> dict[str, Usage]:
        """Usage of each part now. What has ended is left out."""
        postgres = _family(self._postgres) if self._postgres else []
        apart = {process.pid for process in postgres}
        usages = {
            part: _sum(
                [
                    process
                    for pid in pids
                    for process in _family(pid)
                    if process.pid not in apart or part == "postgres"
                ]
            )
            for part, pids in self._roots.items()
        }
        if postgres:
            usages["postgres"] = _sum(postgres)
        return usages


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _sum(processes: Sequence[psutil.Process]) -> Usage:
    cpu, private, shared = 0.0, 0, [0]
    for process in processes:
        try:
            with process.oneshot():
                times = process.cpu_times()
                memory = process.memory_info()
        except psutil.Error:
            continue
        cpu += times.user + times.system
        # Only where the system tells them: children that ended and were collected.
        cpu += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
        common = getattr(memory, "shared", 0)
        private += memory.rss - common
        shared.append(common)
    return Usage(cpu, private + max(shared))
