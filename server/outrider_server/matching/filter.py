"""A filter's text made safe: parsed, type-checked, kept within limits, or refused with line and column.

What a checked filter promises: it is Boolean (or of unknown type, then anything but true is no match), its checked
AST can be loaded without this module, its patterns compile, and no event can make it use more than bounded time and
memory. A pure function of the text; it is meant to run where a slow text holds nobody up.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import NamedTuple

from outrider_server.domain.errors import InvalidArgument
from outrider_server.matching import codegen, engine
from outrider_server.matching.checked_ast import (
    Call,
    CheckedAst,
    Comprehension,
    Const,
    Ident,
    ListLiteral,
    MapLiteral,
    Node,
    canonical,
    children,
    decode,
    walk,
)
from outrider_server.matching.macros import Macro, recognise
from outrider_server.matching.variables import CONTAINER, DATA, EVENT, EVENT_FIELDS

TEXT_BYTES_MAX = 4096
NODES_MAX = 256
LITERALS_MAX = 1000
COMPREHENSIONS_MAX = 2
PATTERN_LENGTH_MAX = 256

FUNCTIONS = [
    "all",
    "bool",
    "bytes",
    "contains",
    "double",
    "duration",
    "dyn",
    "endsWith",
    "exists",
    "exists_one",
    "filter",
    "getDate",
    "getDayOfMonth",
    "getDayOfWeek",
    "getDayOfYear",
    "getFullYear",
    "getHours",
    "getMilliseconds",
    "getMinutes",
    "getMonth",
    "getSeconds",
    "has",
    "int",
    "map",
    "matches",
    "size",
    "startsWith",
    "string",
    "timestamp",
    "type",
    "uint",
]

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNDECLARED = re.compile(r"undeclared reference to '\.?([^']*)'")
_RESERVED = re.compile(r"reserved identifier: (\w+)")
# Names of types stay the language's own, so that `type(x) == int` works; a field of that name is `data.int`.
# `type` is the exception: it is a common field and a rare comparison.
_TYPE_NAMES = frozenset(
    ("bool", "bytes", "double", "int", "list", "map", "null_type", "string", "uint")
)


class CheckedFilter(NamedTuple):
    """A filter as it is stored: the text and the checked AST it stands for."""

    text: str
    ast: bytes


class FilterError(InvalidArgument):
    """A filter that cannot be used. Line and column count from 1; `hint` may be empty."""

    def __init__(self, message: str, line: int = 1, column: int = 1, hint: str = "") -> None:
        told = f"filter, line {line}, column {column}: {message}" + (f" ({hint})" if hint else "")
        super().__init__(
            "INVALID_FILTER",
            told,
            metadata={"line": str(line), "column": str(column), "hint": hint},
            violations=(("filter", told),),
        )
        self.problem = message
        self.line = line
        self.column = column
        self.hint = hint


def check_filter(text: str) -> CheckedFilter:
    """Parse, type-check and bound `text`; raise `FilterError` on anything wrong with it."""
    _check_text(text)
    try:
        checked = engine.check(text, _top_level_names(text))
    except engine.EngineError as error:
        raise _told(error.issues[-1] if _is_path(error.issues) else error.issues[0], text) from None
    ast = decode(checked.ast)
    if checked.type_name not in ("BOOL", "DYN"):
        kind = checked.type_name.lower().split("<", maxsplit=1)[0]
        raise FilterError(
            f"a filter must be true or false, this is of type {kind}", *_place(ast, ast.root, text)
        )
    _check_limits(ast, text)
    _check_patterns(ast, text)
    _check_growth(ast, text)
    return CheckedFilter(text, canonical(checked.ast))


def _check_text(text: str) -> None:
    if not text.strip():
        raise FilterError("the filter is empty")
    try:
        length = len(text.encode())
    except UnicodeEncodeError as error:
        raise FilterError(
            "the filter holds half a surrogate pair", *_line_and_column(text, error.start)
        ) from None
    if length > TEXT_BYTES_MAX:
        raise FilterError(f"a filter has at most {TEXT_BYTES_MAX} bytes, this one has {length}")
    if (at := text.find("\0")) >= 0:
        raise FilterError("the filter holds a NUL", *_line_and_column(text, at))
    found = re.search(rf"\b{CONTAINER}\b", text)
    if found:
        raise FilterError(
            f"the name {CONTAINER} is reserved",
            *_line_and_column(text, found.start()),
            hint=f'write data["{CONTAINER}"]',
        )


def _top_level_names(text: str) -> set[str]:
    """Every word of `text` that may be a top-level field. A word too many declares a name nobody uses."""
    names = set(_WORD.findall(text)) - _TYPE_NAMES - {DATA, EVENT}
    if "google.protobuf" in text:
        names.discard("google")
    return names


def _is_path(issues: tuple[engine.Issue, ...]) -> bool:
    """Whether an unknown function hides behind complaints about its receiver, as in `strings.join(x)`."""
    return len(issues) > 1 and all(_UNDECLARED.match(issue.message) for issue in issues)


def _told(issue: engine.Issue, text: str) -> FilterError:
    """The engine's complaint in our words: what is wrong, where it starts, what was probably meant."""
    message, line, column = issue
    hint = ""
    if found := _UNDECLARED.search(message):
        return _undeclared(found[1], line, column, text)
    if found := _RESERVED.search(message):
        message = f"the word {found[1]!r} is reserved"
        hint = f"write data.{found[1]} for a field of that name"
    elif "matching overload" in message:
        message = message.replace("found no matching overload for", "no such operation:")
        if re.search(r"has\s*\(\s*event\s*\.", text):
            hint = 'fields of event are always there; compare with ""'
    elif message.startswith("Syntax error: "):
        message = re.sub(r" expecting \{.*", "", message)
    return FilterError(message, line, column, hint)


