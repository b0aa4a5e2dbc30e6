"""Which URLs an endpoint may have.

Rule: a URL is taken only when no two readers can take it differently: RFC 3986 characters alone, http or https, a host,
no user information, no fragment. Which addresses may be dialled is not decided here but when the socket is made, since
a name's address may change between the two. Errors never repeat the URL: its path or query may be a credential.
"""

from __future__ import annotations

import ipaddress
import re

from outrider_server.domain.errors import InvalidArgument

URL_LENGTH_MAX = 2048
_HOST_LENGTH_MAX = 253

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://"
    r"(?P<authority>[^/?#]*)"
    r"(?P<path>/[^?#]*)?"
    r"(?:\?(?P<query>[^#]*))?"
    r"(?P<fragment>#.*)?"
)
_ALLOWED = re.compile(r"(?:[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2})*")
_TARGET = re.compile(r"[^\[\]#]*")
_AUTHORITY = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*)(?::(?P<port>[0-9]{1,5}))?")
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_\-]{0,61}[A-Za-z0-9_])?")


def validate_url(url: str) -> str:
    """The URL, if an endpoint may have it; else InvalidArgument."""
    problem = _problem(url)
    if problem:
        raise InvalidArgument("INVALID_ENDPOINT_URL", problem, violations=[("url", problem)])
    return url


def _problem(url: str) -> str:
    if len(url) > URL_LENGTH_MAX:
        return f"a URL has at most {URL_LENGTH_MAX} characters, not {len(url)}"
    parts = _URL.fullmatch(url)
    if parts is None:
        return "a URL is written as https://host/path"
    if parts["scheme"].lower() not in ("http", "https"):
        return "a URL's scheme is http or https"
    if not _ALLOWED.fullmatch(url):
        return (
            "a URL holds ASCII letters, digits and -._~:/?[]@!$&'()*+,;= alone: "
            "percent-encode everything else, and write a host's name in its xn-- form"
        )
    if parts["fragment"] is not None:
        return "a URL has no #fragment: it would not be sent"
    if not _TARGET.fullmatch((parts["path"] or "") + (parts["query"] or "")):
        return "square brackets in a URL's path or query must be percent-encoded"
    return _authority_problem(parts["authority"])


def _authority_problem(authority: str) -> str:
    if "@" in authority:
        return "a URL has no user information: use a header for credentials"
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        return "a URL's host and port are written as host:port"
    if parts["port"] is not None and not 1 <= int(parts["port"]) <= 65535:
        return "a URL's port is between 1 and 65535"
    host = parts["host"]
    if host.startswith("["):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            return "between square brackets stands an IPv6 address"
        # A zone names an interface of this machine, which is no business of an endpoint.
        return "an IPv6 address in a URL has no zone" if "%" in host else ""
    if not host:
        return "a URL names a host"
    if len(host) > _HOST_LENGTH_MAX:
        return f"a host's name has at most {_HOST_LENGTH_MAX} characters"
    labels = host.removesuffix(".").split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        return "a host's name is made of labels of letters, digits, - and _, joined by dots"
    return ""
