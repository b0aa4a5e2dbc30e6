"""Lines for people and machines: JSON or console, secrets left out, every kind of recurring line bounded.

A line is written per batch or per failed attempt, never per event. Whatever a line holds, writing it never raises, is
never longer than a bound, and never spans more than one line where text from outside is part of it.
"""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Callable, MutableMapping
from typing import Any, Literal, TextIO, cast

import orjson
import structlog

from outrider_server.domain.outcome import Outcome
from outrider_server.telemetry.counters import TelemetryCounters

REDACTED = "[redacted]"
VALUE_CHARACTERS_MAX = 2_000
TRACE_CHARACTERS_MAX = 16_000
VALUES_MAX = 50
DEPTH_MAX = 4

SECRET_NAME = re.compile(
    r"secret|passw|authorization|api_?key|private_?key|signing_?key|cookie|credential|"
    r"^(access_|refresh_|bearer_)?token$",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9+/=._~-]{6,}", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(\w://)[^/\s]*@")
_QUERY_IN_URL = re.compile(r"(\w://[^\s?\"'<>]*\?)[^\s\"'<>]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_CONTROL_IN_TRACE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

Logger = Any
"""A structlog logger: it has whichever level's methods its configuration gives it."""


def configure(
    level: Literal["debug", "info", "warning", "error"],
    form: Literal["json", "console"],
    stream: TextIO,
    counters: TelemetryCounters | None = None,
) -> None:
    """Set up this process's logging, ours and the libraries'. Called once by each process, before it does anything.

    Libraries write through the standard `logging`, from warnings up, and come out in the same form.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    # It has of a stream what loggers use of one.
    out = cast(TextIO, _LosingStream(stream, counters or TelemetryCounters()))
    first: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    # Redaction comes after a traceback has become text, for an exception's message may hold anything.
    last: list[structlog.typing.Processor] = [structlog.processors.format_exc_info, redact]
    last.append(
        structlog.processors.JSONRenderer(serializer=_json)
        if form == "json"
        else structlog.dev.ConsoleRenderer(
            colors=stream.isatty(),
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    structlog.configure(
        processors=[*first, *last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*first, structlog.stdlib.ExtraAdder(), _name_source],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))
    logging.captureWarnings(capture=True)


class LineBound:
    """Allows at most `lines_per_second` in any second, and counts what it held back."""

    def __init__(self, lines_per_second: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._written: deque[float] = deque(maxlen=lines_per_second)
        self.suppressed = 0

    def admit(self) -> bool:
        now = self._clock()
        if len(self._written) == self._written.maxlen and now - self._written[0] < 1.0:
            self.suppressed += 1
            return False
        self._written.append(now)
        return True

    def take_suppressed(self) -> int:
        """How many were held back since this was last asked."""
        count, self.suppressed = self.suppressed, 0
        return count


class PipelineLog:
    """The recurring lines of the event's path. Each kind has a bound of its own, so that none drowns another.

    A line's `suppressed` says how many of its kind were held back before it. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        counters: TelemetryCounters,
        lines_per_second: int = 20,
        logger: Logger | None = None,
    ) -> None:
        self._clock = clock
        self._counters = counters
        self._lines_per_second = lines_per_second
        self._logger: Logger = logger if logger is not None else structlog.get_logger()
        self._failures = LineBound(lines_per_second, clock)
        self._batches: dict[str, LineBound] = {}

    def log_attempt_failed(
        self,
        *,
        tenant: int,
        endpoint: int,
        outcome: Outcome,
        deliveries: int,
        attempt: int,
        first_sequence: int,
        retry_seconds: float | None,
        **more: object,
    ) -> None:
        """Tell one failed request: who, how many deliveries, where it broke, when it is tried again (None: never).

        The URL is left out on purpose, for it often holds a secret; the endpoint's number finds it.
        """
        if not self._admit(self._failures):
            return
        self._logger.warning(
            "attempt failed",
            tenant=tenant,
            endpoint=endpoint,
            verdict=outcome.verdict.name.lower(),
            status=outcome.status,
            error=outcome.error.name.lower(),
            detail=outcome.detail,
            duration_ms=round(outcome.duration_ms, 1),
            deliveries=deliveries,
            attempt=attempt,
            first_sequence=first_sequence,
            retry_seconds=None if retry_seconds is None else round(retry_seconds, 1),
            **more,
            **_suppressed(self._failures),
        )

    def log_batch(self, stage: str, *, events: int, seconds: float, **more: object) -> None:
        """Tell one batch of a stage: an ingest transaction, a record, a page of owed deliveries."""
        bound = self._batches.get(stage)
        if bound is None:
            # Stages are few and named in code, so this does not grow.
            bound = self._batches[stage] = LineBound(self._lines_per_second, self._clock)
        if not self._admit(bound):
            return
        self._logger.info(
            "batch",
            stage=stage,
            events=events,
            duration_ms=round(seconds * 1_000, 2),
            **more,
            **_suppressed(bound),
        )

    def _admit(self, bound: LineBound) -> bool:
        if bound.admit():
            return True
        self._counters.lines_suppressed += 1
        return False


