"""Python functions generated from checked ASTs: CEL's exact meaning without exceptions on the path.

Each Boolean node has two forms: T is true when the node is true, F when it is false; an error is neither, so `&&` and
`||` absorb errors as the language says with plain `and` and `or`. Where both outcomes are needed in one place a
third form W yields True, False or ERROR with every operand written once, so that the source grows linearly with the
filter. V is the value of any node, or ERROR.

Rules: the source holds only numbered names, names of `runtime`, and `repr` of constants and field names, never a
name copied from a filter; it is capped; a generated function refers to its constants by default arguments and to
one shared namespace, so no reference cycle forms. What is not covered raises `Unsupported`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Final, NamedTuple, cast
from zoneinfo import ZoneInfo

import re2

from outrider_server.domain.event import NewEvent
from outrider_server.matching import runtime
from outrider_server.matching.checked_ast import (
    Call,
    CheckedAst,
    Comprehension,
    Const,
    Ident,
    ListLiteral,
    MapLiteral,
    Node,
    Select,
    children,
)
from outrider_server.matching.macros import Macro, recognise
from outrider_server.matching.variables import CONTAINER, DATA, EVENT

SOURCE_MAX = 64 * 1024
"""Largest source of one filter, in characters."""

Generated = Callable[[dict[str, object], object, NewEvent], object]
"""`f(fields, document, event)`: the top-level fields (empty unless the document is an object), the whole document,
the envelope."""


class Unsupported(Exception):
    """The generator does not cover this expression; the engine evaluates it instead."""


def compile_predicate(ast: CheckedAst) -> Generated:
    """A function that gives True when the expression is true, and False when it is false, an error or no bool."""
    return _Writer().function(lambda writer: writer.true(ast.root))


def compile_value(ast: CheckedAst) -> Generated:
    """A function that gives the expression's value, or `runtime.ERROR`."""
    return _Writer().function(lambda writer: writer.value(ast.root))


def source_size(ast: CheckedAst) -> int:
    """Characters of source that the predicate takes."""
    writer = _Writer()
    writer.function(lambda inner: inner.true(ast.root))
    return writer.size


def covers(ast: CheckedAst) -> bool:
    """Whether `compile_predicate` takes this expression."""
    try:
        compile_predicate(ast)
    except Unsupported:
        return False
    return True


def pattern_problem(pattern: str) -> str:
    """Why RE2 refuses `pattern`, or nothing."""
    try:
        _compile_pattern(pattern)
    except re2.error as error:
        reason = error.args[0] if error.args else "not a regular expression"
        return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
    return ""


def _compile_pattern(pattern: str) -> runtime.Pattern:
    options = re2.Options()
    options.max_mem = 1 << 20
    options.log_errors = False
    # Compiled from bytes it searches bytes, which spares the binding's mapping of offsets to characters.
    return cast(runtime.Pattern, re2.compile(pattern.encode(), options))  # type: ignore[no-untyped-call]


_PRIMITIVES: Final = {
    "E": runtime.ERROR,
    "N": runtime.NUMBERS,
    "dict": dict,
    "list": list,
    "str": str,
    "bool": bool,
    "len": len,
    "iter": iter,
}
_RUNTIME: Final = [
    "add",
    "contains",
    "divide",
    "ends_with",
    "equal",
    "event_time",
    "index",
    "less",
    "less_equal",
    "make_list",
    "make_map",
    "matches",
    "member",
    "modulo",
    "multiply",
    "negate",
    "over_budget",
    "size",
    "spend",
    "starts_with",
    "subtract",
    "time_part",
    "to_bool",
    "to_bytes",
    "to_double",
    "to_duration",
    "to_int",
    "to_string",
    "to_timestamp",
    "to_uint",
    "type_of",
]
_NAMESPACE: Final[dict[str, object]] = {
    "__builtins__": {},
    **_PRIMITIVES,
    **{name: getattr(runtime, name) for name in _RUNTIME},
}

