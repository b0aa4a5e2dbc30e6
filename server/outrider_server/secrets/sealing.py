"""Sealed values: AES-256-GCM under a data key of their own, which travels with them.

    version 1 | key id 8 | nonce 12 | wrapped data key 32+16 | nonce 12 | ciphertext+16

Each value has a fresh data key, wrapped by the installation's key-encryption key, inside the sealed record itself. The
other form, one data key per tenant in the tenant's row, would save 68 bytes and two microseconds a value, and cost a
second secret row that every unseal depends on, a cache of unwrapped keys, and an order of writes between the two. This
form needs neither table nor cache, a rotation rewrites 69 bytes of a record without touching its plaintext, and a data
key never seals twice, so its nonce cannot repeat.

Rule: a value opens only where it was sealed for. Tenant, purpose and id are authenticated in both layers, so a row
copied to another tenant, column or endpoint does not open.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from outrider_server.secrets.errors import SealBrokenError, UnknownKeyError
from outrider_server.secrets.keys import KEY_BYTES, KEY_ID_BYTES, KeyRing, RandomBytes

_VERSION = 1
_NONCE_BYTES = 12
_TAG_BYTES = 16
_WRAP_NONCE_AT = 1 + KEY_ID_BYTES
_WRAPPED_AT = _WRAP_NONCE_AT + _NONCE_BYTES
_NONCE_AT = _WRAPPED_AT + KEY_BYTES + _TAG_BYTES
_CIPHERTEXT_AT = _NONCE_AT + _NONCE_BYTES

SEAL_OVERHEAD_BYTES = _CIPHERTEXT_AT + _TAG_BYTES
"""How much longer a sealed value is than its plaintext."""


class Sealer:
    """Seals under the first key of a ring, unseals under any. `random` gives nonces and data keys (`os.urandom`).

    A key-encryption key wraps under random 96-bit nonces: rotate it before it has wrapped 2**32 values.
    """

    __slots__ = ("_primary", "_random", "_wrapping")

    def __init__(self, keys: KeyRing, random: RandomBytes) -> None:
        self._primary = keys.primary.id
        self._wrapping = {key.id: AESGCM(key.key) for key in keys.keys}
        self._random = random

    def seal(self, tenant: int, purpose: str, name: str, plaintext: bytes) -> bytes:
        """Seal `plaintext` for one place: the tenant's `purpose` (what it is) of `name` (whose it is)."""
        place = _place(tenant, purpose, name)
        data_key = self._random(KEY_BYTES)
        nonce = self._random(_NONCE_BYTES)
        sealed = AESGCM(data_key).encrypt(nonce, plaintext, place)
        return self._wrap(data_key, place) + nonce + sealed

    def unseal(self, tenant: int, purpose: str, name: str, sealed: bytes) -> bytes:
        """The plaintext that was sealed for this place; UnknownKeyError or SealBrokenError if there is none."""
        place = _place(tenant, purpose, name)
        data_key = self._unwrap(sealed, place)
        nonce = sealed[_NONCE_AT:_CIPHERTEXT_AT]
        try:
            return AESGCM(data_key).decrypt(nonce, sealed[_CIPHERTEXT_AT:], place)
        except InvalidTag:
            raise _broken(tenant, purpose, name) from None

    def rewrap(self, tenant: int, purpose: str, name: str, sealed: bytes) -> bytes:
        """The same value under the key that seals now: the step of a rotation. The plaintext is not opened."""
        place = _place(tenant, purpose, name)
        return self._wrap(self._unwrap(sealed, place), place) + sealed[_NONCE_AT:]

    def is_current(self, sealed: bytes) -> bool:
        """Whether a value is sealed under the key that seals now."""
        return sealed[1:_WRAP_NONCE_AT] == self._primary

    def _wrap(self, data_key: bytes, place: bytes) -> bytes:
        nonce = self._random(_NONCE_BYTES)
        head = bytes([_VERSION]) + self._primary
        # The head is authenticated too, so that a record cannot be turned to another key or version.
        wrapped = self._wrapping[self._primary].encrypt(nonce, data_key, head + place)
        return head + nonce + wrapped

    def _unwrap(self, sealed: bytes, place: bytes) -> bytes:
        if len(sealed) < SEAL_OVERHEAD_BYTES or sealed[0] != _VERSION:
            raise SealBrokenError("not a sealed value of a version that is known here")
        head = sealed[:_WRAP_NONCE_AT]
        wrapping = self._wrapping.get(head[1:])
        if wrapping is None:
            raise UnknownKeyError(head[1:].hex())
        try:
            return wrapping.decrypt(
                sealed[_WRAP_NONCE_AT:_WRAPPED_AT], sealed[_WRAPPED_AT:_NONCE_AT], head + place
            )
        except InvalidTag:
            raise SealBrokenError(
                "a sealed value is damaged, or stands where it was not sealed for"
            ) from None


def _place(tenant: int, purpose: str, name: str) -> bytes:
    """Where a value belongs, as bytes that no other place shares: texts carry their length."""
    parts = (str(tenant).encode(), purpose.encode(), name.encode())
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _broken(tenant: int, purpose: str, name: str) -> SealBrokenError:
    return SealBrokenError(f"the sealed {purpose} of {name} of tenant {tenant} is damaged")
