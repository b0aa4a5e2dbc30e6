"""Failures of an attempt: from what was raised to a kind and a few words. The one table.

Rule: words are made here, never taken from an exception's own text where that may hold the URL or a header: a failed
attempt is stored and shown.
"""

from __future__ import annotations

import os
import ssl

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from outrider_server.domain.errors import InvalidArgument
from outrider_server.domain.outcome import AttemptError
from outrider_server.transport.attempt import AttemptState

DETAIL_LENGTH_MAX = 256


def classify(error: Exception) -> tuple[AttemptError, str]:
    """Where the attempt broke, and what to tell about it."""
    kind, detail = _classify(error)
    return kind, detail[:DETAIL_LENGTH_MAX]


def timed_out(state: AttemptState, seconds: float) -> str:
    """What to tell of an attempt that took too long."""
    if state.transport is None:
        moment = "while connecting"
    elif state.status == 0:
        moment = "while waiting for the response"
    else:
        moment = "while reading the response's body"
    return f"no complete response within {seconds:g} s: it ended {moment}"


def is_stale(error: Exception, state: AttemptState) -> bool:
    """Whether a kept connection was closed by the other side as we began to use it.

    Nobody can tell whether the request was still taken, so sending it again may make a duplicate; not doing so would
    count a healthy receiver's ordinary closing of idle connections as its failure.
    """
    if not state.reused or state.status != 0:
        return False
    return isinstance(error, (aiohttp.ServerDisconnectedError, ConnectionError)) or (
        isinstance(error, aiohttp.ClientOSError)
        and not isinstance(error, aiohttp.ClientConnectorError)
    )


def _classify(error: Exception) -> tuple[AttemptError, str]:
    match error:
        case InvalidArgument():
            return AttemptError.INTERNAL, f"the endpoint cannot be sent to: {error.message}"
        case aiohttp.ClientConnectorDNSError():
            return AttemptError.DNS, "the host's name cannot be resolved"
        case aiohttp.ClientConnectorCertificateError():
            return AttemptError.TLS, _certificate_words(error.certificate_error)
        case aiohttp.ClientSSLError() | ssl.SSLError():
            return AttemptError.TLS, f"TLS failed: {_ssl_words(error)}"
        case aiohttp.ClientConnectorError():
            if isinstance(error.os_error, PermissionError):
                return AttemptError.FORBIDDEN_ADDRESS, "the host's address must not be dialled"
            return AttemptError.CONNECT, f"cannot connect: {_os_words(error.os_error)}"
        case aiohttp.InvalidURL():
            # The literal looks like an address but is not the one way to write one.
            return AttemptError.DNS, "the host is not a usable name or address"
        case aiohttp.ClientResponseError() | HttpProcessingError():
            return AttemptError.PROTOCOL, "the response is not valid HTTP"
        case aiohttp.ClientPayloadError():
            return AttemptError.DISCONNECTED, "the response's body ended early"
        case TimeoutError():
            return AttemptError.TIMEOUT, "the connection timed out"
        case aiohttp.ServerDisconnectedError():
            return AttemptError.DISCONNECTED, "the connection was closed without a response"
        case OSError() | aiohttp.ClientConnectionError():
            return AttemptError.DISCONNECTED, f"the connection was lost: {_os_words(error)}"
        case _:
            return AttemptError.INTERNAL, f"unexpected {type(error).__name__}"


def _certificate_words(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate does not hold: {error.verify_message}"
    return "the certificate does not hold"


def _ssl_words(error: Exception) -> str:
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    reason = getattr(cause, "reason", None)
    return str(reason) if reason else type(cause).__name__


def _os_words(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number else type(error).__name__
