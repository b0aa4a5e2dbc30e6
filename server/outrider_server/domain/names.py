"""What an id may be, for everything that has one in a resource name: tenants, endpoints, subscriptions, API keys.

Rule: nothing else is stored under an id. A key's id stands in the key's own text, where only these letters are read back.
"""

from __future__ import annotations

import re

ID_LENGTH_MAX = 63
ID_PATTERN = rf"[a-z0-9-]{{1,{ID_LENGTH_MAX}}}"
ID_RULE = f"an id has 1 to {ID_LENGTH_MAX} lower-case letters, digits and -"

_ID = re.compile(ID_PATTERN)


def is_id(text: str) -> bool:
    """Whether `text` may be an id."""
    return _ID.fullmatch(text) is not None
