"""What generated filters call: CEL's operators and functions on decoded JSON, total and exact.

Rules every function keeps: an error is the value `ERROR`, never an exception; classes are compared exactly, so a
bool is never a number; the result does not depend on anything but the arguments. The one exception that may leave
is `OverBudget`, when an evaluation used up what it was given.

CEL values as Python values: int and float by JSON spelling, an int past int64 is an unsigned one (so is a `Uint`),
`Timestamp` and `Duration` count nanoseconds.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, tzinfo
from typing import Final, Protocol

from typing_extensions import override

from outrider_server.domain.event import NewEvent
from outrider_server.matching.checked_ast import Uint

ITERATIONS_MAX = 10_000
"""Comprehension iterations of one evaluation, the same number as the C++ engine allows."""

WORK_MAX = 200_000
"""Units of work of one evaluation, about 0.1 us each: operations inside loops, elements compared, text searched."""

ITEMS_MAX = 1_000
"""Longest list or map that a macro walks; a longer one is over budget."""

TEXT_MAX = 1 << 20
"""Longest string, byte string or list that `+` may make; a longer one is over budget."""

DEPTH_MAX = 200
"""Deepest nesting that equality walks into; deeper is over budget."""

INT_MAX = (1 << 63) - 1
INT_MIN = -(1 << 63)
UINT_MAX = (1 << 64) - 1

_SECOND = 1_000_000_000
_TIMESTAMP_MIN = -62_135_596_800 * _SECOND
_TIMESTAMP_MAX = 253_402_300_799 * _SECOND + 999_999_999
_DURATION_MAX = 315_576_000_000 * _SECOND + 999_999_999


class _Error:
    """The class of `ERROR`."""

    __slots__ = ()

    @override
    def __repr__(self) -> str:
        return "ERROR"


ERROR: Final = _Error()
"""An evaluation error as a value. It equals nothing and has no class that an operator accepts."""


class OverBudget(Exception):
    """An evaluation needs more than its budget; it counts as no match."""


class Timestamp(int):
    """Nanoseconds since 1970 UTC."""

    __slots__ = ()


class Duration(int):
    """Nanoseconds between two moments."""

    __slots__ = ()


class CelType:
    """A CEL type as a value, named as CEL names it. One object a type: equal means identical."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Pattern(Protocol):
    """A compiled regular expression over UTF-8 bytes."""

    def search(self, text: bytes, /) -> object | None: ...


Budget = list[int]
"""Iterations left and work left, counted down in place."""

NUMBERS: Final = frozenset((int, float, Uint))
_ORDERED: Final = frozenset((str, bool, bytes, Timestamp, Duration))


def spend(budget: Budget, units: int) -> None:
    """Take `units` of work from `budget`."""
    budget[1] -= units
    if budget[1] < 0:
        raise OverBudget


def over_budget() -> None:
    """Stop the evaluation."""
    raise OverBudget


# Equality, order, membership


def equal(budget: Budget, x: object, y: object) -> object:
    """`x == y`: True, False, or ERROR when either is one."""
    if x is ERROR or y is ERROR:
        return ERROR
    return same(budget, x, y, 0)


def same(budget: Budget, x: object, y: object, depth: int) -> bool:
    """Whether two values, neither an error, are equal."""
    if x.__class__ is not y.__class__:
        if x.__class__ in NUMBERS and y.__class__ in NUMBERS:
            return _same_number(x, y)
        return False
    if isinstance(x, list) and isinstance(y, list):
        if len(x) != len(y):
            return False
        _enter(budget, len(x), depth)
        return all(same(budget, a, b, depth + 1) for a, b in zip(x, y, strict=True))
    if isinstance(x, dict) and isinstance(y, dict):
        if len(x) != len(y):
            return False
        _enter(budget, len(x), depth)
        for key, value in x.items():
            other = y.get(key, ERROR)
            if other is ERROR or not same(budget, value, other, depth + 1):
                return False
        return True
    return x == y


