"""Macros recognised in their expanded form: exists, all, exists_one, map and filter over one variable.

The parser hands a macro over as a fold. Only folds of exactly the known shapes are recognised; anything else is
`None` and left to the engine.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from outrider_server.matching.checked_ast import (
    Call,
    Comprehension,
    Const,
    Ident,
    ListLiteral,
    Node,
)


class Macro(NamedTuple):
    """One macro: for exists, all and exists_one `condition` decides; map has `element` and may have a condition."""

    kind: Literal["exists", "all", "exists_one", "map", "filter"]
    variable: str
    range: Node
    condition: Node | None
    element: Node | None


def recognise(node: Comprehension) -> Macro | None:
    """The macro that `node` was written as, or None."""
    if node.second_variable or node.variable == node.accumulator:
        return None
    step = node.step
    if not isinstance(step, Call) or step.target is not None:
        return None
    if step.function in ("_||_", "_&&_"):
        return _quantifier(node, step)
    if not _is_constant(node.condition, value=True):
        return None
    if _is_constant_zero(node.initial):
        return _exists_one(node, step)
    if isinstance(node.initial, ListLiteral) and not node.initial.elements:
        return _mapping(node, step)
    return None


def _quantifier(node: Comprehension, step: Call) -> Macro | None:
    exists = step.function == "_||_"
    condition = node.condition
    if not (
        isinstance(condition, Call)
        and condition.function == "@not_strictly_false"
        and len(condition.args) == 1
        and _is_constant(node.initial, value=not exists)
        and _is_accumulator(node, node.result)
        and len(step.args) == 2
        and _is_accumulator(node, step.args[0])
    ):
        return None
    stop = condition.args[0]
    if exists:
        if not (isinstance(stop, Call) and stop.function == "!_" and len(stop.args) == 1):
            return None
        stop = stop.args[0]
    if not _is_accumulator(node, stop):
        return None
    return Macro("exists" if exists else "all", node.variable, node.range, step.args[1], None)


def _exists_one(node: Comprehension, step: Call) -> Macro | None:
    result = node.result
    if not (
        step.function == "_?_:_"
        and len(step.args) == 3
        and _is_accumulator(node, step.args[2])
        and isinstance(step.args[1], Call)
        and step.args[1].function == "_+_"
        and len(step.args[1].args) == 2
        and _is_accumulator(node, step.args[1].args[0])
        and _is_one(step.args[1].args[1])
        and isinstance(result, Call)
        and result.function == "_==_"
        and len(result.args) == 2
        and _is_accumulator(node, result.args[0])
        and _is_one(result.args[1])
    ):
        return None
    return Macro("exists_one", node.variable, node.range, step.args[0], None)


def _mapping(node: Comprehension, step: Call) -> Macro | None:
    if not _is_accumulator(node, node.result):
        return None
    condition: Node | None = None
    append: Node = step
    if step.function == "_?_:_":
        if len(step.args) != 3 or not _is_accumulator(node, step.args[2]):
            return None
        condition, append = step.args[0], step.args[1]
    if not (
        isinstance(append, Call)
        and append.function == "_+_"
        and len(append.args) == 2
        and _is_accumulator(node, append.args[0])
        and isinstance(append.args[1], ListLiteral)
        and len(append.args[1].elements) == 1
        and not append.args[1].optional
    ):
        return None
    element = append.args[1].elements[0]
    kept = isinstance(element, Ident) and element.name == node.variable
    kind: Literal["map", "filter"] = "filter" if kept and condition is not None else "map"
    return Macro(kind, node.variable, node.range, condition, element)


def _is_accumulator(node: Comprehension, other: Node) -> bool:
    return isinstance(other, Ident) and other.name == node.accumulator


def _is_constant(node: Node, *, value: bool) -> bool:
    return isinstance(node, Const) and node.value is value


def _is_constant_zero(node: Node) -> bool:
    return isinstance(node, Const) and node.value.__class__ is int and node.value == 0


def _is_one(node: Node) -> bool:
    return isinstance(node, Const) and node.value.__class__ is int and node.value == 1
