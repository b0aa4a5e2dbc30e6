"""What an id may be."""

from __future__ import annotations

import pytest

from outrider_server.domain.names import is_id


@pytest.mark.parametrize("text", ["a", "0", "a-b", "a" * 63, "-"])
def test_lower_case_letters_digits_and_dashes_are_an_id(text: str) -> None:
    assert is_id(text)


@pytest.mark.parametrize(
    "text", ["", "A", "a b", "x/../y", "a" * 64, "a\n", "a_b", "\u00e4", "\u0661"]
)
def test_anything_else_is_none(text: str) -> None:
    assert not is_id(text)
