"""The conformance cases of the CEL language, as the generator's values; and one way to run one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from outrider_server.domain.event import NewEvent
from outrider_server.matching import codegen, engine
from outrider_server.matching.checked_ast import Uint, decode
from outrider_server.matching.runtime import ERROR, TYPES_BY_NAME, Duration, Timestamp

CASES_FILE = (
    Path(__file__).resolve().parents[2].parent / "shared" / "data" / "cel_conformance_half.json"
)

EVENT = NewEvent(tenant=1, type="a.b", data=b"", time_us=0)

_SECOND = 1_000_000_000


class Unusable(Exception):
    """A case that asks for what filters do not have: a container, own functions, unchecked mode, protobuf."""


class Answer(NamedTuple):
    """What the generator said: as a value, and asked as a filter."""

    value: object
    passes: bool


def cases() -> list[dict[str, Any]]:
    """The core cases that expect a value or an error."""
    found = json.loads(CASES_FILE.read_text())["cases"]
    return [c for c in found if c.get("ext") is None and not c.get("check_only")]


def typed(value: list[Any]) -> object:
    """A typed value of the file as a runtime value."""
    kind, *rest = value
    payload = rest[0] if rest else None
    if kind == "null":
        return None
    if kind in ("bool", "int", "string"):
        return payload
    if kind == "uint":
        return Uint(payload)
    if kind == "double":
        return float(payload)
    if kind == "bytes":
        return bytes.fromhex(payload)
    if kind == "list":
        return [typed(element) for element in payload]
    if kind == "map":
        return {typed(key): typed(element) for key, element in payload}
    if kind == "type":
        return TYPES_BY_NAME.get(payload, payload)
    moment = Duration if kind == "duration" else Timestamp
    return moment(payload[0] * _SECOND + payload[1])


def run(case: Mapping[str, Any]) -> Answer:
    """Run one case; raises `codegen.Unsupported` where the generator leaves it to the engine."""
    if case.get("container") or case.get("functions") or case.get("disable_check"):
        raise Unusable
    bindings = {name: typed(value) for name, value in case.get("bindings", {}).items()}
    if any("." in name for name in (*bindings, *case.get("type_env", {}))):
        raise Unusable
    names = {*bindings, *case.get("type_env", {})} - {"true", "false", "null"}
    try:
        checked = engine.check(case["expr"], names)
    except engine.EngineError:
        return Answer(ERROR, passes=False)
    tree = decode(checked.ast)
    value = codegen.compile_value(tree)(bindings, bindings, EVENT)
    return Answer(value, bool(codegen.compile_predicate(tree)(bindings, bindings, EVENT)))


def alike(x: object, y: object) -> bool:
    """Equality with classes, NaN equal to itself."""
    if isinstance(x, list) and isinstance(y, list):
        return len(x) == len(y) and all(map(alike, x, y))
    if isinstance(x, dict) and isinstance(y, dict):
        return x.keys() == y.keys() and all(alike(x[key], y[key]) for key in x)
    if isinstance(x, float) and isinstance(y, float):
        return x == y or (math.isnan(x) and math.isnan(y))
    return x.__class__ is y.__class__ and x == y