def _enter(budget: Budget, size: int, depth: int) -> None:
    spend(budget, 3 * size + 1)
    if depth > DEPTH_MAX:
        raise OverBudget


def _same_number(x: object, y: object) -> bool:
    # CEL compares an integer with a double after converting it to a double; Python compares exactly.
    if x.__class__ is float or y.__class__ is float:
        return float(x) == float(y)  # type: ignore[arg-type]
    return x == y


def less(x: object, y: object) -> object:
    """`x < y`: True, False, or ERROR where the two have no order."""
    if x.__class__ in NUMBERS and y.__class__ in NUMBERS:
        if x.__class__ is float or y.__class__ is float:
            return float(x) < float(y)  # type: ignore[arg-type]
        return x < y  # type: ignore[operator]
    if x.__class__ is y.__class__ and x.__class__ in _ORDERED:
        return x < y  # type: ignore[operator]
    return ERROR


def less_equal(x: object, y: object) -> object:
    """`x <= y`: True, False, or ERROR where the two have no order."""
    if x.__class__ in NUMBERS and y.__class__ in NUMBERS:
        if x.__class__ is float or y.__class__ is float:
            return float(x) <= float(y)  # type: ignore[arg-type]
        return x <= y  # type: ignore[operator]
    if x.__class__ is y.__class__ and x.__class__ in _ORDERED:
        return x <= y  # type: ignore[operator]
    return ERROR


def member(budget: Budget, x: object, container: object) -> object:
    """`x in container`."""
    if x is ERROR:
        return ERROR
    if isinstance(container, list):
        spend(budget, 2 * len(container))
        return any(same(budget, x, element, 0) for element in container)
    if isinstance(container, dict):
        if x.__class__ is str:
            return x in container
        if x.__class__ in NUMBERS or x.__class__ is bool:
            return False
    return ERROR


# Reaching into values


def index(x: object, key: object) -> object:
    """`x[key]`."""
    if isinstance(x, dict):
        return x.get(key, ERROR) if key.__class__ is str else ERROR
    if isinstance(x, list):
        if key.__class__ is float:
            if not key.is_integer():
                return ERROR
            key = int(key)
        elif key.__class__ is not int and key.__class__ is not Uint:
            return ERROR
        if 0 <= key < len(x):
            return x[key]
    return ERROR


def size(x: object) -> object:
    """`size(x)`: code points, bytes, elements or entries."""
    if x.__class__ is str or x.__class__ is list or x.__class__ is dict or x.__class__ is bytes:
        return len(x)
    return ERROR


def make_list(*elements: object) -> object:
    """A list literal."""
    return ERROR if ERROR in elements else list(elements)


def make_map(keys: tuple[str, ...], *values: object) -> object:
    """A map literal with constant keys."""
    return ERROR if ERROR in values else dict(zip(keys, values, strict=True))


def event_time(event: NewEvent) -> object:
    """`event.time`; ERROR outside the years 1 to 9999."""
    nanoseconds = event.time_us * 1000
    return Timestamp(nanoseconds) if _TIMESTAMP_MIN <= nanoseconds <= _TIMESTAMP_MAX else ERROR


# Arithmetic


def _unsigned(x: object) -> bool:
    return x.__class__ is Uint or (x.__class__ is int and x > INT_MAX)


def _whole(x: object, y: object) -> int:
    """1 for two signed integers, 2 for two unsigned ones, 0 for anything else."""
    if x.__class__ is int and y.__class__ is int and x <= INT_MAX and y <= INT_MAX:
        return 1
    return 2 if _unsigned(x) and _unsigned(y) else 0


def _bounded(kind: int, result: int) -> object:
    if kind == 1:
        return result if INT_MIN <= result <= INT_MAX else ERROR
    return Uint(result) if 0 <= result <= UINT_MAX else ERROR


def _timestamp(nanoseconds: int) -> object:
    return Timestamp(nanoseconds) if _TIMESTAMP_MIN <= nanoseconds <= _TIMESTAMP_MAX else ERROR