_ONE_OPERAND: Final = {
    "-_": "negate",
    "size": "size",
    "int": "to_int",
    "uint": "to_uint",
    "double": "to_double",
    "string": "to_string",
    "bool": "to_bool",
    "bytes": "to_bytes",
    "timestamp": "to_timestamp",
    "duration": "to_duration",
    "type": "type_of",
}
_TWO_OPERANDS: Final = {
    "_-_": "subtract",
    "_*_": "multiply",
    "_/_": "divide",
    "_%_": "modulo",
    "_[_]": "index",
}
_TIME_PARTS: Final = frozenset(
    [
        "getFullYear",
        "getMonth",
        "getDate",
        "getDayOfMonth",
        "getDayOfWeek",
        "getDayOfYear",
        "getHours",
        "getMinutes",
        "getSeconds",
        "getMilliseconds",
    ]
)
_CONVERSIONS: Final = frozenset(_ONE_OPERAND) - {"-_", "size", "type"}
# How `a OP b` is asked of the two helpers: name, operands swapped.
_ORDER: Final = {
    "_<_": ("less", False),
    "_<=_": ("less_equal", False),
    "_>_": ("less", True),
    "_>=_": ("less_equal", True),
}
_MIRRORED: Final = {"_<_": ">", "_<=_": ">=", "_>_": "<", "_>=_": "<="}
_STRING_TESTS: Final = {
    "startsWith": "startswith",
    "endsWith": "endswith",
    "contains": "contains",
}
_BOOLEAN: Final = frozenset(
    ("_&&_", "_||_", "!_", "_==_", "_!=_", "@in", "matches", *_ORDER, *_STRING_TESTS)
)
# Below this an integer and its nearest double compare alike, so Python's exact comparison is CEL's.
_EXACT: Final = 1 << 53
_PLAIN_PATTERN: Final = re.compile(r"(\^?)([A-Za-z0-9_ ,:;@#/%&=<>~!\"'-]*)(\$?)\Z")
_ZONE_OFFSET: Final = re.compile(r"([+-]?)([0-9]{1,2}):([0-9]{2})\Z")
_NAME: Final = re.compile(r"[a-z]+[0-9]*\Z")


class _Loop(NamedTuple):
    """The parts of a loop's source: before it, each turn, the result at its end, the result of a wrong range."""

    start: str
    turn: str
    end: str
    failed: str


class _Function:
    """One generated function while it is written: its default arguments and the fields it loads first."""

    def __init__(self, parameters: str, *, loop: bool) -> None:
        self.parameters = parameters
        self.loop = loop
        self.defaults: dict[str, object] = {}
        self.fields: dict[str, str] = {}

    def code(self, body: str) -> tuple[str, tuple[object, ...]]:
        parameters = ", ".join((self.parameters, *self.defaults))
        loads = "".join(
            f"    {name} = d.get({field!r}, E)\n" for field, name in self.fields.items()
        )
        return f"def f({parameters}):\n{loads}{body}", tuple(self.defaults.values())


