"""Generated filters against two other voices: the C++ engine on everything, cel-python where it can be trusted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from tests.support import cel_random

from outrider_server.domain.event import NewEvent
from outrider_server.matching import codegen, engine
from outrider_server.matching.checked_ast import decode
from outrider_server.matching.filter import _top_level_names, check_filter
from outrider_server.matching.predicate import names_in
from outrider_server.matching.runtime import ERROR, OverBudget

EVENT = NewEvent(
    tenant=1,
    type="a.b",
    data=b"",
    time_us=1_767_323_045_678_901,
    subject="s",
    attributes={"k": "v"},
)

# A long run: OUTRIDER_DIFFERENTIAL_FILTERS=100000 (8 evaluations each) with other seeds.
FILTERS = int(os.environ.get("OUTRIDER_DIFFERENTIAL_FILTERS", "1500"))


@pytest.mark.timeout(60 + FILTERS // 100)
@pytest.mark.parametrize("seed", range(4))
def test_generated_code_answers_as_the_engine_does(seed: int) -> None:
    random = Random(seed + int(os.environ.get("OUTRIDER_DIFFERENTIAL_SEED", "0")))
    accepted = evaluations = errors = trues = 0
    while accepted < FILTERS:
        text = cel_random.FilterWriter(random).boolean(random.randrange(1, 4))
        try:
            checked = engine.check(text, _top_level_names(text))
        except engine.EngineError:
            continue
        accepted += 1
        tree = decode(checked.ast)
        predicate, value = codegen.compile_predicate(tree), codegen.compile_value(tree)
        names = names_in(tree) - {"data"}
        expression = engine.load(checked.ast, names)
        for _ in range(8):
            fields = cel_random.document(random)
            try:
                passes = bool(predicate(fields, fields, EVENT))
                ours = value(fields, fields, EVENT)
                theirs = engine.evaluate(
                    expression, engine.variables_of(names, fields, fields, EVENT)
                )
            except (OverBudget, engine.EngineOverBudget):
                continue
            evaluations += 1
            failed = isinstance(theirs, engine.EngineFailure)
            told = (text, fields, theirs, ours)
            assert passes is (theirs is True), told
            assert (ours is ERROR) is failed, told
            if theirs.__class__ is bool:
                assert ours is theirs, told
            errors += failed
            trues += passes
    # The inputs must reach all three outcomes, or agreement would mean little.
    assert evaluations > 7 * accepted
    assert min(errors, trues, evaluations - errors - trues) > evaluations // 20


@pytest.fixture
def celpy() -> Iterator[Any]:
    limit = sys.getrecursionlimit()
    import celpy

    yield celpy
    sys.setrecursionlimit(limit)


def simple_filter(random: Random) -> str:
    """A filter on which cel-python agrees with the language: no double against int, no bool against number."""
    leaves = (
        lambda: f"n {random.choice(('==', '!=', '<', '<=', '>', '>='))} {random.randrange(-2, 3)}",
        lambda: (
            f"s {random.choice(('==', '!=', '<', '>'))} '{random.choice(('a', 'ab', 'b', ''))}'"
        ),
        lambda: (
            f"s.{random.choice(('startsWith', 'endsWith', 'contains'))}('{random.choice(('a', 'b'))}')"
        ),
        lambda: f"n in [{random.randrange(3)}, {random.randrange(3)}]",
        lambda: f"has(o.{random.choice(('x', 'y'))})",
        lambda: f"o.x {random.choice(('==', '<', '>'))} {random.randrange(3)}",
        lambda: f"l.{random.choice(('exists', 'all', 'exists_one'))}(i, i > {random.randrange(3)})",
        lambda: f"size(l) == {random.randrange(4)}",
        lambda: f"n + {random.randrange(3)} == {random.randrange(4)}",
        lambda: f"(n / {random.randrange(2)}) == n",
        lambda: f"l[{random.randrange(3)}] == {random.randrange(3)}",
    )

    def grow(depth: int) -> str:
        if depth == 0 or random.random() < 0.2:
            return random.choice(leaves)()
        kind = random.randrange(4)
        if kind == 0:
            return f"!({grow(depth - 1)})"
        if kind == 1:
            return f"(({grow(depth - 1)}) ? ({grow(depth - 1)}) : ({grow(depth - 1)}))"
        return f"(({grow(depth - 1)}) {'&&' if kind == 2 else '||'} ({grow(depth - 1)}))"

    return grow(3)


def simple_document(random: Random) -> dict[str, object]:
    document: dict[str, object] = {
        "n": random.randrange(-2, 3),
        "s": random.choice(("a", "ab", "b", "")),
        "l": [random.randrange(3) for _ in range(random.randrange(4))],
        "o": {name: random.randrange(3) for name in ("x", "y") if random.random() < 0.6},
    }
    if random.random() < 0.3:
        # Not `o`: has(o.x) of a missing `o` is an error, and false to cel-python.
        del document[random.choice("nsl")]
    return document


def test_a_third_engine_agrees_where_it_can_be_trusted(celpy: Any) -> None:
    random = Random(11)
    environment = celpy.Environment(runner_class=celpy.InterpretedRunner)
    outcomes = {True: 0, False: 0}
    for _ in range(150):
        text = simple_filter(random)
        predicate = codegen.compile_predicate(decode(check_filter(text).ast))
        program = environment.program(environment.compile(text))
        for _ in range(4):
            document = simple_document(random)
            try:
                theirs = bool(program.evaluate(celpy.json_to_cel(document)))
            except celpy.CELEvalError:
                theirs = False
            ours = bool(predicate(document, document, EVENT))
            assert ours is theirs, (text, document)
            outcomes[ours] += 1
    assert min(outcomes.values()) > 50
