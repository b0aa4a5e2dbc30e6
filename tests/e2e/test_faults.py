"""Every fault of `tests.faults` in its short form, and tests of what their oracle adds to that of the crash tests.

The long forms, with as many kills as wanted, are `python -m tests.faults` and `make faults`.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

import pytest
from tests.faults.catalogue import FAULTS
from tests.faults.faults import Effort
from tests.support.ledger import (
    Fault,
    LedgerReceiver,
    Request,
    Sent,
    Wanted,
    out_of_order,
    shard_of,
)
from tests.support.service import Template

SEED = 41
EFFORT = Effort(seed=SEED)
SLACK_SECONDS = 60


@pytest.mark.e2e
@pytest.mark.postgres
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.timeout(fault.seconds_max(EFFORT) + SLACK_SECONDS))
        for name, fault in FAULTS.items()
        if not fault.long_only
    ],
)
async def test_nothing_is_lost_and_all_is_as_promised_over(
    name: str, fresh_state: Template
) -> None:
    fault = FAULTS[name]
    async with asyncio.timeout(fault.seconds_max(EFFORT)):
        await fault.run(fresh_state, EFFORT)


# Tests of the tests


def _request(number: int, sequence: int, **when: float) -> Request:
    return Request(
        "/ordered",
        when.get("arrived", 0.0),
        200,
        signed=True,
        ids=[f"dlv_{sequence}_1"],
        numbers=[number],
        answered=True,
        ended=when.get("ended", 0.0),
    )


def _sent(key: str) -> Sent:
    return Sent("invoice.posted", {"key": key}, Future())  # type: ignore[arg-type]


def test_first_arrivals_that_overtake_within_a_key_are_found() -> None:
    receiver = LedgerReceiver()
    wanted = Wanted("t/ordered", 1, "/ordered", lambda _type, _data: True)
    sent = {1: _sent("a"), 2: _sent("b"), 3: _sent("a")}
    receiver.requests = [_request(2, 2048), _request(1, 1024), _request(3, 3072)]
    receiver.requests += [_request(1, 1024)]  # a copy, which may come late
    assert out_of_order(receiver, sent, wanted, lambda one: one.data["key"]) == []
    receiver.requests = [_request(3, 3072), _request(1, 1024)]
    assert len(out_of_order(receiver, sent, wanted, lambda one: one.data["key"])) == 1


def test_a_kill_excuses_only_what_lived_in_the_shards_of_the_killed() -> None:
    name = f"dlv_{(5 << 10) + 7}_1"
    first, second = _request(1, 0, arrived=1.0, ended=1.1), _request(1, 0, arrived=3.0, ended=3.1)
    assert shard_of(name) == 7
    assert Fault("kill", 1.5, 2.0, frozenset({7})).excuses(name, first, second)
    assert not Fault("kill", 1.5, 2.0, frozenset({8})).excuses(name, first, second)
    assert not Fault("kill", 1.9, 2.0, frozenset({7})).excuses(name, first, second)
