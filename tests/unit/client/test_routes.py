from __future__ import annotations

import random
import re
from collections import deque
from typing import Any

import pytest
from typing_extensions import override

from outrider._frames import Frame
from outrider._line import Line, Listener
from outrider._queue import Settings
from outrider._routes import Crossing, Routes
from outrider._stream import Counts
from outrider.errors import PublisherClosed
from outrider.v1.ingest_service_pb2 import FrameAck, TenantHome


async def _no_sleep(_: float) -> None:
    return None


def settings(**options: Any) -> Settings:
    chosen: dict[str, Any] = {
        "tenant": "",
        "metadata": (),
        "linger_seconds": 3600.0,
        "frame_events": 3,
        "frame_bytes": 4096,
        "memory_bytes_max": 1 << 20,
        "backoff_seconds": 0.1,
        "backoff_seconds_max": 1.0,
        "random": lambda: 0.5,
        "clock": lambda: 1.0,
        "wall_clock_ns": lambda: 1_000_000,
        "sleep": _no_sleep,
    }
    return Settings(**(chosen | options))


class FakeLine(Line):
    """A line without streams: the test opens it, answers its frames and lets it fail."""

    def __init__(self, number: int) -> None:
        nothing: Any = lambda *_: None  # noqa: E731
        listener = Listener(
            sealed=nothing,
            acknowledged=nothing,
            opened=nothing,
            astray=nothing,
            failed=nothing,
        )
        super().__init__(number, f"p~{number}", 1, settings(), Counts(), listener, connect=nothing)
        self.streaming = False
        self.rested = False
        self.starts: list[str | None] = []

    @property
    @override
    def is_open(self) -> bool:
        return self.streaming

    @property
    @override
    def is_at_rest(self) -> bool:
        return self.rested

    @property
    @override
    def is_ending(self) -> bool:
        return self.rested

    @override
    def start(self, address: str | None = None) -> None:
        self.address = address
        self.starts.append(address)
        self.rested = False

    @override
    def rest(self) -> None:
        self.rested = True
        self.streaming = False
        self.address = None

    def answer(self) -> list[str]:
        """Acknowledge the oldest frame; returns the texts of its events."""
        frame = self.queue.frames.popleft()
        told = texts([frame])
        self.queue.acknowledged(frame, FrameAck(number=frame.number))
        return told


class Road:
    """Routes over fake lines, with what a publisher would do around them."""

    def __init__(self, **options: Any) -> None:
        self.now = 1.0
        self.first = FakeLine(0)
        self.first.streaming = True
        self.first.node = "first:1"
        self.routes = Routes(self.first, FakeLine, target="h:1", clock=lambda: self.now, **options)

    def line(self, number: int) -> FakeLine:
        line = self.routes.lines[number]
        assert isinstance(line, FakeLine)
        return line

    def send(self, tenant: str, text: str) -> None:
        self.routes.places.get(tenant, self.first).put(text.encode(), tenant, 1)

    def hint(self, line: Line, tenant: str, *addresses: str) -> None:
        homes = [TenantHome(tenant=tenant, address=address) for address in addresses]
        self.routes.told(line, FrameAck(homes=homes))

    def open(self, number: int) -> None:
        line = self.line(number)
        line.streaming = True
        line.node = line.address or ""
        self.routes.opened(line)


def texts(frames: Any) -> list[str]:
    found = []
    for frame in frames:
        # A sealed frame is one message; the events in these tests are told by their texts alone.
        message = frame.message or b"".join(frame.parts)
        found += [word.decode() for word in re.findall(rb"<(\w+)>", message)]
    return found


async def test_an_idle_tenant_moves_as_soon_as_the_stream_to_its_home_is_open() -> None:
    road = Road()
    road.send("a", "<a1>")
    road.first.queue.seal_open()
    road.first.answer()
    road.hint(road.first, "a", "n:1")
    assert road.line(1).starts == ["n:1"]
    road.send("a", "<a2>")  # not open yet: nothing waits for it
    road.first.queue.seal_open()
    assert road.first.answer() == ["a2"]
    road.open(1)
    assert road.routes.places["a"] is road.line(1)
    road.send("a", "<a3>")
    road.line(1).queue.seal_open()
    assert texts(road.line(1).queue.frames) == ["a3"]


