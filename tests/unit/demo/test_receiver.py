"""The sample receiver counts what is genuine, once, and fails only what it was told to."""

from __future__ import annotations

import json
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator

import aiohttp
import pytest
from standardwebhooks import Webhook as Signer

from outrider_server.demo.receiver import SampleReceiver

SECRET = "whsec_" + b64encode(b"k" * 32).decode()
OTHER = "whsec_" + b64encode(b"o" * 32).decode()


def delivery(number: int) -> dict[str, object]:
    return {
        "id": f"dlv_{number}",
        "event_id": str(number),
        "type": "invoice.created",
        "timestamp": "2026-01-01T00:00:00Z",
        "data": {"n": number},
    }


async def post(receiver: SampleReceiver, path: str, body: object, secret: str = SECRET) -> int:
    from datetime import UTC, datetime

    raw = json.dumps(body)
    now = datetime.fromtimestamp(int(time.time()), UTC)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Signer(b64decode(secret[6:])).sign("msg_1", now, raw),
    }
    async with (
        aiohttp.ClientSession() as session,
        session.post(receiver.url(path), data=raw, headers=headers) as response,
    ):
        return response.status


def chances(*numbers: float) -> Iterator[float]:
    return iter(numbers)


async def test_genuine_deliveries_are_counted_one_by_one_and_copies_apart() -> None:
    receiver = SampleReceiver(lambda: 0.0)
    receiver.expect("crm", SECRET)
    async with receiver.listening(0):
        assert await post(receiver, "crm", delivery(1)) == 200
        assert await post(receiver, "crm", [delivery(1), delivery(2), delivery(3)]) == 200
    counts = receiver.received["crm"]
    assert (counts.requests, counts.deliveries, counts.copies) == (2, 3, 1)
    assert receiver.deliveries == 3


async def test_what_another_secret_signed_is_refused_and_not_counted() -> None:
    receiver = SampleReceiver(lambda: 0.0)
    receiver.expect("crm", SECRET)
    async with receiver.listening(0):
        assert await post(receiver, "crm", delivery(1), OTHER) == 401
        assert await post(receiver, "elsewhere", delivery(1)) == 404
    assert receiver.deliveries == 0
    assert receiver.received["crm"].not_genuine == 1


async def test_the_share_that_is_to_fail_fails_and_counts_when_it_comes_again() -> None:
    numbers = chances(0.05, 0.95)
    receiver = SampleReceiver(lambda: next(numbers))
    receiver.expect("warehouse", SECRET, share_failed=0.1)
    async with receiver.listening(0):
        assert await post(receiver, "warehouse", delivery(1)) == 503
        assert await post(receiver, "warehouse", delivery(1)) == 200
    counts = receiver.received["warehouse"]
    assert (counts.failed_on_purpose, counts.deliveries, counts.copies) == (1, 1, 0)


async def test_it_remembers_a_bounded_number_of_ids() -> None:
    receiver = SampleReceiver(lambda: 0.0, ids_max=2)
    receiver.expect("crm", SECRET)
    async with receiver.listening(0):
        await post(receiver, "crm", [delivery(n) for n in (1, 2, 3)])
        await post(receiver, "crm", [delivery(3), delivery(1)])
    assert receiver.received["crm"].copies == 1
    assert len(receiver._ids) == 2


async def test_it_listens_where_it_did_before_and_elsewhere_only_if_that_is_taken() -> None:
    first, second = SampleReceiver(lambda: 0.0), SampleReceiver(lambda: 0.0)
    async with first.listening(0):
        port = first.port
        async with second.listening(port):
            assert second.port not in (0, port)
    async with second.listening(port):
        assert second.port == port


@pytest.mark.parametrize("secret", ["", "whsec_short"])
def test_a_secret_that_is_none_is_refused_at_once(secret: str) -> None:
    with pytest.raises(ValueError, match="secret"):
        SampleReceiver(lambda: 0.0).expect("crm", secret)
