from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from outrider_server.domain.errors import InvalidArgument
from outrider_server.policy.signing import Signer, format_secret, parse_secret

KEYS = st.binary(min_size=24, max_size=64)


@given(KEYS, st.from_regex(r"[a-z0-9_]{1,40}", fullmatch=True), st.text(max_size=200))
def test_an_independent_verifier_accepts_the_signature(
    key: bytes, message_id: str, text: str
) -> None:
    now = int(datetime.now(UTC).timestamp())
    body = text.encode("utf-8", "replace")
    headers = {
        "webhook-id": message_id,
        "webhook-timestamp": str(now),
        "webhook-signature": Signer((key,)).sign(message_id, now, body),
    }
    Webhook(format_secret(key)).verify(body, headers, json_parse=False)


def test_each_secret_signs_so_that_either_receiver_of_a_rotation_accepts() -> None:
    old, new = b"o" * 24, b"n" * 64
    now = int(datetime.now(UTC).timestamp())
    signature = Signer((new, old)).sign("dlv_1_2", now, b"{}")
    assert len(signature.split(" ")) == 2
    headers = {
        "webhook-id": "dlv_1_2",
        "webhook-timestamp": str(now),
        "webhook-signature": signature,
    }
    for key in (old, new):
        assert Webhook(format_secret(key)).verify(b"{}", headers) == {}


def test_a_signer_signs_one_message_after_another_without_memory() -> None:
    signer = Signer((b"k" * 32,))
    first = signer.sign("a", 1, b"x")
    assert signer.sign("b", 1, b"x") != first
    assert signer.sign("a", 2, b"x") != first
    assert signer.sign("a", 1, b"y") != first
    assert signer.sign("a", 1, b"x") == first


def test_without_secrets_there_is_no_signature() -> None:
    assert Signer(()).sign("a", 1, b"") == ""


@given(KEYS)
def test_secrets_survive_their_text_form(key: bytes) -> None:
    assert parse_secret(format_secret(key)) == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "whsec_",
        "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0",
        "whsec_***",
        "whsec_c2VjcmV0",
        "whsec_" + "A" * 31,
        "whsec_" + "A" * 32 + "\n",
        "whsec_" + "AAAA" * 22,
    ],
)
def test_what_is_no_secret_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_secret(text)
    assert caught.value.reason == "INVALID_SECRET"
    tail = text.removeprefix("whsec_").strip()
    assert not tail or tail not in repr(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("size", [0, 23, 65])
def test_secrets_of_a_wrong_size_are_not_formatted(size: int) -> None:
    with pytest.raises(InvalidArgument):
        format_secret(bytes(size))


def test_a_signer_does_not_show_its_secrets() -> None:
    assert "topsecret" not in repr(Signer((b"topsecret" * 3,)))