async def test_a_busy_tenant_crosses_when_its_last_frame_on_the_old_line_is_answered() -> None:
    road = Road()
    road.hint(road.first, "a", "n:1")
    for i in range(4):
        road.send("a", f"<a{i}>")
    road.send("b", "<b0>")
    road.open(1)
    assert isinstance(road.routes.places["a"], Crossing)
    for i in range(4, 12):
        road.send("a", f"<a{i}>")
        road.send("b", f"<b{i}>")
    assert not road.line(1).queue.frames
    assert road.first.answer() == ["a0", "a1", "a2"]
    assert isinstance(road.routes.places["a"], Crossing)
    assert road.first.answer() == ["a3", "b0"]
    assert road.routes.places["a"] is road.line(1)
    road.send("a", "<a12>")
    road.line(1).queue.seal_open()
    frames = road.line(1).queue.frames
    assert texts(frames) == [f"a{i}" for i in range(4, 13)]
    assert [frame.number for frame in frames] == [1, 2, 3, 4]
    assert all(frame.events <= 3 for frame in frames)


async def test_what_waits_to_cross_is_part_of_the_last_frames_and_is_abandoned_with_the_rest() -> (
    None
):
    road = Road()
    road.hint(road.first, "a", "n:1")
    road.send("a", "<a1>")
    road.open(1)
    road.send("a", "<a2>")
    road.send("b", "<b1>")
    assert sorted(texts(road.routes.last_frames())) == ["a2", "b1"]
    frames = road.routes.abandon(PublisherClosed("closed"))
    assert len(frames) == 3
    assert all(frame.error is not None for frame in frames)
    assert not road.line(1).queue.frames  # nothing arrived by the settling of what it waited for
    assert not road.routes.places


async def test_a_home_that_fails_during_the_crossing_leaves_the_tenant_on_the_first_line() -> None:
    road = Road()
    road.hint(road.first, "a", "n:1")
    road.send("a", "<a1>")
    road.open(1)
    road.send("a", "<a2>")
    road.line(1).address = None
    road.routes.astray(road.line(1), "n:1", after_success=True)
    assert road.line(1).rested
    road.first.answer()
    assert "a" not in road.routes.places
    assert texts(road.first.queue.frames) == ["a2"]


async def test_tenants_of_a_failed_home_go_back_when_what_they_have_there_is_answered() -> None:
    road = Road()
    for tenant in "ab":
        road.hint(road.first, tenant, "n:1")
    road.open(1)
    line = road.line(1)
    road.send("a", "<a1>")
    line.address = None
    road.routes.astray(line, "n:1", after_success=True)
    assert not line.rested  # what it has goes through the target
    assert "b" not in road.routes.places
    road.send("a", "<a2>")
    road.hint(road.first, "a", "n:2")  # not the line that the tenant is on
    assert len(road.routes.lines) == 2
    line.answer()
    road.routes.rest_if_unused(line)
    assert line.rested
    assert texts(road.first.queue.frames) == ["a2"]
    # Used again for the next home, with its numbers.
    road.hint(road.first, "b", "n:2")
    assert line.starts == ["n:1", "n:2"]
    assert line.queue.number == 1


async def test_a_line_nobody_wishes_for_any_more_rests_when_it_opens() -> None:
    road = Road()
    road.hint(road.first, "a", "n:1")
    road.hint(road.first, "a", "n:2")
    road.open(2)
    assert road.routes.places["a"] is road.line(2)
    road.open(1)
    assert road.line(1).rested
    assert not road.line(2).rested