class _Writer:
    """Writes the functions of one expression; used once."""

    def __init__(self) -> None:
        self.size = 0
        self._names = 0
        self._needs_budget = False
        self._functions: list[_Function] = []
        self._variables: list[tuple[str, str]] = []

    def function(self, write: Callable[[_Writer], str]) -> Generated:
        """The whole expression as one function."""
        self._functions.append(_Function("d, x, v", loop=False))
        try:
            result = write(self)
        except RecursionError:
            raise Unsupported("nested too deep") from None
        body = f"    return {result}\n"
        if self._needs_budget:
            body = f"    b = [{runtime.ITERATIONS_MAX}, {runtime.WORK_MAX}]\n" + body
        return cast(Generated, self._build(self._functions.pop(), body))

    def _build(self, function: _Function, body: str) -> FunctionType:
        source, defaults = function.code(body)
        self._count(source)
        try:
            module = compile(source, "<filter>", "exec", dont_inherit=True, optimize=2)
        except (SyntaxError, RecursionError, MemoryError):
            # Python's own parser has a limit on nesting; such a filter is rare and the engine takes it.
            raise Unsupported("nested too deep for Python") from None
        code = next(constant for constant in module.co_consts if isinstance(constant, CodeType))
        return FunctionType(code, _NAMESPACE, "f", defaults)

    def _count(self, source: str) -> None:
        self.size += len(source)
        if self.size > SOURCE_MAX:
            raise Unsupported("the source is too large")

    # Names

    def _name(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}{self._names}"

    def _constant(self, value: object) -> str:
        name = self._name("k")
        self._functions[-1].defaults[name] = value
        return name

    def _budget(self) -> str:
        self._needs_budget = True
        return "b"

    def _bind(self, expression: str) -> tuple[str, str]:
        """`expression` at its first use, and the name it has afterwards."""
        if _NAME.match(expression):
            return expression, expression
        name = self._name("t")
        return f"({name} := {expression})", name

    # V: the value or ERROR

    def value(self, node: Node) -> str:
        """A Python expression for the node's value."""
        node = _bare(node)
        if isinstance(node, Const):
            return self._literal(node.value)
        if isinstance(node, Ident):
            return self._ident(node)
        if isinstance(node, Select):
            return self._either(node) if node.test_only else self._select(node)
        if isinstance(node, Call):
            return self._call(node)
        if isinstance(node, ListLiteral):
            return self._list(node)
        if isinstance(node, MapLiteral):
            return self._map(node)
        macro = self._macro(node)
        if macro.kind in ("map", "filter"):
            return self._loop(macro, self._collect)
        return self._either(node)

    def _literal(self, value: object) -> str:
        if value is None or value is True or value is False:
            return repr(value)
        if value.__class__ is int or value.__class__ is float:
            finite = math.isfinite(value)
            return f"({value!r})" if finite else self._constant(value)
        if value.__class__ is str or value.__class__ is bytes:
            return repr(value)
        return self._constant(value)

    def _ident(self, node: Ident) -> str:
        for name, local in reversed(self._variables):
            if name == node.name:
                return local
        if node.name in runtime.TYPES_BY_NAME:
            return self._constant(runtime.TYPES_BY_NAME[node.name])
        container, _, name = node.name.partition(".")
        if container != CONTAINER or not name:
            raise Unsupported("an unknown name")
        if name == DATA:
            return "x"
        if name.startswith(f"{EVENT}."):
            return self._event_field(name.removeprefix(f"{EVENT}."))
        fields = self._functions[-1].fields
        if name not in fields:
            fields[name] = self._name("h")
        return fields[name]

    def _event_field(self, field: str) -> str:
        if field in ("time", "timestamp"):
            return "event_time(v)"
        if field in ("type", "source", "subject", "key", "organization", "actor", "attributes"):
            return f"v.{field}"
        raise Unsupported("an unknown field of the envelope")

    def _select(self, node: Select) -> str:
        first, name = self._bind(self.value(node.operand))
        return f"({name}.get({node.field!r}, E) if {first}.__class__ is dict else E)"

    def _reach(self, node: Node) -> tuple[list[str], str]:
        """Guards that must hold, in order, and then the value (which may still be ERROR)."""
        node = _bare(node)
        if isinstance(node, Const):
            # By a name, because Python warns of `is` beside a literal.
            return [], self._constant(node.value)
        if not isinstance(node, Select) or node.test_only:
            return [], self.value(node)
        guards, value = self._reach(node.operand)
        first, name = self._bind(value)
        return [*guards, f"{first}.__class__ is dict"], f"{name}.get({node.field!r}, E)"

    def _call(self, node: Call) -> str:
        function, operands = node.function, node.operands
        if function in _BOOLEAN:
            return self._either(node)
        if function == "_?_:_" and len(operands) == 3:
            first, name = self._bind(self._either(operands[0]))
            yes, no = self.value(operands[1]), self.value(operands[2])
            return f"({yes} if {first} is True else {no} if {name} is False else E)"
        if function in _TIME_PARTS:
            return self._time_part(node)
        if function == "_+_" and len(operands) == 2:
            return f"add({self._budget()}, {self.value(operands[0])}, {self.value(operands[1])})"
        if function in _ONE_OPERAND and len(operands) == 1:
            return f"{_ONE_OPERAND[function]}({self.value(operands[0])})"
        if function in _TWO_OPERANDS and len(operands) == 2:
            return (
                f"{_TWO_OPERANDS[function]}({self.value(operands[0])}, {self.value(operands[1])})"
            )
        raise Unsupported("a function")

    def _time_part(self, node: Call) -> str:
        operands = node.operands
        zone: object = None
        if len(operands) == 2:
            name = operands[1]
            if not isinstance(name, Const) or not isinstance(name.value, str):
                raise Unsupported("a zone that is not a literal")
            zone = _zone(name.value)
        return f"time_part({self.value(operands[0])}, {node.function!r}, {self._constant(zone)})"

    def _list(self, node: ListLiteral) -> str:
        if node.optional:
            raise Unsupported("optional elements")
        if all(isinstance(element, Const) for element in node.elements):
            # Nothing generated changes a list, so one may be shared by all evaluations.
            return self._constant([cast(Const, element).value for element in node.elements])
        return f"make_list({', '.join(self.value(element) for element in node.elements)})"

    def _map(self, node: MapLiteral) -> str:
        keys = tuple(
            key.value
            for key, _ in node.entries
            if isinstance(key, Const) and isinstance(key.value, str)
        )
        if node.message or len(keys) != len(node.entries) or len(set(keys)) != len(keys):
            raise Unsupported("a message or a map with other keys than names")
        values = "".join(f", {self.value(value)}" for _, value in node.entries)
        return f"make_map({self._constant(keys)}{values})"

    # W: True, False or ERROR, every operand written once

    def _either(self, node: Node) -> str:
        node = _bare(node)
        if isinstance(node, Select) and node.test_only:
            first, name = self._bind(self.value(node.operand))
            return f"({node.field!r} in {name} if {first}.__class__ is dict else E)"
        if isinstance(node, Const):
            return repr(node.value) if node.value.__class__ is bool else "E"
        if isinstance(node, Comprehension):
            macro = self._macro(node)
            if macro.kind in ("exists", "all"):
                return self._loop(macro, self._quantify_either)
            if macro.kind == "exists_one":
                return self._loop(macro, self._count_one)
        if isinstance(node, Call):
            if node.function in _BOOLEAN:
                return self._either_operator(node)
            if node.function == "_?_:_" and len(node.operands) == 3:
                first, name = self._bind(self._either(node.operands[0]))
                yes, no = self._either(node.operands[1]), self._either(node.operands[2])
                return f"({yes} if {first} is True else {no} if {name} is False else E)"
        first, name = self._bind(self.value(node))
        return f"({name} if {first}.__class__ is bool else E)"

    def _either_operator(self, node: Call) -> str:
        function, operands = node.function, node.operands
        if function == "!_" and len(operands) == 1:
            first, name = self._bind(self._either(operands[0]))
            return f"(E if {first} is E else not {name})"
        if len(operands) != 2:
            raise Unsupported("an operator")
        if function in ("_&&_", "_||_"):
            decided = function == "_||_"
            x, x_name = self._bind(self._either(operands[0]))
            y, y_name = self._bind(self._either(operands[1]))
            return (
                f"({decided} if {x} is {decided} else {y_name} if {y} is {decided} "
                f"or {x_name} is {not decided} else E)"
            )
        if function == "_!=_":
            first, name = self._bind(self._equal(operands))
            return f"(E if {first} is E else not {name})"
        if function == "_==_":
            return self._equal(operands)
        if function == "@in":
            return f"member({self._budget()}, {self.value(operands[0])}, {self.value(operands[1])})"
        if function in _ORDER:
            return self._ordered(function, operands)
        return self._string_helper(node)

    def _equal(self, operands: tuple[Node, ...]) -> str:
        return f"equal({self._budget()}, {self.value(operands[0])}, {self.value(operands[1])})"

    def _ordered(self, function: str, operands: tuple[Node, ...]) -> str:
        helper, swapped = _ORDER[function]
        x, y = self.value(operands[0]), self.value(operands[1])
        return f"{helper}({y}, {x})" if swapped else f"{helper}({x}, {y})"

    def _string_helper(self, node: Call) -> str:
        subject, argument = node.operands
        if node.function == "matches":
            pattern = self._pattern(argument)
            budget = self._budget()
            return f"matches({budget}, {self._constant(pattern)}, {self.value(subject)})"
        x, y = self.value(subject), self.value(argument)
        if node.function == "contains":
            return f"contains({self._budget()}, {x}, {y})"
        helper = "starts_with" if node.function == "startsWith" else "ends_with"
        return f"{helper}({x}, {y})"

    def _pattern(self, node: Node) -> runtime.Pattern:
        if not isinstance(node, Const) or not isinstance(node.value, str):
            raise Unsupported("a pattern that is not a literal")
        try:
            return _compile_pattern(node.value)
        except re2.error:
            raise Unsupported("a pattern that does not compile") from None

    # T and F: whether the node is true, whether it is false

    def true(self, node: Node) -> str:
        """A Python condition that holds exactly when the node is true."""
        return self._verdict(node, wanted=True)

    def _verdict(self, node: Node, *, wanted: bool) -> str:
        node = _bare(node)
        if isinstance(node, Const):
            return repr(node.value is wanted)
        if isinstance(node, Select) and node.test_only:
            return self._has(node, wanted=wanted)
        if isinstance(node, Comprehension):
            macro = self._macro(node)
            if macro.kind in ("exists", "all"):
                return self._loop(macro, self._quantify_true if wanted else self._quantify_false)
        if isinstance(node, Call):
            written = self._operator(node, wanted=wanted)
            if written:
                return written
        guards, value = self._reach(node)
        return _every([*guards, f"{value} is {wanted}"])

    def _operator(self, node: Call, *, wanted: bool) -> str:
        """T or F of an operator, or nothing if the node is no operator of its own."""
        function, operands = node.function, node.operands
        if function in ("_&&_", "_||_"):
            parts = [self._verdict(part, wanted=wanted) for part in _flattened(node)]
            both = (function == "_&&_") is wanted
            return f"({(' and ' if both else ' or ').join(parts)})"
        if function == "!_" and len(operands) == 1:
            return self._verdict(operands[0], wanted=not wanted)
        if function == "_?_:_" and len(operands) == 3:
            first, name = self._bind(self._either(operands[0]))
            yes = self._verdict(operands[1], wanted=wanted)
            no = self._verdict(operands[2], wanted=wanted)
            return f"({yes} if {first} is True else {no} if {name} is False else False)"
        if function not in _BOOLEAN or len(operands) != 2:
            return ""
        if function in ("_==_", "_!=_"):
            return self._equality(operands, wanted=(function == "_==_") is wanted)
        if function in _ORDER:
            return self._order(node, wanted=wanted)
        if function == "@in":
            return self._membership(node, wanted=wanted)
        return self._string_test(node, wanted=wanted)

    def _has(self, node: Select, *, wanted: bool) -> str:
        guards, value = self._reach(node.operand)
        first, name = self._bind(value)
        test = f"{node.field!r} {'in' if wanted else 'not in'} {name}"
        return _every([*guards, f"{first}.__class__ is dict", test])

    def _equality(self, operands: tuple[Node, ...], *, wanted: bool) -> str:
        x, y = operands
        if isinstance(x, Const) and not isinstance(y, Const):
            x, y = y, x
        if not isinstance(y, Const):
            return f"({self._equal((x, y))} is {wanted})"
        literal = y.value
        guards: list[str]
        if literal is None or literal.__class__ is bool or literal.__class__ is str:
            guards, value = self._reach(x)
            test = "==" if literal.__class__ is str else "is"
            if wanted:
                return _every([*guards, f"{value} {test} {literal!r}"])
            first, name = self._bind(value)
            differs = "!=" if test == "==" else "is not"
            return _every([*guards, f"{first} is not E", f"{name} {differs} {literal!r}"])
        if _is_exact_number(literal):
            guards, value = self._reach(x)
            first, name = self._bind(value)
            if wanted:
                return _every([*guards, f"{first}.__class__ in N", f"{name} == {literal!r}"])
            unlike = f"({name}.__class__ not in N or {name} != {literal!r})"
            return _every([*guards, f"{first} is not E", unlike])
        return f"({self._equal((x, y))} is {wanted})"

    def _order(self, node: Call, *, wanted: bool) -> str:
        x, y = node.operands
        operator = node.function[1:-1]
        if isinstance(x, Const):
            x, y = y, x
            operator = _MIRRORED[node.function]
        if isinstance(y, Const) and not isinstance(x, Const):
            literal = y.value
            kind = ""
            if literal.__class__ is str:
                kind = ".__class__ is str"
            elif _is_exact_number(literal):
                kind = ".__class__ in N"
            if kind:
                guards, value = self._reach(x)
                first, name = self._bind(value)
                test = f"{name} {operator} {literal!r}"
                return _every([*guards, f"{first}{kind}", test if wanted else f"not {test}"])
        return f"({self._ordered(node.function, node.operands)} is {wanted})"

    def _membership(self, node: Call, *, wanted: bool) -> str:
        x, container = node.operands
        if isinstance(container, ListLiteral) and not container.optional:
            literals = [e.value for e in container.elements if isinstance(e, Const)]
            if len(literals) == len(container.elements) and all(
                literal.__class__ is str for literal in literals
            ):
                guards, value = self._reach(x)
                first, name = self._bind(value)
                names = self._constant(frozenset(literals))
                if wanted:
                    return _every([*guards, f"{first}.__class__ is str", f"{name} in {names}"])
                unlike = f"({name}.__class__ is not str or {name} not in {names})"
                return _every([*guards, f"{first} is not E", unlike])
        return f"({self._either_operator(node)} is {wanted})"

    def _string_test(self, node: Call, *, wanted: bool) -> str:
        subject = node.operands[0]
        test = _plain_test(node)
        if test is None or (self._functions[-1].loop and test[0] == "contains"):
            # In a loop a search counts as work, so that long strings cannot be searched a thousand times.
            return f"({self._string_helper(node)} is {wanted})"
        kind, literal = test
        guards, value = self._reach(subject)
        first, name = self._bind(value)
        if kind == "contains":
            # A long text is searched on account: sixty searches of ten megabytes are too much.
            searched = f"contains({self._budget()}, {name}, {literal!r}) is True"
            written = f"({literal!r} in {name} if len({name}) < 1024 else {searched})"
        elif kind == "equals":
            written = f"{name} == {literal!r}"
        else:
            written = f"{name}.{kind}({literal!r})"
        return _every(
            [*guards, f"{first}.__class__ is str", written if wanted else f"not {written}"]
        )

    # Macros: a function of its own for each loop

    def _macro(self, node: Comprehension) -> Macro:
        macro = recognise(node)
        if macro is None:
            raise Unsupported("a macro")
        return macro

    def _loop(self, macro: Macro, write: Callable[[Macro, int], _Loop]) -> str:
        """A call of a new function that walks the range. Iterations are charged where it returns."""
        self._budget()
        outer = "".join(f", {local}" for _, local in self._variables)
        argument = self.value(macro.range)
        element = self._name("l")
        self._functions.append(_Function(f"r, d, x, v, b{outer}", loop=True))
        self._variables.append((macro.variable, element))
        weight = _weight(macro)
        loop = write(macro, weight)
        self._variables.pop()
        body = (
            "    if r.__class__ is not list and r.__class__ is not dict:\n"
            f"        return {loop.failed}\n"
            "    n = len(r)\n"
            f"    if n > {runtime.ITEMS_MAX}:\n"
            "        over_budget()\n"
            "    i = iter(r)\n"
            f"{loop.start}"
            f"    for {element} in i:\n"
            f"{loop.turn}"
            "    b[0] -= n\n"
            f"    b[1] -= n * {weight}\n"
            "    if b[0] < 0 or b[1] < 0:\n"
            "        over_budget()\n"
            f"    return {loop.end}\n"
        )
        function = self._build(self._functions.pop(), body)
        return f"{self._constant(function)}({argument}, d, x, v, b{outer})"

    def _quantify(self, macro: Macro, weight: int, *, wanted: bool) -> _Loop:
        """T or F of exists and all: `exists` is true when one body is, false when all bodies are; `all` dually."""
        condition = cast(Node, macro.condition)
        test = self._verdict(condition, wanted=wanted)
        one_decides = (macro.kind == "exists") is wanted
        stop = test if one_decides else f"not {test}"
        turn = f"        if {stop}:\n{_leave(str(one_decides), weight)}"
        return _Loop("", turn, str(not one_decides), "False")

    def _quantify_true(self, macro: Macro, weight: int) -> _Loop:
        return self._quantify(macro, weight, wanted=True)

    def _quantify_false(self, macro: Macro, weight: int) -> _Loop:
        return self._quantify(macro, weight, wanted=False)

    def _quantify_either(self, macro: Macro, weight: int) -> _Loop:
        decided = macro.kind == "exists"
        turn = (
            f"        t = {self._either(cast(Node, macro.condition))}\n"
            f"        if t is {decided}:\n{_leave(str(decided), weight)}"
            "        if t is E:\n            s = E\n"
        )
        return _Loop(f"    s = {not decided}\n", turn, "s", "E")

    def _count_one(self, macro: Macro, weight: int) -> _Loop:
        turn = (
            f"        t = {self._either(cast(Node, macro.condition))}\n"
            f"        if t is E:\n{_leave('E', weight)}"
            "        if t:\n            s += 1\n"
        )
        return _Loop("    s = 0\n", turn, "s == 1", "E")

    def _collect(self, macro: Macro, weight: int) -> _Loop:
        turn = ""
        if macro.condition is not None:
            turn = (
                f"        t = {self._either(macro.condition)}\n"
                f"        if t is E:\n{_leave('E', weight)}"
                "        if not t:\n            continue\n"
            )
        turn += (
            f"        t = {self.value(cast(Node, macro.element))}\n"
            f"        if t is E:\n{_leave('E', weight)}"
            "        s.append(t)\n"
        )
        return _Loop("    s = []\n", turn, "s", "E")


