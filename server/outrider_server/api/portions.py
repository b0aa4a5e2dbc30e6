"""Portions: a frame split by the homes of its tenants, each part taken in where it lives, the answers joined to one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from outrider.v1 import ingest_service_pb2
from outrider_server.api.frames import Elsewhere, Split
from outrider_server.api.links import Link
from outrider_server.api.peers import Peers
from outrider_server.domain.access import Caller
from outrider_server.domain.errors import OutriderError, Unavailable
from outrider_server.domain.frame import FrameResult
from outrider_server.pipeline.admission import Admission
from outrider_server.telemetry.counters import HomesCounters


class PortionRouter:
    """Sends the parts of one stream's frames where they belong. `wrong` is told that what is known of homes is not so."""

    def __init__(
        self,
        caller: Caller,
        admission: Admission,
        peers: Peers,
        *,
        counters: HomesCounters,
        seconds: Callable[[], float],
        wrong: Callable[[Sequence[str]], None],
    ) -> None:
        self._caller = caller
        self._admission = admission
        self._peers = peers
        self._counters = counters
        self._seconds = seconds
        self._wrong = wrong
        self._links: dict[str, Link] = {}

    async def submit(
        self,
        producer: str | None,
        session: int,
        frame: ingest_service_pb2.Frame,
        split: Split,
        previous: Mapping[int, int],
    ) -> asyncio.Future[FrameResult]:
        """The answer to the whole frame; its exception is an `OutriderError`. Raises one where nothing is taken in."""
        closed = self._admission.closed()
        if closed is not None:
            raise closed
        if split.homeless:
            self._wrong(sorted(split.homeless))
            raise Unavailable(
                "NOT_READY",
                "a shard that this belongs to is on its way to another node",
                retry_after_seconds=0.2,
            )
        portion = split.portion
        portion.previous = previous
        if not split.elsewhere:
            return await self._admission.submit(producer, session, frame.number, portion)
        # First those that travel, so that all are under way at once.
        parts = [
            self._pass_on(address, part, producer, session, frame, previous)
            for address, part in split.elsewhere.items()
        ]
        homes = [
            (tenant, address)
            for address, part in split.elsewhere.items()
            for tenant in sorted(part.settled)
        ]
        elsewhere = sorted(set().union(*(part.tenants for part in split.elsewhere.values())))
        known = FrameResult(refusals=portion.refusals, duplicate=True, homes=homes)
        if portion.shards:
            try:
                parts.append(await self._admission.submit(producer, session, frame.number, portion))
            except OutriderError as error:
                parts.append(_failed(error))
        return asyncio.ensure_future(self._joined(parts, known, elsewhere, frame))

    async def close(self) -> None:
        """End the links."""
        links, self._links = self._links, {}
        for link in links.values():
            await link.close()

    def _pass_on(
        self,
        address: str,
        part: Elsewhere,
        producer: str | None,
        session: int,
        frame: ingest_service_pb2.Frame,
        previous: Mapping[int, int],
    ) -> asyncio.Future[FrameResult]:
        link = self._links.get(address)
        if link is None or link.closed:
            link = self._links[address] = Link(
                self._peers, address, self._caller, producer, session, seconds=self._seconds
            )
        self._counters.portions_passed_on += 1
        places: Sequence[int] = ()
        if len(part.places) < len(frame.events):
            places = part.places
            frame = ingest_service_pb2.Frame(
                number=frame.number,
                tenant=frame.tenant,
                events=[frame.events[place] for place in places],
            )
        return link.submit(
            frame.number, {shard: previous.get(shard, 0) for shard in part.shards}, places, frame
        )

    async def _joined(
        self,
        parts: Sequence[asyncio.Future[FrameResult]],
        known: FrameResult,
        elsewhere: Sequence[str],
        frame: ingest_service_pb2.Frame,
    ) -> FrameResult:
        """All answers as one. What is refused anywhere is refused as a whole, and comes again as a whole."""
        answers = await asyncio.gather(*parts, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if errors:
            self._wrong(elsewhere)
            raise min(errors, key=lambda error: isinstance(error, Unavailable))
        result = known
        for answer in answers:
            assert isinstance(answer, FrameResult)
            result = result.joined(answer)
        if len(result.ranges) > 1:
            order: dict[str, int] = {}
            for index, event in enumerate(frame.events):
                order.setdefault(event.tenant or frame.tenant, index)
            result.ranges.sort(key=lambda item: order[item[0]])
        return result


def _failed(error: OutriderError) -> asyncio.Future[FrameResult]:
    failed: asyncio.Future[FrameResult] = asyncio.get_running_loop().create_future()
    failed.set_exception(error)
    return failed