async def test_repeated_hints_while_a_tenant_crosses_change_nothing() -> None:
    road = Road()
    road.hint(road.first, "a", "n:1")
    road.send("a", "<a1>")
    road.open(1)
    for _ in range(3):
        road.hint(road.first, "a", "n:1")
    assert road.line(1).starts == ["n:1"]
    assert len(road.routes.lines) == 2
    road.first.answer()
    assert road.routes.places["a"] is road.line(1)


async def test_no_line_is_needed_where_the_target_leads_to_the_home() -> None:
    road = Road()
    road.hint(road.first, "a", "first:1")
    assert len(road.routes.lines) == 1


async def test_a_tenant_does_not_return_at_once_to_a_home_it_left() -> None:
    road = Road()
    road.hint(road.first, "a", "n:1")
    road.open(1)
    road.hint(road.line(1), "a", "first:1")
    assert road.routes.places["a"] is road.line(1)
    road.now += 60.1
    road.hint(road.line(1), "a", "first:1")
    assert "a" not in road.routes.places


async def test_lines_and_tenants_are_bounded() -> None:
    road = Road(lines_max=2, tenants_max=3)
    for i in range(5):
        road.hint(road.first, f"t{i}", f"n:{i + 1}")
    assert len(road.routes.lines) == 3
    for i in range(10, 20):
        road.hint(road.first, f"t{i}", "n:1")
    assert len(road.routes._wishes) == 3
    road.open(1)
    for i in range(20, 30):
        road.hint(road.first, f"t{i}", "n:1")
    assert len(road.routes.places) == 3
    assert len(road.routes._left) <= 3


@pytest.mark.parametrize("seed", range(40))
async def test_any_course_of_hints_answers_and_failures_keeps_each_tenants_order(
    seed: int,
) -> None:
    chance = random.Random(seed)
    road = Road()
    tenants = "abcd"
    sent = dict.fromkeys(tenants, 0)
    came: dict[str, list[int]] = {tenant: [] for tenant in tenants}

    def answer(line: FakeLine) -> None:
        if line.queue.frames:
            for text in line.answer():
                came[text[0]].append(int(text[1:]))
            road.routes.rest_if_unused(line)

    for _ in range(1500):
        lines = [line for line in road.routes.lines if isinstance(line, FakeLine)]
        line = chance.choice(lines)
        roll = chance.random()
        tenant = chance.choice(tenants)
        if roll < 0.5:
            road.send(tenant, f"<{tenant}{sent[tenant]}>")
            sent[tenant] += 1
        elif roll < 0.7:
            answer(line)
        elif roll < 0.78:
            line.queue.seal_open()
        elif roll < 0.9:
            road.hint(line, tenant, f"n:{chance.randint(1, 4)}")
            road.now += 61.0
        elif roll < 0.95 and line is not road.first and line.address and not line.streaming:
            road.open(line.number)
        elif line is not road.first and line.address:
            address, line.address = line.address, None
            line.streaming = False
            road.routes.astray(line, address, after_success=True)
        # On one line at a time: that is what order rests on.
        for name in tenants:
            holding = [each for each in lines if any(f.holds(name) for f in each.queue.frames)]
            assert len(holding) <= 1
    while road.routes.last_frames():
        for each in list(road.routes.lines):
            assert isinstance(each, FakeLine)
            each.queue.seal_open()
            answer(each)
    assert came == {tenant: list(range(sent[tenant])) for tenant in tenants}
    assert not list(road.routes.crossings())
    counted = {t for each in road.routes.lines[1:] for t in each.tenants}
    assert counted == set(road.routes.places)


async def test_last_with_finds_the_last_frame_of_a_tenant_and_closes_the_open_one() -> None:
    line = FakeLine(0)
    for tenant in "aabbab":
        line.put(b"x", tenant, 1)
    frames: deque[Frame] = line.queue.frames
    assert line.queue.last_with("a") is frames[1]
    line.put(b"x", "c", 1)
    assert line.queue.last_with("b") is frames[1]
    assert line.queue.open is not None
    assert line.queue.last_with("c") is frames[2]
    assert line.queue.open is None
    assert line.queue.last_with("d") is None
