"""Processes of a run: started in a session of their own, told to end by process id, killed if they do not.

Rule: whoever starts one ends it, also when interrupted; the server, which has no input that ends with us, is told by the
kernel where it can be (Linux).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINE_BYTES_MAX = 256 * 1024 * 1024
"""A report holds histograms and a sample of ids in one line."""

_PR_SET_PDEATHSIG = 1


class ChildFailed(Exception):
    """A process of the run ended or kept silent where it should not have; the end of its log tells why."""


class Child:
    """One process. Its errors go to a file; what it says on standard output is read line by line."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    @classmethod
    async def start(
        cls, name: str, arguments: Sequence[str], folder: Path, environment: dict[str, str]
    ) -> Child:
        """Start `python arguments`."""
        log = folder / f"{name}.log"
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=environment,
                limit=LINE_BYTES_MAX,
                start_new_session=True,
                preexec_fn=_follow_parent(),
            )
        return cls(name, process, log)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._process.returncode is not None

    async def line(self, seconds: float) -> str:
        """Its next line."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise ChildFailed(
                f"{self.name} said nothing for {seconds:.0f} s{self.tail()}"
            ) from None
        if not line:
            raise ChildFailed(f"{self.name} ended too early{self.tail()}")
        return line.decode().strip()

    async def report(self, seconds: float) -> dict[str, Any]:
        """Its next line, which is JSON."""
        report: dict[str, Any] = json.loads(await self.line(seconds))
        if "error" in report:
            raise ChildFailed(f"{self.name}: {report['error']}")
        return report

    def tell(self, order: str) -> None:
        """Give it an order."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(order.encode() + b"\n")

    async def output(self, seconds: float) -> str:
        """All it says until it ends by itself with status 0."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(seconds):
                text = await self._process.stdout.read()
                status = await self._process.wait()
        except TimeoutError:
            raise ChildFailed(f"{self.name} took over {seconds:.0f} s{self.tail()}") from None
        if status:
            raise ChildFailed(f"{self.name} ended with status {status}{self.tail()}")
        return text.decode()

    async def end(self, seconds: float, ask: signal.Signals | None = signal.SIGTERM) -> bool:
        """End it: by its input's end and the signal, then by force. True if it ended by itself and without error."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if not self.ended and ask is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(ask)
        try:
            async with asyncio.timeout(seconds):
                return await self._process.wait() == 0
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            return False

    def tail(self, lines: int = 15) -> str:
        """The end of its log, to be put behind a sentence."""
        try:
            text = self.log.read_text(errors="replace").splitlines()[-lines:]
        except OSError:
            return ""
        return "".join(f"\n  | {line}" for line in text)


def _follow_parent() -> Callable[[], None] | None:
    """What a child does between fork and exec so that it is told to end when this process is killed."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def follow() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return follow
