"""Which line takes a tenant's events: the first one, unless an acknowledgement named a home and a line leads there.

    first line -> (ack names a home) -> wished, until a stream to it is open -> crossing, until nothing of the tenant is
    unanswered on its old line -> on the home's line -> (home fails, drains) -> crossing back to the first line

Rules: a tenant's events are under way on one line at a time, so their order is that in which they were sent; while it
crosses, further ones wait here, filled into frames that have no number yet, and hold up nobody else. A hint is only
taken from the line that the tenant is on. Bounded: lines, tenants away from the first line; the events that wait count
in the publisher's window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

from outrider._frames import Frame
from outrider._handle import Handle
from outrider._homes import Addresses, unanimous
from outrider._line import Line
from outrider.errors import OutriderError
from outrider.v1.ingest_service_pb2 import FrameAck

LINES_MAX = 64
"""Lines to homes, beside the first."""
TENANTS_MAX = 65_536
_RETURN_SECONDS_MIN = 60.0


class Crossing:
    """A tenant between two lines: its events wait in frames that `destination` will number."""

    __slots__ = ("_bytes_max", "_clock", "_events_max", "destination", "frames", "origin", "tenant")

    def __init__(
        self,
        tenant: str,
        origin: Line,
        destination: Line,
        *,
        events_max: int,
        bytes_max: int,
        clock: Callable[[], float],
    ) -> None:
        self.tenant = tenant
        self.origin = origin
        self.destination = destination
        self.frames: deque[Frame] = deque()
        self._events_max = events_max
        self._bytes_max = bytes_max
        self._clock = clock

    def put(self, data: bytes, tenant: str, cost: int) -> Handle:
        """Take an event that was counted in."""
        frame = self.frames[-1] if self.frames else None
        if (
            frame is None
            or frame.events >= self._events_max
            or frame.bytes + len(data) + 6 > self._bytes_max
        ):
            frame = Frame(tenant, self._clock())
            self.frames.append(frame)
        index = frame.add(data, tenant)
        frame.cost += cost
        return Handle(frame, index)


class Routes:
    """All lines of a publisher, and the place of every tenant that is not on the first.

    `make(number)` builds a line that was never started. A tenant does not return within a minute to a home that it
    left for another: where two homes name each other for it (it may be split), it would only wander.
    """

    def __init__(
        self,
        first: Line,
        make: Callable[[int], Line],
        *,
        target: str,
        clock: Callable[[], float],
        lines_max: int = LINES_MAX,
        tenants_max: int = TENANTS_MAX,
    ) -> None:
        self.first = first
        self.lines = [first]
        self.places: dict[str, Line | Crossing] = {}
        self._make = make
        self._clock = clock
        self._lines_max = lines_max
        self._tenants_max = tenants_max
        self._addresses = Addresses(target)
        self._wishes: dict[str, Line] = {}
        self._left: dict[str, tuple[str, float]] = {}
        self._over = False

    def crossings(self) -> Iterator[Crossing]:
        """The tenants that are between two lines."""
        return (place for place in self.places.values() if isinstance(place, Crossing))

    def last_frames(self) -> list[Frame]:
        """The last frame of each line and crossing: with them everything taken so far is answered."""
        for line in self.lines:
            line.queue.seal_open()
        last = [line.queue.frames[-1] for line in self.lines if line.queue.frames]
        return last + [crossing.frames[-1] for crossing in self.crossings() if crossing.frames]

    def told(self, line: Line, ack: FrameAck) -> None:
        """An acknowledgement on `line` named homes."""
        if self._over:
            return
        now = self._clock()
        for tenant, address in unanimous(ack.homes).items():
            place = self.places.get(tenant, self.first)
            if (place.origin if isinstance(place, Crossing) else place) is not line:
                continue
            left, at = self._left.get(tenant, ("", 0.0))
            if left == address and now < at + _RETURN_SECONDS_MIN:
                continue
            destination = self._line_to(address, now)
            if destination is None:
                continue
            if destination.is_open:
                self._move_by_hint(tenant, destination, now)
            elif tenant in self._wishes or len(self._wishes) < self._tenants_max:
                self._wishes[tenant] = destination

    def opened(self, line: Line) -> None:
        """A stream of `line` opened: those who wished for it come."""
        if self._over or line is self.first:
            return
        now = self._clock()
        for tenant in [tenant for tenant, wish in self._wishes.items() if wish is line]:
            del self._wishes[tenant]
            self._move_by_hint(tenant, line, now)
        self.rest_if_unused(line)

    def astray(self, line: Line, address: str, *, after_success: bool) -> None:
        """`line` left its home: what it has goes through the target, its tenants go back to the first line."""
        if self._over:
            return
        self._addresses.failed(address, self._clock(), after_success=after_success)
        for tenant in [tenant for tenant, wish in self._wishes.items() if wish is line]:
            del self._wishes[tenant]
        for tenant in list(line.tenants):
            self._move(tenant, self.first)
        self.rest_if_unused(line)

    def rest_if_unused(self, line: Line) -> None:
        """End the stream of a line that nobody is on and nothing is under way on. It can be used again."""
        if (
            line is not self.first
            and not line.is_ending
            and not line.tenants
            and line.queue.is_empty
            and line not in self._wishes.values()
        ):
            line.rest()

    def abandon(self, error: OutriderError) -> list[Frame]:
        """Nothing moves any more: settle everything unanswered, on lines and between them, and return it."""
        self._over = True
        frames = [frame for crossing in self.crossings() for frame in crossing.frames]
        self.places.clear()
        self._wishes.clear()
        for frame in frames:
            frame.settle(None, error)
        for line in self.lines:
            frames += line.queue.abandon(error)
        return frames

    # Moving

    def _line_to(self, address: str, now: float) -> Line | None:
        if address == self.first.node:
            return self.first
        used = [line for line in self.lines[1:] if line.address is not None and not line.is_ending]
        for line in used:
            if address in (line.address, line.node):
                return line
        if not self._addresses.may_follow(address, now):
            return None
        spare = next((line for line in self.lines[1:] if line.is_at_rest), None)
        if spare is None:
            if len(self.lines) > self._lines_max:
                return None
            spare = self._make(len(self.lines))
            self.lines.append(spare)
        spare.start(address)
        return spare

    def _move_by_hint(self, tenant: str, destination: Line, now: float) -> None:
        place = self.places.get(tenant, self.first)
        before = place.origin if isinstance(place, Crossing) else place
        address = before.address or before.node
        if self._move(tenant, destination) and address:
            self._left[tenant] = (address, now)
            while len(self._left) > self._tenants_max:
                del self._left[next(iter(self._left))]

    def _move(self, tenant: str, destination: Line) -> bool:
        """Let the tenant's next events go to `destination`; whether they went elsewhere before."""
        place = self.places.get(tenant, self.first)
        if isinstance(place, Crossing):
            before, place.destination = place.destination, destination
            if before is destination:
                return False
            self._count(tenant, before, destination)
            return True
        if place is destination:
            return False
        if place is self.first and len(self.places) >= self._tenants_max:
            return False
        last = place.queue.last_with(tenant)
        if last is None:
            self._arrive(tenant, destination)
        else:
            crossing = self.places[tenant] = Crossing(
                tenant,
                place,
                destination,
                # Small enough for every line that it may end on.
                events_max=min(line.queue.frame_events for line in self.lines),
                bytes_max=min(line.queue.frame_room for line in self.lines),
                clock=self._clock,
            )
            if last.on_settled is None:
                last.on_settled = []
            last.on_settled.append(partial(self._crossed, crossing))
        self._count(tenant, place, destination)
        return True

    def _crossed(self, crossing: Crossing) -> None:
        """Nothing of the tenant is under way any more: what waited goes to its new line, and all that follows."""
        if self._over:
            return
        self._arrive(crossing.tenant, crossing.destination)
        crossing.destination.queue.adopt(crossing.frames)

    def _arrive(self, tenant: str, line: Line) -> None:
        if line is self.first:
            self.places.pop(tenant, None)
        else:
            self.places[tenant] = line

    def _count(self, tenant: str, origin: Line, destination: Line) -> None:
        """Keep the tenants of lines to homes, by which an unused one is known."""
        if destination is not self.first:
            destination.tenants.add(tenant)
        origin.tenants.discard(tenant)
        self.rest_if_unused(origin)