def _duration(nanoseconds: int) -> object:
    # The language bounds the result of arithmetic to int64 nanoseconds, 292 years, and only what is read to 10,000.
    return Duration(nanoseconds) if INT_MIN <= nanoseconds <= INT_MAX else ERROR


def add(budget: Budget, x: object, y: object) -> object:
    """`x + y`."""
    kind = _whole(x, y)
    if kind:
        return _bounded(kind, x + y)  # type: ignore[operator]
    c, d = x.__class__, y.__class__
    if c is d:
        if c is float:
            return x + y  # type: ignore[operator]
        if c is str or c is bytes or c is list:
            total = len(x) + len(y)  # type: ignore[arg-type]
            if total > TEXT_MAX:
                raise OverBudget
            spend(budget, total >> 5)
            return x + y  # type: ignore[operator]
        if c is Duration:
            return _duration(int(x) + int(y))  # type: ignore[call-overload]
    elif (c is Timestamp and d is Duration) or (c is Duration and d is Timestamp):
        return _timestamp(int(x) + int(y))  # type: ignore[call-overload]
    return ERROR


def subtract(x: object, y: object) -> object:
    """`x - y`."""
    kind = _whole(x, y)
    if kind:
        return _bounded(kind, x - y)  # type: ignore[operator]
    c, d = x.__class__, y.__class__
    if c is float and d is float:
        return x - y  # type: ignore[operator]
    if (c is Timestamp or c is Duration) and c is d:
        return _duration(int(x) - int(y))  # type: ignore[call-overload]
    if c is Timestamp and d is Duration:
        return _timestamp(int(x) - int(y))  # type: ignore[call-overload]
    return ERROR


def multiply(x: object, y: object) -> object:
    """`x * y`."""
    kind = _whole(x, y)
    if kind:
        return _bounded(kind, x * y)  # type: ignore[operator]
    if x.__class__ is float and y.__class__ is float:
        return x * y
    return ERROR


def divide(x: object, y: object) -> object:
    """`x / y`, towards zero for integers, IEEE for doubles."""
    kind = _whole(x, y)
    if kind:
        if y == 0:
            return ERROR
        quotient: int = abs(x) // abs(y)  # type: ignore[arg-type]
        return _bounded(kind, quotient if (x < 0) == (y < 0) else -quotient)  # type: ignore[operator]
    if x.__class__ is float and y.__class__ is float:
        if y == 0.0:
            if x == 0.0 or x != x:
                return math.nan
            return math.copysign(math.inf, x) * math.copysign(1.0, y)
        return x / y
    return ERROR


def modulo(x: object, y: object) -> object:
    """`x % y`, with the sign of `x`; integers only."""
    kind = _whole(x, y)
    if not kind or y == 0 or (kind == 1 and x == INT_MIN and y == -1):
        return ERROR
    rest: int = abs(x) % abs(y)  # type: ignore[arg-type]
    return _bounded(kind, -rest if x < 0 else rest)  # type: ignore[operator]


def negate(x: object) -> object:
    """`-x`."""
    if x.__class__ is float:
        return -x
    if x.__class__ is int and INT_MIN < x <= INT_MAX:
        return -x
    return ERROR


# Strings


def starts_with(x: object, y: object) -> object:
    """`x.startsWith(y)`."""
    if x.__class__ is str and y.__class__ is str:
        return x.startswith(y)
    return ERROR


def ends_with(x: object, y: object) -> object:
    """`x.endsWith(y)`."""
    if x.__class__ is str and y.__class__ is str:
        return x.endswith(y)
    return ERROR


def contains(budget: Budget, x: object, y: object) -> object:
    """`x.contains(y)`."""
    if x.__class__ is str and y.__class__ is str:
        if len(x) > 1024:
            spend(budget, len(x) >> 5)
        return y in x
    return ERROR


def matches(budget: Budget, pattern: Pattern, x: object) -> object:
    """`x.matches(pattern)`, the pattern compiled once."""
    if x.__class__ is not str:
        return ERROR
    spend(budget, 8 + (len(x) >> 3))
    return pattern.search(x.encode()) is not None


