"""The publisher for threads: the same methods, blocking, over a `Publisher` in a loop of its own thread.

Rule: threads only put encoded events into a bounded stage and the loop takes them in batches, so a thread pays for a
lock and an append, not for waking the loop each time. Order is that of the stage.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from outrider._frames import Ack
from outrider.errors import EventRejected, OutriderError, PublisherClosed
from outrider.publisher import Handle, Publisher, Stats
from outrider.v1.event_pb2 import Event

_T = TypeVar("_T")
_LOOK_SECONDS = 1.0


class ThreadHandle:
    """One event on its way, for any thread. Modelled on `concurrent.futures.Future`, without cancelling."""

    __slots__ = ("_callbacks", "_error", "_handle", "_owner")

    def __init__(self, owner: ThreadPublisher) -> None:
        self._owner = owner
        self._handle: Handle | None = None
        self._error: OutriderError | None = None
        self._callbacks: list[Callable[[], None]] | None = None

    def done(self) -> bool:
        """Whether it is acknowledged or failed."""
        return self._error is not None or (self._handle is not None and self._handle.done())

    def result(self, timeout: float | None = None) -> Ack:
        """Wait for the acknowledgement; raises the event's error, or TimeoutError after `timeout` seconds."""
        error = self.exception(timeout)
        if error is not None:
            raise error.again()
        assert self._handle is not None, "what did not fail has a handle"
        return self._handle.result()

    def exception(self, timeout: float | None = None) -> OutriderError | None:
        """Wait for the outcome: the event's error, None if it is acknowledged."""
        if not self.done():
            self._owner._wait(self, timeout)  # noqa: SLF001 - the two classes are one thing
        if self._error is not None:
            return self._error
        assert self._handle is not None, "what did not fail has a handle"
        return self._handle.exception()

    def add_done_callback(self, callback: Callable[[ThreadHandle], None]) -> None:
        """Call `callback(handle)` when it is done, in the publisher's thread; it should be quick."""
        self._owner._attach(self, lambda: callback(self))  # noqa: SLF001

    # The loop's side

    def _taken(self, handle: Handle) -> None:
        self._handle = handle
        callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            handle.add_done_callback(callback)

    def _failed(self, error: OutriderError) -> None:
        self._error = error
        callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            callback()

    def _when_done(self, callback: Callable[[], None]) -> None:
        if self._error is not None:
            callback()
        elif self._handle is not None:
            self._handle.add_done_callback(callback)
        else:
            if self._callbacks is None:
                self._callbacks = []
            self._callbacks.append(callback)


