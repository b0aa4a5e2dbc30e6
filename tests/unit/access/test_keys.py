"""The text of keys."""

from __future__ import annotations

import hashlib
import random

import pytest

from outrider_server.access.keys import digest, is_well_formed, make_text, require_key_id
from outrider_server.domain.errors import InvalidArgument

FIXED = random.Random(7)


def test_text_holds_the_name_and_256_random_bits() -> None:
    asked: list[int] = []

    def source(count: int) -> bytes:
        asked.append(count)
        return b"\xff" * count

    text = make_text("my-key", source)
    assert text.startswith("ork_my-key_7777")
    assert asked == [32]
    assert make_text("my-key", source) == text
    assert digest(text) == hashlib.sha256(text.encode()).digest()


def test_every_single_typing_error_is_noticed() -> None:
    text = make_text("k1", FIXED.randbytes)
    assert is_well_formed(text)
    for index, letter in enumerate(text):
        for other in "abz27-_X":
            if other != letter:
                assert not is_well_formed(text[:index] + other + text[index + 1 :])
        assert not is_well_formed(text[:index])
        assert (
            not is_well_formed(text[:index] + text[index + 1 :]) or text[index] == text[index - 1]
        )
        if index > 0 and text[index] != text[index - 1]:
            swapped = text[: index - 1] + text[index] + text[index - 1] + text[index + 1 :]
            assert not is_well_formed(swapped)


def test_other_texts_are_no_keys() -> None:
    text = make_text("k1", FIXED.randbytes)
    for other in ("", "ork_", " " + text, text + "\n", text.upper(), "x" * 10_000, "ork___", "é"):
        assert not is_well_formed(other)


@pytest.mark.parametrize("name", ["a", "ops-1", "a" * 63, "-"])
def test_a_key_of_every_id_that_is_let_through_can_be_used(name: str) -> None:
    require_key_id(name)
    assert is_well_formed(make_text(name, FIXED.randbytes))


@pytest.mark.parametrize("name", ["", "A B", "x/../y", "a" * 100, "a_b", "a\n"])
def test_an_id_that_no_key_could_be_used_with_is_refused(name: str) -> None:
    assert not is_well_formed(make_text(name, FIXED.randbytes))
    with pytest.raises(InvalidArgument, match="1 to 63 lower-case letters, digits and -") as caught:
        require_key_id(name)
    assert "\n" not in str(caught.value)