# Conversions and types

_TYPES: Final = {
    bool: CelType("bool"),
    float: CelType("double"),
    str: CelType("string"),
    bytes: CelType("bytes"),
    list: CelType("list"),
    dict: CelType("map"),
    type(None): CelType("null_type"),
    Uint: CelType("uint"),
    Timestamp: CelType("google.protobuf.Timestamp"),
    Duration: CelType("google.protobuf.Duration"),
    CelType: CelType("type"),
}
_INT_TYPE: Final = CelType("int")
TYPES_BY_NAME: Final = {kind.name: kind for kind in (*_TYPES.values(), _INT_TYPE)}

_WHOLE_TEXT: Final = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]{1,20})[ \t\n\v\f\r]*\Z")
_DOUBLE_TEXT: Final = re.compile(
    r"[ \t\n\v\f\r]*([+-]?)(?:((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(0[xX](?:[0-9a-fA-F]+\.?[0-9a-fA-F]*|\.[0-9a-fA-F]+)(?:[pP][+-]?[0-9]+)?)"
    r"|(inf|infinity|nan))[ \t\n\v\f\r]*\Z",
    re.IGNORECASE | re.ASCII,
)
_NUMBER_TEXT_MAX = 1024
_BOOLS: Final = {
    **dict.fromkeys(("1", "t", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "false", "FALSE", "False"), False),
}


def type_of(x: object) -> object:
    """`type(x)`."""
    if x is ERROR:
        return ERROR
    if x.__class__ is int:
        return _TYPES[Uint] if x > INT_MAX else _INT_TYPE
    return _TYPES.get(x.__class__, ERROR)


def to_int(x: object) -> object:
    """`int(x)`."""
    if isinstance(x, Timestamp):
        return x // _SECOND
    if isinstance(x, Duration):
        return ERROR
    if isinstance(x, int):
        return int(x) if x <= INT_MAX else ERROR
    if isinstance(x, float):
        return int(x) if -9223372036854775808.0 < x < 9223372036854775808.0 else ERROR
    if x.__class__ is str and (found := _WHOLE_TEXT.match(x)):
        number = int(found[1])
        return number if INT_MIN <= number <= INT_MAX else ERROR
    return ERROR


def to_uint(x: object) -> object:
    """`uint(x)`."""
    if x.__class__ is int or x.__class__ is Uint:
        return Uint(x) if x >= 0 else ERROR
    if isinstance(x, float):
        return Uint(x) if 0.0 <= x < 18446744073709551616.0 else ERROR
    if x.__class__ is str and (found := _WHOLE_TEXT.match(x)):
        number = int(found[1])
        if number <= UINT_MAX and not found[1].startswith("-"):
            return Uint(number)
    return ERROR


def to_double(x: object) -> object:
    """`double(x)`."""
    if x.__class__ in NUMBERS:
        return float(x)  # type: ignore[arg-type]
    if isinstance(x, str) and len(x) <= _NUMBER_TEXT_MAX and (found := _DOUBLE_TEXT.match(x)):
        sign, decimal, hexadecimal, word = found.groups()
        try:
            number = float.fromhex(hexadecimal) if hexadecimal else float(decimal or word)
        except OverflowError:
            number = math.inf
        return -number if sign == "-" else number
    return ERROR


def to_string(x: object) -> object:
    """`string(x)`."""
    c = x.__class__
    if c is str:
        return x
    if c is bool:
        return "true" if x else "false"
    if c is int or c is Uint:
        return str(int(x))  # type: ignore[call-overload]
    if isinstance(x, float):
        return _double_text(x)
    if isinstance(x, bytes):
        try:
            return x.decode()
        except UnicodeDecodeError:
            return ERROR
    if isinstance(x, Timestamp):
        return _timestamp_text(x)
    if isinstance(x, Duration):
        return _duration_text(x)
    return ERROR


def to_bool(x: object) -> object:
    """`bool(x)`."""
    if x.__class__ is bool:
        return x
    return _BOOLS.get(x, ERROR) if x.__class__ is str else ERROR


