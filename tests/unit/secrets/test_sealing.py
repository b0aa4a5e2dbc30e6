import itertools
import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_server.secrets.errors import SealBrokenError, SecretsError, UnknownKeyError
from outrider_server.secrets.keys import KeyEncryptionKey, KeyRing
from outrider_server.secrets.sealing import SEAL_OVERHEAD_BYTES, Sealer

OLD = KeyEncryptionKey.of(b"o" * 32)
NEW = KeyEncryptionKey.of(b"n" * 32)
PLACE = (7, "signing_secret", "endpoints/1")


def sealer(*keys: KeyEncryptionKey) -> Sealer:
    return Sealer(KeyRing(keys), os.urandom)


@given(st.integers(0), st.text(max_size=20), st.text(max_size=20), st.binary(max_size=3000))
def test_a_value_opens_where_it_was_sealed_for(
    tenant: int, purpose: str, name: str, plaintext: bytes
) -> None:
    sealed = sealer(OLD).seal(tenant, purpose, name, plaintext)
    assert len(sealed) == len(plaintext) + SEAL_OVERHEAD_BYTES
    assert sealer(OLD).unseal(tenant, purpose, name, sealed) == plaintext
    assert len(plaintext) < 4 or plaintext not in sealed


@pytest.mark.parametrize(
    "place",
    [
        (8, "signing_secret", "endpoints/1"),
        (7, "url", "endpoints/1"),
        (7, "signing_secret", "endpoints/2"),
        (7, "signing_secretendpoints", "/1"),
        (7, "signing_secret", ""),
    ],
)
def test_a_value_does_not_open_anywhere_else(place: tuple[int, str, str]) -> None:
    sealed = sealer(OLD).seal(*PLACE, b"secret")
    for act in (sealer(OLD).unseal, sealer(OLD, NEW).rewrap):
        with pytest.raises(SealBrokenError):
            act(*place, sealed)


def test_every_flipped_bit_and_every_cut_is_noticed() -> None:
    sealed = sealer(OLD).seal(*PLACE, b"secret")
    for at, bit in itertools.product(range(len(sealed)), range(8)):
        changed = bytearray(sealed)
        changed[at] ^= 1 << bit
        with pytest.raises(SecretsError):
            sealer(OLD, NEW).unseal(*PLACE, bytes(changed))
    for size in range(len(sealed)):
        with pytest.raises(SecretsError):
            sealer(OLD).unseal(*PLACE, sealed[:size])


def test_parts_of_two_records_cannot_be_joined() -> None:
    first, second = (sealer(OLD).seal(*PLACE, text) for text in (b"first!", b"second"))
    for at in range(1, len(first)):
        if first[:at] == second[:at] or first[at:] == second[at:]:
            continue
        with pytest.raises(SealBrokenError):
            sealer(OLD).unseal(*PLACE, first[:at] + second[at:])


def test_an_unknown_key_is_named() -> None:
    sealed = sealer(OLD).seal(*PLACE, b"secret")
    with pytest.raises(UnknownKeyError, match=OLD.id.hex()) as caught:
        sealer(NEW).unseal(*PLACE, sealed)
    assert caught.value.key_id == OLD.id.hex()


def test_a_rotation_keeps_old_values_readable_and_rewraps_them() -> None:
    sealed = sealer(OLD).seal(*PLACE, b"secret")
    both = sealer(NEW, OLD)
    assert both.unseal(*PLACE, sealed) == b"secret"
    assert not both.is_current(sealed)
    rewrapped = both.rewrap(*PLACE, sealed)
    assert both.is_current(rewrapped)
    assert sealer(NEW).unseal(*PLACE, rewrapped) == b"secret"
    with pytest.raises(UnknownKeyError):
        sealer(OLD).unseal(*PLACE, rewrapped)


def test_no_key_and_no_nonce_is_used_twice() -> None:
    drawn: list[bytes] = []

    def draw(size: int) -> bytes:
        drawn.append(random.Random(len(drawn)).randbytes(size))
        return drawn[-1]

    same = Sealer(KeyRing((OLD,)), draw)
    assert same.seal(*PLACE, b"secret") != same.seal(*PLACE, b"secret")
    assert [len(value) for value in drawn] == [32, 12, 12, 32, 12, 12]


def test_neither_sealer_nor_errors_show_keys_or_plaintext() -> None:
    sealed = sealer(OLD).seal(*PLACE, b"topsecret")
    broken = sealed[:-1] + bytes([sealed[-1] ^ 1])
    with pytest.raises(SealBrokenError) as caught:
        sealer(OLD).unseal(*PLACE, broken)
    shown = repr((sealer(OLD), caught.value, caught.value.__cause__))
    assert "topsecret" not in shown
    assert "oooo" not in shown
