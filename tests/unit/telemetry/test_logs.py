"""Lines: whole, bounded in size and number, without secrets, and never in the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from io import StringIO
from typing import Any, Literal

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from outrider_server.domain.outcome import AttemptError, Outcome, Verdict
from outrider_server.telemetry.counters import TelemetryCounters
from outrider_server.telemetry.logs import LineBound, PipelineLog, configure, redact

FAILED = Outcome(Verdict.RETRY, 503, AttemptError.STATUS, 12.3456, detail="the receiver said 503")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def stream() -> StringIO:
    return StringIO()


def lines(stream: StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def fail(log: PipelineLog, **more: Any) -> None:
    log.log_attempt_failed(
        tenant=3, endpoint=7, outcome=FAILED, deliveries=20, attempt=2, first_sequence=1 << 60,
        retry_seconds=6.04, **more,
    )  # fmt: skip


def test_line_is_one_json_object_with_level_and_time_in_utc(stream: StringIO) -> None:
    configure("info", "json", stream)
    structlog.get_logger().info("started", node="a", text="two\nlines", number=1.5, nothing=None)
    (line,) = lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "event": "started",
        "level": "info",
        "node": "a",
        "text": "two lines",
        "number": 1.5,
        "nothing": None,
    }


def test_lines_below_the_level_are_not_written(stream: StringIO) -> None:
    configure("warning", "json", stream)
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")
    assert [line["event"] for line in lines(stream)] == ["loud"]


def test_libraries_and_warnings_come_out_in_the_same_form(stream: StringIO) -> None:
    configure("info", "json", stream)
    logging.getLogger("aiohttp").info("chatter")
    logging.getLogger("aiohttp").warning("slow %s", "https://u:hunter2@host/x?token=abc")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("old thing", UserWarning, stacklevel=1)
    first, second = lines(stream)
    assert first["source"] == "aiohttp"
    assert first["level"] == "warning"
    assert first["event"] == "slow https://[redacted]@host/x?[redacted]"
    assert "old thing" in second["event"]


def test_exception_of_a_task_is_one_line_with_its_trace(stream: StringIO) -> None:
    configure("info", "json", stream)
    error = ValueError("postgres://u:pw@h")
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.call_exception_handler({"message": "lost", "exception": error})
    (line,) = lines(stream)
    assert line["source"] == "asyncio"
    assert "ValueError: postgres://[redacted]@h" in line["exception"]


def test_console_line_is_for_people_and_stays_one_line(stream: StringIO) -> None:
    configure("info", "console", stream)
    structlog.get_logger().info("started", node="a\nb\x1b[31m", password="hunter2")
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert "started" in text
    assert "\x1b" not in text
    assert "hunter2" not in text


@pytest.mark.parametrize("form", ["json", "console"])
def test_trace_is_written_without_secrets(
    form: Literal["json", "console"], stream: StringIO
) -> None:
    configure("info", form, stream)
    try:
        raise RuntimeError("cannot reach postgresql://outrider:hunter2@db/outrider")
    except RuntimeError:
        structlog.get_logger().exception("database gone")
    text = stream.getvalue()
    assert "RuntimeError" in text
    assert "postgresql://[redacted]@db/outrider" in text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    "name",
    ["secret", "endpoint_secrets", "Authorization", "proxy-authorization", "api_key", "apiKey", "password", "PGPASSWORD",
     "private_key", "signing_key", "Cookie", "set-cookie", "credential", "token", "access_token"],
)  # fmt: skip
def test_value_under_a_secret_name_is_left_out(name: str) -> None:
    for value in ("hunter2", b"hunter2", ["hunter2"], {"a": "hunter2"}):
        assert redact(None, "", {name: value}) == {name: "[redacted]"}
        assert "hunter2" not in str(redact(None, "", {"headers": {name: value}}))
        assert "hunter2" not in str(redact(None, "", {"headers": [(name, value)]}))


@pytest.mark.parametrize(
    "name", ["key", "idempotency_key", "page_token", "keys", "endpoint", "pass_through"]
)
def test_harmless_name_keeps_its_value(name: str) -> None:
    assert redact(None, "", {name: "seen"}) == {name: "seen"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("to https://user:hunter2@host:1/p", "to https://[redacted]@host:1/p"),
        ("https://h/p?sig=hunter2&b=hunter2 failed", "https://h/p?[redacted] failed"),
        ("postgres://u:hunter2@x@h/d", "postgres://[redacted]@h/d"),
        ("header was Bearer hunter2hunter2", "header was Bearer [redacted]"),
        ("mail a@b.example, 10:30", "mail a@b.example, 10:30"),
        ("https://h/p/@name", "https://h/p/@name"),
    ],
)
def test_secret_in_a_text_is_left_out(text: str, shown: str) -> None:
    assert redact(None, "", {"detail": text}) == {"detail": shown}
    assert redact(None, "", {"detail": [{"deep": text}]}) == {"detail": [{"deep": shown}]}


def test_line_is_bounded_in_length_breadth_and_depth() -> None:
    deep: Any = "x"
    for _ in range(1_000):
        deep = [deep]
    line = redact(None, "", {
        "text": "x" * 10**6, "list": ["x"] * 10**5, "dict": {str(n): n for n in range(10**5)}, "deep": deep,
    })  # fmt: skip
    assert len(json.dumps(line)) < 6_000


def test_what_cannot_be_written_is_told_by_its_type(stream: StringIO) -> None:
    class Odd:
        @override
        def __repr__(self) -> str:
            raise RuntimeError("no")

    configure("info", "json", stream)
    structlog.get_logger().info(
        "odd",
        value=Odd(),
        large=1 << 200,
        half="\ud800",
        data=b"ab",
        number=float("nan"),
        keys={1: 2},
    )
    (line,) = lines(stream)
    assert line["value"] == "[Odd]"
    assert line["large"] == 1 << 200
    assert line["half"] == " "
    assert line["data"] == "b'ab'"
    assert line["keys"] == {"1": 2}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.from_regex(r"field_[a-z]{1,8}", fullmatch=True), json_values, max_size=5))
def test_whatever_a_line_holds_it_is_one_line_of_json(values: dict[str, Any]) -> None:
    stream = StringIO()
    configure("info", "json", stream)
    structlog.get_logger().info("anything", **values)
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert set(values) <= set(json.loads(text))


class FullDisk(StringIO):
    @override
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


class ClosedPipe(StringIO):
    """Takes a line into its buffer and fails to pass it on."""

    @override
    def flush(self) -> None:
        raise BrokenPipeError


def test_line_that_cannot_be_written_is_lost_and_counted() -> None:
    closed = StringIO()
    closed.close()
    for stream in (FullDisk(), ClosedPipe(), closed):
        counters = TelemetryCounters()
        configure("info", "json", stream, counters)
        structlog.get_logger().info("started")
        logging.getLogger("library").warning("also")
        assert counters.lines_lost == 2


def test_failed_attempt_is_one_wide_line(stream: StringIO) -> None:
    configure("info", "json", stream)
    fail(PipelineLog(clock=Clock(), counters=TelemetryCounters()), circuit="closed")
    (line,) = lines(stream)
    del line["time"]
    assert line == {
        "event": "attempt failed", "level": "warning", "tenant": 3, "endpoint": 7, "verdict": "retry", "status": 503,
        "error": "status", "detail": "the receiver said 503", "duration_ms": 12.3, "deliveries": 20, "attempt": 2,
        "first_sequence": 1 << 60, "retry_seconds": 6.0, "circuit": "closed",
    }  # fmt: skip


def test_batch_is_one_wide_line(stream: StringIO) -> None:
    configure("info", "json", stream)
    log = PipelineLog(clock=Clock(), counters=TelemetryCounters())
    log.log_batch("persist", events=200, seconds=0.0123456, frames=4, shards=2)
    (line,) = lines(stream)
    del line["time"]
    assert line == {
        "event": "batch", "level": "info", "stage": "persist", "events": 200, "duration_ms": 12.35, "frames": 4,
        "shards": 2,
    }  # fmt: skip


def test_held_back_lines_are_counted_and_told_by_the_next_one(stream: StringIO) -> None:
    configure("info", "json", stream)
    clock, counters = Clock(), TelemetryCounters()
    log = PipelineLog(clock=clock, counters=counters, lines_per_second=3)
    for _ in range(10):
        fail(log)
    clock.now += 1.0
    fail(log)
    fail(log)
    assert ["suppressed" in line for line in lines(stream)] == [False, False, False, True, False]
    assert lines(stream)[3]["suppressed"] == 7
    assert counters.lines_suppressed == 7


def test_one_kind_of_line_does_not_hold_back_another(stream: StringIO) -> None:
    configure("info", "json", stream)
    log = PipelineLog(clock=Clock(), counters=TelemetryCounters(), lines_per_second=1)
    for _ in range(5):
        log.log_batch("persist", events=1, seconds=0.0)
        log.log_batch("record", events=1, seconds=0.0)
        fail(log)
    assert [line.get("stage", line["event"]) for line in lines(stream)] == [
        "persist",
        "record",
        "attempt failed",
    ]


@given(
    st.lists(st.floats(0, 0.7), max_size=200),
    st.integers(1, 5),
)
def test_no_second_has_more_lines_than_the_bound(pauses: list[float], bound: int) -> None:
    clock = Clock()
    lines_of = LineBound(bound, clock)
    admitted: list[float] = []
    for pause in pauses:
        clock.now += pause
        if lines_of.admit():
            admitted.append(clock.now)
    for index, start in enumerate(admitted):
        assert sum(1 for moment in admitted[index:] if moment - start < 1.0) <= bound
    assert len(admitted) + lines_of.take_suppressed() == len(pauses)
    assert lines_of.take_suppressed() == 0
