"""Large events: checked and matched in a child process.

Why: parsing 10 MiB of JSON takes 64 ms with the interpreter's lock held, in a thread as on the loop, and every other
event of the node would wait for it. There is one child; it is asked one thing at a time over its standard streams, keeps
the indexes of the tenants it met last, and ends when its input ends, so it never outlives its parent. Not a
`ProcessPoolExecutor`: after the death of a child that may wait for ever, itself and at the end of the process.

    request, answer: 8 bytes of length, then a pickle; both ends are this file
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import signal
import struct
import sys
from collections import OrderedDict
from dataclasses import replace
from typing import Any, BinaryIO

from outrider_server.domain.errors import Unavailable
from outrider_server.domain.event import Event
from outrider_server.domain.frame import EventRefusal
from outrider_server.domain.subscription import Subscription
from outrider_server.matching.index import Index
from outrider_server.pipeline.ingest import EventChecker, IngestLimits, Refused, parse_payload
from outrider_server.pipeline.match import TenantEntry
from outrider_server.telemetry.counters import MatchCounters

INDEXES_MAX = 64
"""Tenants whose index the child holds; of others it asks for the subscriptions again."""

PIECE_BYTES = 64 * 1024
END_SECONDS_MAX = 2.0

_LENGTH = struct.Struct("<Q")

_Answer = tuple[tuple[int, ...], tuple[int, ...]] | EventRefusal | None
"""Targets and over-budget filters, or a refusal; None where the index of this version is needed first."""


class LargeEvents:
    """Owns the child process, which is started by the first large event. Close it."""

    def __init__(self, limits: IngestLimits, counters: MatchCounters) -> None:
        self._limits = limits
        self._checker = EventChecker(limits)
        self._counters = counters
        self._child: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._asking: set[asyncio.Task[_Answer]] = set()

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is no child."""
        return self._child.pid if self._child is not None else None

    @property
    def waiting(self) -> int:
        """Events that the child has or will be asked about."""
        return len(self._asking)

    async def check_and_match(self, event: Event, entry: TenantEntry) -> None:
        """As `pipeline.ingest.check_and_match` for one event; raises `Refused`, or `Unavailable` if the child died."""
        self._checker.check(event, entry)
        # A task of its own: who gives up must not leave half a request in the pipe.
        asking = asyncio.ensure_future(self._ask(event, entry))
        self._asking.add(asking)
        asking.add_done_callback(self._asked)
        answer = await asyncio.shield(asking)
        if isinstance(answer, EventRefusal):
            raise Refused(answer.reason, answer.message)
        assert answer is not None
        event.targets, event.over_budget = answer
        event.config_version = entry.version
        self._counters.events += 1
        self._counters.targets += len(event.targets)
        self._counters.unmatched += not event.targets
        self._counters.over_budget += len(event.over_budget)

    async def close(self) -> None:
        """End the child."""
        for asking in list(self._asking):
            asking.cancel()
        await self._end_child()

    def _asked(self, asking: asyncio.Task[_Answer]) -> None:
        self._asking.discard(asking)
        if not asking.cancelled():
            asking.exception()  # whoever asked may have given up; then it is nobody's surprise

    async def _ask(self, event: Event, entry: TenantEntry) -> _Answer:
        bare = replace(event, deliveries=None)
        async with self._turn:
            try:
                answer = await self._exchange(bare, entry.version, None)
                if answer is None:
                    answer = await self._exchange(
                        bare, entry.version, entry.configuration.subscriptions
                    )
            except (OSError, EOFError):
                await self._end_child()
                raise Unavailable(
                    "OVERLOADED",
                    "the process for large events ended; try again",
                    retry_after_seconds=0.2,
                ) from None
            except BaseException:
                await (
                    self._end_child()
                )  # in the middle of an exchange: the next one needs a fresh child
                raise
            return answer

    async def _exchange(
        self, event: Event, version: int, subscriptions: tuple[Subscription, ...] | None
    ) -> _Answer:
        child = self._child
        if child is None:
            child = self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "outrider_server.pipeline.large",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdin.is_closing():
            raise BrokenPipeError  # it died while nobody asked it
        request = pickle.dumps((event, version, subscriptions, self._limits.json_depth_max), 5)
        child.stdin.write(_LENGTH.pack(len(request)))
        # In pieces: a child that reads as fast as we write would keep the loop in one write to the end.
        for start in range(0, len(request), PIECE_BYTES):
            child.stdin.write(request[start : start + PIECE_BYTES])
            await child.stdin.drain()
            await asyncio.sleep(0)
        (length,) = _LENGTH.unpack(await child.stdout.readexactly(_LENGTH.size))
        answer: _Answer = pickle.loads(await child.stdout.readexactly(length))  # noqa: S301 - our own child
        return answer

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        assert child.stdin is not None
        child.stdin.close()
        try:
            async with asyncio.timeout(END_SECONDS_MAX):
                await child.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


class _Child:
    """The other side: the indexes it holds, and the answers it gives."""

    def __init__(self) -> None:
        self._held: OrderedDict[int, tuple[int, Index]] = OrderedDict()

    def answer(
        self,
        event: Event,
        version: int,
        subscriptions: tuple[Subscription, ...] | None,
        depth_max: int,
    ) -> _Answer:
        """What `LargeEvents` is told of one event."""
        held = self._held.get(event.tenant)
        if subscriptions is not None:
            held = self._held[event.tenant] = (version, Index.build(subscriptions))
            if len(self._held) > INDEXES_MAX:
                self._held.popitem(last=False)
        if held is None or held[0] != version:
            return None
        self._held.move_to_end(event.tenant)
        try:
            document = parse_payload(event.data, depth_max)
        except Refused as refused:
            return EventRefusal(0, refused.reason, refused.message)
        targets, over_budget = held[1].match(event, document)
        return targets, over_budget


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the parent closes the pipe, or is gone."""
    child = _Child()
    while len(head := requests.read(_LENGTH.size)) == _LENGTH.size:
        request: Any = pickle.loads(requests.read(*_LENGTH.unpack(head)))  # noqa: S301 - our own parent
        answer = pickle.dumps(child.answer(*request), 5)
        answers.write(_LENGTH.pack(len(answer)))
        answers.write(answer)
        answers.flush()


if __name__ == "__main__":
    # A Ctrl-C in a terminal is the parent's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        _serve(sys.stdin.buffer, sys.stdout.buffer)
