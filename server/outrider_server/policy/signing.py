"""Standard Webhooks signatures: what a receiver checks a request against.

The signed text is `id.timestamp.body`; the signature header holds one `v1,<base64 HMAC-SHA256>` per secret, separated
by spaces, so that a receiver accepts a request while it holds any one of them (a rotation overlaps). Rule: a key is
hashed once, when the signer is made; each signature continues from a copy of that state.
"""

from __future__ import annotations

import binascii
import hmac

from outrider_server.domain.errors import InvalidArgument

SECRET_PREFIX = "whsec_"  # noqa: S105 - the public prefix of every secret
SECRET_BYTES_MIN = 24
SECRET_BYTES_MAX = 64
SECRETS_MAX = 5
"""Secrets that sign at once: the newest, and those a rotation still overlaps with."""


class Signer:
    """Signs requests with every secret it was made with. Never shows one: neither `repr` nor errors hold them."""

    __slots__ = ("_keyed",)

    def __init__(self, secrets: tuple[bytes, ...]) -> None:
        self._keyed = tuple(hmac.new(secret, digestmod="sha256") for secret in secrets)

    def sign(self, message_id: str, timestamp: int, body: bytes) -> str:
        """The value of `webhook-signature`; empty when there is no secret.

        Costs about 2 microseconds a KiB of body and releases the interpreter's lock for large ones, so it may run in
        a thread.
        """
        head = f"{message_id}.{timestamp}.".encode()
        signatures = []
        for keyed in self._keyed:
            state = keyed.copy()
            state.update(head)
            state.update(body)
            signatures.append(
                "v1," + binascii.b2a_base64(state.digest(), newline=False).decode("ascii")
            )
        return " ".join(signatures)


def parse_secret(text: str) -> bytes:
    """The key bytes of a `whsec_...` secret.

    The error never repeats the text: what is nearly a secret must not reach a log.
    """
    if not text.startswith(SECRET_PREFIX):
        raise _invalid_secret(f"a signing secret starts with {SECRET_PREFIX}")
    try:
        secret = binascii.a2b_base64(text[len(SECRET_PREFIX) :], strict_mode=True)
    except ValueError:
        # The cause would show the text's position and, in a traceback, the text.
        raise _invalid_secret("a signing secret is base64 after its prefix") from None
    if not SECRET_BYTES_MIN <= len(secret) <= SECRET_BYTES_MAX:
        raise _invalid_secret(
            f"a signing secret holds {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes, not {len(secret)}"
        )
    return secret


def format_secret(secret: bytes) -> str:
    """The text form of a secret, as it is shown to its owner once."""
    if not SECRET_BYTES_MIN <= len(secret) <= SECRET_BYTES_MAX:
        raise _invalid_secret(
            f"a signing secret holds {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes, not {len(secret)}"
        )
    return SECRET_PREFIX + binascii.b2a_base64(secret, newline=False).decode("ascii")


def _invalid_secret(message: str) -> InvalidArgument:
    return InvalidArgument("INVALID_SECRET", message, violations=[("secret", message)])
