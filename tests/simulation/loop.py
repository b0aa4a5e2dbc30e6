"""A deterministic event loop: virtual time, one seed, every legal order of what comes from outside.

What asyncio promises is kept, and what it does not promise is drawn from the seed:

- `call_soon` is first in, first out. Callbacks run in rounds: what a round schedules runs in the next one.
- Time stands still while anything is ready. When nothing is, it jumps to the next timer, so nothing here ever sleeps.
- Timers and completions of I/O (which here are timers, set by the fake store, the fake network and the fake receivers)
  that fall on one instant may come in any order, and each may come between any two rounds while others still run: a
  selector reports what is ready in no order, and work takes time while the world goes on. Drawn.
- How many rounds lie between a completion and the wake-up of the task that waits for it is nobody's promise either (it
  differs between loops, Python versions and drivers). So two neighbours in the queue that are wake-ups of different tasks
  and that stem from different completions may change places. Drawn. What stems from one completion keeps its order, and
  nothing ever passes a callback that is not a task's wake-up: so a future's callbacks stay in the order they were added.

A `Life` is what happens in one process. A context variable names it, so every task and callback of it is known. A dead
life's callbacks are dropped without running, `finally` included; a frozen one's are kept, as a stopped process's are.
"""

from __future__ import annotations

import asyncio
import heapq
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from enum import Enum
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

from typing_extensions import override

T = TypeVar("T")

TRACE_STEPS = 400


class LifeState(Enum):
    """What a process does."""

    RUNNING = 1
    FROZEN = 2
    DEAD = 3


class Life:
    """One process. `steps` counts its callbacks; `at` holds what is to happen to it after which of them."""

    __slots__ = ("at", "held", "name", "state", "steps")

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = LifeState.RUNNING
        self.steps = 0
        self.held: list[_Step] = []
        self.at: dict[int, Callable[[], None]] = {}


LIFE: ContextVar[Life | None] = ContextVar("life", default=None)


class Vanished(BaseException):
    """The world is over for whoever waits for something of it."""


class StepsExceeded(Exception):
    """The world went on for longer than it may."""


if TYPE_CHECKING:
    # What a loop has of sockets, signals, pipes and processes has no place here.
    _Bare = asyncio.BaseEventLoop
else:
    _Bare = asyncio.AbstractEventLoop


class _Step(asyncio.TimerHandle):
    """A callback to run. `root` is the completion that it stems from."""

    __slots__ = ("root",)

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: SimulationLoop,
        context: Context | None,
        when: float,
        root: int,
    ) -> None:
        # Without the base class's own: it asks for much that no step here needs, and there are very many steps.
        self._callback: Any = callback
        self._args: Any = args
        self._loop = loop
        self._context: Context = copy_context() if context is None else context
        self._cancelled = False
        self._repr = None
        self._source_traceback = None
        self._scheduled = False
        self._when = when
        self.root = root

    @override
    def cancel(self) -> None:
        self._cancelled = True
        self._callback = self._args = None


class SimulationTask(asyncio.Task[Any]):
    """A task whose place in a set depends on its number, not on its address."""

    label: bytes = b""
    number: int = 0

    @override
    def __hash__(self) -> int:
        return self.number

    @override
    def __eq__(self, other: object) -> bool:
        return self is other


