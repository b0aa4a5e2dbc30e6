"""The machine a figure was measured on, and the CPUs a run keeps to."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

FLUSHES = 20
FLUSH_BYTES = 8192
PACKAGES = ("uvloop", "grpcio", "asyncpg", "aiohttp", "protobuf", "orjson")


@dataclass(frozen=True, slots=True)
class Machine:
    """What a reader needs to place a figure."""

    cpu: str
    cores: int
    cpus_used: tuple[int, ...]
    memory_bytes: int
    kernel: str
    python: str
    packages: dict[str, str]
    flush_ms: float
    """The median of writing a block and flushing it, in the folder of the run: the floor under every acknowledgement."""


def describe(cpus: tuple[int, ...], folder: Path) -> Machine:
    """Look at the machine."""
    return Machine(
        cpu=_cpu_model(),
        cores=os.cpu_count() or 1,
        cpus_used=cpus,
        memory_bytes=psutil.virtual_memory().total,
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        packages={name: metadata.version(name) for name in PACKAGES if _installed(name)},
        flush_ms=_flush_ms(folder),
    )


def pin(count: int) -> tuple[int, ...]:
    """Keep this process, and all it starts, to `count` CPUs; returns them. Where the system has no such call: all."""
    if sys.platform != "linux":
        return tuple(range(os.cpu_count() or 1))
    allowed = sorted(os.sched_getaffinity(0))
    chosen = tuple(allowed[:count])
    os.sched_setaffinity(0, chosen)
    return chosen


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _flush_ms(folder: Path) -> float:
    path = folder / "flush"
    flush = os.fdatasync if hasattr(os, "fdatasync") else os.fsync
    took: list[float] = []
    with path.open("wb", buffering=0) as file:
        for _ in range(FLUSHES):
            begin = time.perf_counter()
            file.write(bytes(FLUSH_BYTES))
            flush(file.fileno())
            took.append(time.perf_counter() - begin)
    path.unlink()
    return statistics.median(took) * 1000
