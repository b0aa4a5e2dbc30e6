from __future__ import annotations

import random
from collections import deque

import pytest

from outrider._flight import AskRoom, Flight
from outrider._frames import Frame
from outrider.errors import ProtocolBroken


def sealed(number: int, size: int = 100, session: int = 7) -> Frame:
    frame = Frame("demo", 0.0)
    frame.session, frame.number, frame.size, frame.events = session, number, size, 1
    return frame


def flight_of(*frames: Frame, window_frames: int = 4, window_bytes: int = 1000) -> Flight:
    return Flight(
        deque(frames),
        7,
        window_frames=window_frames,
        window_bytes=window_bytes,
        frame_bytes_max=500,
        backoff=lambda attempt: 10.0 * 2**attempt,
    )


def sent(flight: Flight, now: float = 0.0) -> list[int | str]:
    steps: list[int | str] = []
    while (step := flight.next(now, lambda _: True)) is not None:
        steps.append(step.number if isinstance(step, Frame) else f"ask {step.frame_bytes}")
    return steps


def test_frames_go_in_order_inside_the_windows_frames() -> None:
    flight = flight_of(*(sealed(n) for n in range(1, 8)))
    assert sent(flight) == [1, 2, 3, 4]
    assert flight.acknowledged(1).number == 1
    assert sent(flight) == [5]
    assert flight.unsent == 2


def test_frames_go_inside_the_windows_bytes() -> None:
    flight = flight_of(sealed(1, 400), sealed(2, 400), sealed(3, 201), sealed(4, 10))
    assert sent(flight) == [1, 2]
    flight.acknowledged(1)
    assert sent(flight) == [3, 4]


def test_a_refused_frame_and_all_behind_it_go_again_once_all_are_answered() -> None:
    flight = flight_of(*(sealed(n) for n in range(1, 6)))
    assert sent(flight) == [1, 2, 3, 4]
    flight.acknowledged(1)
    flight.refused(2, 0.0, 0.0)
    assert sent(flight) == []
    flight.refused(3, 0.0, 0.0)
    assert sent(flight) == []
    flight.refused(4, 0.0, 0.0)
    assert sent(flight) == [2, 3, 4, 5]


def test_a_refused_frame_waits_as_long_as_the_server_says() -> None:
    flight = flight_of(sealed(1))
    assert sent(flight) == [1]
    flight.refused(1, 3.0, 100.0)
    assert sent(flight, 102.9) == []
    assert flight.resume_at == 103.0
    assert sent(flight, 103.0) == [1]
    assert flight.resume_at is None


def test_refusals_without_end_get_growing_pauses_until_an_acknowledgement() -> None:
    flight = flight_of(sealed(1), sealed(2), window_frames=1)
    now, pauses = 0.0, []
    for _ in range(4):
        assert sent(flight, now) == [1]
        flight.refused(1, 0.0, now)
        assert flight.resume_at is not None
        pauses.append(flight.resume_at - now)
        now = flight.resume_at
    assert pauses == [0.0, 20.0, 40.0, 80.0]
    assert sent(flight, now) == [1]
    flight.acknowledged(1)
    assert sent(flight, now) == [2]
    flight.refused(2, 0.0, now)
    assert flight.resume_at == now


def test_a_large_frame_is_asked_for_and_waits_for_its_grant_with_all_behind_it() -> None:
    flight = flight_of(sealed(1), sealed(2, 900), sealed(3))
    assert sent(flight) == [1, "ask 900"]
    assert sent(flight) == []
    flight.granted(900)
    assert sent(flight) == [2, 3]


def test_a_large_frame_counts_as_frame_but_not_as_bytes() -> None:
    flight = flight_of(sealed(1, 5000), sealed(2, 400), sealed(3, 400), sealed(4, 200), sealed(5))
    assert sent(flight) == ["ask 5000"]
    flight.granted(5000)
    assert sent(flight) == [1, 2, 3, 4]


def test_a_second_large_frame_is_asked_for_when_the_first_is_answered() -> None:
    flight = flight_of(sealed(1, 5000), sealed(2, 6000))
    assert sent(flight) == ["ask 5000"]
    flight.granted(5000)
    assert sent(flight) == [1]
    flight.acknowledged(1)
    assert sent(flight) == ["ask 6000"]


def test_a_refused_large_frame_is_asked_for_anew() -> None:
    flight = flight_of(sealed(1, 5000))
    assert sent(flight) == ["ask 5000"]
    flight.granted(5000)
    assert sent(flight) == [1]
    flight.refused(1, 0.0, 0.0)
    assert sent(flight) == ["ask 5000"]


