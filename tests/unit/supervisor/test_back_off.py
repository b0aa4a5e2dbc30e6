"""One crash costs nothing; a worker that cannot live is started ever more rarely, and forgiven after a sound life."""

from __future__ import annotations

import pytest

from outrider_server.supervisor.back_off import LONGEST_SECONDS, SOUND_SECONDS, BackOff


def test_the_first_start_is_at_once_and_each_further_one_waits_twice_as_long() -> None:
    back_off = BackOff()
    waits = [back_off.after(0.0) for _ in range(9)]
    assert waits == pytest.approx(
        [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, LONGEST_SECONDS, LONGEST_SECONDS]
    )


def test_a_sound_life_is_started_again_at_once() -> None:
    back_off = BackOff()
    for _ in range(5):
        back_off.after(0.0)
    assert back_off.after(SOUND_SECONDS - 0.001) > 0
    assert back_off.after(SOUND_SECONDS) == 0
    assert back_off.after(0.0) == pytest.approx(0.1)
