from __future__ import annotations

import base64
import hashlib
import hmac
import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from outrider.webhooks import (
    Delivery,
    InvalidBody,
    InvalidHeaders,
    InvalidSignature,
    OutsideTolerance,
    Webhook,
    parse,
)

NOW = 1_790_000_000
KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
OTHER = "whsec_" + base64.b64encode(b"o" * 24).decode()
ELEMENT = {
    "id": "dlv_1789_3",
    "event_id": "1789",
    "type": "sales_order.created",
    "timestamp": "2026-01-31T12:00:00.250000Z",
    "data": {"order": {"total": 12345678901234567890}},
}


def body_of(*elements: object, batch: bool = False) -> bytes:
    return json.dumps(list(elements) if batch else elements[0]).encode()


def signed(
    body: bytes, *, key: bytes = KEY, at: int = NOW, message_id: str = "m1"
) -> dict[str, str]:
    text = f"{message_id}.{at}.".encode() + body
    signature = base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()
    return {
        "Webhook-Id": message_id,
        "webhook-timestamp": str(at),
        "WEBHOOK-SIGNATURE": f"v1,{signature}",
    }


def webhook(*secrets: str, now: float = NOW) -> Webhook:
    return Webhook(secrets or SECRET, clock=lambda: now)


def test_a_single_delivery_is_read() -> None:
    body = body_of(ELEMENT)
    assert webhook().verify(signed(body), body) == [
        Delivery(
            id="dlv_1789_3",
            event_id="1789",
            type="sales_order.created",
            timestamp=datetime(2026, 1, 31, 12, 0, 0, 250_000, UTC),
            data={"order": {"total": 12345678901234567890}},
        )
    ]


def test_a_batch_is_read_in_order_with_every_field() -> None:
    full = ELEMENT | {
        "id": "dlv_1790_3",
        "source": "erp/sales",
        "subject": "sales_orders/1",
        "key": "k",
        "organization": "o",
        "actor": "a",
        "attributes": {"x": "y"},
        "data": None,
    }
    body = body_of(ELEMENT, full, batch=True)
    first, second = webhook().verify(signed(body), body)
    assert first.id == "dlv_1789_3"
    assert first.attributes == {}
    assert (second.source, second.subject, second.key) == ("erp/sales", "sales_orders/1", "k")
    assert (second.organization, second.actor, second.attributes) == ("o", "a", {"x": "y"})
    assert second.data is None


@pytest.mark.parametrize(
    "change",
    [
        lambda headers, body: (headers, body + b" "),
        lambda headers, body: (headers | {"Webhook-Id": "m2"}, body),
        lambda headers, body: (headers | {"webhook-timestamp": str(NOW + 1)}, body),
        lambda headers, body: (headers | {"WEBHOOK-SIGNATURE": "v1,AAAA"}, body),
        lambda headers, body: (headers | {"WEBHOOK-SIGNATURE": "v1,not base64"}, body),
        lambda headers, body: (
            headers | {"WEBHOOK-SIGNATURE": headers["WEBHOOK-SIGNATURE"].replace("v1,", "v2,")},
            body,
        ),
        lambda _, body: (signed(body, key=b"x" * 32), body),
    ],
    ids=["body", "id", "timestamp", "signature", "not base64", "version", "secret"],
)
def test_whatever_was_changed_is_refused(change: object) -> None:
    body = body_of(ELEMENT)
    headers, changed = change(signed(body), body)  # type: ignore[operator]
    with pytest.raises(InvalidSignature):
        webhook().verify(headers, changed)


@pytest.mark.parametrize(
    ("skew", "holds"), [(300, True), (-300, True), (301, False), (-301, False)]
)
def test_requests_outside_five_minutes_are_refused(skew: int, holds: bool) -> None:
    body = body_of(ELEMENT)
    receiver = webhook(now=NOW + skew)
    if holds:
        assert receiver.check(signed(body), body) == "m1"
    else:
        with pytest.raises(OutsideTolerance):
            receiver.check(signed(body), body)


