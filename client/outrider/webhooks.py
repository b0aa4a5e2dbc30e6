"""For receivers: check that a request comes from Outrider, and read the deliveries it carries.

    webhook = Webhook(["whsec_..."])
    for delivery in webhook.verify(request.headers, await request.read()):
        ...

The scheme is Standard Webhooks: the signed text is `id.timestamp.body`, the header holds one signature per secret.
Rules: the body is verified as the bytes that came, before anything is parsed; comparisons take the same time for right
and wrong; a request outside the time tolerance is refused, so that a recorded one cannot be played again later.
"""

from __future__ import annotations

import binascii
import hmac
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

_HMAC_PREFIX = "whsec_"
_ED25519_PREFIX = "whpk_"
_SIGNATURES_MAX = 32


class WebhookError(Exception):
    """Base of what `Webhook` raises: answer such a request with 400 or 401, never with 2xx."""


class InvalidHeaders(WebhookError):
    """A header is missing or not what Standard Webhooks prescribes."""


class OutsideTolerance(WebhookError):
    """The request's time is too far from ours: played again, or a clock is wrong."""


class InvalidSignature(WebhookError):
    """No signature fits any of the secrets."""


class InvalidBody(WebhookError):
    """The signature holds, but the body holds no deliveries: a mapping of the subscription made it something else."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event owed to one subscription. `id` is the same in every copy: skip what you have seen."""

    id: str
    event_id: str
    type: str
    timestamp: datetime
    data: Any
    source: str = ""
    subject: str = ""
    key: str = ""
    organization: str = ""
    actor: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


class Webhook:
    """Verifies requests against the secrets of an endpoint: `whsec_...`, or `whpk_...` for ed25519 (extra `[ed25519]`).

    Give the old and the new secret while one is being rotated. Neither `repr` nor errors show them.
    """

    def __init__(
        self,
        secrets: str | Iterable[str],
        *,
        tolerance_seconds: float = 300.0,
        clock: Callable[[], float] = time.time,  # noqa: TID251 - the default of the argument
    ) -> None:
        self._checks: list[tuple[str, Callable[[bytes, bytes], bool]]] = []
        for secret in [secrets] if isinstance(secrets, str) else secrets:
            self._checks.append(_check_of(secret.strip()))
        if not self._checks:
            raise ValueError("a webhook needs at least one secret")
        self._tolerance_seconds = tolerance_seconds
        self._clock = clock

    def verify(self, headers: Mapping[str, str], body: bytes) -> list[Delivery]:
        """The deliveries of a genuine request, one or a batch; raises `WebhookError` for any other."""
        self.check(headers, body)
        return parse(body)

    def check(self, headers: Mapping[str, str], body: bytes) -> str:
        """Verify alone, for bodies that a mapping shaped; returns the request's `webhook-id`."""
        message_id, timestamp, signatures = _read(headers)
        if abs(self._clock() - int(timestamp)) > self._tolerance_seconds:
            raise OutsideTolerance("the request's webhook-timestamp is too far from now")
        signed = b".".join((message_id.encode(), timestamp.encode(), body))
        genuine = False
        # Every secret meets every signature, so that the time tells nothing of which one fits.
        for version, check in self._checks:
            for told, signature in signatures:
                if told == version and check(signed, signature):
                    genuine = True
        if not genuine:
            raise InvalidSignature("no signature of the request fits a secret")
        return message_id


def parse(body: bytes) -> list[Delivery]:
    """The deliveries in a body that was verified: a JSON object, or an array of them."""
    try:
        value = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidBody("the body is not JSON in UTF-8") from error
    elements = value if isinstance(value, list) else [value]
    return [_delivery(element) for element in elements]


def _read(headers: Mapping[str, str]) -> tuple[str, str, list[tuple[str, bytes]]]:
    wanted = {"webhook-id": "", "webhook-timestamp": "", "webhook-signature": ""}
    for name, value in headers.items():
        # Frameworks differ in how they spell names; HTTP does not care.
        if name.lower() in wanted:
            wanted[name.lower()] = value
    for name, value in wanted.items():
        if not value:
            raise InvalidHeaders(f"the header {name} is missing")
    message_id, timestamp = wanted["webhook-id"], wanted["webhook-timestamp"]
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= 12):
        raise InvalidHeaders("webhook-timestamp is not a number of seconds")
    signatures: list[tuple[str, bytes]] = []
    for part in wanted["webhook-signature"].split(" ")[:_SIGNATURES_MAX]:
        version, _, text = part.partition(",")
        try:
            signatures.append(
                (version, binascii.a2b_base64(text.encode("ascii"), strict_mode=True))
            )
        except ValueError:
            continue  # of a version that we do not know, perhaps
    return message_id, timestamp, signatures


def _check_of(secret: str) -> tuple[str, Callable[[bytes, bytes], bool]]:
    """The signature version of a secret, and the check of a signed text against a signature."""
    if secret.startswith(_ED25519_PREFIX):
        return "v1a", _ed25519_check(_decoded(secret, _ED25519_PREFIX, 32, 32))
    # Anything else is taken for an HMAC secret, with or without its prefix, as other libraries do.
    keyed = hmac.new(_decoded(secret, _HMAC_PREFIX, 24, 64), digestmod="sha256")

    def check(signed: bytes, signature: bytes) -> bool:
        state = keyed.copy()
        state.update(signed)
        return hmac.compare_digest(state.digest(), signature)

    return "v1", check


def _ed25519_check(key: bytes) -> Callable[[bytes, bytes], bool]:
    try:
        # An extra: only who uses such keys has it.
        from cryptography.exceptions import InvalidSignature as Mismatch  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric.ed25519 import (  # noqa: PLC0415
            Ed25519PublicKey,
        )
    except ImportError as error:
        raise ImportError("whpk_ keys need the extra: pip install 'outrider[ed25519]'") from error
    public = Ed25519PublicKey.from_public_bytes(key)

    def check(signed: bytes, signature: bytes) -> bool:
        try:
            public.verify(signature, signed)
        except Mismatch:
            return False
        return True

    return check


def _decoded(secret: str, prefix: str, bytes_min: int, bytes_max: int) -> bytes:
    try:
        key = binascii.a2b_base64(secret.removeprefix(prefix).encode("ascii"), strict_mode=True)
    except ValueError:
        key = b""
    if not bytes_min <= len(key) <= bytes_max:
        # Without the cause and the text: what is nearly a secret must not reach a log.
        raise ValueError(
            f"a {prefix} secret is {bytes_min} to {bytes_max} bytes in base64"
        ) from None
    return key


def _delivery(element: Any) -> Delivery:
    if not isinstance(element, dict):
        raise InvalidBody("a delivery is a JSON object")
    try:
        texts = {
            name: _text(element[name])
            for name in ("source", "subject", "key", "organization", "actor")
            if name in element
        }
        return Delivery(
            id=_text(element["id"]),
            event_id=_text(element["event_id"]),
            type=_text(element["type"]),
            timestamp=_time(_text(element["timestamp"])),
            data=element["data"],
            attributes=_attributes(element.get("attributes", {})),
            **texts,
        )
    except KeyError as error:
        raise InvalidBody(f"a delivery lacks {error.args[0]!r}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidBody("a field of a delivery is not a text")
    return value


def _attributes(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidBody("attributes are not a JSON object")
    return {name: _text(text) for name, text in value.items()}


def _time(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidBody("timestamp is not a time") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
