"""The guard with small programs in Postgres' place: what it must do is the same for any child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.support.processes import is_gone, wait_for

from outrider_server.embedded import guard

# Ends like Postgres does: SIGINT cleanly, SIGQUIT at once. `ready` is printed into the log when it can be signalled.
OBEDIENT = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
signal.signal(signal.SIGQUIT, lambda *_: sys.exit(2))
print("ready", flush=True)
while True: time.sleep(60)
"""
STUBBORN = OBEDIENT.replace(
    "signal.SIGINT, lambda *_: sys.exit(0)", "signal.SIGINT, signal.SIG_IGN"
)


@contextmanager
def guarded(
    tmp_path: Path,
    program: str,
    *,
    interpreter: str = sys.executable,
    grace: float = 30.0,
    log_bytes_max: int = 1 << 20,
) -> Iterator[subprocess.Popen[bytes]]:
    log = tmp_path / "log"
    with log.open("ab", buffering=0) as file:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__]
            + [str(n) for n in (os.getpid(), -1, -1, log_bytes_max, grace)]
            + [str(log), interpreter, "-I", "-S", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.close()


def child_of(process: subprocess.Popen[bytes]) -> int:
    return int(process.stdout.readline())


def wait_until_ready(tmp_path: Path) -> None:
    wait_for(lambda: b"ready" in (tmp_path / "log").read_bytes())


@pytest.mark.parametrize(("order", "code"), [(b"I", 0), (b"Q", 2), (b"K", -signal.SIGKILL)])
def test_an_order_is_passed_on_and_the_end_is_the_childs(
    tmp_path: Path, order: bytes, code: int
) -> None:
    with guarded(tmp_path, OBEDIENT) as process:
        child_of(process)
        wait_until_ready(tmp_path)
        process.stdin.write(order)
        process.stdin.flush()
        assert process.wait(20) == code


def test_a_child_that_is_killed_shows_as_killed(tmp_path: Path) -> None:
    with guarded(tmp_path, OBEDIENT) as process:
        os.kill(child_of(process), signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL


def test_the_end_of_the_pipe_ends_the_child_cleanly(tmp_path: Path) -> None:
    with guarded(tmp_path, OBEDIENT) as process:
        child = child_of(process)
        wait_until_ready(tmp_path)
        process.stdin.close()
        assert process.wait(20) == 0
        assert is_gone(child)


def test_a_child_that_will_not_end_cleanly_is_ended_after_the_grace(tmp_path: Path) -> None:
    with guarded(tmp_path, STUBBORN, grace=0.1) as process:
        child_of(process)
        wait_until_ready(tmp_path)
        process.stdin.close()
        assert process.wait(20) == 2


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a child of its parent's death"
)
def test_killing_the_guard_ends_the_child_cleanly(tmp_path: Path) -> None:
    said = OBEDIENT.replace("sys.exit(0)", "print('ended', flush=True) or sys.exit(0)")
    with guarded(tmp_path, said) as process:
        child = child_of(process)
        wait_until_ready(tmp_path)
        process.kill()
        wait_for(lambda: is_gone(child))
        assert b"ended" in (tmp_path / "log").read_bytes()


def test_signals_to_the_guard_change_nothing(tmp_path: Path) -> None:
    with guarded(tmp_path, OBEDIENT) as process:
        child = child_of(process)
        wait_until_ready(tmp_path)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)
        # An order that comes after them is still obeyed, so they were survived.
        assert not is_gone(child)
        process.stdin.write(b"Q")
        process.stdin.flush()
        assert process.wait(20) == 2


def test_the_log_is_kept_at_two_parts_and_the_newest_lines_stay(tmp_path: Path) -> None:
    chatty = OBEDIENT.replace(
        'print("ready", flush=True)',
        'print("x" * 99_000 + "last line", flush=True); print("ready", flush=True)',
    )
    with guarded(tmp_path, chatty, log_bytes_max=10_000) as process:
        child_of(process)
        older, log = tmp_path / "log.1", tmp_path / "log"
        wait_for(lambda: older.exists() and log.stat().st_size == 0)
        assert older.stat().st_size == 10_000
        assert b"last line\nready\n" in older.read_bytes()


def test_a_program_that_cannot_be_started_says_so_in_the_log(tmp_path: Path) -> None:
    with guarded(tmp_path, "", interpreter=str(tmp_path / "nothing")) as process:
        assert process.wait(20) == 127
    text = (tmp_path / "log").read_text()
    assert "FATAL:" in text
    assert str(tmp_path / "nothing") in text


def test_an_order_that_comes_before_the_program_is_obeyed(tmp_path: Path) -> None:
    with guarded(tmp_path, STUBBORN) as process:
        process.stdin.write(b"I")
        process.stdin.flush()
        process.stdin.close()  # were the order lost, the child would ignore the one that follows from this
        assert process.wait(20) == -signal.SIGINT
