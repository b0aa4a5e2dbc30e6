"""The checked AST of a filter, decoded from the bytes that are stored with its revision.

A small reader of the protobuf wire format and the node types; no engine and no protobuf package is needed to load a
filter. Only what the generator and the limits use is decoded: nodes, static types and source positions. Malformed
bytes raise `MalformedAst`, whatever they hold.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

NESTING_MAX = 400
"""Deepest chain of nodes that is read: far above what the parser accepts, far below Python's own limit."""


class MalformedAst(ValueError):
    """The bytes are not a checked expression."""


class Uint(int):
    """An unsigned 64-bit value, apart from `int` because CEL never mixes the two in arithmetic."""

    __slots__ = ()


class Const(NamedTuple):
    """A literal. An unsigned one is a `Uint`."""

    id: int
    value: bool | int | float | str | bytes | None


class Ident(NamedTuple):
    """A name, resolved by the checker."""

    id: int
    name: str


class Select(NamedTuple):
    """`operand.field`, or `has(operand.field)` when `test_only`."""

    id: int
    operand: Node
    field: str
    test_only: bool


class Call(NamedTuple):
    """An operator or a function; `target` is the receiver of a method call."""

    id: int
    target: Node | None
    function: str
    args: tuple[Node, ...]

    @property
    def operands(self) -> tuple[Node, ...]:
        """Receiver and arguments in one row: a method and a function of the same name mean the same."""
        return self.args if self.target is None else (self.target, *self.args)


class ListLiteral(NamedTuple):
    """`[a, b]`; `optional` when an element is an optional one."""

    id: int
    elements: tuple[Node, ...]
    optional: bool


class MapLiteral(NamedTuple):
    """`{k: v}`, or a message literal when `message` names one."""

    id: int
    message: str
    entries: tuple[tuple[Node | None, Node], ...]


class Comprehension(NamedTuple):
    """An expanded macro: a fold over `range` with one accumulator."""

    id: int
    variable: str
    second_variable: str
    range: Node
    accumulator: str
    initial: Node
    condition: Node
    step: Node
    result: Node


Node = Const | Ident | Select | Call | ListLiteral | MapLiteral | Comprehension


class CheckedAst(NamedTuple):
    """A whole checked expression. `scalar` holds the ids of nodes whose static type is a number or a time."""

    root: Node
    scalar: frozenset[int]
    positions: dict[int, int]


def children(node: Node) -> tuple[Node, ...]:
    """The nodes right below `node`, macros as they were expanded."""
    if isinstance(node, Select):
        return (node.operand,)
    if isinstance(node, Call):
        return node.operands
    if isinstance(node, ListLiteral):
        return node.elements
    if isinstance(node, MapLiteral):
        return tuple(part for entry in node.entries for part in entry if part is not None)
    if isinstance(node, Comprehension):
        return (node.range, node.initial, node.condition, node.step, node.result)
    return ()


