"""The C++ CEL engine behind three functions: check a text, load a checked expression, evaluate it.

The only module that imports `cel_expr_python`. Every variable is declared inside `CONTAINER`, because a name such
as `type` cannot be declared at the top level. Whatever the binding raises leaves as `EngineError`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from cel_expr_python import cel

from outrider_server.domain.event import NewEvent
from outrider_server.matching.variables import CONTAINER, DATA, EVENT, EVENT_FIELDS

_TYPES = {
    "string": cel.Type.STRING,
    "timestamp": cel.Type.TIMESTAMP,
    "attributes": cel.Type.Map(cel.Type.STRING, cel.Type.STRING),
}
_ISSUE = re.compile(r"ERROR: <input>:(-?\d+):(-?\d+): (.*)")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Issue(NamedTuple):
    """One complaint of the engine; line and column count from 1."""

    message: str
    line: int
    column: int


class EngineError(Exception):
    """The engine refused a text or a serialized expression."""

    def __init__(self, issues: tuple[Issue, ...]) -> None:
        super().__init__(issues[0].message)
        self.issues = issues


class EngineOverBudget(Exception):
    """An evaluation took more iterations than the engine allows."""


class Checked(NamedTuple):
    """A checked text: its serialized AST and the name of its type."""

    ast: bytes
    type_name: str


class Expression(NamedTuple):
    """A loaded expression, with the environment that knows its variables' types."""

    environment: cel.Env
    expression: cel.Expression


class EngineFailure(NamedTuple):
    """An evaluation that ended in a CEL error."""

    message: str


def _environment(names: Iterable[str]) -> cel.Env:
    variables = {f"{CONTAINER}.{name}": cel.Type.DYN for name in names}
    variables[f"{CONTAINER}.{DATA}"] = cel.Type.DYN
    for field, kind in EVENT_FIELDS.items():
        variables[f"{CONTAINER}.{EVENT}.{field}"] = _TYPES[kind]
    return cel.NewEnv(variables=variables, container=CONTAINER)


def check(text: str, names: Iterable[str]) -> Checked:
    """Parse and type-check `text`, with `names` as top-level fields of any type."""
    try:
        expression = _environment(names).compile(text)
        return Checked(bytes(expression.serialize()), expression.return_type().name())
    except (RuntimeError, ValueError, TypeError) as error:
        raise EngineError(_issues(str(error))) from None


def load(ast: bytes, names: Iterable[str]) -> Expression:
    """Load a serialized checked expression that mentions `names`."""
    environment = _environment(names)
    # An environment takes up its variables' types at its first compile; before that it refuses datetimes.
    environment.compile("true")
    try:
        return Expression(environment, environment.deserialize(ast))
    except (RuntimeError, ValueError, TypeError) as error:
        raise EngineError(_issues(str(error))) from None


def evaluate(expression: Expression, variables: Mapping[str, object]) -> object:
    """The value, or an `EngineFailure`. `variables` are named with the container in front."""
    try:
        value = expression.expression.eval(data=variables)
        if value.type() == cel.Type.ERROR:
            return EngineFailure(str(value.value()))
        return value.value()
    except RuntimeError as error:
        if "iteration" in str(error).lower():
            raise EngineOverBudget from None
        return EngineFailure(str(error))
    except (ValueError, TypeError, OverflowError) as error:
        # A value that the binding cannot convert is an error of the evaluation, like any other.
        return EngineFailure(str(error))


def variables_of(
    names: Iterable[str], fields: Mapping[str, object], document: object, event: NewEvent
) -> dict[str, object]:
    """The engine's variables for one event: of the top-level fields only those in `names`."""
    time = _EPOCH + timedelta(microseconds=event.time_us)
    envelope: dict[str, object] = {
        "type": event.type,
        "source": event.source,
        "subject": event.subject,
        "key": event.key,
        "organization": event.organization,
        "actor": event.actor,
        "time": time,
        "timestamp": time,
        "attributes": event.attributes,
    }
    variables = {f"{CONTAINER}.{name}": fields[name] for name in names if name in fields}
    variables[f"{CONTAINER}.{DATA}"] = document
    for field, value in envelope.items():
        variables[f"{CONTAINER}.{EVENT}.{field}"] = value
    return variables


def _issues(message: str) -> tuple[Issue, ...]:
    found = tuple(
        Issue(_plain(text), max(int(line), 1), max(int(column), 1))
        for line, column, text in _ISSUE.findall(message)
    )
    return found or (Issue(_plain(message.partition(": ")[2] or message), 1, 1),)


def _plain(text: str) -> str:
    """One line without the engine's own prefixes and status names."""
    line = text.partition("\n")[0]
    line = re.sub(r"\s*\[[A-Z_]+\]$", "", line)
    return line.replace(f" (in container '{CONTAINER}')", "").replace(f"{CONTAINER}.", "")
