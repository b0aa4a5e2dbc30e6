"""Names of event types and patterns: the language of both, and a typed error for anything else."""

from __future__ import annotations

import pytest

from outrider_server.domain.errors import InvalidArgument
from outrider_server.matching.event_types import validate_event_type, validate_type_pattern

NAMES = ["a", "sales_order.created", "a.b.c.d", "0.1", "_", "a" * 128, ".".join("a" * 64)]
BROKEN = [
    "", ".", "a.", ".a", "a..b", "A.b", "a b", "a-b", "é.b", "a.b\n", "a" * 129, "a.\0", "*.a", "a.*.b", "**", "a*",
    "\u0663", "a.b.**", ".*",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_type_and_a_pattern(name: str) -> None:
    validate_event_type(name)
    validate_type_pattern(name)


@pytest.mark.parametrize("text", BROKEN)
def test_anything_else_is_neither(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validate_event_type(text)
    assert caught.value.reason == "INVALID_EVENT_TYPE"
    with pytest.raises(InvalidArgument) as caught:
        validate_type_pattern(text)
    assert caught.value.reason == "INVALID_TYPE_PATTERN"


@pytest.mark.parametrize("pattern", ["*", "a.*", "a.b.*"])
def test_a_star_is_a_pattern_but_no_type(pattern: str) -> None:
    validate_type_pattern(pattern)
    with pytest.raises(InvalidArgument):
        validate_event_type(pattern)


def test_the_message_names_the_limit_and_what_was_found() -> None:
    with pytest.raises(InvalidArgument, match=r"at most 128 characters, this one has 200"):
        validate_event_type("a" * 200)