def test_a_grant_waits_for_its_frame_over_a_refusal() -> None:
    flight = flight_of(sealed(1), sealed(2, 5000))
    assert sent(flight) == [1, "ask 5000"]
    flight.refused(1, 0.0, 0.0)
    flight.granted(5000)
    assert sent(flight) == [1, 2]


def test_a_refused_frame_that_became_large_does_not_take_anothers_grant() -> None:
    flight = flight_of(sealed(1, 400), sealed(2, 5000))
    assert sent(flight) == [1, "ask 5000"]
    flight.window(4, 300)
    flight.refused(1, 0.0, 0.0)
    flight.granted(5000)
    assert sent(flight) == []
    assert flight.finished


def test_a_grant_that_nobody_asked_for_breaks_the_contract() -> None:
    with pytest.raises(ProtocolBroken):
        flight_of(sealed(1)).granted(10)


def test_a_smaller_window_holds_back_at_once() -> None:
    flight = flight_of(*(sealed(n) for n in range(1, 6)), window_frames=3)
    assert sent(flight) == [1, 2, 3]
    flight.window(1, 1000)
    flight.acknowledged(1)
    flight.acknowledged(2)
    assert sent(flight) == []
    flight.acknowledged(3)
    assert sent(flight) == [4]


@pytest.mark.parametrize("answer", [1, 3])
def test_an_answer_out_of_order_breaks_the_contract(answer: int) -> None:
    flight = flight_of(sealed(2), sealed(3))
    assert sent(flight) == [2, 3]
    with pytest.raises(ProtocolBroken):
        flight.acknowledged(answer)


def test_an_acknowledgement_behind_a_refusal_breaks_the_contract() -> None:
    flight = flight_of(sealed(1), sealed(2))
    assert sent(flight) == [1, 2]
    flight.refused(1, 0.0, 0.0)
    with pytest.raises(ProtocolBroken):
        flight.acknowledged(2)


def test_a_draining_stream_sends_nothing_and_ends_with_its_last_answer() -> None:
    flight = flight_of(*(sealed(n) for n in range(1, 4)), window_frames=2)
    assert sent(flight) == [1, 2]
    flight.going_away = True
    flight.acknowledged(1)
    assert sent(flight) == []
    assert not flight.finished
    flight.acknowledged(2)
    assert flight.finished


def test_frames_of_another_session_end_the_stream() -> None:
    flight = flight_of(sealed(1), sealed(1, session=8))
    assert sent(flight) == [1]
    assert not flight.finished
    flight.acknowledged(1)
    assert sent(flight) == []
    assert flight.finished


def test_a_frame_that_is_not_durable_yet_holds_back_those_behind_it() -> None:
    flight = flight_of(sealed(1), sealed(2))
    assert flight.next(0.0, lambda frame: frame.number != 1) is None
    step = flight.next(0.0, lambda _: True)
    assert isinstance(step, Frame)
    assert step.number == 1


@pytest.mark.parametrize("seed", range(30))
def test_any_course_of_answers_keeps_window_and_order_and_gets_everything_through(
    seed: int,
) -> None:
    chance = random.Random(seed)
    frames = [sealed(n, chance.choice([50, 300, 500, 3000])) for n in range(1, 60)]
    flight = flight_of(*frames)
    wire: deque[Frame] = deque()
    taken: list[int] = []
    grants: deque[int] = deque()
    refusing: int | None = None
    now = 0.0
    while len(taken) < len(frames):
        step = flight.next(now, lambda _: True)
        if isinstance(step, AskRoom):
            assert not grants
            grants.append(step.frame_bytes)
        elif step is not None:
            wire.append(step)
            assert len(wire) <= flight.window_frames
            small = [frame.size for frame in wire if frame.size <= 500]
            assert sum(small) <= 1000 or flight.window_bytes < 1000
        if step is not None and chance.random() < 0.7:
            continue
        now += 5.0
        if grants and chance.random() < 0.5:
            flight.granted(grants.popleft())
        if not wire:
            continue
        frame = wire.popleft()
        if refusing is not None and frame.number != refusing:
            flight.refused(frame.number, 0.0, now)
        elif chance.random() < 0.2:
            refusing = frame.number
            flight.refused(frame.number, chance.random(), now)
        else:
            refusing = None
            taken.append(flight.acknowledged(frame.number).number)
    assert taken == [frame.number for frame in frames]
