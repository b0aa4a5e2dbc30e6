"""The sender on real sockets, both forms of exchange against the same promises."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from standardwebhooks import Webhook
from tests.support.certificates import Authority
from tests.support.receiver import Behaviour, Cut, Receiver
from typing_extensions import override

from outrider_server.domain.endpoint import Endpoint
from outrider_server.domain.outcome import AttemptError, Outcome, Verdict
from outrider_server.policy.signing import format_secret
from outrider_server.transport.attempt import RESPONSE_KEPT_BYTES
from outrider_server.transport.webhook import Form, WebhookSender

SECRET = bytes(range(32))
SHORT_SECONDS = 0.3


@pytest.fixture(params=[Form.SESSION, Form.DIRECT], ids=lambda form: form.value)
def form(request: pytest.FixtureRequest) -> Form:
    value: Form = request.param
    return value


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        receiver.secrets("/hook", SECRET)
        yield receiver


@pytest.fixture
async def sender(form: Form) -> AsyncIterator[WebhookSender]:
    sender = WebhookSender(monotonic=time.monotonic, form=form)
    yield sender
    await sender.close()


def endpoint(url: str, **changes: Any) -> Endpoint:
    fields: dict[str, Any] = {"secrets": (SECRET,), "attempt_timeout_seconds": 10.0, **changes}
    return Endpoint(id=7, tenant=1, name="orders", url=url, **fields)


async def send(
    sender: WebhookSender, to: Endpoint, body: bytes = b'{"id":"dlv_1_2"}', number: int = 1
) -> Outcome:
    return await sender.send(to, f"dlv_{number}_2", body, "application/json", 1_764_000_000)


def assert_failed(outcome: Outcome, error: AttemptError, status: int = 0) -> None:
    assert (outcome.verdict, outcome.error, outcome.status) == (Verdict.RETRY, error, status), (
        outcome
    )
    assert outcome.detail


async def _stay_silent(writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


class TestOneRequest:
    async def test_delivers_and_signs_for_an_independent_verifier(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        now = int(datetime.now(UTC).timestamp())
        body = '{"id":"dlv_5_9","data":{"name":"Zoë"}}'.encode()
        outcome = await sender.send(
            endpoint(receiver.url("/hook")), "dlv_5_9", body, "application/json", now
        )
        assert (outcome.verdict, outcome.status, outcome.error) == (
            Verdict.DELIVERED,
            200,
            AttemptError.NONE,
        )
        [request] = receiver.requests
        assert request.signed
        assert request.body == body
        assert request.headers["content-type"] == "application/json"
        assert Webhook(format_secret(SECRET)).verify(body, request.headers)["id"] == "dlv_5_9"

    async def test_sends_the_endpoints_method_query_and_headers(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        to = endpoint(
            receiver.url("/hook?a=1&b=%20x"),
            method="PUT",
            headers=(
                ("Authorization", "Bearer t0p"),
                ("content-type", "application/cloudevents+json"),
                ("User-Agent", "ours"),
            ),
        )
        assert (await send(sender, to)).verdict is Verdict.DELIVERED
        [request] = receiver.requests
        assert request.method == "PUT"
        assert request.headers[":target"] == "/hook?a=1&b=%20x"
        assert request.headers["authorization"] == "Bearer t0p"
        assert request.headers["content-type"] == "application/cloudevents+json"
        assert request.headers["user-agent"] == "ours"
        assert request.headers["accept-encoding"] == "identity"
        assert "cookie" not in request.headers

    async def test_every_secret_signs_and_none_means_no_signature(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        other = b"o" * 32
        receiver.secrets("/other", other)
        await send(sender, endpoint(receiver.url("/other"), secrets=(SECRET, other)))
        await send(sender, endpoint(receiver.url("/other"), secrets=()))
        assert [request.signed for request in receiver.requests] == [True, False]
        assert "webhook-signature" not in receiver.requests[1].headers

    @pytest.mark.parametrize("status", [201, 204, 299])
    async def test_every_2xx_is_delivered(
        self, receiver: Receiver, sender: WebhookSender, status: int
    ) -> None:
        receiver.always("/hook", Behaviour(status=status))
        outcome = await send(sender, endpoint(receiver.url("/hook")))
        assert (outcome.verdict, outcome.status, outcome.response) == (
            Verdict.DELIVERED,
            status,
            b"",
        )

    @pytest.mark.parametrize("status", [304, 400, 401, 404, 410, 429, 500, 503])
    async def test_every_other_status_is_a_failure_that_keeps_the_response(
        self, receiver: Receiver, sender: WebhookSender, status: int
    ) -> None:
        body = b"" if status == 304 else b'{"why":"no"}'
        receiver.always("/hook", Behaviour(status=status, body=body))
        outcome = await send(sender, endpoint(receiver.url("/hook")))
        assert_failed(outcome, AttemptError.STATUS, status)
        assert outcome.response == body

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    async def test_redirects_are_not_followed(
        self, receiver: Receiver, sender: WebhookSender, status: int
    ) -> None:
        headers = (("Location", receiver.url("/elsewhere")),)
        receiver.always("/hook", Behaviour(status=status, headers=headers))
        outcome = await send(sender, endpoint(receiver.url("/hook")))
        assert_failed(outcome, AttemptError.STATUS, status)
        assert [request.path for request in receiver.requests] == ["/hook"]

    async def test_cookies_are_not_remembered(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        receiver.always("/hook", Behaviour(headers=(("Set-Cookie", "session=1; Path=/"),)))
        for number in range(2):
            await send(sender, endpoint(receiver.url("/hook")), number=number)
        assert all("cookie" not in request.headers for request in receiver.requests)

    async def test_interim_responses_are_passed_over(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        final = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
        receiver.script("/hook", Behaviour(raw=early + early + final))
        outcome = await send(sender, endpoint(receiver.url("/hook")))
        assert (outcome.verdict, outcome.status) == (Verdict.DELIVERED, 202)

    @pytest.mark.parametrize("size", [70_000, 300_000, 3_000_000])
    async def test_large_bodies_arrive_whole_and_signed(
        self, receiver: Receiver, sender: WebhookSender, size: int
    ) -> None:
        body = b'"' + b"x" * size + b'"'
        outcome = await send(sender, endpoint(receiver.url("/hook")), body)
        assert outcome.verdict is Verdict.DELIVERED
        assert receiver.requests[0].body == body
        assert receiver.requests[0].signed


class TestConnections:
    async def test_a_connection_serves_one_request_after_the_other(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        receiver.script(
            "/hook",
            Behaviour(body=b"x" * 60_000),
            Behaviour(status=500, body=b"x" * RESPONSE_KEPT_BYTES),
            Behaviour(status=204),
        )
        for number in range(5):
            await send(sender, endpoint(receiver.url("/hook")), number=number)
        assert {request.connection for request in receiver.requests} == {1}

    async def test_many_requests_at_once_each_get_a_connection(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        gate = asyncio.Event()
        receiver.always("/hook", Behaviour(hold=gate))
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(send(sender, endpoint(receiver.url("/hook")), number=number))
                for number in range(150)  # more than aiohttp's own limit of 100
            ]
            await receiver.wait_for(150)
            gate.set()
        assert {task.result().verdict for task in tasks} == {Verdict.DELIVERED}
        assert receiver.connections == 150

    @pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
    async def test_a_stale_kept_connection_is_replaced_once_with_the_same_message(
        self, receiver: Receiver, sender: WebhookSender, reset: bool
    ) -> None:
        to = endpoint(receiver.url("/hook"))
        await send(sender, to, number=1)
        receiver.script("/hook", Behaviour(cut=Cut.BEFORE_RESPONSE, reset=reset))
        outcome = await send(sender, to, number=2)
        assert outcome.verdict is Verdict.DELIVERED
        first, stale, again = receiver.requests
        assert first.connection == stale.connection != again.connection
        assert stale.message_id == again.message_id == "dlv_2_2"
        assert stale.headers["webhook-signature"] == again.headers["webhook-signature"]

    async def test_a_second_disconnect_is_the_outcome(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        to = endpoint(receiver.url("/hook"))
        async with asyncio.TaskGroup() as group:  # leaves two kept connections in the pool
            gate = asyncio.Event()
            receiver.script("/hook", Behaviour(hold=gate), times=2)
            for number in (1, 2):
                group.create_task(send(sender, to, number=number))
            await receiver.wait_for(2)
            gate.set()
        receiver.always("/hook", Behaviour(cut=Cut.BEFORE_RESPONSE))
        assert_failed(await send(sender, to, number=3), AttemptError.DISCONNECTED)
        assert len(receiver.requests) == 4
        assert receiver.connections == 3, "the second try takes a fresh connection, not a kept one"

    @pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
    async def test_a_disconnect_of_a_fresh_connection_is_not_repeated(
        self, receiver: Receiver, sender: WebhookSender, reset: bool
    ) -> None:
        receiver.always("/hook", Behaviour(cut=Cut.BEFORE_RESPONSE, reset=reset))
        assert_failed(
            await send(sender, endpoint(receiver.url("/hook"))), AttemptError.DISCONNECTED
        )
        assert len(receiver.requests) == 1

    async def test_an_answer_nobody_asked_for_is_not_taken_for_the_next(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        to = endpoint(receiver.url("/hook"))
        extra = asyncio.Event()

        async def answer_and_later_again(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await extra.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await asyncio.Event().wait()

        receiver.script("/hook", Behaviour(takeover=answer_and_later_again))
        receiver.always("/hook", Behaviour(status=500))
        assert (await send(sender, to, number=1)).status == 200
        extra.set()
        for _ in range(20):  # lets the extra answer cross loopback into the kept connection
            await asyncio.sleep(0.005)
        assert (await send(sender, to, number=2)).status == 500

    @pytest.mark.parametrize("status", [200, 500])
    async def test_an_early_answer_does_not_leave_half_a_request_in_the_pool(
        self, receiver: Receiver, sender: WebhookSender, status: int
    ) -> None:
        closed = asyncio.Event()
        served = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal served
            served += 1
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 %d Early\r\nContent-Length: 0\r\n\r\n" % status)
            await closed.wait()
            writer.transport.abort()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1024)
        try:
            to = endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook")
            for number in (1, 2):
                outcome = await send(sender, to, b"x" * 20_000_000, number)
                assert outcome.status == status
            assert served == 2
        finally:
            closed.set()
            server.close()
            await server.wait_closed()


class TestBrokenResponses:
    @pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
    @pytest.mark.parametrize(
        ("cut", "status"),
        [(Cut.BEFORE_BODY, 0), (Cut.BEFORE_RESPONSE, 0), (Cut.MID_HEAD, 0), (Cut.MID_BODY, 200)],
    )
    async def test_a_cut_response_is_never_a_success(
        self, receiver: Receiver, sender: WebhookSender, cut: Cut, reset: bool, status: int
    ) -> None:
        receiver.always("/hook", Behaviour(body=b"0123456789", cut=cut, reset=reset))
        outcome = await send(sender, endpoint(receiver.url("/hook")))
        assert outcome.verdict is Verdict.RETRY
        assert outcome.error is AttemptError.DISCONNECTED
        # A reset may overtake the head that was sent before it.
        assert outcome.status in ((0, status) if reset else (status,))

    async def test_a_response_without_a_length_ends_with_its_connection(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        async def answer(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.0 200 OK\r\n\r\nfine")
            writer.close()

        receiver.script("/hook", Behaviour(takeover=answer))
        to = endpoint(receiver.url("/hook"))
        assert (await send(sender, to, number=1)).verdict is Verdict.DELIVERED
        assert (await send(sender, to, number=2)).verdict is Verdict.DELIVERED
        assert receiver.connections == 2

    @pytest.mark.parametrize(
        "raw",
        [
            b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
            b"HTTP/1.1 abc OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        ],
        ids=["not-http", "status", "length", "length-and-chunks", "long-line", "many-headers"],
    )
    async def test_what_is_not_http_is_told_as_such(
        self, receiver: Receiver, sender: WebhookSender, raw: bytes
    ) -> None:
        receiver.always("/hook", Behaviour(raw=raw))
        assert_failed(await send(sender, endpoint(receiver.url("/hook"))), AttemptError.PROTOCOL)

    async def test_a_body_framed_wrongly_is_a_failure(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n"
        receiver.always("/hook", Behaviour(raw=raw))
        outcome = await send(sender, endpoint(receiver.url("/hook")))
        assert outcome.verdict is Verdict.RETRY
        assert outcome.error in (AttemptError.PROTOCOL, AttemptError.DISCONNECTED)

    async def test_switching_protocols_is_a_failure_and_ends_the_connection(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        raw = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
        receiver.script("/hook", Behaviour(raw=raw))
        to = endpoint(receiver.url("/hook"), attempt_timeout_seconds=2.0)
        assert (await send(sender, to, number=1)).verdict is Verdict.RETRY
        assert (await send(sender, to, number=2)).verdict is Verdict.DELIVERED
        assert receiver.requests[0].connection != receiver.requests[1].connection


class TestBounds:
    async def test_only_the_first_16_kib_of_a_failure_are_kept(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        body = bytes(range(256)) * 40_000
        receiver.always("/hook", Behaviour(status=500, body=body))
        to = endpoint(receiver.url("/hook"))
        outcome = await send(sender, to, number=1)
        assert outcome.response == body[:RESPONSE_KEPT_BYTES]
        await send(sender, to, number=2)
        assert receiver.connections == 2, "what is not read to its end is not kept open"

    @pytest.mark.parametrize("status", [200, 500])
    @pytest.mark.parametrize("framing", ["length", "chunks"])
    async def test_an_endless_body_is_left_and_its_connection_closed(
        self, receiver: Receiver, sender: WebhookSender, status: int, framing: str
    ) -> None:
        block = b"x" * 65_536
        written = 0

        async def stream(writer: asyncio.StreamWriter) -> None:
            nonlocal written
            line = (
                "Transfer-Encoding: chunked"
                if framing == "chunks"
                else "Content-Length: 10737418240"
            )
            writer.write(f"HTTP/1.1 {status} S\r\n{line}\r\n\r\n".encode())
            piece = b"10000\r\n%b\r\n" % block if framing == "chunks" else block
            while True:  # ends with the sender's closing
                writer.write(piece)
                await writer.drain()
                written += len(block)

        receiver.always("/hook", Behaviour(takeover=stream))
        tracemalloc.start()
        try:
            outcome = await send(sender, endpoint(receiver.url("/hook")))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        await receiver.wait_until(lambda: receiver.connections_open == 0)
        assert outcome.status == status
        assert outcome.verdict is (Verdict.DELIVERED if status == 200 else Verdict.RETRY)
        assert len(outcome.response) == (0 if status == 200 else RESPONSE_KEPT_BYTES)
        assert peak < 8 * 1024 * 1024
        # What the kernel's buffers on both sides hold, far from the 10 GiB that were offered.
        assert written < 64 * 1024 * 1024

    async def test_a_compressed_body_is_kept_as_it_came(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        bomb = gzip.compress(bytes(8 * 1024 * 1024), compresslevel=9)
        assert len(bomb) < RESPONSE_KEPT_BYTES
        headers = (("Content-Encoding", "gzip"),)
        receiver.always("/hook", Behaviour(status=500, headers=headers, body=bomb))
        outcome = await send(sender, endpoint(receiver.url("/hook")))
        assert outcome.response == bomb


class TestTimeouts:
    async def test_a_receiver_that_never_answers_costs_the_timeout(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        receiver.always("/hook", Behaviour(hold=asyncio.Event()))
        to = endpoint(receiver.url("/hook"), attempt_timeout_seconds=SHORT_SECONDS)
        outcome = await send(sender, to)
        assert_failed(outcome, AttemptError.TIMEOUT)
        assert "waiting for the response" in outcome.detail
        assert outcome.duration_ms == pytest.approx(SHORT_SECONDS * 1000, rel=0.5)
        await receiver.wait_until(lambda: receiver.connections_open == 0)

    @pytest.mark.parametrize(
        ("start", "piece", "status"),
        [
            (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x", 200),
            (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0),
        ],
        ids=["head", "body", "interim"],
    )
    async def test_a_trickle_does_not_outlast_the_timeout(
        self, receiver: Receiver, sender: WebhookSender, start: bytes, piece: bytes, status: int
    ) -> None:
        async def trickle(writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(RuntimeError):  # uvloop's word for a closed transport
                writer.write(start)
                while True:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.02)

        receiver.always("/hook", Behaviour(takeover=trickle))
        to = endpoint(receiver.url("/hook"), attempt_timeout_seconds=SHORT_SECONDS)
        outcome = await send(sender, to)
        assert_failed(outcome, AttemptError.TIMEOUT, status)
        assert outcome.duration_ms == pytest.approx(SHORT_SECONDS * 1000, rel=0.5)
        await receiver.wait_until(lambda: receiver.connections_open == 0)

    async def test_a_receiver_that_does_not_read_costs_the_timeout_and_no_socket(
        self, form: Form
    ) -> None:
        dialled: list[socket.socket] = []

        def dial(address: Any) -> socket.socket:
            dialled.append(socket.socket(*address[:3]))
            return dialled[-1]

        done = asyncio.Event()

        async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await done.wait()
            writer.transport.abort()

        server = await asyncio.start_server(ignore, "127.0.0.1", 0, limit=1024)
        sender = WebhookSender(monotonic=time.monotonic, form=form, socket_factory=dial)
        try:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            to = endpoint(url, attempt_timeout_seconds=SHORT_SECONDS)
            assert_failed(await send(sender, to, b"x" * 20_000_000), AttemptError.TIMEOUT)
            # A close that first waits until all is written would keep the socket for as long as nobody reads.
            async with asyncio.timeout(5):
                while dialled[0].fileno() != -1:
                    await asyncio.sleep(0)
            assert len(dialled) == 1
        finally:
            done.set()
            await sender.close()
            server.close()
            await server.wait_closed()

    async def test_both_tries_of_a_stale_connection_share_one_timeout(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        to = endpoint(receiver.url("/hook"), attempt_timeout_seconds=SHORT_SECONDS)
        await send(sender, to, number=1)
        gate = asyncio.Event()
        asyncio.get_running_loop().call_later(SHORT_SECONDS * 0.6, gate.set)
        receiver.script(
            "/hook",
            Behaviour(hold=gate, cut=Cut.BEFORE_RESPONSE),
            Behaviour(hold=asyncio.Event()),
        )
        outcome = await send(sender, to, number=2)
        assert_failed(outcome, AttemptError.TIMEOUT)
        assert outcome.duration_ms < SHORT_SECONDS * 1000 * 1.4
        assert len(receiver.requests) == 3

    async def test_cancelling_leaves_no_connection_and_is_not_an_outcome(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        receiver.always("/hook", Behaviour(hold=asyncio.Event()))
        task = asyncio.ensure_future(send(sender, endpoint(receiver.url("/hook"))))
        await receiver.wait_for(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await receiver.wait_until(lambda: receiver.connections_open == 0)

    async def test_closing_ends_requests_in_flight_as_disconnected(
        self, receiver: Receiver, form: Form
    ) -> None:
        sender = WebhookSender(monotonic=time.monotonic, form=form)
        await send(sender, endpoint(receiver.url("/hook")), number=1)
        receiver.always("/hook", Behaviour(hold=asyncio.Event()))
        task = asyncio.ensure_future(send(sender, endpoint(receiver.url("/hook")), number=2))
        await receiver.wait_for(2)
        await sender.close()
        assert_failed(await task, AttemptError.DISCONNECTED)


class _Names(AbstractResolver):
    """Resolves one name to loopback, and knows no other."""

    @override
    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        if host != "receiver.test":
            raise OSError(None, "unknown name")
        return [
            ResolveResult(hostname=host, host="127.0.0.1", port=port, family=2, proto=0, flags=0)
        ]

    @override
    async def close(self) -> None:
        pass


class TestConnecting:
    async def test_a_refused_connection(self, sender: WebhookSender) -> None:
        async with Receiver() as gone:
            url = gone.url("/hook")
        assert_failed(await send(sender, endpoint(url)), AttemptError.CONNECT)

    async def test_names_are_resolved_and_sent_as_the_host(
        self, receiver: Receiver, form: Form
    ) -> None:
        sender = WebhookSender(monotonic=time.monotonic, form=form, resolver=_Names())
        try:
            outcome = await send(sender, endpoint(receiver.url("/hook", "receiver.test")))
            assert outcome.verdict is Verdict.DELIVERED
            assert receiver.requests[0].headers["host"] == f"receiver.test:{receiver.port}"
            unknown = await send(sender, endpoint("http://nowhere.test/hook"), number=2)
            assert_failed(unknown, AttemptError.DNS)
        finally:
            await sender.close()

    @pytest.mark.parametrize("host", ["2130706433", "127.1", "0"])
    async def test_odd_spellings_of_addresses_are_not_dialled(
        self, receiver: Receiver, sender: WebhookSender, host: str
    ) -> None:
        assert_failed(await send(sender, endpoint(receiver.url("/hook", host))), AttemptError.DNS)
        assert receiver.connections == 0

    async def test_the_socket_factory_can_forbid_an_address(
        self, receiver: Receiver, form: Form
    ) -> None:
        def guard(address: Any) -> Any:
            raise PermissionError(13, "denied")

        sender = WebhookSender(monotonic=time.monotonic, form=form, socket_factory=guard)
        try:
            outcome = await send(sender, endpoint(receiver.url("/hook")))
            assert_failed(outcome, AttemptError.FORBIDDEN_ADDRESS)
            assert receiver.connections == 0
        finally:
            await sender.close()

    @pytest.mark.parametrize(
        "changes",
        [
            {"url": "ftp://127.0.0.1/"},
            {"url": "http://user:hunter2@127.0.0.1/"},
            {"headers": (("X", "a\r\nHost: evil"),)},
            {"headers": (("Content-Length", "1"),)},
            {"method": "GET / HTTP/1.1\r\nX:"},
        ],
        ids=["scheme", "user", "injection", "length", "method"],
    )
    async def test_an_endpoint_that_should_not_exist_is_not_sent_to(
        self, receiver: Receiver, sender: WebhookSender, changes: dict[str, Any]
    ) -> None:
        fields = {"url": receiver.url("/hook"), **changes}
        outcome = await send(sender, endpoint(**fields))
        assert_failed(outcome, AttemptError.INTERNAL)
        assert receiver.connections == 0
        assert "hunter2" not in outcome.detail
        assert "evil" not in outcome.detail

    async def test_a_message_id_cannot_forge_a_header(
        self, receiver: Receiver, sender: WebhookSender
    ) -> None:
        outcome = await sender.send(
            endpoint(receiver.url("/hook")), "a\r\nX: y", b"{}", "application/json", 1
        )
        assert_failed(outcome, AttemptError.INTERNAL)
        assert receiver.connections == 0

    @pytest.mark.parametrize("size", [100, 1_000_000])
    @pytest.mark.parametrize(
        "behaviour",
        [
            Behaviour(cut=Cut.BEFORE_RESPONSE),
            Behaviour(cut=Cut.BEFORE_BODY, reset=True),
            Behaviour(cut=Cut.MID_BODY, body=b"1234"),
            Behaviour(raw=b"nonsense\r\n\r\n"),
            Behaviour(status=500),
            Behaviour(takeover=_stay_silent),
        ],
        ids=["closed", "reset", "cut", "nonsense", "status", "timeout"],
    )
    async def test_no_detail_shows_the_urls_credentials(
        self, receiver: Receiver, sender: WebhookSender, behaviour: Behaviour, size: int
    ) -> None:
        receiver.always("/s3cr3t", behaviour)
        to = endpoint(receiver.url("/s3cr3t?token=s3cr3t"), attempt_timeout_seconds=SHORT_SECONDS)
        outcome = await send(sender, to, b"x" * size)
        assert outcome.verdict is Verdict.RETRY
        assert outcome.detail
        assert "s3cr3t" not in repr(outcome)


class TestTls:
    async def outcome(
        self, form: Form, tmp_path: Path, *, trusted: bool = True, **certificate: Any
    ) -> Outcome:
        authority = Authority(tmp_path)
        context = authority.client_context() if trusted else Authority(tmp_path).client_context()
        async with Receiver(tls=authority.server_context(**certificate)) as receiver:
            receiver.secrets("/hook", SECRET)
            sender = WebhookSender(monotonic=time.monotonic, form=form, ssl_context=context)
            try:
                first = await send(sender, endpoint(receiver.url("/hook")), number=1)
                await send(sender, endpoint(receiver.url("/hook")), number=2)
                if first.verdict is Verdict.DELIVERED:
                    assert [request.signed for request in receiver.requests] == [True, True]
                    assert receiver.connections == 1
                else:
                    assert receiver.requests == []
                return first
            finally:
                await sender.close()

    async def test_a_good_certificate_is_accepted(self, form: Form, tmp_path: Path) -> None:
        assert (await self.outcome(form, tmp_path)).verdict is Verdict.DELIVERED

    @pytest.mark.parametrize(
        ("certificate", "words"),
        [
            ({"trusted": False}, "unable to get local issuer"),
            ({"expired": True}, "expired"),
            ({"name": "10.0.0.1"}, "IP address mismatch"),
        ],
        ids=["unknown-issuer", "expired", "wrong-name"],
    )
    async def test_a_bad_certificate_is_refused_and_told(
        self, form: Form, tmp_path: Path, certificate: dict[str, Any], words: str
    ) -> None:
        outcome = await self.outcome(form, tmp_path, **certificate)
        assert_failed(outcome, AttemptError.TLS)
        assert words in outcome.detail

    async def test_plain_http_where_tls_was_expected(self, sender: WebhookSender) -> None:
        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        try:
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            assert_failed(await send(sender, endpoint(url)), AttemptError.TLS)
        finally:
            server.close()
            await server.wait_closed()

    async def test_a_handshake_that_hangs_ends_at_the_timeout(self, sender: WebhookSender) -> None:
        done = asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await done.wait()
            writer.transport.abort()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        try:
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            outcome = await send(sender, endpoint(url, attempt_timeout_seconds=SHORT_SECONDS))
            assert_failed(outcome, AttemptError.TIMEOUT)
            assert "connecting" in outcome.detail
        finally:
            done.set()
            server.close()
            await server.wait_closed()
