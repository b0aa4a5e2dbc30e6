"""The receiver verifies everything, however a request is cut into pieces, and refuses what does not fit."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.board import Board, Received
from benchmarks.receivers import BAD, OK, Connection, Inbox
from benchmarks.scenario import NUMBER_BASE, TIME_BASE, Plan, Topology, plan_of, topology_of
from typing_extensions import override

from outrider_server.policy.envelope import batch_id
from outrider_server.policy.signing import Signer


class WrittenTransport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    @override
    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    @override
    def close(self) -> None:
        self.closed = True


class Setting:
    """An inbox, a connection to it, and the requests a server would send."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.topology: Topology = topology_of(plan, "test")
        self.secrets = [bytes([number]) * 32 for number in range(len(self.topology.endpoints))]
        board = Board(folder / "board", create=True)
        self.row = board.row(3)
        self.inbox = Inbox(plan, "test", self.secrets, self.row)
        self.inbox.epoch_us = time.monotonic_ns() // 1000 - 10_000_000
        self.transport = WrittenTransport()
        self.connection = Connection(self.inbox)
        self.connection.connection_made(self.transport)

    def numbers(self, endpoint: int) -> list[int]:
        return sorted(self.topology.routes_of(endpoint))

    def request(
        self,
        endpoint: int,
        numbers: list[int],
        *,
        message_id: str = "",
        timestamp: int = 0,
        secret: bytes = b"",
        path: str = "",
    ) -> bytes:
        elements: list[dict[str, Any]] = [
            {
                "id": f"dlv_{7_000 + number}_{number + 1}",
                "event_id": str(7_000 + number),
                "data": {"n": NUMBER_BASE + number, "t": TIME_BASE + 4_000_000},
            }
            for number in numbers
        ]
        body = json.dumps(elements[0] if self.plan.single else elements).encode()
        named = [(7_000 + number, number + 1) for number in numbers]
        message_id = message_id or (elements[0]["id"] if self.plan.single else batch_id(named))
        timestamp = timestamp or int(time.time())
        signer = Signer((secret or self.secrets[endpoint],))
        head = (
            f"POST {path or f'/{endpoint}'} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: application/json\r\nWebhook-Id: {message_id}\r\nwebhook-timestamp: {timestamp}\r\n"
            f"webhook-signature: {signer.sign(message_id, timestamp, body)}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(plan_of("batched", {"subscriptions": 100, "seconds": 5.0}), tmp_path)


def test_a_genuine_batch_is_counted_and_its_latency_taken(setting: Setting) -> None:
    numbers = setting.numbers(4)
    setting.connection.data_received(setting.request(4, numbers))
    assert setting.transport.written == OK
    assert setting.row[Received.REQUESTS] == 1
    assert setting.row[Received.DELIVERIES] == len(numbers)
    (latencies,) = setting.inbox.end_to_end
    found = latencies.percentiles()
    assert found.count == len(numbers)
    assert 5_900 < found.p50 < 16_000  # meant to be sent 4 s after the start, which was 10 s ago


def test_events_meant_for_the_warm_up_have_no_part_in_the_latencies(setting: Setting) -> None:
    request = setting.request(4, setting.numbers(4)).replace(b"", b"")
    setting.inbox._phases = [("", 5_000_000, 6_000_000)]
    setting.connection.data_received(request)
    assert setting.row[Received.DELIVERIES] == len(setting.numbers(4))
    assert setting.inbox.end_to_end[0].percentiles().count == 0


@pytest.mark.parametrize("piece", [1, 7, 100, 350])
def test_requests_may_come_in_any_pieces(setting: Setting, piece: int) -> None:
    data = b"".join(setting.request(number, setting.numbers(number)) for number in range(3))
    for begin in range(0, len(data), piece):
        setting.connection.data_received(data[begin : begin + piece])
    assert setting.transport.written == OK * 3
    assert setting.inbox.bad == {}


def test_several_requests_in_one_piece_are_each_answered(setting: Setting) -> None:
    setting.connection.data_received(
        b"".join(setting.request(number, setting.numbers(number)) for number in range(5))
    )
    assert setting.transport.written == OK * 5


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"secret": b"another" * 6}, "signature"),
        ({"timestamp": 1_000_000_000}, "timestamp"),
        ({"message_id": "bat_1_2_00"}, "webhook-id"),
        ({"path": "/nowhere"}, "path"),
    ],
)
def test_what_does_not_verify_is_refused_and_counted(
    setting: Setting, changed: dict[str, Any], why: str
) -> None:
    setting.connection.data_received(setting.request(4, setting.numbers(4), **changed))
    assert setting.transport.written == BAD
    assert setting.inbox.bad == {why: 1}
    assert setting.row[Received.BAD] == 1
    assert setting.row[Received.DELIVERIES] == 0


def test_a_changed_body_does_not_verify(setting: Setting) -> None:
    request = setting.request(4, setting.numbers(4))
    setting.connection.data_received(request[:-3] + b" }]")
    assert setting.inbox.bad == {"signature": 1}


def test_a_single_request_is_named_by_its_delivery(tmp_path: Path) -> None:
    setting = Setting(plan_of("single", {"subscriptions": 20, "seconds": 5.0}), tmp_path)
    (number, *_) = setting.numbers(2)
    setting.connection.data_received(setting.request(2, [number]))
    setting.connection.data_received(setting.request(2, [number], message_id="bat_7000_1_x"))
    assert setting.transport.written == OK + BAD
    assert setting.inbox.bad == {"webhook-id": 1}


@pytest.mark.parametrize("data", [b"nonsense\r\n\r\n", b"POST /1 HTTP/1.1\r\n\r\n", b"x" * 20_000])
def test_what_is_no_request_ends_the_connection_and_is_counted(
    setting: Setting, data: bytes
) -> None:
    setting.connection.data_received(data)
    assert setting.transport.closed
    assert setting.row[Received.BAD] == 1


def test_the_report_holds_the_ledgers_and_all_counts(setting: Setting, tmp_path: Path) -> None:
    numbers = setting.numbers(4)
    setting.connection.data_received(setting.request(4, numbers))
    report = setting.inbox.report([tmp_path / "seen"])
    seen = (tmp_path / "seen").read_bytes()
    assert sum(seen) == len(numbers)
    assert all(seen[number] for number in numbers)
    assert json.loads(json.dumps(report))["deliveries"] == len(numbers)