def _undeclared(path: str, line: int, column: int, text: str) -> FilterError:
    lines = text.split("\n")
    row = lines[line - 1] if line <= len(lines) else ""
    name = path.rpartition(".")[2]
    before = row[: column - 1].rstrip()
    at = row[column - 1 :]
    # The engine points at the bracket of an unknown function and at the dot of an unknown path.
    if at.startswith("(") and before.endswith(name):
        return FilterError(
            f"unknown function {name!r}",
            line,
            len(before) - len(name) + 1,
            _nearest(name, FUNCTIONS),
        )
    if path == EVENT or path.startswith(f"{EVENT}."):
        field = re.match(r"\s*(?:event)?\s*\.\s*(\w+)", at)
        known = tuple(EVENT_FIELDS)
        every = f"it has {', '.join(known)}"
        if field is None:
            return FilterError("event is not a value of its own", line, column, f"{every}")
        hint = _nearest(field[1], known) or every
        return FilterError(f"event has no field {field[1]!r}", line, column + field.start(1), hint)
    hint = f"write data.{name} for a field of that name" if name in _TYPE_NAMES else ""
    return FilterError(f"unknown name {path!r}", line, column, hint)


def _nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return f"did you mean {lowered[close[0]]!r}?" if close else ""


def _check_limits(ast: CheckedAst, text: str) -> None:
    for count, node in enumerate(_written(ast.root), start=1):
        if count > NODES_MAX:
            raise FilterError(
                f"a filter has at most {NODES_MAX} operations and operands",
                *_place(ast, node, text),
            )
        size = 0
        if isinstance(node, ListLiteral):
            size = len(node.elements)
        elif isinstance(node, MapLiteral):
            size = len(node.entries)
        if size > LITERALS_MAX:
            raise FilterError(
                f"a literal has at most {LITERALS_MAX} entries, this one has {size}",
                *_place(ast, node, text),
            )
        if isinstance(node, Comprehension) and _comprehensions(node) > COMPREHENSIONS_MAX:
            raise FilterError(
                f"macros are nested or chained at most {COMPREHENSIONS_MAX} deep",
                *_place(ast, node, text),
            )


def _written(node: Node) -> Iterator[Node]:
    """The nodes a person wrote: of a macro its range and body, of a list of literals the list."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ListLiteral) and all(isinstance(e, Const) for e in node.elements):
            continue
        if isinstance(node, Comprehension) and (macro := recognise(node)) is not None:
            parts: tuple[Node | None, ...] = (macro.range, macro.condition, macro.element)
            waiting.extend(part for part in parts if part is not None)
            continue
        waiting.extend(children(node))


def _comprehensions(node: Node) -> int:
    """How deep macros stand in each other, in bodies or in ranges."""
    below = max((_comprehensions(child) for child in children(node)), default=0)
    return below + 1 if isinstance(node, Comprehension) else below


def _check_patterns(ast: CheckedAst, text: str) -> None:
    for node in walk(ast.root):
        if not isinstance(node, Call) or node.function != "matches":
            continue
        pattern = node.operands[1]
        place = _place(ast, pattern, text)
        if not isinstance(pattern, Const) or not isinstance(pattern.value, str):
            raise FilterError("the pattern of matches must be a literal", *place)
        if len(pattern.value) > PATTERN_LENGTH_MAX:
            raise FilterError(
                f"a pattern has at most {PATTERN_LENGTH_MAX} characters, this one has {len(pattern.value)}",
                *place,
            )
        if problem := codegen.pattern_problem(pattern.value):
            raise FilterError(f"the pattern does not compile: {problem}", *place)


def _check_growth(ast: CheckedAst, text: str) -> None:
    """Refuse `+` on what may be text or lists where it could grow with every step of a macro.

    `list.map(s, s + s)` doubles what it walks; two such steps over long strings would need gigabytes. Sums with a
    number on one side are fine, so `double(i.price) + i.tax` is the way to write them.
    """
    generated = codegen.covers(ast)
    for node in walk(ast.root):
        if not isinstance(node, Comprehension):
            continue
        macro = recognise(node)
        grows = macro is None or macro.kind in ("map", "filter")
        if not grows and generated:
            continue
        for part in _bodies(node, macro):
            for inner in walk(part):
                if isinstance(inner, Comprehension) and recognise(inner) is None:
                    continue
                if (
                    isinstance(inner, Call)
                    and inner.function == "_+_"
                    and not any(operand.id in ast.scalar for operand in inner.operands)
                    and not _is_bookkeeping(inner)
                ):
                    raise FilterError(
                        "+ on text or lists is not allowed inside map and filter",
                        *_place(ast, inner, text),
                        hint="for numbers write int(x) or double(x) on one side",
                    )


def _bodies(node: Comprehension, macro: Macro | None) -> tuple[Node, ...]:
    if macro is None:
        return (node.step, node.result)
    return tuple(part for part in (macro.condition, macro.element) if part is not None)


def _is_bookkeeping(node: Call) -> bool:
    """Whether a `+` is a macro's own step: it adds to an accumulator, whose name nobody can write."""
    first = node.operands[0]
    return isinstance(first, Ident) and first.name.startswith("@")


def _place(ast: CheckedAst, node: Node, text: str) -> tuple[int, int]:
    return _line_and_column(text, ast.positions.get(node.id, 0))


def _line_and_column(text: str, offset: int) -> tuple[int, int]:
    before = text[:offset]
    return before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1
