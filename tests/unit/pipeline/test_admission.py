"""Room is never exceeded, is given in the order of asking, and what was asked for in vain is not lost."""

from __future__ import annotations

import asyncio

import pytest

from outrider_server.pipeline.admission import Room


async def waiting(room: Room, size: int, turns: list[int]) -> asyncio.Task[None]:
    async def wait() -> None:
        await room.take(size)
        turns.append(size)

    task = asyncio.get_running_loop().create_task(wait())
    await asyncio.sleep(0)
    return task


async def test_those_who_wait_get_room_in_their_order() -> None:
    room, turns = Room(100), list[int]()
    await room.take(60)
    large, small = await waiting(room, 90, turns), await waiting(room, 10, turns)
    assert turns == []  # the small one would fit, but came later
    room.give_back(60)
    await asyncio.gather(large, small)
    assert turns == [90, 10]
    assert room.taken == 100


async def test_what_is_larger_than_all_there_is_is_let_in_alone() -> None:
    room, turns = Room(100), list[int]()
    await room.take(1)
    task = await waiting(room, 1000, turns)
    room.give_back(1)
    await task
    assert room.taken == 100
    after = await waiting(room, 1, turns)
    assert not after.done()
    room.give_back(1000)
    await after
    assert room.taken == 1


async def test_one_who_gives_up_waiting_lets_those_behind_pass() -> None:
    room, turns = Room(100), list[int]()
    await room.take(50)
    large, small = await waiting(room, 90, turns), await waiting(room, 10, turns)
    large.cancel()
    await small
    assert turns == [10]
    with pytest.raises(asyncio.CancelledError):
        await large
    assert room.taken == 60


async def test_one_who_gives_up_just_as_the_turn_comes_gives_it_back() -> None:
    room, turns = Room(100), list[int]()
    await room.take(100)
    first, second = await waiting(room, 100, turns), await waiting(room, 100, turns)
    room.give_back(100)
    first.cancel()  # its turn was told, but it has not run since
    await second
    assert turns == [100]
    assert first.cancelled()
    assert room.taken == 100


async def test_nothing_is_asked_for_and_nothing_is_taken() -> None:
    room = Room(10)
    await room.take(0)
    room.give_back(0)
    assert room.taken == 0
