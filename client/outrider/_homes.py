"""Which addresses a publisher may follow, as acknowledgements name them. Pure: no loop, no socket, no clock.

Rules: only a plain `host:port` is dialled, for the API key goes there; one on the loopback only from a target on the
loopback, because elsewhere it is another machine's. An address that failed is left alone for a while that doubles from
failure to failure. Everything remembered is bounded.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from outrider.v1.ingest_service_pb2 import TenantHome

_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")
_SCHEMES = ("dns:", "ipv4:", "ipv6:")
_ADDRESSES_MAX = 256
_PAUSE_SECONDS = 1.0
_PAUSE_SECONDS_MAX = 60.0


def unanimous(homes: Iterable[TenantHome]) -> dict[str, str]:
    """Each tenant's address; tenants with several are left out, for no single stream serves them."""
    told: dict[str, str] = {}
    several: set[str] = set()
    for home in homes:
        if told.setdefault(home.tenant, home.address) != home.address:
            several.add(home.tenant)
    for tenant in several:
        del told[tenant]
    return told


class Addresses:
    """What is known of the addresses that a server names, for a publisher that was given `target`."""

    def __init__(self, target: str) -> None:
        self._target_is_loopback = _is_loopback_target(target)
        self._failed: dict[str, tuple[int, float]] = {}

    def may_follow(self, address: str, now: float) -> bool:
        """Whether a stream may be opened there now."""
        _, until = self._failed.get(address, (0, now))
        if now < until:
            return False
        match = _ADDRESS.fullmatch(address)
        if match is None or not 0 < int(match[3]) < 65_536:
            return False
        host = match[1] or match[2]
        return self._target_is_loopback or not _is_loopback(host)

    def failed(self, address: str, now: float, *, after_success: bool) -> None:
        """A stream there was refused, broke, or was told to go."""
        failures = 0 if after_success else self._failed.pop(address, (0, 0.0))[0]
        pause = min(_PAUSE_SECONDS_MAX, _PAUSE_SECONDS * 2.0 ** min(failures, 30))
        self._failed.pop(address, None)
        while len(self._failed) >= _ADDRESSES_MAX:
            del self._failed[next(iter(self._failed))]
        self._failed[address] = (failures + 1, now + pause)


def _is_loopback(host: str) -> bool:
    """Whether the host is this machine, wherever it is read. The unspecified address is none to dial at all."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _is_loopback_target(target: str) -> bool:
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    for scheme in _SCHEMES:
        target = target.removeprefix(scheme)
    if target.startswith("//"):  # dns://resolver/name
        target = target.removeprefix("//").partition("/")[2]
    host = target.partition(",")[0]
    if host.startswith("["):
        return _is_loopback(host[1:].partition("]")[0])
    return _is_loopback(host.partition(":")[0] if host.count(":") == 1 else host)
