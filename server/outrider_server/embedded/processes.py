"""Postgres processes that nobody of ours holds any more: which are they, and ending them.

A process id proves nothing: it may be a zombie (dead, not yet collected) or, after a restart of the machine or the
container, somebody else. A server is ours when it works *in* our data folder. Two servers on one folder would
destroy it, so a folder is only started when no process of an earlier server is left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from outrider_server.embedded.errors import still_running

_LINUX = sys.platform == "linux"
_POLL_SECONDS = 0.02
_KILLED_SECONDS = 10.0  # after SIGKILL only a process stuck in the kernel stays


@dataclass(frozen=True, slots=True)
class PidFile:
    """What `postmaster.pid` says: who runs, how far the start has come (starting, ready, stopping), and where."""

    pid: int
    status: str
    port: int = 0
    socket_folder: str = ""


def read_pid_file(data: Path) -> PidFile | None:
    """None when there is none, or when it is being written at this moment."""
    try:
        lines = (data / "postmaster.pid").read_text(errors="replace").splitlines()
        if len(lines) <= 7:  # the rest is filled in on the way
            return PidFile(int(lines[0]), "")
        return PidFile(int(lines[0]), lines[7].strip(), int(lines[3]), lines[4].strip())
    except (FileNotFoundError, NotADirectoryError, ValueError, IndexError):
        return None


def serves(pid: int, data: Path) -> bool:
    """Whether `pid` is a living Postgres process that works in `data`."""
    return _serves_linux(pid, data) if _LINUX else _serves_elsewhere(pid, data)


def _serves_linux(pid: int, data: Path) -> bool:
    process = Path("/proc") / str(pid)
    with contextlib.suppress(OSError, IndexError):  # gone meanwhile
        # The state follows the name, which is in brackets and may itself hold any character. A zombie's folder
        # can still be read for a moment, and a dead process' cannot.
        if process.joinpath("stat").read_text(errors="replace").rpartition(") ")[2][0] in "ZX":
            return False
        try:
            return (
                process.joinpath("exe").readlink().name.startswith("postgres")
                and process.joinpath("cwd").readlink() == data.resolve()
            )
        except PermissionError:
            # Root in a container may not look at other users' links. The launcher puts the folder's full path on
            # the command line of the postmaster, which everybody may read; backends write over theirs.
            command = process.joinpath("cmdline").read_bytes().split(b"\0")
            return b"postgres" in command[0] and os.fsencode(data.resolve()) in command
    return False


def _serves_elsewhere(pid: int, data: Path) -> bool:
    asked = subprocess.run(  # noqa: S603 - a number as the only argument, no shell
        ["/bin/ps", "-o", "stat=,command=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=False,
    )
    state, _, command = asked.stdout.strip().partition(" ")
    # The launcher starts Postgres with the folder's full path on its command line.
    return bool(state) and "Z" not in state and "postgres" in command and str(data) in command


def _servers(data: Path) -> Iterator[int]:
    """Every living Postgres process in `data`: also backends that outlived their postmaster, where /proc tells."""
    if _LINUX:
        for process in Path("/proc").iterdir():
            if process.name.isdecimal() and _serves_linux(int(process.name), data):
                yield int(process.name)
    elif (file := read_pid_file(data)) is not None and _serves_elsewhere(file.pid, data):
        yield file.pid


def end_leftovers(
    data: Path,
    *,
    fast_seconds: float,
    monotonic: Callable[[], float],
    sleep: Callable[[float], None],
) -> None:
    """End whatever still works in `data`, cleanly if it can be, and clear away a pid file that names nobody.

    The caller holds the state folder's lock, so no launcher is behind such a server any more.
    """

    def wait_until_gone(seconds: float) -> bool:
        deadline = monotonic() + seconds
        while True:
            if not any(_servers(data)):
                return True
            if monotonic() > deadline:
                return False
            sleep(_POLL_SECONDS)

    if not (data / "PG_VERSION").is_file():
        return  # not Postgres data: nothing in there is ours to end or to clear away
    file = read_pid_file(data)
    postmaster = file.pid if file is not None and serves(file.pid, data) else None
    if postmaster is not None:
        _signal(postmaster, signal.SIGINT)
        if not wait_until_gone(fast_seconds):
            _signal(postmaster, signal.SIGQUIT)
            wait_until_gone(_KILLED_SECONDS)
    # Backends without a postmaster end by themselves only when they next wait for something: not in a long query.
    for pid in list(_servers(data)):
        _signal(pid, signal.SIGKILL)
    if not wait_until_gone(_KILLED_SECONDS):
        raise still_running(data)
    # Postgres clears a stale file itself, except when its process id lives on as a zombie or as somebody else:
    # then it would refuse to start for ever.
    with contextlib.suppress(FileNotFoundError):
        (data / "postmaster.pid").unlink()


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