def to_bytes(x: object) -> object:
    """`bytes(x)`."""
    if x.__class__ is bytes:
        return x
    return x.encode() if x.__class__ is str else ERROR


def _double_text(x: float) -> str:
    """The shortest digits that read back as `x`, with an exponent from 1e6 and below 1e-4."""
    if x != x:
        return "nan"
    if math.isinf(x):
        return "inf" if x > 0 else "-inf"
    mantissa, _, exponent = f"{x!r}".partition("e")
    sign = "-" if mantissa.startswith("-") else ""
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    digits = (whole + fraction).lstrip("0")
    if not digits:
        return sign + "0"
    leading = len(whole + fraction) - len(digits)
    power = int(exponent or 0) + len(whole) - 1 - leading
    digits = digits.rstrip("0")
    if -4 <= power < 6:
        if power < 0:
            return f"{sign}0.{'0' * (-power - 1)}{digits}"
        digits = digits.ljust(power + 1, "0")
        rest = digits[power + 1 :]
        return sign + digits[: power + 1] + ("." + rest if rest else "")
    rest = digits[1:]
    return (
        f"{sign}{digits[0]}{'.' + rest if rest else ''}e{'-' if power < 0 else '+'}{abs(power):02d}"
    )


# Timestamps and durations

_TIMESTAMP_TEXT: Final = re.compile(
    r"[ \t\n\v\f\r]*([0-9]{4})-([0-9]{1,2})-([0-9]{1,2})[Tt]([0-9]{1,2}):([0-9]{1,2}):([0-9]{1,2})(?:\.([0-9]+))?"
    r"(?:[Zz]|([+-])([0-9]{2}):?([0-9]{2}))[ \t\n\v\f\r]*\Z"
)
_DURATION_PART: Final = re.compile(r"([0-9]*)(?:\.([0-9]*))?(h|ms|m|s|us|ns)")
_UNITS: Final = {
    "h": 3600 * _SECOND,
    "m": 60 * _SECOND,
    "s": _SECOND,
    "ms": 1_000_000,
    "us": 1_000,
    "ns": 1,
}
_TIME_TEXT_MAX = 64


def to_timestamp(x: object) -> object:
    """`timestamp(x)`: RFC 3339 text or seconds since 1970."""
    if x.__class__ is Timestamp:
        return x
    if x.__class__ is int:
        return _timestamp(x * _SECOND) if x <= INT_MAX else ERROR
    if not isinstance(x, str) or len(x) > _TIME_TEXT_MAX or not (found := _TIMESTAMP_TEXT.match(x)):
        return ERROR
    year, month, day, hour, minute, second = (int(part) for part in found.groups()[:6])
    fraction, sign, zone_hours, zone_minutes = found.groups()[6:]
    if hour > 23 or minute > 59 or second > 60 or int(zone_hours or 0) > 23:
        return ERROR
    if int(zone_minutes or 0) > 59:
        return ERROR
    try:
        moment = datetime(year, month, day, hour, minute, tzinfo=UTC)
    except ValueError:
        return ERROR
    seconds = (moment - _EPOCH).days * 86400 + hour * 3600 + minute * 60 + second
    offset = int(zone_hours or 0) * 3600 + int(zone_minutes or 0) * 60
    seconds -= -offset if sign == "-" else offset
    # A leap second has no fraction of its own in the engine's calendar.
    nanoseconds = 0 if second == 60 else int((fraction or "0")[:9].ljust(9, "0"))
    return _timestamp(seconds * _SECOND + nanoseconds)


def to_duration(x: object) -> object:
    """`duration(x)`: text such as `1h30m` or `-1.5s`."""
    if x.__class__ is Duration:
        return x
    if not isinstance(x, str) or len(x) > _TIME_TEXT_MAX:
        return ERROR
    negative = x.startswith("-")
    rest = x[1:] if x.startswith(("-", "+")) else x
    if rest == "0":
        return Duration(0)
    at = total = 0
    while at < len(rest):
        found = _DURATION_PART.match(rest, at)
        if found is None or not (found[1] or found[2]) or len(found[1]) > 18:
            return ERROR
        unit = _UNITS[found[3]]
        total += int(found[1] or 0) * unit
        if found[2]:
            total += int(found[2]) * unit // 10 ** len(found[2])
        at = found.end()
    if at == 0 or total > _DURATION_MAX:
        return ERROR
    return Duration(-total if negative else total)


