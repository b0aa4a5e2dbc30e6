"""Tests of the crash tests: a server with a fault planted into it must not get past their oracle.

About ten seconds each, so only with OUTRIDER_TEST_LONG=1 or by `python -m tests.e2e.crash_loop --planted`.
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


@long
@pytest.mark.parametrize("name", sorted(PLANTS))
async def test_the_oracle_finds(name: str, fresh_state: Template) -> None:
    found = await look_for_plant(fresh_state, name, seed=31)
    assert CAUGHT_BY[name](found), f"{found}\n{found.wrong()}"