def walk(node: Node) -> Iterator[Node]:
    """`node` and everything below it, parents first."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(reversed(children(node)))


def decode(data: bytes) -> CheckedAst:
    """Read the bytes of a serialized checked expression; raise `MalformedAst` if they are not one."""
    try:
        return _decode(data)
    except MalformedAst:
        raise
    except (IndexError, UnicodeDecodeError, struct.error, TypeError, KeyError) as error:
        raise MalformedAst("not a checked expression") from error


def canonical(data: bytes) -> bytes:
    """The same expression in the one form we store: equal filters give equal bytes.

    The engine writes its maps in any order; here they are sorted. Source positions are left out, which a check of
    the text gives again.
    """
    parts: dict[int, list[bytes]] = {}
    name = b""
    for number, _, value in _fields(data):
        if number == 1:
            name = _bytes(value)
        elif number == 2:
            for key, _, part in _fields(_bytes(value)):
                parts.setdefault(key, []).append(_bytes(part))
    parts.pop(5, None)
    checked = b"".join(
        _delimited(number, part)
        for number in sorted(parts)
        for part in (sorted(parts[number]) if number in (2, 3) else parts[number])
    )
    return _delimited(1, name) + _delimited(2, checked)


def _delimited(number: int, data: bytes) -> bytes:
    out = bytearray([number << 3 | 2])
    length = len(data)
    while length >= 128:
        out.append(length & 127 | 128)
        length >>= 7
    out.append(length)
    return bytes(out) + data


_Field = tuple[int, int, "int | bytes"]


def _decode(data: bytes) -> CheckedAst:
    envelope = {number: value for number, _, value in _fields(data)}
    if not str(_text(envelope.get(1, b""))).endswith("cel.expr.CheckedExpr"):
        raise MalformedAst("not a checked expression")
    root: Node | None = None
    scalar: set[int] = set()
    positions: dict[int, int] = {}
    for number, _, value in _fields(_bytes(envelope.get(2, b""))):
        if number == 4:
            root = _node(_bytes(value), 0)
        elif number == 3:
            entry = {key: part for key, _, part in _fields(_bytes(value))}
            if _is_scalar(_bytes(entry.get(2, b""))):
                scalar.add(_int(entry.get(1, 0)))
        elif number == 5:
            for key, _, part in _fields(_bytes(value)):
                if key == 4:
                    place = {k: v for k, _, v in _fields(_bytes(part))}
                    positions[_int(place.get(1, 0))] = _int(place.get(2, 0))
    if root is None:
        raise MalformedAst("no expression")
    return CheckedAst(root, frozenset(scalar), positions)


def _is_scalar(data: bytes) -> bool:
    """Whether a type is int, uint, double (primitive 2, 3, 4), timestamp or duration (well-known 2, 3)."""
    for number, _, value in _fields(data):
        if number == 3:
            return value in (2, 3, 4)
        if number == 5:
            return value in (2, 3)
    return False


def _node(data: bytes, depth: int) -> Node:
    if depth > NESTING_MAX:
        raise MalformedAst("nested too deep")
    identity = 0
    node: Node | None = None
    for number, _, value in _fields(data):
        if number == 2:
            identity = _int(value)
        elif number in _READERS:
            node = _READERS[number](_bytes(value), depth + 1)
    if node is None:
        raise MalformedAst("an empty node")
    return node._replace(id=identity)


def _const(data: bytes, _depth: int) -> Const:
    for number, _, value in _fields(data):
        if number == 1:
            return Const(0, None)
        if number == 2:
            return Const(0, value != 0)
        if number == 3:
            whole = _int(value)
            return Const(0, whole - (1 << 64) if whole >= 1 << 63 else whole)
        if number == 4:
            return Const(0, Uint(_int(value)))
        if number == 5:
            return Const(0, float(struct.unpack("<d", _bytes(value))[0]))
        if number == 6:
            return Const(0, _text(value))
        if number == 7:
            return Const(0, _bytes(value))
    raise MalformedAst("an empty constant")


def _ident(data: bytes, _depth: int) -> Ident:
    return Ident(0, next((_text(value) for number, _, value in _fields(data) if number == 1), ""))


def _select(data: bytes, depth: int) -> Select:
    parts = {number: value for number, _, value in _fields(data)}
    return Select(
        0, _node(_bytes(parts[1]), depth), _text(parts.get(2, b"")), bool(parts.get(3, 0))
    )


def _call(data: bytes, depth: int) -> Call:
    target: Node | None = None
    function = ""
    args: list[Node] = []
    for number, _, value in _fields(data):
        if number == 1:
            target = _node(_bytes(value), depth)
        elif number == 2:
            function = _text(value)
        elif number == 3:
            args.append(_node(_bytes(value), depth))
    return Call(0, target, function, tuple(args))


def _list(data: bytes, depth: int) -> ListLiteral:
    elements: list[Node] = []
    optional = False
    for number, _, value in _fields(data):
        if number == 1:
            elements.append(_node(_bytes(value), depth))
        elif number == 2:
            optional = True
    return ListLiteral(0, tuple(elements), optional)


def _struct(data: bytes, depth: int) -> MapLiteral:
    message = ""
    entries: list[tuple[Node | None, Node]] = []
    for number, _, value in _fields(data):
        if number == 1:
            message = _text(value)
        elif number == 2:
            entry = {key: part for key, _, part in _fields(_bytes(value))}
            if entry.get(5, 0):
                raise MalformedAst("an optional entry")
            key = _node(_bytes(entry[3]), depth) if 3 in entry else None
            entries.append((key, _node(_bytes(entry[4]), depth)))
    return MapLiteral(0, message, tuple(entries))


def _comprehension(data: bytes, depth: int) -> Comprehension:
    parts = {number: value for number, _, value in _fields(data)}
    return Comprehension(
        0,
        _text(parts.get(1, b"")),
        _text(parts.get(8, b"")),
        _node(_bytes(parts[2]), depth),
        _text(parts.get(3, b"")),
        _node(_bytes(parts[4]), depth),
        _node(_bytes(parts[5]), depth),
        _node(_bytes(parts[6]), depth),
        _node(_bytes(parts[7]), depth),
    )


_READERS: dict[int, Callable[[bytes, int], Node]] = {
    3: _const,
    4: _ident,
    5: _select,
    6: _call,
    7: _list,
    8: _struct,
    9: _comprehension,
}


def _fields(data: bytes) -> Iterator[_Field]:
    """Field number, wire type and value of each field of one message."""
    at = 0
    end = len(data)
    while at < end:
        key, at = _varint(data, at)
        wire = key & 7
        value: int | bytes
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            if wire == 2:
                length, at = _varint(data, at)
            else:
                length = 8 if wire == 1 else 4
            if at + length > end:
                raise MalformedAst("cut short")
            value = data[at : at + length]
            at += length
        else:
            raise MalformedAst("an unknown wire type")
        yield key >> 3, wire, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, at
        shift += 7
        if shift > 63:
            raise MalformedAst("a number too long")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise MalformedAst("a number where bytes belong")
    return value


def _int(value: int | bytes) -> int:
    if isinstance(value, int):
        return value
    raise MalformedAst("bytes where a number belongs")


def _text(value: int | bytes) -> str:
    return _bytes(value).decode()
