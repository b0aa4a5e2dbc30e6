"""Resource names: `tenants/{tenant}/endpoints/{endpoint}` and its like, taken apart and put together.

Rule: what comes out is well formed, so an id never holds anything but what its pattern says.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable

from outrider_server.domain.errors import InvalidArgument
from outrider_server.domain.names import ID_RULE, is_id

RandomBytes = Callable[[int], bytes]
"""A source of random bytes such as `os.urandom`."""

CHOSEN_ID_BYTES = 10

_TYPE = re.compile(r"[a-z0-9_.]{1,128}")


def tenant_name(tenant: str) -> str:
    """The resource name of a tenant."""
    return f"tenants/{tenant}"


def child_name(tenant: str, collection: str, child: str) -> str:
    """The resource name of something of a tenant; of no tenant where `tenant` is empty."""
    return f"tenants/{tenant}/{collection}/{child}" if tenant else f"{collection}/{child}"


def parse_tenant(name: str, field: str) -> str:
    """The tenant's id in `tenants/{tenant}`, which stands in the request's `field`."""
    parts = name.split("/")
    if len(parts) != 2 or parts[0] != "tenants" or not is_id(parts[1]):
        raise _malformed(field, "tenants/{tenant}")
    return parts[1]


def parse_child(name: str, collection: str, field: str) -> tuple[str, str]:
    """The ids in `tenants/{tenant}/{collection}/{child}`."""
    parts = name.split("/")
    is_child = _TYPE.fullmatch if collection == "eventTypes" else is_id
    if (
        len(parts) != 4
        or parts[0] != "tenants"
        or parts[2] != collection
        or not is_id(parts[1])
        or not is_child(parts[3])
    ):
        raise _malformed(field, f"tenants/{{tenant}}/{collection}/{{id}}")
    return parts[1], parts[3]


def parse_api_key(name: str, field: str) -> tuple[str, str]:
    """The ids in an API key's name; the tenant's is empty for a key of no tenant."""
    parts = name.split("/")
    if len(parts) == 2 and parts[0] == "apiKeys" and is_id(parts[1]):
        return "", parts[1]
    return parse_child(name, "apiKeys", field)


def given_or_chosen(given: str, field: str, random: RandomBytes) -> str:
    """The id a caller gave for something new, checked; or one chosen here where it gave none."""
    if not given:
        return base64.b32encode(random(CHOSEN_ID_BYTES)).decode().lower()
    if not is_id(given):
        raise InvalidArgument("INVALID_ARGUMENT", ID_RULE, violations=[(field, ID_RULE)])
    return given


def _malformed(field: str, form: str) -> InvalidArgument:
    problem = f"a name here is written as {form}"
    return InvalidArgument("INVALID_ARGUMENT", problem, violations=[(field, problem)])
