"""The wrapper of the C++ engine: its complaints as issues, its failures as values."""

from __future__ import annotations

import pytest

from outrider_server.domain.event import NewEvent
from outrider_server.matching import engine

EVENT = NewEvent(tenant=1, type="a.b", data=b"", time_us=1_000_001)


def evaluated(text: str, fields: dict[str, object]) -> object:
    names = set(fields)
    expression = engine.load(engine.check(text, names).ast, names)
    return engine.evaluate(expression, engine.variables_of(names, fields, fields, EVENT))


def test_every_complaint_has_its_place() -> None:
    with pytest.raises(engine.EngineError) as caught:
        engine.check("a +\n b(1) + c", {"a"})
    assert [(issue.line, issue.column) for issue in caught.value.issues] == [(2, 3), (2, 9)]
    assert all("_e" not in issue.message for issue in caught.value.issues)


def test_values_and_failures_are_told_apart() -> None:
    assert evaluated("a + 1", {"a": 1}) == 2
    assert isinstance(evaluated("a + 1", {"a": "x"}), engine.EngineFailure)
    assert isinstance(evaluated("a == 1", {"a": 2**70}), engine.EngineFailure)
    assert isinstance(evaluated("a == 1", {"a": object()}), engine.EngineFailure)


def test_a_loaded_expression_knows_the_types_of_the_envelope() -> None:
    # In an environment that never compiled anything the binding refuses datetimes.
    assert evaluated("event.time == timestamp(1) + duration('1us') && a", {"a": True}) is True


def test_bytes_that_are_no_expression_are_refused() -> None:
    with pytest.raises(engine.EngineError):
        engine.load(b"x", ())
