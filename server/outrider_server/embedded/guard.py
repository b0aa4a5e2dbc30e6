"""The process between us and Postgres: starts it, passes on its end, and ends it when we are gone.

Run as a file of its own (`python -I -S guard.py ...`), it imports nothing of ours. Why a process: the kernel's
"signal me when my parent dies" means the parent *thread*, so a pool thread that ends would stop the database,
and other systems than Linux have no such thing. Here our end is the end of a pipe, which holds everywhere.
Postgres in turn has this single-threaded process as its parent, so killing the guard stops Postgres too (Linux).

Orders come as single bytes on standard input: I, Q and K for SIGINT, SIGQUIT and SIGKILL. Only the parent may
signal a child without fear that its process id has meanwhile gone to somebody else.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from types import FrameType

ORDERS = {ord("I"): signal.SIGINT, ord("Q"): signal.SIGQUIT, ord("K"): signal.SIGKILL}
_PR_SET_PDEATHSIG = 1
# Also how often the log's size and our parent are looked at; everything urgent wakes the loop at once.
_TICK_SECONDS = 1.0


def main(arguments: list[str]) -> None:
    parent, uid, gid, log_bytes_max = (int(text) for text in arguments[:4])
    grace_seconds, log, command = float(arguments[4]), arguments[5], arguments[6:]
    wake, wake_write = os.pipe()
    for end in (wake, wake_write):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    # A handler, not SIG_IGN: ignoring would be inherited by Postgres. Our own end follows from the pipe or from
    # Postgres alone, never from a signal sent to a whole group.
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _awake)
    child = _start(command, uid, gid)
    os.write(1, b"%d\n" % child)
    os.close(1)

    inputs = [0, wake]
    deadline: float | None = None
    ending = signal.SIGQUIT
    while True:
        ready, _, _ = select.select(inputs, [], [], _TICK_SECONDS)
        if wake in ready:
            os.read(wake, 4096)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            _leave_like(status)
        orders = os.read(0, 64) if 0 in ready else b" "
        for order in orders:
            if order in ORDERS:
                os.kill(child, ORDERS[order])
        # A copy of the pipe's other end may live on in a process that our parent forked: so ask for it as well.
        if deadline is None and (not orders or os.getppid() != parent):
            inputs = [wake]
            deadline = time.monotonic() + grace_seconds
            os.kill(child, signal.SIGINT)
        elif deadline is not None and time.monotonic() > deadline:
            deadline = time.monotonic() + grace_seconds
            os.kill(child, ending)
            ending = signal.SIGKILL
        _trim(log, log_bytes_max)


def _awake(number: int, frame: FrameType | None) -> None:
    """Nothing to do: the byte in the wakeup pipe is what counts."""


def _start(command: list[str], uid: int, gid: int) -> int:
    prctl = None
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415 - nowhere else needed

        prctl = ctypes.CDLL(None, use_errno=True).prctl
    guard = os.getpid()
    # An order that comes before Postgres has its own handlers must end the child, not be swallowed by ours.
    handled = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        return child
    try:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(2, 1)
        os.umask(0o077)
        if uid >= 0:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
        if prctl is not None:
            # After setuid, which clears it. If the guard died before this line, nobody is left to tell us.
            prctl(_PR_SET_PDEATHSIG, int(signal.SIGINT), 0, 0, 0)
            if os.getppid() != guard:
                os._exit(126)
        os.execv(command[0], command)  # noqa: S606 - no shell is the point
    except OSError as error:
        os.write(2, f"FATAL:  {command[0]} cannot be started: {error}\n".encode())
    finally:
        os._exit(127)


def _leave_like(status: int) -> None:
    """End as the child did, so that our parent's wait tells the truth about Postgres."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


def _trim(log: str, bytes_max: int) -> None:
    """Keep the log at one full older part and the current one. Lines written during the copy are lost."""
    size = os.fstat(2).st_size
    if size <= bytes_max:
        return
    try:
        source = os.open(log, os.O_RDONLY)
        try:
            older = os.open(log + ".1", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                left = bytes_max
                os.lseek(source, size - left, os.SEEK_SET)
                while left > 0 and (part := os.read(source, min(left, 1 << 20))):
                    os.write(older, part)
                    left -= len(part)
            finally:
                os.close(older)
        finally:
            os.close(source)
    except OSError:
        pass  # a full disk is one more reason to shorten the log
    os.ftruncate(2, 0)  # opened for appending, so the next line begins the file anew


if __name__ == "__main__":
    main(sys.argv[1:])
