"""The deterministic loop: what asyncio promises it keeps, the rest it draws, and every draw comes from the seed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from random import Random
from typing import Any

import pytest
from tests.simulation.loop import LIFE, Life, SimulationLoop, StepsExceeded


def run(seed: int, main: Coroutine[Any, Any, Any]) -> Any:
    return SimulationLoop(Random(seed)).run(main)


def here() -> SimulationLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimulationLoop)
    return loop


def in_life(life: Life, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    context = here().outside.copy()
    context.run(LIFE.set, life)
    return context.run(here().create_task, coroutine)


def test_time_jumps_to_the_next_timer_and_nothing_sleeps() -> None:
    async def main() -> float:
        await asyncio.sleep(86_400)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await asyncio.Event().wait()
        return here().time()

    assert run(1, main()) == 86_410


def test_callbacks_of_one_cause_keep_their_order() -> None:
    async def main() -> list[int]:
        order: list[int] = []
        event = asyncio.Event()

        async def wait(number: int) -> None:
            await event.wait()
            order.append(number)

        async with asyncio.TaskGroup() as tasks:
            for number in range(8):
                tasks.create_task(wait(number))
            await asyncio.sleep(0)
            here().call_later(1, event.set)
        return order

    for seed in range(20):
        assert run(seed, main()) == list(range(8))


def test_a_futures_callbacks_keep_the_order_in_which_they_were_added() -> None:
    async def main() -> list[str]:
        order: list[str] = []

        def note(text: str, _: object) -> None:
            order.append(text)

        futures = [here().create_future() for _ in range(4)]

        async def wait(number: int) -> None:
            await futures[number]
            order.append(f"task {number}")

        async with asyncio.TaskGroup() as tasks:
            for number, future in enumerate(futures):
                future.add_done_callback(partial(note, f"first {number}"))
                tasks.create_task(wait(number))
                here().call_later(1, future.set_result, None)
        return order

    for seed in range(20):
        order = run(seed, main())
        for number in range(4):
            assert order.index(f"first {number}") < order.index(f"task {number}")


def test_what_completes_at_one_instant_comes_in_any_order_and_the_same_for_a_seed() -> None:
    async def main() -> tuple[int, ...]:
        order: list[int] = []

        async def wait(number: int) -> None:
            await asyncio.sleep(1)
            order.append(number)

        async with asyncio.TaskGroup() as tasks:
            for number in range(4):
                tasks.create_task(wait(number))
        return tuple(order)

    orders = [run(seed, main()) for seed in range(200)]
    assert len(set(orders)) == 24
    assert orders == [run(seed, main()) for seed in range(200)]


def test_a_completion_may_come_between_any_two_rounds_of_work() -> None:
    async def main() -> int:
        rounds = 0
        done = here().create_future()
        started = asyncio.Event()

        def work() -> None:
            nonlocal rounds
            started.set()
            if not done.done():
                rounds += 1
                here().call_soon(work)

        here().call_later(1, work)
        here().call_later(1, done.set_result, None)
        await done
        return rounds

    assert len({run(seed, main()) for seed in range(60)}) >= 4


def test_nothing_of_a_dead_life_runs_not_even_what_should_come_last() -> None:
    ran: list[str] = []

    async def main() -> None:
        life = Life("process")

        async def work() -> None:
            try:
                await asyncio.sleep(1)
            finally:
                ran.append("finally")
                await asyncio.sleep(1)
                ran.append("after")

        task = in_life(life, work())
        await asyncio.sleep(0.5)
        here().kill(life)
        await asyncio.sleep(10)
        assert not task.done()
        assert ran == []

    run(1, main())


def test_a_frozen_life_goes_on_where_it_stood_with_all_that_came_meanwhile() -> None:
    async def main() -> list[float]:
        life = Life("process")
        times: list[float] = []

        async def work() -> None:
            for _ in range(3):
                await asyncio.sleep(1)
                times.append(here().time())

        task = in_life(life, work())
        await asyncio.sleep(1.5)
        here().freeze(life)
        await asyncio.sleep(10)
        here().thaw(life)
        await task
        return times

    assert run(1, main()) == [1, 11.5, 12.5]


def test_something_can_happen_to_a_life_after_any_of_its_steps() -> None:
    async def main(steps: int) -> int:
        life = Life("process")
        done = 0

        async def work() -> None:
            nonlocal done
            for _ in range(5):
                await asyncio.sleep(0)
                done += 1

        life.at[steps] = lambda: here().kill(life)
        _ = in_life(life, work())
        await asyncio.sleep(1)
        return done

    assert [run(1, main(steps)) for steps in range(1, 6)] == [0, 1, 2, 3, 4]


def test_a_task_can_be_cancelled_at_each_of_its_awaits() -> None:
    async def main(steps: int) -> int:
        reached = 0

        async def work() -> None:
            nonlocal reached
            for _ in range(4):
                reached += 1
                await asyncio.sleep(1)

        task = here().create_task(work())
        here().cancel_after(task, steps)
        await asyncio.wait({task})
        assert task.cancelled()
        return reached

    assert [run(1, main(steps)) for steps in range(1, 5)] == [1, 2, 3, 4]


def test_a_world_without_a_future_ends() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(StepsExceeded):
        run(1, main())


def test_a_callback_of_a_process_that_raises_is_written_down() -> None:
    loop = SimulationLoop(Random(1))

    async def main() -> None:
        async def work() -> None:
            here().call_soon(lambda: 1 / 0)

        await in_life(Life("process"), work())
        await asyncio.sleep(1)

    loop.run(main())
    assert "ZeroDivisionError" in loop.errors[0]


def test_a_callback_of_the_world_that_raises_ends_the_run() -> None:
    async def main() -> None:
        here().call_soon(lambda: 1 / 0)
        await asyncio.sleep(1)

    with pytest.raises(ZeroDivisionError):
        run(1, main())
