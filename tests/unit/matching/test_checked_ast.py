"""decode: a checked expression comes back as nodes; any other bytes raise MalformedAst and nothing else."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_server.matching import engine
from outrider_server.matching.checked_ast import (
    Call,
    Comprehension,
    Const,
    Ident,
    MalformedAst,
    Select,
    Uint,
    children,
    decode,
    walk,
)
from outrider_server.matching.filter import check_filter

AST = check_filter(
    "items.exists(i, i.n == -5 && i.u == 7u && i.d < 1.5) || data == [null, 'é', b'x']"
).ast


def test_nodes_hold_what_was_written() -> None:
    tree = decode(AST)
    nodes = list(walk(tree.root))
    assert isinstance(tree.root, Call)
    assert tree.root.function == "_||_"
    values = [node.value for node in nodes if isinstance(node, Const)]
    for expected in (-5, Uint(7), 1.5, None, "é", b"x"):
        assert any(type(value) is type(expected) and value == expected for value in values)
    assert {node.field for node in nodes if isinstance(node, Select)} == {"n", "u", "d"}
    assert {"_e.items", "_e.data", "i"} <= {node.name for node in nodes if isinstance(node, Ident)}
    assert sum(isinstance(node, Comprehension) for node in nodes) == 1


def test_every_node_but_those_of_macros_has_its_own_place() -> None:
    tree = decode(engine.check("a.b == 1 && c.d == 2", {"a", "c"}).ast)
    for node in walk(tree.root):
        assert node.id in tree.positions
        assert all(child.id != node.id for child in children(node))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_decoded(data: bytes) -> None:
    with contextlib.suppress(MalformedAst):
        decode(data)


@given(st.data())
def test_a_damaged_ast_is_refused_or_decoded(data: st.DataObject) -> None:
    damaged = bytearray(AST)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    with contextlib.suppress(MalformedAst):
        decode(bytes(damaged[:cut]))
    with contextlib.suppress(MalformedAst):
        decode(bytes(damaged))


def test_deep_nesting_is_refused_not_recursed_into() -> None:
    node = b"\x1a\x02\x10\x01"
    for _ in range(2000):
        inner = b"\x0a" + _length(node) + node
        node = b"\x2a" + _length(inner) + inner
    checked = b"\x22" + _length(node) + node
    name = b"cel.expr.CheckedExpr"
    envelope = b"\x0a" + _length(name) + name + b"\x12" + _length(checked) + checked
    with pytest.raises(MalformedAst, match="deep"):
        decode(envelope)


def _length(data: bytes) -> bytes:
    length = len(data)
    out = bytearray()
    while length >= 128:
        out.append(length & 127 | 128)
        length >>= 7
    out.append(length)
    return bytes(out)