@pytest.mark.parametrize("key", [KEY, b"o" * 24])
def test_during_a_rotation_either_secret_holds(key: bytes) -> None:
    body = body_of(ELEMENT)
    assert webhook(SECRET, OTHER).verify(signed(body, key=key), body)


def test_one_of_several_signatures_suffices() -> None:
    body = body_of(ELEMENT)
    headers = signed(body)
    wrong = signed(body, key=b"w" * 32)["WEBHOOK-SIGNATURE"]
    headers["WEBHOOK-SIGNATURE"] = f"{wrong} v1a,AAAA {headers['WEBHOOK-SIGNATURE']}"
    assert webhook().verify(headers, body)


@pytest.mark.parametrize("name", ["Webhook-Id", "webhook-timestamp", "WEBHOOK-SIGNATURE"])
def test_a_missing_header_is_named(name: str) -> None:
    body = body_of(ELEMENT)
    headers = signed(body)
    del headers[name]
    with pytest.raises(InvalidHeaders, match=name.lower()):
        webhook().verify(headers, body)


@pytest.mark.parametrize("text", ["now", "-5", "1.5", "\u0661\u0662", "9" * 13])
def test_a_timestamp_is_whole_seconds(text: str) -> None:
    body = body_of(ELEMENT)
    with pytest.raises(InvalidHeaders):
        webhook().verify(signed(body) | {"webhook-timestamp": text}, body)


@pytest.mark.parametrize(
    "body",
    [
        b"\xff",
        b"{",
        b"[" * 100_000,
        b"3",
        b"[3]",
        b'{"mapped": true}',
        json.dumps(ELEMENT | {"type": 3}).encode(),
        json.dumps(ELEMENT | {"timestamp": "yesterday"}).encode(),
        json.dumps(ELEMENT | {"attributes": []}).encode(),
    ],
    ids=["utf8", "json", "deep", "number", "array", "mapped", "type", "timestamp", "attributes"],
)
def test_a_body_without_deliveries_is_told_from_a_forged_one(body: bytes) -> None:
    assert webhook().check(signed(body), body) == "m1"
    with pytest.raises(InvalidBody):
        webhook().verify(signed(body), body)


def test_ed25519_signatures_hold_and_do_not_stand_in_for_others() -> None:
    private = Ed25519PrivateKey.from_private_bytes(b"p" * 32)
    public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    body = body_of(ELEMENT)
    signature = base64.b64encode(private.sign(f"m1.{NOW}.".encode() + body)).decode()
    headers = signed(body) | {"WEBHOOK-SIGNATURE": f"v1a,{signature}"}
    key = "whpk_" + base64.b64encode(public).decode()
    assert webhook(key).verify(headers, body)
    assert webhook(SECRET, key).verify(headers, body)
    with pytest.raises(InvalidSignature):
        webhook(key).verify(headers, body + b" ")
    with pytest.raises(InvalidSignature):
        webhook(key).verify(headers | {"WEBHOOK-SIGNATURE": f"v1,{signature}"}, body)


@pytest.mark.parametrize("secret", ["whsec_AAAA", "whsec_!!!!", "whpk_AAAA", "", "geheim\u00e4"])
def test_a_wrong_secret_is_refused_without_repeating_it(secret: str) -> None:
    with pytest.raises(ValueError, match="secret is") as caught:
        webhook(secret)
    told = str(caught.value)
    assert len(secret) < 7 or secret not in told
    assert caught.value.__cause__ is None


def test_at_least_one_secret_is_needed() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Webhook([])


def test_parse_reads_a_time_of_any_offset() -> None:
    [delivery] = parse(body_of(ELEMENT | {"timestamp": "2026-01-31T14:00:00+02:00"}))
    assert delivery.timestamp == datetime(2026, 1, 31, 12, tzinfo=UTC)


def test_a_receiver_loads_neither_grpc_nor_protobuf() -> None:
    code = (
        "import sys; from outrider import Webhook; "
        "print([m for m in ('grpc', 'google.protobuf', 'cryptography') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