def _fraction_text(nanoseconds: int) -> str:
    if nanoseconds == 0:
        return ""
    digits = f"{nanoseconds:09d}"
    # Three, six or nine digits, as JSON spells times of protobuf.
    while digits.endswith("000"):
        digits = digits[:-3]
    return "." + digits


def _timestamp_text(x: int) -> str:
    seconds, nanoseconds = divmod(int(x), _SECOND)
    days, rest = divmod(seconds, 86400)
    year, month, day, _ = _civil(days)
    hour, minute, second = rest // 3600, rest // 60 % 60, rest % 60
    return (
        f"{year:04d}-{month:02d}-{day:02d}T{hour:02d}:{minute:02d}:{second:02d}"
        f"{_fraction_text(nanoseconds)}Z"
    )


def _duration_text(x: int) -> str:
    seconds, nanoseconds = divmod(abs(int(x)), _SECOND)
    return f"{'-' if x < 0 else ''}{seconds}{_fraction_text(nanoseconds)}s"


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def _civil(days: int) -> tuple[int, int, int, int]:
    """Year, month, day and day of the year (from 0) of a day counted from 1970, in any year.

    `datetime` ends at the years 1 and 9999, a zone's offset may reach past them.
    """
    days += 719_468
    era, day_of_era = divmod(days, 146_097)
    year_of_era = (
        day_of_era - day_of_era // 1460 + day_of_era // 36524 - day_of_era // 146_096
    ) // 365
    since_march = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    shifted = (5 * since_march + 2) // 153
    day = since_march - (153 * shifted + 2) // 5 + 1
    month = shifted + 3 if shifted < 10 else shifted - 9
    year = year_of_era + era * 400 + (1 if month <= 2 else 0)
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    before = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)[month - 1]
    return year, month, day, before + day - 1 + (1 if leap and month > 2 else 0)


def time_part(x: object, part: str, zone: tzinfo | int | None) -> object:
    """`x.getHours("zone")` and its kin; `zone` is an offset in seconds, a named zone, or not given."""
    if x.__class__ is Duration:
        return _duration_part(int(x), part) if zone is None else ERROR
    if x.__class__ is not Timestamp:
        return ERROR
    seconds, nanoseconds = divmod(int(x), _SECOND)
    if isinstance(zone, int):
        seconds += zone
    elif zone is not None:
        try:
            offset = datetime.fromtimestamp(seconds, UTC).astimezone(zone).utcoffset()
        except (OverflowError, ValueError):
            return ERROR
        seconds += int(offset.total_seconds()) if offset is not None else 0
    if part == "getMilliseconds":
        return nanoseconds // 1_000_000
    if part == "getSeconds":
        return seconds % 60
    if part == "getMinutes":
        return seconds // 60 % 60
    if part == "getHours":
        return seconds // 3600 % 24
    days = seconds // 86400
    if part == "getDayOfWeek":
        return (days + 4) % 7
    year, month, day, day_of_year = _civil(days)
    return {
        "getFullYear": year,
        "getMonth": month - 1,
        "getDate": day,
        "getDayOfMonth": day - 1,
        "getDayOfYear": day_of_year,
    }[part]


def _duration_part(x: int, part: str) -> object:
    unit = {
        "getHours": 3600 * _SECOND,
        "getMinutes": 60 * _SECOND,
        "getSeconds": _SECOND,
        "getMilliseconds": 1_000_000,
    }.get(part)
    if unit is None:
        return ERROR
    whole = abs(x) // unit
    if part == "getMilliseconds":
        whole %= 1000
    return -whole if x < 0 else whole
