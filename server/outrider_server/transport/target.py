"""An endpoint made ready to be sent to, and the bounded cache of those.

What does not change between two requests of one endpoint (URL, header lines, keyed signer, TLS) is worked out once per
endpoint value. Rule: nothing is sent to a URL or with a header that the policies would refuse today, however it came
into the database.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from aiohttp.client_reqrep import ClientRequest
from yarl import URL

from outrider_server.domain.endpoint import Endpoint
from outrider_server.domain.errors import InvalidArgument
from outrider_server.policy.headers import validate_headers
from outrider_server.policy.signing import Signer
from outrider_server.policy.url import validate_url

_METHOD = re.compile(r"[A-Z]{1,16}")


@dataclass(slots=True, eq=False)
class Target:
    """One endpoint as the exchanges use it. Its parts may be credentials, so `repr` shows the endpoint's number alone.

    `headers` are all headers but `Content-Length`, `Content-Type` and the three of the signature. With
    `own_content_type` the endpoint gives its own `Content-Type`. `head` is the same as bytes, from the request line on.
    `dial` is what the direct exchange asks the pool with, made at its first use.
    """

    endpoint: int
    url: URL = field(repr=False)
    method: str
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    own_content_type: bool
    head: bytes = field(repr=False)
    signer: Signer = field(repr=False)
    dial: ClientRequest | None = field(default=None, repr=False)


class TargetCache:
    """Targets by endpoint, at most `targets_max`; the oldest made goes first, and costs its making again."""

    __slots__ = ("_targets", "_targets_max", "_user_agent")

    def __init__(self, user_agent: str, targets_max: int) -> None:
        self._targets: dict[int, tuple[Endpoint, Target]] = {}
        self._targets_max = targets_max
        self._user_agent = user_agent

    def of(self, endpoint: Endpoint) -> Target:
        """The target of exactly this endpoint value; InvalidArgument if its URL, method or headers cannot be sent."""
        held = self._targets.get(endpoint.id)
        # Identity first: the delivery path passes the same value until configuration changes.
        if held is not None and (held[0] is endpoint or held[0] == endpoint):
            return held[1]
        target = prepare(endpoint, self._user_agent)
        self._targets.pop(endpoint.id, None)
        if len(self._targets) >= self._targets_max:
            del self._targets[next(iter(self._targets))]
        self._targets[endpoint.id] = (endpoint, target)
        return target

    def forget(self, endpoint_id: int) -> None:
        """Drop what is held of an endpoint, its keyed secrets with it."""
        self._targets.pop(endpoint_id, None)


def prepare(endpoint: Endpoint, user_agent: str) -> Target:
    """Work out what every request of `endpoint` shares."""
    url = URL(validate_url(endpoint.url))
    if not _METHOD.fullmatch(endpoint.method) or endpoint.method == "CONNECT":
        raise InvalidArgument("INVALID_ARGUMENT", "the endpoint's method cannot be sent")
    own = validate_headers(endpoint.headers)
    names = {name.lower() for name, _ in own}
    headers = [("Accept-Encoding", "identity")]
    if "accept" not in names:
        headers.append(("Accept", "*/*"))
    if "user-agent" not in names:
        headers.append(("User-Agent", user_agent))
    headers.extend(own)
    lines = [f"{endpoint.method} {url.raw_path_qs} HTTP/1.1", f"Host: {url.host_port_subcomponent}"]
    lines.extend(f"{name}: {value}" for name, value in headers)
    return Target(
        endpoint=endpoint.id,
        url=url,
        method=endpoint.method,
        headers=tuple(headers),
        own_content_type="content-type" in names,
        head="".join(line + "\r\n" for line in lines).encode("ascii"),
        signer=Signer(endpoint.secrets),
    )
