"""One worker's place: its process is started again whenever it ends, until it is told to stop.

        start ---> STARTING ---(ready)---> READY ---(end)---> WAITING ---(back-off)---> start
                       |                                        ^
                       +-----------------(end)------------------+

A worker that cannot be started because of something a person must cure says so; said three times in a row before it was
ever ready, that is a `Refusal`, and the place is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from enum import StrEnum

import structlog

from outrider_server.supervisor.back_off import BackOff
from outrider_server.supervisor.leases import Leases
from outrider_server.supervisor.lifeline import SupervisorEnd

REFUSALS_MAX = 3
REFUSED_STATUS = 1


class WorkerState(StrEnum):
    """Where a worker is in its life."""

    STARTING = "starting"
    READY = "ready"
    WAITING = "ended, to be started again"
    ENDED = "ended"


class Refusal(Exception):
    """A worker can never run as things are; the message is the worker's own sentence on why."""


class Life:
    """One process of a worker, from its start to its end."""

    def __init__(self, process: Process, line: SupervisorEnd) -> None:
        self.process = process
        self.line = line
        self.ready = asyncio.Event()

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def listen(self) -> None:
        """Take in what it says; called by the loop when there is something."""
        if not self.line.read():
            asyncio.get_running_loop().remove_reader(self.line.fileno())
        if self.line.ready:
            self.ready.set()


class Worker:
    """Starts `command` with `environment` and the number of its end of the lifeline as last argument.

    `monotonic` is in seconds.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        leases: Leases,
        monotonic: Callable[[], float],
    ) -> None:
        self.name = name
        self.starts = 0
        self.unclean = False
        self._command = command
        self._environment = environment
        self._leases = leases
        self._monotonic = monotonic
        self._back_off = BackOff()
        self._stop = asyncio.Event()
        self._rolling = False
        self._life: Life | None = None
        self._state = WorkerState.WAITING
        self._changed = asyncio.Condition()
        self._ever_ready = False
        self._refusals: list[str] = []
        self._log = structlog.get_logger()

    @property
    def state(self) -> WorkerState:
        life = self._life
        if life is not None:
            return WorkerState.READY if life.ready.is_set() else WorkerState.STARTING
        return self._state

    @property
    def pid(self) -> int | None:
        """Of the process that runs; None while there is none."""
        return self._life.process.pid if self._life is not None else None

    @property
    def restarts(self) -> int:
        return max(0, self.starts - 1)

    def stop(self) -> None:
        """Start it no more, and tell it to drain."""
        self._stop.set()
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End its process at once."""
        self._signal(signal.SIGKILL)

    async def roll(self, drain_seconds: float, ready_seconds: float) -> bool:
        """Drain it, start it again, and tell whether it is ready within so many seconds."""
        life = self._life
        if life is not None:
            self._rolling = True
            life.signal(signal.SIGTERM)
            if not await self._until(lambda: self._life is not life, drain_seconds):
                self._log.warning("worker.killed", node=self.name, why="it did not drain in time")
                life.signal(signal.SIGKILL)
        return await self._until(
            lambda: self._life is not life and self.state is WorkerState.READY, ready_seconds
        )

    async def keep(self) -> None:
        """Run it until `stop`; raises Refusal."""
        try:
            while not self._stop.is_set():
                wait_seconds = await self._live()
                if wait_seconds and not self._stop.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(wait_seconds):
                            await self._stop.wait()
        finally:
            await self._became(None, WorkerState.ENDED)

    async def _live(self) -> float:
        """One life; returns after how many seconds the next may begin."""
        began = self._monotonic()
        self.starts += 1
        try:
            async with self._started() as life:
                self._log.info(
                    "worker.started", node=self.name, pid=life.process.pid, restarts=self.restarts
                )
                await self._became(life, WorkerState.STARTING)
                if self._stop.is_set():  # told while it was being started
                    life.signal(signal.SIGTERM)
                await self._until_ended(life)
                status, ready, refusal = (
                    await life.process.wait(),
                    life.line.ready,
                    life.line.refusal,
                )
        except OSError as error:  # out of processes, memory or descriptors
            status, ready, refusal = REFUSED_STATUS, False, f"cannot start a worker: {error}"
        await self._became(None, WorkerState.WAITING)
        alive_seconds = self._monotonic() - began
        stopped = self._stop.is_set()
        rolled, self._rolling = self._rolling, False
        # Told to stop before it had anything to drain.
        clean = status == 0 or (status == -signal.SIGTERM and not ready)
        self._tell_end(status, alive_seconds, refusal, quiet=(stopped or rolled) and clean)
        # Who was never ready, or was told that another holds its name, held no lease that could be ended for it.
        if ready and refusal is None and not clean:
            await self._leases.expire(self.name)
        if stopped:
            self.unclean = not clean
            return 0.0
        self._require_curable(refusal if status == REFUSED_STATUS else None, ready=ready)
        return 0.0 if rolled and clean else self._back_off.after(alive_seconds)

    async def _until_ended(self, life: Life) -> None:
        ended = asyncio.ensure_future(life.process.wait())
        ready = asyncio.ensure_future(life.ready.wait())
        try:
            await asyncio.wait({ended, ready}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                self._log.info("worker.ready", node=self.name, pid=life.process.pid)
                await self._became(life, WorkerState.READY)
            await ended
        finally:
            ready.cancel()
            ended.cancel()
        life.line.read()

    @contextlib.asynccontextmanager
    async def _started(self) -> AsyncIterator[Life]:
        """A process that is gone after the block."""
        line = SupervisorEnd()
        loop = asyncio.get_running_loop()
        life: Life | None = None
        try:
            inherited: socket.socket = line.inherited
            process = await asyncio.create_subprocess_exec(
                *self._command,
                str(inherited.fileno()),
                env=dict(self._environment),
                stdin=DEVNULL,
                pass_fds=(inherited.fileno(),),
                # A Ctrl-C in the terminal is for the supervisor, which tells its workers in order.
                start_new_session=True,
            )
            inherited.close()
            life = Life(process, line)
            loop.add_reader(line.fileno(), life.listen)
            yield life
        finally:
            if life is not None:
                loop.remove_reader(line.fileno())
                if life.process.returncode is None:
                    life.signal(signal.SIGKILL)
                    await life.process.wait()
            line.close()

    def _require_curable(self, refusal: str | None, *, ready: bool) -> None:
        """Raise Refusal when one sentence was said too often by a worker that was never ready.

        Once it was, what it cannot do now it could do before: then the cure is time, not a person.
        """
        self._ever_ready = self._ever_ready or ready
        if refusal is None or self._ever_ready:
            self._refusals.clear()
            return
        if self._refusals and self._refusals[-1] != refusal:
            self._refusals.clear()
        self._refusals.append(refusal)
        if len(self._refusals) >= REFUSALS_MAX:
            raise Refusal(refusal)

    def _tell_end(
        self, status: int, alive_seconds: float, refusal: str | None, *, quiet: bool
    ) -> None:
        say = self._log.info if quiet else self._log.warning
        how = {"signal": _signal_name(-status)} if status < 0 else {"status": status}
        why = {"why": refusal} if refusal is not None else {}
        say("worker.ended", node=self.name, **how, alive_seconds=round(alive_seconds, 3), **why)

    def _signal(self, number: int) -> None:
        if self._life is not None:
            self._life.signal(number)

    async def _became(self, life: Life | None, state: WorkerState) -> None:
        self._life, self._state = life, state
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            return False
        return True


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