def _leave(result: str, weight: int) -> str:
    """Return from inside a loop, charging the turns taken so far."""
    return (
        "            n -= i.__length_hint__()\n"
        "            b[0] -= n\n"
        f"            b[1] -= n * {weight}\n"
        "            if b[0] < 0 or b[1] < 0:\n"
        "                over_budget()\n"
        f"            return {result}\n"
    )


def _weight(macro: Macro) -> int:
    """Units of work of one turn: its operations, conversions for eight. Loops inside count for themselves."""
    total = 0
    waiting = [part for part in (macro.condition, macro.element) if part is not None]
    while waiting:
        node = waiting.pop()
        heavy = isinstance(node, Call) and (
            node.function in _TIME_PARTS or node.function in _CONVERSIONS
        )
        total += 8 if heavy else 1
        waiting.extend([node.range] if isinstance(node, Comprehension) else children(node))
    return total


def _every(conditions: list[str]) -> str:
    return f"({' and '.join(conditions)})"


def _bare(node: Node) -> Node:
    """`node` without `dyn(...)` around it, which only speaks to the checker."""
    while isinstance(node, Call) and node.function == "dyn" and len(node.operands) == 1:
        node = node.operands[0]
    return node


def _flattened(node: Call) -> list[Node]:
    """The operands of a chain of one `&&` or `||`, in order."""
    parts: list[Node] = []
    waiting: list[Node] = [node]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Call) and part.function == node.function:
            waiting.extend(reversed(part.operands))
        else:
            parts.append(part)
    return parts


def _is_exact_number(literal: object) -> bool:
    if literal.__class__ is int:
        return -_EXACT < literal < _EXACT
    return literal.__class__ is float and -_EXACT < literal < _EXACT


def _plain_test(node: Call) -> tuple[str, str] | None:
    """A string test as a method of str and its argument, when both are known; for simple patterns too."""
    argument = node.operands[1]
    if not isinstance(argument, Const) or not isinstance(argument.value, str):
        return None
    if node.function != "matches":
        return _STRING_TESTS[node.function], argument.value
    found = _PLAIN_PATTERN.match(argument.value)
    if found is None:
        return None
    start, literal, end = found.groups()
    if start and end:
        return "equals", literal
    return ("startswith" if start else "endswith" if end else "contains"), literal


def _zone(name: str) -> ZoneInfo | int:
    """A named zone or an offset in seconds."""
    if name in ("", "UTC"):
        return 0
    if found := _ZONE_OFFSET.match(name):
        seconds = int(found[2]) * 3600 + int(found[3]) * 60
        return -seconds if found[1] == "-" else seconds
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError):
        raise Unsupported("an unknown zone") from None
