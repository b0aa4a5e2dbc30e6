"""One filter, ready to be asked about events.

Generated Python where the generator covers the expression, the C++ engine where it does not; `generated` tells
which, and nothing else differs. Either way a filter that needs more than its budget raises `OverBudget`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from outrider_server.domain.event import NewEvent
from outrider_server.matching import codegen
from outrider_server.matching.checked_ast import CheckedAst, Ident, MalformedAst, decode, walk
from outrider_server.matching.runtime import OverBudget
from outrider_server.matching.variables import CONTAINER, DATA, EVENT

Test = Callable[[dict[str, object], object, NewEvent], object]
"""`test(fields, document, event)` is true when the event passes; it may raise `OverBudget`."""


class Predicate(NamedTuple):
    """A filter as a function. `generated` is false where the engine evaluates it."""

    test: Test
    generated: bool


def load_predicate(ast: bytes) -> Predicate:
    """The predicate of a stored AST; raises `MalformedAst` if the bytes are not one."""
    tree = decode(ast)
    try:
        return Predicate(codegen.compile_predicate(tree), generated=True)
    except codegen.Unsupported:
        return Predicate(_by_engine(ast, tree), generated=False)


def fields_of(document: object) -> dict[str, object]:
    """The top-level fields that a document gives to filters: none unless it is an object."""
    return document if isinstance(document, dict) else {}


def names_in(ast: CheckedAst) -> frozenset[str]:
    """The top-level fields that an expression mentions."""
    prefix = f"{CONTAINER}."
    return frozenset(
        node.name.removeprefix(prefix)
        for node in walk(ast.root)
        if isinstance(node, Ident)
        and node.name.startswith(prefix)
        and not node.name.startswith(f"{prefix}{EVENT}.")
    )


def _by_engine(ast: bytes, tree: CheckedAst) -> Test:
    # Imported here because a node whose filters are all generated never needs the engine.
    from outrider_server.matching import engine  # noqa: PLC0415

    names = names_in(tree) - {DATA}
    try:
        expression = engine.load(ast, names)
    except engine.EngineError as error:
        raise MalformedAst(str(error)) from None

    def test(fields: dict[str, object], document: object, event: NewEvent) -> bool:
        variables = engine.variables_of(names, fields, document, event)
        try:
            return engine.evaluate(expression, variables) is True
        except engine.EngineOverBudget:
            raise OverBudget from None

    return test