class ThreadPublisher:
    """Publishes for threads. Takes what `Publisher` takes, and starts a daemon thread.

    `send` blocks only for room. After a fork it is unusable in the child, as gRPC is.
    """

    def __init__(self, target: str, api_key: str, producer: str, **options: Any) -> None:
        self._publisher = Publisher(target, api_key, producer, **options)
        self._tenant: str = options.get("tenant", "")
        # The stage is bounded on its own; what it passed on is bounded by the publisher, which the taker waits for.
        self._stage_events_max = 10_000
        self._stage_bytes_max = 16 * 1024 * 1024
        self._room = threading.Condition(threading.Lock())
        self._stage: list[tuple[bytes, str, ThreadHandle]] = []
        self._stage_bytes = 0
        self._staged = 0
        self._passed = 0
        self._asleep = True
        self._error: OutriderError | None = None
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._work = asyncio.Event()
        self._progress = asyncio.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"outrider publisher {producer}", daemon=True
        )
        self._thread.start()

    def send(self, event: Event) -> ThreadHandle:
        """Take the event; blocks only while there is no room.

        The event may be changed afterwards, but make a new one for each: a message keeps the memory of every value a
        field ever had.
        """
        data = event.SerializeToString()
        handle = ThreadHandle(self)
        item = (data, event.tenant or self._tenant, handle)
        with self._room:
            while not self._closed and self._error is None and self._is_full(len(data)):
                self._room.wait()
            self._check_usable()
            self._stage.append(item)
            self._stage_bytes += len(data)
            self._staged += 1
            if self._asleep:
                self._asleep = False
                self._loop.call_soon_threadsafe(self._work.set)
        return handle

    def publish(self, event: Event, timeout: float | None = None) -> Ack:
        """Take the event and wait until it is durable; raises its error, or TimeoutError."""
        return self.send(event).result(timeout)

    def publish_many(self, events: Iterable[Event]) -> list[Ack | OutriderError]:
        """Take the events and wait for all of them: each one's acknowledgement or error, in order."""
        handles = [self.send(event) for event in events]
        outcomes: list[Ack | OutriderError] = []
        for handle in handles:
            error = handle.exception()
            outcomes.append(handle.result() if error is None else error)
        return outcomes

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything taken before is answered; raises the publisher's own error if it failed."""
        self._call(self._drained(self._publisher.flush), timeout)

    def spooled(self, timeout: float | None = None) -> None:
        """Wait until everything taken before is in the spool."""
        self._call(self._drained(self._publisher.spooled), timeout)

    def close(self, timeout_seconds: float | None = 30.0) -> None:
        """As `Publisher.close`; ends the thread."""
        with self._room:
            if self._closed:
                return
            self._closed = True
            self._room.notify_all()
        try:
            asyncio.run_coroutine_threadsafe(self._end(timeout_seconds), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OutriderError:
            # An error of the block itself must not be hidden by its consequence.
            if exc is None:
                raise

    @property
    def stats(self) -> Stats:
        """Counts since the start, and what is held now (without the stage)."""
        return self._publisher.stats

    def _check_usable(self) -> None:
        if self._error is not None:
            raise self._error.again()
        if self._closed:
            raise PublisherClosed("the publisher is closed")

    def _is_full(self, size: int) -> bool:
        if not self._stage:
            return False
        return (
            len(self._stage) >= self._stage_events_max
            or self._stage_bytes + size > self._stage_bytes_max
        )

    def _wait(self, handle: ThreadHandle, timeout: float | None) -> None:
        done: Future[None] = Future()
        self._attach(handle, lambda: None if done.done() else done.set_result(None))
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            try:
                return done.result(_LOOK_SECONDS if left is None else min(left, _LOOK_SECONDS))
            except TimeoutError:
                # The loop may have ended between the look and the callback: then nobody calls.
                if handle.done():
                    return None
                if left is not None and left <= _LOOK_SECONDS:
                    raise

    def _attach(self, handle: ThreadHandle, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(handle._when_done, callback)  # noqa: SLF001
        except RuntimeError:
            # The loop is closed: every handle is settled by then.
            callback()

    def _call(self, work: Coroutine[Any, Any, _T], timeout: float | None) -> _T:
        if self._closed:
            work.close()
            raise PublisherClosed("the publisher is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout)
        except TimeoutError:
            future.cancel()
            raise
        except FutureCancelledError:
            raise PublisherClosed("the publisher was closed meanwhile") from None

    # The loop's side

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        taker = self._loop.create_task(self._take_stage())
        try:
            self._loop.run_forever()
        finally:
            taker.cancel()
            rest = asyncio.all_tasks(self._loop)
            for task in rest:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            asyncio.set_event_loop(None)
            self._loop.close()

    async def _take_stage(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while True:
                with self._room:
                    items, self._stage = self._stage, []
                    self._stage_bytes = 0
                    self._asleep = not items
                    if items:
                        self._room.notify_all()
                if not items:
                    break
                await self._pass_on(items)

    async def _pass_on(self, items: list[tuple[bytes, str, ThreadHandle]]) -> None:
        send = self._publisher._send  # noqa: SLF001 - the twin
        for data, tenant, handle in items:
            try:
                handle._taken(await send(data, tenant))  # noqa: SLF001
            except EventRejected as error:
                handle._failed(error)  # noqa: SLF001
            except OutriderError as error:
                with self._room:
                    self._error = self._error or error
                    self._room.notify_all()
                handle._failed(error)  # noqa: SLF001
        self._passed += len(items)
        self._progress.set()

    async def _drained(self, then: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `then` when everything staged before now was passed on."""
        await self._until_passed()
        await then()

    async def _until_passed(self) -> None:
        with self._room:
            staged = self._staged
        while self._passed < staged:
            self._progress.clear()
            await self._progress.wait()

    async def _end(self, timeout_seconds: float | None) -> None:
        started = self._loop.time()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._until_passed()
        except TimeoutError:
            pass  # the rest of the stage fails with the publisher
        left = None
        if timeout_seconds is not None:
            left = max(0.0, timeout_seconds - (self._loop.time() - started))
        try:
            await self._publisher.close(left)
        finally:
            await self._until_passed()