class SimulationLoop(_Bare):
    """Runs one world from one seed. `digest` sums up everything that happened; equal seeds have equal ones."""

    def __init__(
        self, random: Random, *, steps_max: int = 200_000, trace_steps: int | None = TRACE_STEPS
    ) -> None:
        self.random = random
        self.steps = 0
        self.steps_max = steps_max
        self.digest = 0
        self.trace: deque[tuple[float, str, str, object]] = deque(maxlen=trace_steps)
        self.errors: list[str] = []
        self.outside = Context()
        """Where what belongs to no process runs."""
        self._now = 0.0
        self._ready: deque[_Step] = deque()
        self._timers: list[tuple[float, int, _Step]] = []
        self._due: list[_Step] = []
        self._tie = count()
        self._roots = count(1)
        self._root = 0
        self._tasks: list[SimulationTask] = []
        self._labels: dict[str, bytes] = {}
        self._cancelling: dict[asyncio.Task[Any], int] = {}
        self._stopped: BaseException | None = None
        self._over = False

    # What the world uses.

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run until `main` is done, then let everything that is left vanish."""
        hooks = sys.get_asyncgen_hooks()
        # Generators of the dead must not be closed by whoever collects them: their `finally` would run.
        sys.set_asyncgen_hooks(firstiter=lambda _: None, finalizer=lambda _: None)
        asyncio._set_running_loop(self)
        try:
            task = self.outside.run(self.create_task, main)
            while not task.done():
                if self._stopped is not None:
                    raise self._stopped
                self._round()
            if self._stopped is not None:
                raise self._stopped
            result: T = task.result()
            return result
        finally:
            self._vanish()
            asyncio._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)

    def halt(self, error: BaseException) -> None:
        """End the run with this error, at once."""
        if self._stopped is None:
            self._stopped = error

    def note(self, kind: str, detail: object = "") -> None:
        """Write a line of the trace; it counts in the digest."""
        life = LIFE.get()
        self.digest = crc32(repr((kind, detail)).encode(), self.digest)
        self.trace.append((self._now, "" if life is None else life.name, kind, detail))

    def cancel_after(self, task: asyncio.Task[Any], steps: int) -> None:
        """Cancel a task at the await that ends its `steps`-th step from here."""
        self._cancelling[task] = max(1, steps)

    def freeze(self, life: Life) -> None:
        """Stop a process; whatever comes for it is kept."""
        if life.state is LifeState.RUNNING:
            life.state = LifeState.FROZEN

    def thaw(self, life: Life) -> None:
        """Let a stopped process go on."""
        if life.state is LifeState.FROZEN:
            life.state = LifeState.RUNNING
            self._ready.extend(life.held)
            life.held.clear()

    def kill(self, life: Life) -> None:
        """End a process: nothing of it ever runs again."""
        life.state = LifeState.DEAD
        life.held.clear()

    # What asyncio uses.

    @override
    def time(self) -> float:
        return self._now

    @override
    def call_soon(  # type: ignore[override]  # the stub says that a handle comes back; it is one
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        step = _Step(callback, args, self, context, 0.0, self._root)
        if not self._over:
            self._ready.append(step)
        return step

    @override
    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    @override
    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + max(0.0, delay), callback, *args, context=context)

    @override
    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        step = _Step(callback, args, self, context, when, 0)
        if not self._over:
            heapq.heappush(self._timers, (when, next(self._tie), step))
        return step

    @override
    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    @override
    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
        **_: Any,
    ) -> asyncio.Task[T]:
        number = len(self._tasks)
        label = f"{number}:{getattr(coro, '__qualname__', name)}"
        task = SimulationTask.__new__(SimulationTask)
        task.number = number  # before the base class asks for the hash
        task.label = label.encode()
        task.__init__(coro, loop=self, name=label, context=context)  # type: ignore[misc]
        self._tasks.append(task)
        return task

    @override
    def get_debug(self) -> bool:
        return False

    @override
    def is_running(self) -> bool:
        return True

    @override
    def is_closed(self) -> bool:
        return self._over

    @override
    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._over and "handle" in context:
            self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Asked for by the base class of timers; a cancelled one is passed over when its time comes."""

    # One round.

    def _round(self) -> None:
        ready, due, timers = self._ready, self._due, self._timers
        if not ready and not due:
            self._advance()
        while timers and timers[0][0] <= self._now:
            step = heapq.heappop(timers)[2]
            if not step._cancelled:
                due.append(step)
        if due:
            self._release()
        batch = list(ready)
        ready.clear()
        if len(batch) > 1:
            self._shuffle(batch)
        for step in batch:
            if not step._cancelled:
                self._run(step)
                if self._stopped is not None:
                    return
        self._root = 0

    def _advance(self) -> None:
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not timers:
            raise StepsExceeded("nothing will ever happen again")
        self._now = timers[0][0]

    def _release(self) -> None:
        """Let completions in: at least one when nothing else is ready, any of them otherwise, in any order."""
        due, random = self._due, self.random
        if len(due) == 1 and not self._ready:
            chosen = due[:]
            due.clear()
        else:
            later: list[_Step] = []
            chosen = []
            for step in due:
                (chosen if random.random() < 0.6 else later).append(step)
            if not chosen and not self._ready:
                chosen.append(later.pop(random.randrange(len(later))))
            random.shuffle(chosen)
            due[:] = later
        for step in chosen:
            step.root = next(self._roots)
            self._ready.append(step)

    def _shuffle(self, batch: list[_Step]) -> None:
        """Let neighbouring wake-ups of tasks that stem from different completions change places."""
        start = 0
        while start < len(batch):
            end = start
            while end < len(batch) and isinstance(
                getattr(batch[end]._callback, "__self__", None), SimulationTask
            ):
                end += 1
            if end - start > 1:
                groups: dict[int, deque[_Step]] = {}
                for step in batch[start:end]:
                    groups.setdefault(step.root, deque()).append(step)
                if len(groups) > 1:
                    roots = [step.root for step in batch[start:end]]
                    self.random.shuffle(roots)
                    batch[start:end] = [groups[root].popleft() for root in roots]
            start = end + 1

    def _run(self, step: _Step) -> None:
        life = step._context.get(LIFE)
        if life is not None:
            if life.state is not LifeState.RUNNING:
                if life.state is LifeState.FROZEN:
                    life.held.append(step)
                return
            life.steps += 1
        self.steps += 1
        if self.steps > self.steps_max:
            self.halt(StepsExceeded(f"more than {self.steps_max} steps"))
            return
        callback = step._callback
        owner = getattr(callback, "__self__", None)
        label = owner.label if isinstance(owner, SimulationTask) else self._label_of(callback)
        self.digest = crc32(label, self.digest)
        self.trace.append((self._now, "" if life is None else life.name, "step", label))
        self._root = step.root
        try:
            step._context.run(callback, *step._args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - as every loop: one callback costs no other
            self._raised(life, f"{label.decode()} raised {error!r}", error)
        if self._cancelling and isinstance(owner, SimulationTask) and owner in self._cancelling:
            self._cancelling[owner] -= 1
            if self._cancelling[owner] == 0:
                del self._cancelling[owner]
                if not owner.done():
                    self.note("cancel", owner.label.decode())
                    owner.cancel()
        if life is not None and life.at:
            fault = life.at.pop(life.steps, None)
            if fault is not None:
                fault()

    def _raised(self, life: Life | None, text: str, error: BaseException) -> None:
        """A callback raised: that of a process is written down, the world's own ends the run."""
        self.errors.append(text)
        if life is None:
            self.halt(error)

    def _label_of(self, callback: Callable[..., object]) -> bytes:
        name = getattr(callback, "__qualname__", type(callback).__name__)
        label = self._labels.get(name)
        if label is None:
            label = self._labels[name] = name.encode()
        return label

    # The end.

    def _vanish(self) -> None:
        """Close what was left in the middle, so that no collector does it later. Nothing it does has any effect now."""
        self._over = True
        self._ready.clear()
        self._timers.clear()
        self._due.clear()
        for task in self._tasks:
            if task.done():
                if not task.cancelled():
                    task.exception()
                continue
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            coroutine: Any = task.get_coro()
            # Thrown, not closed: closing abandons the inner ones where an outer one's `finally` awaits.
            for _ in range(50):
                try:
                    coroutine.throw(Vanished())
                except BaseException:  # noqa: BLE001 - whatever it ends with, it has ended
                    break
        self._tasks.clear()
