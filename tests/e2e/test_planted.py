"""Tests of the crash tests: a server with a fault planted into it must not get past their oracle.

Two faults are looked for always, by one kill each: an event that is lost and one that is stored twice. All of them, by
two kills each, take two minutes, so only with OUTRIDER_TEST_LONG=1 or by `python -m tests.e2e.crash_loop --planted`.
"""

from __future__ import annotations

import os

import pytest
from tests.e2e.crash_loop import CAUGHT_BY, look_for_plant
from tests.support.planted import PLANTS
from tests.support.service import Template

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.postgres,
    pytest.mark.timeout(120),
]
long = pytest.mark.skipif(
    os.environ.get("OUTRIDER_TEST_LONG") != "1", reason="long: set OUTRIDER_TEST_LONG=1"
)


def test_every_plant_has_its_finding() -> None:
    assert set(CAUGHT_BY) == set(PLANTS)


@pytest.mark.parametrize("name", ["checkpoint_past_open", "frames_stored_again"])
async def test_the_oracle_finds_by_one_kill(name: str, fresh_state: Template) -> None:
    found = await look_for_plant(fresh_state, name, seed=31, kills=1, rest_seconds=5.0)
    assert CAUGHT_BY[name](found), f"{found}\n{found.wrong()}"


@long
@pytest.mark.parametrize("name", sorted(PLANTS))
async def test_the_oracle_finds(name: str, fresh_state: Template) -> None:
    found = await look_for_plant(fresh_state, name, seed=31)
    assert CAUGHT_BY[name](found), f"{found}\n{found.wrong()}"
