"""Names of event types, and patterns over them: an exact name, `prefix.*`, or `*`.

A name is one to many segments of `a-z 0-9 _`, joined by dots, at most 128 characters. `a.*` stands for every type
below `a`, at any depth, not for `a` itself.
"""

from __future__ import annotations

import re

from outrider_server.domain.errors import InvalidArgument

TYPE_LENGTH_MAX = 128

_TYPE = re.compile(r"[a-z0-9_]+(?:\.[a-z0-9_]+)*\Z")


def validate_event_type(text: str) -> None:
    """Raise `InvalidArgument` unless `text` names an event type."""
    _within_length(text, "INVALID_EVENT_TYPE", "an event type")
    if not _TYPE.match(text):
        raise InvalidArgument(
            "INVALID_EVENT_TYPE",
            f"{_shown(text)} is not an event type: write segments of a-z, 0-9 and _ joined by dots, "
            "such as sales_order.created",
        )


def validate_type_pattern(text: str) -> None:
    """Raise `InvalidArgument` unless `text` is an event type, `prefix.*` or `*`."""
    _within_length(text, "INVALID_TYPE_PATTERN", "a type pattern")
    if text == "*" or _TYPE.match(text.removesuffix(".*")):
        return
    raise InvalidArgument(
        "INVALID_TYPE_PATTERN",
        f"{_shown(text)} is not a type pattern: write an event type such as sales_order.created, "
        "a prefix such as sales_order.*, or *",
    )


def _within_length(text: str, reason: str, what: str) -> None:
    if len(text) > TYPE_LENGTH_MAX:
        raise InvalidArgument(
            reason,
            f"{what} has at most {TYPE_LENGTH_MAX} characters, this one has {len(text)}",
        )


def _shown(text: str) -> str:
    return repr(text)