def redact(
    _logger: object, _method: str, line: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Leave secrets out, by the name they stand under and by their look; clip what is long.

    A value deeper than lines go is shown as its text, and so is checked as text.
    """
    for name, value in line.items():
        if name == "exception" and isinstance(value, str):
            clean = _without_secrets(value[:TRACE_CHARACTERS_MAX])
            line[name] = _CONTROL_IN_TRACE.sub(" ", clean)
        else:
            line[name] = _clean(name, value, 0)
    return line


def _clean(name: object, value: Any, depth: int) -> Any:
    if isinstance(name, str) and SECRET_NAME.search(name) and not isinstance(value, bool | None):
        return REDACTED
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return _clean_text(value)
    if depth < DEPTH_MAX:
        if isinstance(value, dict):
            pairs = list(value.items())[:VALUES_MAX]
            return {_clean_text(str(k)): _clean(k, v, depth + 1) for k, v in pairs}
        if isinstance(value, list | tuple):
            # A pair's first half may name its second, as with headers.
            if len(value) == 2 and isinstance(value[0], str):
                return [_clean_text(value[0]), _clean(value[0], value[1], depth + 1)]
            return [_clean("", item, depth + 1) for item in value[:VALUES_MAX]]
    try:
        return _clean_text(repr(value))
    except Exception:  # noqa: BLE001  # a value that cannot tell itself must not cost the line
        return f"[{type(value).__name__}]"


def _clean_text(text: str) -> str:
    clipped = text if len(text) <= VALUE_CHARACTERS_MAX else text[:VALUE_CHARACTERS_MAX] + "..."
    return _CONTROL.sub(" ", _without_secrets(clipped))


def _without_secrets(text: str) -> str:
    if "://" in text:
        text = _USER_IN_URL.sub(rf"\1{REDACTED}@", text)
        text = _QUERY_IN_URL.sub(rf"\1{REDACTED}", text)
    return _BEARER.sub(rf"\1 {REDACTED}", text)


def _suppressed(bound: LineBound) -> dict[str, int]:
    count = bound.take_suppressed()
    return {"suppressed": count} if count else {}


def _name_source(
    _logger: object, _method: str, line: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    record = line.get("_record")
    if isinstance(record, logging.LogRecord):
        line["source"] = record.name
    return line


def _json(line: Any, **_options: Any) -> str:
    try:
        return orjson.dumps(line, option=orjson.OPT_NON_STR_KEYS, default=repr).decode()
    except (TypeError, ValueError, RecursionError):
        # A number beyond 64 bits.
        return json.dumps(line, default=repr)


class _LosingStream:
    """A stream that loses a line rather than raise: a full disk or a closed pipe must not stop deliveries."""

    def __init__(self, stream: TextIO, counters: TelemetryCounters) -> None:
        self._stream = stream
        self._counters = counters
        self._unflushed = False

    def write(self, text: str) -> int:
        try:
            written = self._stream.write(text)
        except (OSError, ValueError):
            self._counters.lines_lost += 1
            return 0
        self._unflushed = True
        return written

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            # A line whose write already failed is not counted a second time.
            self._counters.lines_lost += self._unflushed
        self._unflushed = False
