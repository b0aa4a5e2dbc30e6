"""Which extra headers an endpoint may send.

Rule: a header can neither break out of its line nor change what the transport decides: where the request goes, how
its body is framed, whether the connection is kept, and what the signature covers. Values may be credentials, so
errors name the header and never its value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from outrider_server.domain.errors import InvalidArgument

HEADERS_MAX = 32
HEADERS_BYTES_MAX = 8 * 1024
"""Names and values of all headers of one endpoint together."""

_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}")
# Visible ASCII, with spaces and tabs only inside. Not obs-text: receivers disagree on its character set.
_VALUE = re.compile(r"(?:[\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?)?")

_DENIED = frozenset(
    {
        "host",
        "content-length",
        "transfer-encoding",
        "connection",
        "keep-alive",
        "te",
        "trailer",
        "upgrade",
        "expect",
        "cookie",
        # Responses are kept as they come, never inflated, so none may be asked for in another form.
        "accept-encoding",
    }
)
_DENIED_PREFIXES = ("proxy-", "webhook-")


def validate_headers(headers: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The headers, if every one may be sent; else InvalidArgument with a violation for each that may not."""
    if len(headers) > HEADERS_MAX:
        raise _invalid([("headers", f"at most {HEADERS_MAX} headers, not {len(headers)}")])
    size = sum(len(name) + len(value) for name, value in headers)
    if size > HEADERS_BYTES_MAX:
        raise _invalid([("headers", f"at most {HEADERS_BYTES_MAX} bytes of headers, not {size}")])
    violations: list[tuple[str, str]] = []
    seen: set[str] = set()
    for index, (name, value) in enumerate(headers):
        problem = _problem(name, value, seen)
        seen.add(name.lower())
        if problem:
            violations.append((f"headers[{index}]", problem))
    if violations:
        raise _invalid(violations)
    return tuple(headers)


def _problem(name: str, value: str, seen: set[str]) -> str:
    lowered = name.lower()
    if not _NAME.fullmatch(name):
        return f"{name[:64]!a} is not a header name"
    if lowered in _DENIED or lowered.startswith(_DENIED_PREFIXES):
        return f"{name} is set by the service and cannot be given"
    if lowered in seen:
        return f"{name} is given twice"
    if not _VALUE.fullmatch(value):
        return f"the value of {name} holds other than printable ASCII, or blanks at its ends"
    return ""


def _invalid(violations: list[tuple[str, str]]) -> InvalidArgument:
    return InvalidArgument("INVALID_HEADER", violations[0][1], violations=violations)
