"""The test of the simulation: each planted fault is found by a recorded seed, whose world is whole without it.

Any change of the code moves what a seed does, so a few are recorded for each fault and the first that finds it counts.
Where none does any more, `python -m tests.simulation --planted --seeds 50` tells which do.
"""

from __future__ import annotations

import pytest
from tests.simulation.__main__ import report
from tests.simulation.planted import PLANTS
from tests.simulation.world import run

RECORDED = {
    "ack_before_commit": (0, 1),
    "checkpoint_past_open": (0, 2, 3),
    "plain_read_fence": (16, 33, 68, 119, 132, 136, 150, 153),
    "memory_after_lost_record": (2, 9, 10, 19, 23),
    "owed_apart_from_checkpoint": (0, 1),
    "claim_deletes": (0, 1),
    "older_configuration": (2, 9, 17, 24, 41, 50, 60),
    "swallowed_cancellation": (21, 41, 44, 50, 60),
    "duplicate_before_commit": (12, 23, 28, 30, 40),
}


def test_every_plant_has_its_seeds() -> None:
    assert RECORDED.keys() == PLANTS.keys()


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_found(plant: str) -> None:
    for seed in RECORDED[plant]:
        with PLANTS[plant]():
            planted = run(seed, stormy=True)
        if planted.violation is not None:
            clean = run(seed, stormy=True)
            assert clean.violation is None, report(clean)
            return
    raise AssertionError(f"none of the seeds {RECORDED[plant]} finds {plant} any more")
